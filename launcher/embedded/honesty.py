"""Is the embedded target a real language model? Its loss beside a trigram's, and how much its greedy replies repeat."""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

DISCOUNT = 0.75


class KneserNeyTrigram:
    """Interpolated Kneser-Ney over token ids, absolute discount 0.75. Source: Chen and Goodman (1999), section 2.8."""

    def __init__(self, documents: Iterable[Sequence[int]], vocab_size: int) -> None:
        self.trigrams = Counter(gram for ids in documents for gram in zip(ids, ids[1:], ids[2:], strict=False))
        self.contexts, self.followers = Counter(), Counter()
        bigrams: dict[tuple[int, int], int] = Counter()
        for (first, second, third), count in self.trigrams.items():
            self.contexts[first, second] += count
            self.followers[first, second] += 1
            bigrams[second, third] += 1
        self.bigrams, self.bigram_totals, self.bigram_followers = bigrams, Counter(), Counter()
        preceding: dict[int, int] = defaultdict(int)
        for (second, third), count in bigrams.items():
            self.bigram_totals[second] += count
            self.bigram_followers[second] += 1
            preceding[third] += 1
        self.preceding, self.num_bigrams, self.vocab_size = preceding, len(bigrams), vocab_size

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
        """Mean of -log p over every token after a document's second, nats."""
        grams = [gram for ids in documents for gram in zip(ids, ids[1:], ids[2:], strict=False)]
        return -sum(math.log(self.probability(*gram)) for gram in grams) / len(grams)


def repeated_share(replies: Iterable[Sequence[int]], size: int = 8) -> float:
    """Share of the replies' n-grams of `size` tokens that occurred before, in the same reply or in an earlier one."""
    seen: set[tuple[int, ...]] = set()
    total = repeated = 0
    for reply in replies:
        for gram in zip(*(reply[offset:] for offset in range(size)), strict=False):
            total, repeated = total + 1, repeated + (gram in seen)
            seen.add(gram)
    return repeated / total if total else 0.0
