"""Rendered conversations: token ids with the mask of what the assistant said, one or many."""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True)
class Document:
    """A rendered conversation, or a piece of one.

    input_ids: int32 [T].
    assistant_mask: bool [T], true for the assistant's replies with their end-of-turn tokens.
    turn_ends: ascending token indices, each just after an assistant turn.
    """

    input_ids: np.ndarray
    assistant_mask: np.ndarray
    turn_ends: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.input_ids)


class Documents(Sequence[Document]):
    """The documents of a run, wherever they lie, and what is asked of all of them together."""

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each, int64 [n]."""
        return np.array([len(document) for document in self], dtype=np.int64)

    @cached_property
    def said(self) -> np.ndarray:
        """The assistant's tokens of each, int64 [n]."""
        return np.array([document.assistant_mask.sum() for document in self], dtype=np.int64)

    @cached_property
    def checksum(self) -> int:
        """CRC-32 of all token ids and masks, document by document."""
        checksum = 0
        for document in self:
            checksum = document_checksum(document, checksum)
        return checksum

    @cached_property
    def token_counts(self) -> np.ndarray:
        """How often the assistant says each token, int64 [largest id + 1]."""
        counts = np.zeros(0, dtype=np.int64)
        for document in self:
            counts = add_counts(counts, document)
        return counts

    def count_assistant_tokens(self, vocab_size: int) -> np.ndarray:
        """How often the assistant says each token: int64 [V]. Raises ValueError if a token id is not below `vocab_size`."""
        counts = self.token_counts
        if len(counts) > vocab_size:
            problem = f"token id {len(counts) - 1} is outside the target's vocabulary of {vocab_size}"
            raise ValueError(f"{problem}; use the target's own tokenizer")
        return np.pad(counts, (0, vocab_size - len(counts)))


class DocumentList(Documents):
    """Documents in memory."""

    def __init__(self, documents: Sequence[Document]) -> None:
        self._documents = documents

    def __len__(self) -> int:
        return len(self._documents)

    def __getitem__(self, index: int) -> Document:
        return self._documents[index]


def document_checksum(document: Document, checksum: int) -> int:
    """The checksum of documents, with one more behind them."""
    return zlib.crc32(document.assistant_mask.tobytes(), zlib.crc32(document.input_ids.tobytes(), checksum))


def add_counts(counts: np.ndarray, document: Document) -> np.ndarray:
    """`counts` of assistant tokens with those of a document, as long as its largest token asks."""
    more = np.bincount(document.input_ids[document.assistant_mask])
    if len(more) > len(counts):
        counts, more = more, counts
    counts[: len(more)] += more
    return counts
