"""How the tokens of one forward of the target lie on the ranks that run it together.

Each rank's own micro-batch is its part of the sequence (Megatron's sequence parallelism, aligned): what is replicated runs on
own tokens, what is sharded on all ranks' tokens, gathered at its door. A document never spans ranks.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate


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
    def own_documents(self) -> slice:
        """Which of all documents are own."""
        start = sum(len(documents) for documents in self.documents_R[: self.rank])
        return slice(start, start + len(self.documents_R[self.rank]))


class ByDocument(ABC):
    """Something that a forward hands down and that has a part for each document."""

    @abstractmethod
    def of(self, documents: slice) -> "ByDocument":
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
