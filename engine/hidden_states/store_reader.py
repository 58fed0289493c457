"""Reading of a store: documents and their hidden states, straight from memory-mapped files."""

import mmap
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, reduce
from pathlib import Path

import numpy as np
import torch

from engine.data.documents import Document, Documents
from engine.hidden_states.store_format import (
    BY_SLOT,
    MANIFEST,
    NO_CHECKSUM,
    OF_SHARD,
    Contents,
    Layout,
    Manifest,
    Shard,
    StoreError,
    document_checksum,
)
from engine.hidden_states.store_writer import shard_checksum
from engine.hidden_states.target_files import check_small_files
from engine.host.mapped_files import MappedFile

MEND = "copy it again, or delete it and run the capture again"


STATES = ("aux", "aux_scale", "last_hidden", "last_hidden_scale", "lse")  # tensors that hold what the target computed
NUMPY = {torch.int64: np.int64, torch.int32: np.int32, torch.float32: np.float32, torch.bool: np.bool_}


class MappedShard:
    """A memory-mapped shard, of which only the requested rows are read.

    Its file is opened again if too many others were read since.
    """

    def __init__(self, folder: Path, contents: Contents, shard: Shard) -> None:
        """Map a shard's file and check its header.

        Raises StoreError, naming the file, if it is missing, cut off, or not the shard that the
        manifest describes.
        """
        self.path = folder / shard.name
        self.shard = shard
        self.layout = Layout.of(contents, shard)
        self._file = MappedFile(self.path)
        self.checksum = self._check_header()

    def _mapping(self) -> mmap.mmap:
        """Return the mapping of the file. Raises StoreError, naming the file, if it is missing or cut off."""
        try:
            mapping = self._file.mapping
        except FileNotFoundError as error:
            raise StoreError(f"{self.path}: the shard is missing; {MEND}") from error
        except ValueError as error:  # an empty file cannot be mapped
            raise StoreError(f"{self.path}: expected {self.layout.num_bytes:,} bytes, found 0; {MEND}") from error
        if len(mapping) != self.layout.num_bytes:
            raise StoreError(f"{self.path}: expected {self.layout.num_bytes:,} bytes, found {len(mapping):,}; {MEND}")
        return mapping

    def _check_header(self) -> str:
        header = self._mapping()[: self.layout.header_bytes]
        at = self.layout.header(NO_CHECKSUM).index(b'"checksum":"') + len('"checksum":"')
        checksum = header[at : at + 16].decode("ascii", "replace")
        if header != self.layout.header(checksum):
            raise StoreError(f"{self.path}: its header is not that of a shard of this store; {MEND}")
        own = (self.rows(name, 0, None) for name in OF_SHARD)
        if self.shard.checksum not in (None, checksum) or checksum != shard_checksum(*own):
            raise StoreError(f"{self.path}: its checksum is not the manifest's: it was altered or is of another store; {MEND}")
        return checksum

    def rows(self, name: str, first: int, end: int | None) -> np.ndarray:
        """Return rows of a tensor, as bytes in formats that numpy does not know.

        end: None = all rows from `first` on.
        """
        place = self.layout.places[name]
        end = place.shape[0] if end is None else end
        num_bytes = (end - first) * place.row_bytes
        data = np.frombuffer(self._mapping(), np.uint8, num_bytes, place.offset + first * place.row_bytes)
        data = data.view(NUMPY.get(place.dtype, np.uint8))
        return data.reshape(end - first, place.row_bytes // data.itemsize) if len(place.shape) > 1 else data

    @cached_property
    def token_bounds(self) -> np.ndarray:
        return np.array(self.rows("token_bounds", 0, None))

    @cached_property
    def slot_bounds(self) -> np.ndarray:
        return np.array(self.rows("slot_bounds", 0, None))

    @cached_property
    def left_out(self) -> tuple[int, ...]:
        """Indices of documents that the capture left out because states were not finite.

        Their states are zeros and their assistant mask is empty, but they have slots, unless the shard
        holds none at all.
        """
        assistants = np.concatenate(([0], np.cumsum(self.rows("assistant_mask", 0, None))))
        num_assistants = assistants[self.token_bounds[1:]] - assistants[self.token_bounds[:-1]]
        has_slots = np.diff(self.slot_bounds) > 0
        if not self.slot_bounds[-1]:
            has_slots = np.ones_like(has_slots)
        return tuple(np.flatnonzero(has_slots & (num_assistants == 0)).tolist())

    def non_finite(self, index: int) -> str | None:
        """Return the name of a tensor in which a document holds NaN or infinity; None if there is none."""
        for name in STATES:
            if name in self.layout.places:
                values = self.rows(name, *self.span(name, index))
                if not _is_finite(values, self.layout.places[name].dtype):
                    return name
        return None

    def document(self, index: int) -> Document:
        # Copies, because a document that is kept would keep the file open.
        ids, mask = (np.array(self.rows(name, *self.span(name, index))) for name in ("input_ids", "assistant_mask"))
        return Document(ids, mask, turn_ends=())

    def slots(self, index: int) -> np.ndarray:
        """Return the positions in the document whose target distribution is stored, int32."""
        return self.rows("slots", *self.span("slots", index)) - np.int32(self.token_bounds[index])

    def span(self, name: str, index: int) -> tuple[int, int]:
        """Return the first row and the end of a document's rows of a tensor."""
        bounds = self.slot_bounds if name in BY_SLOT else self.token_bounds
        return int(bounds[index]), int(bounds[index + 1])

    def will_need(self, index: int) -> None:
        """Ask the operating system to read a document's hidden states in advance."""
        for name in ("aux", "last_hidden"):
            (first, end), place = self.span(name, index), self.layout.places[name]
            start = (place.offset + first * place.row_bytes) // mmap.PAGESIZE * mmap.PAGESIZE
            length = place.offset + end * place.row_bytes - start
            if length > 0:
                self._mapping().madvise(mmap.MADV_WILLNEED, start, length)

    def verify(self, index: int) -> None:
        """Raise StoreError if a document's bytes are not those that were written."""
        parts = [
            self.slots(index) if name == "slots" else self.rows(name, *self.span(name, index))
            for name in self.layout.places
            if name not in OF_SHARD
        ]
        if document_checksum(parts) != self.rows("checksums", 0, None)[index]:
            document = self.shard.first_document + index
            raise StoreError(f"{self.path}: document {document} was altered after it was written; {MEND}")


def _is_finite(rows: np.ndarray, dtype: torch.dtype) -> bool:
    """Return whether all values are finite. rows: values, or bytes in formats unknown to numpy."""
    if dtype == torch.bfloat16:
        exponent = np.uint16(0x7F80)
        return not ((np.ascontiguousarray(rows).view(np.uint16) & exponent) == exponent).any()
    if dtype == torch.float8_e4m3fn:  # the format has NaN but no infinity
        return not ((rows & 0x7F) == 0x7F).any()
    return bool(np.isfinite(rows).all())


def _learned_argmax(shard: MappedShard) -> np.ndarray:
    """Return the target's most likely tokens at all slots of documents that are not left out."""
    argmax_N = shard.rows("argmax", 0, None)
    if not shard.left_out:
        return argmax_N
    is_learned_N = np.ones(len(argmax_N), dtype=bool)
    for document in shard.left_out:
        is_learned_N[slice(*shard.span("argmax", document))] = False
    return argmax_N[is_learned_N]


@dataclass(frozen=True)
class StoredDocuments(Documents):
    """The documents of a store's shards, in order; their tokens stay on disk."""

    shards: tuple[MappedShard, ...]

    @cached_property
    def _ends(self) -> np.ndarray:
        return np.cumsum([shard.shard.num_documents for shard in self.shards])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Document:
        shard, own = self.find(index)
        return shard.document(own)

    def name_of(self, index: int) -> str:
        shard, own = self.find(index)
        return f"document {shard.shard.first_document + own} of {shard.path}"

    def count_argmax(self, vocab_size: int) -> np.ndarray:
        """Return how often each token is the target's most likely one at a slot, int64 [V].

        Documents that are left out do not count.
        """
        counts = (np.bincount(_learned_argmax(shard), minlength=vocab_size) for shard in self.shards)
        total = reduce(operator.add, counts)
        return total.astype(np.int64)

    def find(self, index: int) -> tuple[MappedShard, int]:
        """Return the shard that holds a document, and the document's index in that shard."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = int(np.searchsorted(self._ends, index, side="right"))
        return self.shards[number], index - int(self._ends[number] - self.shards[number].shard.num_documents)


@dataclass(frozen=True)
class OpenStore:
    """A store that was opened for training.

    problems: what is wrong with each shard that was left out.
    target_files: SHA-256 of each file of the target's folder; see `Manifest`.
    """

    folder: Path
    contents: Contents
    documents: StoredDocuments
    problems: tuple[str, ...]
    target_files: Mapping[str, str]

    @property
    def trained_with(self) -> dict[str, str]:
        """Hashes of tokenizer and chat template, as in `fingerprint.trained_with`."""
        return {"tokenizer_hash": self.contents.tokenizer_hash, "template_hash": self.contents.template_hash}

    def check(self, **wanted: object) -> None:
        """Raise StoreError unless the store was captured with these options.

        wanted: expected values by the last part of an option's dotted key; None = any value.
        """
        for name, value in wanted.items():
            stored = getattr(self.contents, name)
            if value is not None and value != stored:
                problem = f"{self.folder} was captured with {name} = {stored}, this run asks for {value}"
                raise StoreError(f"{problem}; set it to {stored}, or capture again")


def open_store(folder: Path, skip_bad: bool) -> OpenStore:
    """Open a store for training.

    skip_bad: leave out shards that are missing, cut off or altered.
    Raises StoreError if no shard can be read, or if the target's config or tokenizer is missing or
    was altered. Without `skip_bad`, also raises StoreError if the capture is not complete or a
    shard is bad.
    """
    manifest = Manifest.read(folder)
    check_small_files(folder, manifest.target_files)
    if not manifest.is_complete and not skip_bad:
        there = sum((folder / shard.name).is_file() for shard in manifest.shards)
        problem = f"{folder / MANIFEST}: the capture is not complete, {there} of {len(manifest.shards)} shards exist"
        raise StoreError(f"{problem}; run it again to continue it, or set store.skip_bad=true to train on these")
    mapped = []
    problems = []
    for shard in manifest.shards:
        try:
            mapped.append(MappedShard(folder, manifest.contents, shard))
        except StoreError as error:
            if not skip_bad:
                raise
            problems.append(str(error))
    if not mapped:
        raise StoreError("\n".join([f"{folder}: no shard can be read", *problems[:5]]))
    return OpenStore(folder, manifest.contents, StoredDocuments(tuple(mapped)), tuple(problems), manifest.target_files)
