"""How the tokens of one forward of the target lie on the ranks that run it together.

Each rank's own micro-batch is its part of the sequence (Megatron's sequence parallelism, aligned): what is replicated runs on
own tokens, what is sharded on all ranks' tokens, gathered at its door. A document never spans ranks.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from torch import Tensor

MUCH = 1.1


@dataclass(frozen=True)
class Tokens:
    """documents_R: lengths of each rank's documents. rank: whose tokens are own."""

    documents_R: tuple[tuple[int, ...], ...]
    rank: int

    @cached_property
    def counts_R(self) -> tuple[int, ...]:
        """Tokens by rank."""
        return tuple(map(sum, self.documents_R))

    @property
    def num_own(self) -> int:
        return self.counts_R[self.rank]

    @cached_property
    def num_all(self) -> int:
        return sum(self.counts_R)

    @cached_property
    def own(self) -> slice:
        """Where own tokens lie among all."""
        start = sum(self.counts_R[: self.rank])
        return slice(start, start + self.num_own)

    @cached_property
    def documents(self) -> tuple[int, ...]:
        """Lengths of all documents, those of rank 0 first."""
        return tuple(length for documents in self.documents_R for length in documents)

    @cached_property
    def own_documents(self) -> range:
        """Which of all documents are own."""
        start = sum(len(documents) for documents in self.documents_R[: self.rank])
        return range(start, start + len(self.documents_R[self.rank]))

    def parts(self, count: int) -> tuple["DocumentChunk", ...]:
        """At most `count` parts, about as long, of whole documents of each rank.

        Fewer where a rank has fewer of them, or where parts that differ from rank to rank would exchange `MUCH` more rows than
        all at once: each rank sends as many as the longest has.
        """
        if count not in self._parts:
            self._parts[count] = self._in_parts(min(count, *map(len, self.documents_R)))
        return self._parts[count]

    @cached_property
    def _parts(self) -> dict[int, tuple["DocumentChunk", ...]]:
        return {}

    def _in_parts(self, count: int) -> tuple["DocumentChunk", ...]:
        longest = max(self.counts_R)
        edges_R = [_edges(documents, [longest * place / count for place in range(1, count)]) for documents in self.documents_R]
        parts = tuple(self._part([edges[place : place + 2] for edges in edges_R]) for place in range(count))
        if count > 1 and sum(max(part.tokens.counts_R) for part in parts) > MUCH * longest:
            return self._in_parts(count - 1)
        return parts

    def _part(self, edges_R: Sequence[Sequence[int]]) -> "DocumentChunk":
        """edges_R: first document of each rank, and the first that is not in the part."""
        rows: list[slice] = []
        numbers: list[int] = []
        first_row = 0
        first_document = 0
        for documents, (start, stop) in zip(self.documents_R, edges_R, strict=True):
            rows.append(slice(first_row + sum(documents[:start]), first_row + sum(documents[:stop])))
            numbers += range(first_document + start, first_document + stop)
            first_row += sum(documents)
            first_document += len(documents)
        documents_R = tuple(documents[start:stop] for documents, (start, stop) in zip(self.documents_R, edges_R, strict=True))
        own = slice(rows[self.rank].start - self.own.start, rows[self.rank].stop - self.own.start)
        return DocumentChunk(Tokens(documents_R, self.rank), own, tuple(rows), tuple(numbers))


@dataclass(frozen=True)
class DocumentChunk:
    """Some documents of each rank.

    tokens: theirs. own: where those of this rank lie among own tokens. rows: where those of each rank lie among all.
    documents: which they are of all.
    """

    tokens: Tokens
    own: slice
    rows: tuple[slice, ...]
    documents: tuple[int, ...]


def _edges(lengths: Sequence[int], places: Sequence[float]) -> list[int]:
    """Where to cut documents near places, so that no part is empty: first documents of the parts, and how many there are."""
    ends = list(accumulate(lengths))
    edges = [0]
    for number, place in enumerate(places):
        possible = range(edges[-1] + 1, len(lengths) - len(places) + number + 1)
        edges.append(min(possible, key=lambda edge: abs(ends[edge - 1] - place)))
    return [*edges, len(lengths)]


class ByDocument(ABC):
    """Something that a forward hands down and that has a part for each document."""

    @abstractmethod
    def of(self, documents: Sequence[int]) -> "ByDocument | Tensor":
        """The parts of some of the documents."""


_current: ContextVar[Tokens] = ContextVar("tokens of the forward under way")


@contextmanager
def tokens_of_forward(tokens: Tokens) -> Iterator[None]:
    """Within it, forwards of a parallel target are of these tokens."""
    before = _current.set(tokens)
    try:
        yield
    finally:
        _current.reset(before)


def current_tokens() -> Tokens:
    return _current.get()


def bounds(lengths: tuple[int, ...]) -> list[tuple[int, int]]:
    """Where each of several parts, one behind the other, starts and stops."""
    return [(stop - length, stop) for length, stop in zip(lengths, accumulate(lengths), strict=True)]
