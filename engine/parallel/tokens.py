"""Layout of the tokens of one target forward over the ranks that run it together.

Each rank's micro-batch is its part of the sequence, as in Megatron's sequence parallelism.
Replicated modules run on local tokens, and sharded modules gather the tokens of all ranks. A
document never spans ranks.
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
    """Tokens of one forward on all ranks.

    documents_R: lengths of each rank's documents.
    rank: this rank, which holds the local tokens.
    """

    documents_R: tuple[tuple[int, ...], ...]
    rank: int

    @cached_property
    def counts_R(self) -> tuple[int, ...]:
        """Number of tokens of each rank."""
        return tuple(map(sum, self.documents_R))

    @property
    def num_own(self) -> int:
        return self.counts_R[self.rank]

    @cached_property
    def num_all(self) -> int:
        return sum(self.counts_R)

    @cached_property
    def own(self) -> slice:
        """Position of the local tokens among all tokens."""
        start = sum(self.counts_R[: self.rank])
        return slice(start, start + self.num_own)

    @cached_property
    def documents(self) -> tuple[int, ...]:
        """Lengths of all documents, in the order of ranks."""
        return tuple(length for documents in self.documents_R for length in documents)

    @cached_property
    def own_documents(self) -> range:
        """Indices of the local documents among all documents."""
        start = sum(len(documents) for documents in self.documents_R[: self.rank])
        return range(start, start + len(self.documents_R[self.rank]))

    def parts(self, count: int) -> tuple["DocumentChunk", ...]:
        """Split the tokens into at most `count` chunks of whole documents, of similar length.

        Each chunk has documents of every rank.

        There are fewer chunks if a rank has fewer documents, or if the chunks would exchange more
        than `MUCH` times the rows of a single exchange. In an exchange every rank sends as many
        rows as the rank with the most tokens, so chunks of uneven lengths send more padding.
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
        """Return a chunk. edges_R: for each rank, its first document and the first one after it."""
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
    """A chunk of a forward: some documents of each rank.

    tokens: the tokens of the chunk.
    own: position of this rank's tokens of the chunk among its local tokens.
    rows: for each rank, position of its tokens of the chunk among all tokens.
    documents: indices of the chunk's documents among all documents.
    """

    tokens: Tokens
    own: slice
    rows: tuple[slice, ...]
    documents: tuple[int, ...]


def _edges(lengths: Sequence[int], places: Sequence[float]) -> list[int]:
    """Return the document boundaries closest to `places` that leave no chunk empty.

    lengths: tokens per document.
    places: wanted boundaries, in tokens.
    Returns the first document of each chunk, followed by the number of documents.
    """
    ends = list(accumulate(lengths))
    edges = [0]
    for number, place in enumerate(places):
        possible = range(edges[-1] + 1, len(lengths) - len(places) + number + 1)
        edges.append(min(possible, key=lambda edge: abs(ends[edge - 1] - place)))
    return [*edges, len(lengths)]


class ByDocument(ABC):
    """Base class of forward arguments that have one part per document."""

    @abstractmethod
    def of(self, documents: Sequence[int]) -> "ByDocument | Tensor":
        """Return the parts of the given documents."""


_current: ContextVar[Tokens] = ContextVar("tokens of the forward under way")


@contextmanager
def tokens_of_forward(tokens: Tokens) -> Iterator[None]:
    """Context in which forwards of a parallel target process these tokens."""
    before = _current.set(tokens)
    try:
        yield
    finally:
        _current.reset(before)


def current_tokens() -> Tokens:
    return _current.get()


def bounds(lengths: tuple[int, ...]) -> list[tuple[int, int]]:
    """Return the start and end of each of several consecutive parts."""
    return [(stop - length, stop) for length, stop in zip(lengths, accumulate(lengths), strict=True)]
