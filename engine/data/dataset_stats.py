"""What conversations are like, as training will meet them: lengths, the assistant's share, rows, vocabulary, packs."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from engine.config.sections import DataSection, TttSection
from engine.data.documents import Documents
from engine.data.packing import collate, pack
from engine.models.eagle3.draft_config import DraftConfig
from engine.models.eagle3.flops import StepCounts, step_parts
from engine.models.eagle3.training_rows import allowed_rows, slots_of

SAMPLED_DOCUMENTS = 4096  # for what needs the masks themselves
VOCAB_SIZES = (8_000, 16_000, 32_000, 64_000)

Bin = tuple[float, float, int]


@dataclass(frozen=True)
class DatasetStats:
    """Figures of all documents, and of a sample of them where their masks are needed.

    lengths, assistant_tokens: tokens per document, and how many of them are the assistant's, int64 [n].
    turns: assistant turns of the sampled documents.
    rows_S, alive_S: rows that the mask allows at each TTT step, and those that compaction keeps, as shares of the positions.
    saving: FLOPs of a training step of the draft without compaction, over those with it. num_sampled: documents sampled.
    token_counts: how often the assistant says each token, descending. num_packs: of one epoch, each of max_tokens.
    """

    lengths: np.ndarray
    assistant_tokens: np.ndarray
    turns: np.ndarray
    rows_S: tuple[float, ...]
    alive_S: tuple[float, ...]
    saving: float
    num_sampled: int
    token_counts: np.ndarray
    num_packs: int
    max_tokens: int

    @property
    def num_tokens(self) -> int:
        return int(self.lengths.sum())

    @property
    def waste(self) -> float:
        """Share of the packs' positions that no token fills."""
        return 1 - self.num_tokens / (self.num_packs * self.max_tokens)

    @property
    def loss_share(self) -> float:
        """Share of positions that learn something at the first TTT step."""
        return self.rows_S[0]

    def coverage(self, vocab_size: int) -> float:
        """Share of what the assistant says that a draft vocabulary of the most frequent tokens holds."""
        covered = self._covered_by_most_frequent
        last = min(vocab_size, len(covered)) - 1
        return float(covered[last] / covered[-1])

    @cached_property
    def _covered_by_most_frequent(self) -> np.ndarray:
        return np.cumsum(self.token_counts)

    def facts(self) -> dict[str, Any]:
        """The figures by name, plain values for JSON."""
        lengths = self.lengths
        shares = self.assistant_tokens / self.lengths
        return {
            "documents": len(lengths),
            "tokens": self.num_tokens,
            "tokens_per_document_mean": round(float(lengths.mean()), 1),
            "tokens_per_document_p50_p95_max": [int(x) for x in np.percentile(lengths, (50, 95, 100))],
            "assistant_turns_per_document_mean": round(float(self.turns.mean()), 2),
            "assistant_token_share": round(float(self.assistant_tokens.sum() / lengths.sum()), 4),
            "assistant_token_share_per_document_p5_p50_p95": [round(float(x), 3) for x in np.percentile(shares, (5, 50, 95))],
            "loss_position_share": round(self.loss_share, 4),
            "loss_row_share_per_ttt_step": [round(share, 4) for share in self.rows_S],
            "computed_row_share_per_ttt_step": [round(share, 4) for share in self.alive_S],
            "compaction_flops_ratio": round(self.saving, 2),
            "packs_per_epoch": self.num_packs,
            "empty_pack_share": round(self.waste, 4),
            "distinct_assistant_tokens": int(np.count_nonzero(self.token_counts)),
            "draft_vocab_coverage": {str(size): round(self.coverage(size), 5) for size in VOCAB_SIZES},
        }


def compute_stats(documents: Documents, data: DataSection, ttt: TttSection, draft: DraftConfig, seed: int) -> DatasetStats:
    """Compute the statistics of documents, for a draft. Raises ValueError if a token id is outside the target's vocabulary."""
    counts_V = documents.count_assistant_tokens(draft.vocab_size)
    generator = np.random.default_rng(seed)
    chosen = np.sort(generator.choice(len(documents), min(len(documents), SAMPLED_DOCUMENTS), replace=False))
    allowed_S = torch.zeros(ttt.steps, dtype=torch.int64)
    alive_S = torch.zeros(ttt.steps, dtype=torch.int64)
    needed = 0
    dense = 0
    for start in range(0, len(chosen), 256):
        batch = collate([documents[index] for index in chosen[start : start + 256]])
        allowed_ST = allowed_rows(batch, ttt)
        counts = StepCounts.needed(batch, allowed_ST, len(slots_of(allowed_ST)))
        allowed_S += allowed_ST.sum(1)
        alive_S += torch.tensor(counts.rows_S)
        needed += draft_flops(draft, counts)
        dense += draft_flops(draft, without_compaction(counts))
    sampled_tokens = int(documents.lengths[chosen].sum())
    packs = pack(documents.lengths, documents.assistant_tokens, data.max_tokens, np.random.default_rng([seed, 0]))
    return DatasetStats(
        lengths=documents.lengths,
        assistant_tokens=documents.assistant_tokens,
        turns=np.array([len(documents[index].turn_ends) for index in chosen]),
        rows_S=_shares(allowed_S, sampled_tokens),
        alive_S=_shares(alive_S, sampled_tokens),
        saving=dense / needed,
        num_sampled=len(chosen),
        token_counts=np.sort(counts_V)[::-1],
        num_packs=len(packs),
        max_tokens=data.max_tokens,
    )


def without_compaction(counts: StepCounts) -> StepCounts:
    """What the same micro-batch runs where every row of every step does."""
    steps = len(counts.rows_S)
    num_tokens = counts.num_tokens
    pairs_S = tuple(counts.prefix_pairs + step * num_tokens for step in range(steps))
    return replace(counts, rows_S=(num_tokens,) * steps, pairs_S=pairs_S)


def draft_flops(draft: DraftConfig, counts: StepCounts) -> int:
    """Of a training step of the draft, the rows of the target's head that it learns from included, the full head not."""
    parts = step_parts(draft.shape, counts)
    return sum(part.flops for name, part in parts.items() if name != "target_head")


def _shares(rows_S: torch.Tensor, num_tokens: int) -> tuple[float, ...]:
    return tuple((rows_S / num_tokens).tolist())


def histogram(values: np.ndarray, num_bins: int = 12, within: tuple[float, float] | None = None) -> list[Bin]:
    """(from, to, how many) over even bins from the smallest to the largest value, or over a range; none is within a number."""
    if within is None and np.issubdtype(values.dtype, np.integer):
        within = int(values.min()), int(values.max()) + 1
        num_bins = min(num_bins, within[1] - within[0])
    counts, edges = np.histogram(values, bins=num_bins, range=within)
    return [(float(low), float(high), int(count)) for low, high, count in zip(edges, edges[1:], counts, strict=False)]
