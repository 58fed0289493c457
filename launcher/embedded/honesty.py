"""Evaluate the embedded target: its loss compared with a trigram model, and repetition in replies.

python launcher/embedded/honesty.py [FOLDER]
"""

import json
import math
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from engine.config.sections import TargetSection
from engine.data.cpython_corpus import write_corpus
from engine.evaluation.acceptance import eos_ids, held_out_prompts
from engine.evaluation.decoding import plain_decode
from engine.host.freed_memory import keep_freed_memory
from engine.target.frozen import FrozenTarget

TARGET = Path(__file__).parent / "target"
DISCOUNT = 0.75


class KneserNeyTrigram:
    """Interpolated Kneser-Ney trigram model over token ids, with absolute discount 0.75.

    Source: Chen and Goodman (1999), section 2.8.
    """

    def __init__(self, documents: Iterable[Sequence[int]], vocab_size: int) -> None:
        self.trigrams = Counter(gram for ids in documents for gram in zip(ids, ids[1:], ids[2:], strict=False))
        self.contexts: Counter[tuple[int, int]] = Counter()
        self.followers: Counter[tuple[int, int]] = Counter()
        bigrams: Counter[tuple[int, int]] = Counter()
        for (first, second, third), count in self.trigrams.items():
            self.contexts[first, second] += count
            self.followers[first, second] += 1
            bigrams[second, third] += 1
        self.bigrams = bigrams
        self.bigram_totals: Counter[int] = Counter()
        self.bigram_followers: Counter[int] = Counter()
        preceding: dict[int, int] = defaultdict(int)
        for (second, third), count in bigrams.items():
            self.bigram_totals[second] += count
            self.bigram_followers[second] += 1
            preceding[third] += 1
        self.preceding = preceding
        self.num_bigrams = len(bigrams)
        self.vocab_size = vocab_size

    def probability(self, first: int, second: int, third: int) -> float:
        unigram = (
            max(self.preceding.get(third, 0) - DISCOUNT, 0) + DISCOUNT * len(self.preceding) / self.vocab_size
        ) / self.num_bigrams
        total = self.bigram_totals[second]
        if not total:
            return unigram
        bigram = max(self.bigrams.get((second, third), 0) - DISCOUNT, 0) / total
        bigram += DISCOUNT * self.bigram_followers[second] / total * unigram
        total = self.contexts[first, second]
        if not total:
            return bigram
        trigram = max(self.trigrams.get((first, second, third), 0) - DISCOUNT, 0) / total
        return trigram + DISCOUNT * self.followers[first, second] / total * bigram

    def loss(self, documents: Iterable[Sequence[int]]) -> float:
        """Return the mean of -log p in nats over all tokens but the first two of each document."""
        grams = [gram for ids in documents for gram in zip(ids, ids[1:], ids[2:], strict=False)]
        return -sum(math.log(self.probability(*gram)) for gram in grams) / len(grams)


def repeated_share(replies: Iterable[Sequence[int]], size: int = 8) -> float:
    """Return the share of n-grams of `size` tokens that repeat an earlier one, in any reply."""
    seen: set[tuple[int, ...]] = set()
    total = repeated = 0
    for reply in replies:
        for gram in zip(*(reply[offset:] for offset in range(size)), strict=False):
            total = total + 1
            repeated = repeated + (gram in seen)
            seen.add(gram)
    return repeated / total if total else 0.0


@dataclass(frozen=True)
class Judgement:
    """Result of an evaluation of the embedded target.

    held_out_loss, trigram_loss: nats per held-out token, of the target and of the trigram model.
    repeated_8_grams: share of repeated 8-grams within and among greedy replies.
    reply_tokens: mean tokens per reply.
    """

    held_out_loss: float
    trigram_loss: float
    repeated_8_grams: float
    reply_tokens: float


def judge(folder: Path, num_documents: int = 200, num_replies: int = 48, reply_tokens: int = 96) -> Judgement:
    """Evaluate the target in `folder` on the held-out part of this Python's own documentation."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    target = FrozenTarget.load(TargetSection(path=str(folder)), torch.device("cpu"))
    with tempfile.TemporaryDirectory() as corpus:
        paths = write_corpus(Path(corpus))
        train, held_out = (_token_ids(path, tokenizer) for path in paths)
        prompts = held_out_prompts([paths[1]], tokenizer, num_replies, None)
    held_out = held_out[:: max(1, len(held_out) // num_documents)]
    ends = eos_ids(target.model, tokenizer)
    replies = [plain_decode(target, prompt.token_ids, reply_tokens, ends).token_ids for prompt in prompts]
    return Judgement(
        held_out_loss=_loss(target, held_out),
        trigram_loss=KneserNeyTrigram(train, target.config.vocab_size).loss(held_out),
        repeated_8_grams=repeated_share(replies),
        reply_tokens=sum(map(len, replies)) / len(replies),
    )


def _token_ids(path: Path, tokenizer) -> list[list[int]]:
    conversations = (json.loads(line)["conversations"] for line in path.read_text(encoding="utf-8").splitlines())
    return [tokenizer.apply_chat_template(turns, return_dict=False)[:1024] for turns in conversations]


@torch.no_grad()
def _loss(target: FrozenTarget, documents: list[list[int]]) -> float:
    """Return the mean loss in nats over all tokens except the first two of each document.

    These are the same tokens as in `KneserNeyTrigram.loss`.
    """
    total = 0.0
    count = 0
    for ids in documents:
        logits_TV = target.model(torch.tensor([ids]), use_cache=False).logits[0, 1:-1].float()
        total += torch.nn.functional.cross_entropy(logits_TV, torch.tensor(ids[2:]), reduction="sum").item()
        count += len(ids) - 2
    return total / count


if __name__ == "__main__":
    keep_freed_memory()
    print(json.dumps(asdict(judge(Path(sys.argv[1]) if len(sys.argv) > 1 else TARGET)), indent=2))
