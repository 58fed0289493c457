"""Pack documents into full packs of similar cost, and group packs of similar cost into steps.

A pack holds whole documents of at most `max_tokens` tokens in total. Ranks wait for each other at
every step, and the cost of a step depends on its rows with loss, which follow from the assistant
tokens.
"""

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from engine.batch import PackedBatch
from engine.data.documents import Document

WINDOW = 4096  # number of documents that are packed together
# A document may be swapped with this many neighbours in order of length, in this many passes.
NEIGHBOURS, PASSES = 8, 4


def pack(
    lengths: np.ndarray, assistant_tokens: np.ndarray, max_tokens: int, generator: np.random.Generator
) -> list[np.ndarray]:
    """Pack documents and return the packs, as arrays of document indices, in random order.

    Each pack has at most `max_tokens` tokens, and every document is in exactly one pack. Documents
    are drawn at random into windows. Within a window, documents are taken from the longest to the
    shortest, and each joins the fullest pack that has room. Then documents of similar length are
    swapped between packs, to even out the packs' assistant tokens.

    lengths, assistant_tokens: tokens and assistant tokens per document, int64 [n].
    Raises ValueError if a document is longer than a pack.
    """
    longest = int(lengths.argmax())
    if lengths[longest] > max_tokens:
        problem = f"document {longest} has {lengths[longest]} tokens, a pack holds {max_tokens}"
        raise ValueError(f"{problem}; cut or split it, or raise data.max_tokens")
    drawn = generator.permutation(len(lengths))
    packs = []
    for start in range(0, len(drawn), WINDOW):
        window = drawn[start : start + WINDOW]
        window = window[np.argsort(-lengths[window], kind="stable")]
        owner, num_packs = _best_fit(lengths[window].tolist(), max_tokens)
        _even_out(lengths[window], assistant_tokens[window], owner, num_packs, max_tokens)
        by_owner = np.argsort(owner, kind="stable")
        packs += np.split(window[by_owner], np.cumsum(np.bincount(owner, minlength=num_packs))[:-1])
    return [packs[index] for index in generator.permutation(len(packs))]


def _best_fit(lengths: Sequence[int], max_tokens: int) -> tuple[np.ndarray, int]:
    """Pack documents best-fit; return the pack index of each document and the number of packs.

    lengths: tokens per document, in the order in which they are packed.
    """
    owner = np.empty(len(lengths), dtype=np.int64)
    room: list[tuple[int, int]] = []  # (free tokens, pack), ascending
    num_packs = 0
    for document, length in enumerate(lengths):
        best = bisect_left(room, (length, -1))
        if best < len(room):
            free, index = room.pop(best)
        else:
            free = max_tokens
            index = num_packs
            num_packs = num_packs + 1
        owner[document] = index
        if free > length:
            insort(room, (free - length, index))
    return owner, num_packs


def _even_out(lengths: np.ndarray, assistant_tokens: np.ndarray, owner: np.ndarray, num_packs: int, max_tokens: int) -> None:
    """Swap documents of similar length between packs to even out assistant tokens; changes `owner`."""
    swaps = _Swaps(lengths, assistant_tokens, owner, num_packs, max_tokens)
    for _ in range(PASSES):
        for reach in range(1, NEIGHBOURS + 1):
            for first in (0, reach):
                swaps.try_pairs(_longer_of_pairs(len(lengths), reach, first), reach)


def _longer_of_pairs(num_documents: int, reach: int, first: int) -> np.ndarray:
    """Return the longer document `a` of pairs `(a, a + reach)` that share no document.

    Documents are in descending order of length. first: 0 or `reach`, for either half of the pairs.
    """
    longer = np.arange(num_documents - reach)
    is_in_half = ((longer - first) // reach) % 2 == 0
    return longer[is_in_half & (longer >= first)]


class _Swaps:
    """Swaps of documents between packs.

    owner: pack of each document; changed in place.
    free_P: free tokens of each pack. excess_P: its assistant tokens above the mean of all packs.
    """

    def __init__(
        self, lengths: np.ndarray, assistant_tokens: np.ndarray, owner: np.ndarray, num_packs: int, max_tokens: int
    ) -> None:
        self._lengths = lengths
        self._assistant_tokens = assistant_tokens
        self.owner = owner
        self.free_P = max_tokens - np.bincount(owner, weights=lengths, minlength=num_packs)
        self.excess_P = np.bincount(owner, weights=assistant_tokens, minlength=num_packs)
        self.excess_P -= self.excess_P.mean()

    def try_pairs(self, a: np.ndarray, reach: int) -> None:
        """Swap the documents of pairs `(a, a + reach)` where it helps, the best first.

        A swap helps if it lowers the squared deviation of both packs' assistant tokens from the
        mean, and if the longer document fits. Each pack takes part in one swap at most.
        """
        b = a + reach
        pack_a = self.owner[a]
        pack_b = self.owner[b]
        more_tokens = self._lengths[a] - self._lengths[b]
        more_assistant_tokens = self._assistant_tokens[a] - self._assistant_tokens[b]
        excess_a = self.excess_P[pack_a]
        excess_b = self.excess_P[pack_b]
        before = excess_a**2 + excess_b**2
        gain = before - (excess_a - more_assistant_tokens) ** 2 - (excess_b + more_assistant_tokens) ** 2
        fits = self.free_P[pack_b] >= more_tokens
        useful = np.flatnonzero((pack_a != pack_b) & fits & (gain > 0))
        best_first = useful[np.argsort(-gain[useful], kind="stable")]
        chosen = _each_pack_once(best_first, pack_a, pack_b, len(self.free_P))
        p = pack_a[chosen]
        q = pack_b[chosen]
        self.owner[a[chosen]] = q
        self.owner[b[chosen]] = p
        self.free_P[p] += more_tokens[chosen]
        self.free_P[q] -= more_tokens[chosen]
        self.excess_P[p] -= more_assistant_tokens[chosen]
        self.excess_P[q] += more_assistant_tokens[chosen]


def _each_pack_once(trades: np.ndarray, from_a: np.ndarray, from_b: np.ndarray, num_packs: int) -> np.ndarray:
    """Return the swaps, best first, without those that affect a pack of a better swap."""
    both = np.stack((from_a[trades], from_b[trades]), 1)
    best_P = np.full(num_packs, len(trades))
    np.minimum.at(best_P, both, np.arange(len(trades))[:, None])
    return trades[(best_P[both] == np.arange(len(trades))[:, None]).all(1)]


def alike_steps(
    assistant_tokens_P: np.ndarray, begun: int, packs_per_step: int, window: int, generator: np.random.Generator
) -> Iterator[np.ndarray]:
    """Yield the pack indices of one step at a time, so that packs of a step have similar cost.

    assistant_tokens_P: assistant tokens per pack.
    begun: number of preceding packs. If they end within a step, the first step yielded completes
        it.
    window: number of steps whose packs are sorted by cost and divided into steps, which are then
        shuffled; 0 keeps the given order.
    """
    packs_P = np.arange(len(assistant_tokens_P))
    first = -begun % packs_per_step
    yield packs_P[:first]
    size = max(window, 1) * packs_per_step
    for start in range(first, len(packs_P), size):
        several = packs_P[start : start + size]
        if window:
            several = several[np.argsort(assistant_tokens_P[several], kind="stable")]
        whole = len(several) // packs_per_step
        steps = several[: whole * packs_per_step].reshape(whole, packs_per_step)
        yield from steps[generator.permutation(whole)] if window else steps
        yield several[whole * packs_per_step :]


def collate(
    documents: Sequence[Document], document_ids: Sequence[int] = (), document_epochs: Sequence[int] = ()
) -> PackedBatch:
    """Concatenate whole documents into one batch, in the order given.

    document_ids, document_epochs: see `PackedBatch`.
    Raises ValueError if there are no documents.
    """
    if not documents:
        raise ValueError("a batch needs at least one document, got none")
    lengths = [len(document) for document in documents]
    return PackedBatch(
        input_ids_T=torch.from_numpy(np.concatenate([document.input_ids for document in documents]).astype(np.int64)),
        assistant_mask_T=torch.from_numpy(np.concatenate([document.assistant_mask for document in documents])),
        cu_seqlens=torch.from_numpy(np.cumsum([0, *lengths]).astype(np.int32)),
        document_ids=tuple(int(index) for index in document_ids),
        document_epochs=tuple(document_epochs),
    )
