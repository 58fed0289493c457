"""Rendered conversations: token ids with a mask of the assistant tokens."""

import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True)
class Document:
    """A rendered conversation, or a piece of one.

    input_ids: int32 [T].
    assistant_mask: bool [T], true for assistant replies including their end-of-turn tokens.
    turn_ends: ascending token indices, each just after an assistant turn.
    place: file index and line number, from 1, of the conversation; None = unknown.
    changes: one description for each marked reply whose text differs from its message.
    """

    input_ids: np.ndarray
    assistant_mask: np.ndarray
    turn_ends: tuple[int, ...]
    place: tuple[int, int] | None = None
    changes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.input_ids)


class Documents(ABC):
    """The documents of a run, in memory or on disk, with statistics over all of them.

    paths: files of the conversations; empty if unknown.
    """

    paths: tuple[str, ...] = ()

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of documents."""

    @abstractmethod
    def __getitem__(self, index: int) -> Document:
        """Return the document with the given index, from 0."""

    def __iter__(self) -> Iterator[Document]:
        for index in range(len(self)):
            yield self[index]

    def name_of(self, index: int) -> str:
        """Return `file:line` of a document, or e.g. `document 7` if that is unknown."""
        place = self[index].place
        if place is None or not self.paths:
            return f"document {index}"
        file, line = place
        return f"{self.paths[file]}:{line}"

    @cached_property
    def largest_token_id(self) -> tuple[int, int]:
        """Largest token id, and index of the first document with it; (-1, 0) if there is none."""
        largest = -1
        holder = 0
        for index, document in enumerate(self):
            own = int(document.input_ids.max(initial=-1))
            if own > largest:
                largest = own
                holder = index
        return largest, holder

    def check_token_ids(self, vocab_size: int) -> None:
        """Raise ValueError, naming the document, if a token id is outside the vocabulary."""
        largest, holder = self.largest_token_id
        if largest >= vocab_size:
            raise ValueError(outside_vocabulary(self.name_of(holder), largest, vocab_size))

    @cached_property
    def lengths(self) -> np.ndarray:
        """Number of tokens of each document, int64 [n]."""
        return np.array([len(document) for document in self], dtype=np.int64)

    @cached_property
    def assistant_tokens(self) -> np.ndarray:
        """Number of assistant tokens of each document, int64 [n]."""
        return np.array([document.assistant_mask.sum() for document in self], dtype=np.int64)

    @cached_property
    def checksum(self) -> int:
        """CRC-32 of the token ids and masks of all documents, in order."""
        checksum = 0
        for document in self:
            checksum = document_checksum(document, checksum)
        return checksum

    @cached_property
    def token_counts(self) -> np.ndarray:
        """Occurrences of each token id among assistant tokens, int64 [largest such id + 1]."""
        counts = np.zeros(0, dtype=np.int64)
        for document in self:
            counts = add_counts(counts, document)
        return counts

    def count_assistant_tokens(self, vocab_size: int) -> np.ndarray:
        """Return the occurrences of each token id among the assistant tokens, int64 [V].

        Raises ValueError if a token id is not below `vocab_size`.
        """
        self.check_token_ids(vocab_size)
        counts = self.token_counts
        return np.pad(counts, (0, vocab_size - len(counts)))


class DocumentList(Documents):
    """Documents in memory."""

    def __init__(self, documents: Sequence[Document], paths: Sequence[str] = ()) -> None:
        self._documents = documents
        self.paths = tuple(paths)

    def __len__(self) -> int:
        return len(self._documents)

    def __getitem__(self, index: int) -> Document:
        return self._documents[index]


def outside_vocabulary(name: str, token_id: int, vocab_size: int) -> str:
    """Return the error message for a token id that is outside the target's vocabulary.

    name: name of the document or prompt that contains it.
    """
    problem = f"{name}: token id {token_id} is outside the target's vocabulary of {vocab_size}"
    return f"{problem}; use the target's own tokenizer, without added tokens, or remove the text"


def document_checksum(document: Document, checksum: int) -> int:
    """Return the checksum of documents, `checksum`, extended by one more document."""
    return zlib.crc32(document.assistant_mask.tobytes(), zlib.crc32(document.input_ids.tobytes(), checksum))


def add_counts(counts: np.ndarray, document: Document) -> np.ndarray:
    """Return `counts` plus the assistant tokens of a document.

    counts: occurrences of each token id, int64. It may be modified in place. The result is extended
    if the document contains a larger token id.
    """
    more = np.bincount(document.input_ids[document.assistant_mask])
    if len(more) > len(counts):
        counts, more = more, counts
    counts[: len(more)] += more
    return counts


def evenly_spread(size: int, count: int) -> list[int]:
    """Return `count` indices below `size`, evenly spread, or all if there are fewer."""
    count = min(count, size)
    return [index * size // count for index in range(count)]


def chosen_documents(documents: Documents, indices: Sequence[int]) -> Documents:
    """Return the documents of some indices, in memory."""
    return DocumentList([documents[index] for index in indices], documents.paths)
