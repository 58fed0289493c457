"""Statistics of rendered conversations: lengths, assistant tokens, TTT rows, vocabulary, packs."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from engine.config.sections import DataSection
from engine.data.documents import Documents
from engine.data.packing import collate, pack
from engine.models.draft_method import DraftConfig, DraftMethod

SAMPLED_DOCUMENTS = 4096  # for figures that need the masks themselves
VOCAB_SIZES = (8_000, 16_000, 32_000, 64_000)

Bin = tuple[float, float, int]


@dataclass(frozen=True)
class DatasetStats:
    """Statistics of all documents; those that need masks are computed from a sample.

    lengths, assistant_tokens: tokens and assistant tokens per document, int64 [n].
    turns: number of assistant turns of each sampled document.
    rows_S: rows that the mask allows at each TTT step, as a share of the positions.
    alive_S: rows that compaction keeps at each TTT step, as a share of the positions.
    saving: FLOPs of a training step of the draft without compaction, divided by those with it.
    num_sampled: number of sampled documents.
    token_counts: occurrences of each token among the assistant tokens, in descending order.
    num_packs: packs in one epoch.
    max_tokens: capacity of a pack.
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
        """Share of positions in the packs that hold no token."""
        return 1 - self.num_tokens / (self.num_packs * self.max_tokens)

    @property
    def loss_share(self) -> float:
        """Share of positions that carry loss at the first TTT step."""
        return self.rows_S[0]

    def coverage(self, vocab_size: int) -> float:
        """Return the share of assistant tokens that the `vocab_size` most frequent tokens cover."""
        covered = self._covered_by_most_frequent
        last = min(vocab_size, len(covered)) - 1
        return float(covered[last] / covered[-1])

    @cached_property
    def _covered_by_most_frequent(self) -> np.ndarray:
        return np.cumsum(self.token_counts)

    def facts(self) -> dict[str, Any]:
        """Return the statistics by name, as plain values for JSON."""
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


def compute_stats(documents: Documents, data: DataSection, method: DraftMethod, draft: DraftConfig, seed: int) -> DatasetStats:
    """Compute the statistics of documents for a draft.

    seed: of the sample and of the packs.
    Raises ValueError if a token id is outside the target's vocabulary.
    """
    counts_V = documents.count_assistant_tokens(draft.vocab_size)
    generator = np.random.default_rng(seed)
    chosen = np.sort(generator.choice(len(documents), min(len(documents), SAMPLED_DOCUMENTS), replace=False))
    allowed_S = torch.zeros((), dtype=torch.int64)
    alive_S = torch.zeros((), dtype=torch.int64)
    needed = 0
    dense = 0
    for start in range(0, len(chosen), 256):
        batch = collate([documents[index] for index in chosen[start : start + 256]])
        allowed_ST = method.allowed_rows(batch)
        counts = method.count_work(batch, allowed_ST)
        allowed_S = allowed_S + allowed_ST.sum(1)
        alive_S = alive_S + torch.tensor(counts.rows_S)
        needed += method.step_flops(draft, counts)
        dense += method.step_flops(draft, counts.without_compaction())
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


def _shares(rows_S: torch.Tensor, num_tokens: int) -> tuple[float, ...]:
    return tuple((rows_S / num_tokens).tolist())


def histogram(values: np.ndarray, num_bins: int = 12, within: tuple[float, float] | None = None) -> list[Bin]:
    """Return a histogram as (low edge, high edge, count) of bins of equal width.

    The bins cover `within`, or the range of the values. For integers without `within`, there are at
    most as many bins as there are integers in the range.
    """
    if within is None and np.issubdtype(values.dtype, np.integer):
        within = int(values.min()), int(values.max()) + 1
        num_bins = min(num_bins, within[1] - within[0])
    counts, edges = np.histogram(values, bins=num_bins, range=within)
    return [(float(low), float(high), int(count)) for low, high, count in zip(edges, edges[1:], counts, strict=False)]
