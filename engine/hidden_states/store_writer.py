"""Shards are written while the target runs on: pieces wait in a bounded queue, threads check-sum and write them in place.

A shard grows in `NAME.partial`, whose size is reserved at once, so a full disk shows before a forward is spent on it. It takes
its name when it is whole and on the disk: whatever has the name is complete, whenever the process was killed.
"""

import errno
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import xxhash

from engine.batch import PackedBatch, TargetOutput
from engine.hidden_states.finite import cleaned, find_faults
from engine.hidden_states.store_format import BY_SLOT, DTYPES, Contents, Layout, Shard, document_checksum, to_stored
from engine.host.files import PARTIAL, sync
from engine.host.pinned_copy import to_pinned


class ShardFile:
    """A shard that is being written."""

    def __init__(self, folder: Path, contents: Contents, shard: Shard) -> None:
        """Raises OSError if its bytes cannot be reserved."""
        self.contents = contents
        self.shard = shard
        self.layout = Layout.of(contents, shard)
        self._path = folder / shard.name
        self._lock = threading.Lock()
        self._missing = shard.num_documents
        self._checksums = np.zeros(shard.num_documents, dtype=np.int64)
        self._bounds = {name: np.zeros(shard.num_documents + 1, dtype=np.int64) for name in ("token_bounds", "slot_bounds")}
        self._file: int | None = os.open(self._partial, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            os.posix_fallocate(self._file, 0, self.layout.num_bytes)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # a file system that cannot reserve room
                self.abandon()
                raise
            os.ftruncate(self._file, self.layout.num_bytes)

    @property
    def _partial(self) -> Path:
        return self._path.with_name(self._path.name + PARTIAL)

    @property
    def _descriptor(self) -> int:
        """Descriptor of the file, which is open until `finish` or `abandon`."""
        assert self._file is not None, f"{self._partial} is closed"
        return self._file

    def write(self, name: str, first_row: int, rows: np.ndarray) -> None:
        """Rows of a tensor to their place."""
        place = self.layout.places[name]
        data = np.ascontiguousarray(rows).view(np.uint8).data.cast("B")
        offset = place.offset + first_row * place.row_bytes
        while data:
            written = os.pwrite(self._descriptor, data, offset)
            data = data[written:]
            offset += written

    def note(self, first_document: int, checksums: list[int], token_ends: list[int], slot_ends: list[int]) -> bool:
        """What only the documents' bytes say of them; whether the shard now has them all."""
        documents = slice(first_document, first_document + len(checksums))
        with self._lock:
            self._checksums[documents] = checksums
            for name, ends in (("token_bounds", token_ends), ("slot_bounds", slot_ends)):
                self._bounds[name][documents.start + 1 : documents.stop + 1] = ends
            self._missing -= len(checksums)
            return self._missing == 0

    def finish(self) -> None:
        """Give the shard its name, once it is on the disk."""
        for name, values in (self._bounds | {"checksums": self._checksums}).items():
            self.write(name, 0, values)
        checksum = shard_checksum(self._checksums, *self._bounds.values())
        os.pwrite(self._descriptor, self.layout.header(checksum), 0)
        os.fsync(self._descriptor)
        self._close()
        os.replace(self._partial, self._path)
        sync(self._path.parent)

    def abandon(self) -> None:
        """Leave nothing behind of a shard that has not got its name."""
        self._close()
        self._partial.unlink(missing_ok=True)

    def _close(self) -> None:
        if self._file is not None:
            os.close(self._file)
        self._file = None


def shard_checksum(checksums: np.ndarray, token_bounds: np.ndarray, slot_bounds: np.ndarray) -> str:
    """Of the checksums of a shard's documents, int64 [n], and of where they lie, int64 [n + 1] each."""
    return xxhash.xxh3_64(np.concatenate((checksums, token_bounds, slot_bounds)).tobytes()).hexdigest()


@dataclass(frozen=True)
class Piece:
    """Some documents of a shard that went through the target together.

    first_document, first_token, first_slot: within the shard. batch, slots_N: on the host. tensors: rows of the shard's
    tensors; faults: bool [num_documents, 5], `StateFaults.by_place`; both on the host once `ready` has happened.
    """

    file: ShardFile
    first_document: int
    first_token: int
    first_slot: int
    batch: PackedBatch
    slots_N: torch.Tensor
    tensors: dict[str, torch.Tensor]
    faults: torch.Tensor
    ready: torch.cuda.Event | None = None


@dataclass(frozen=True)
class StoredTensors:
    """A target's output as a shard holds it, on its way to the host. Fields as in `Piece`."""

    tensors: dict[str, torch.Tensor]
    faults: torch.Tensor
    ready: torch.cuda.Event | None

    @classmethod
    def of(cls, batch: PackedBatch, output: TargetOutput, dtype: str) -> "StoredTensors":
        """Return a target's output as a shard holds it; documents whose states are not finite become zeros.

        batch: on the device of `output`, whose `aux_TA` may change.
        """
        if dtype != "float8_e4m3":  # what overflows in the store's precision is found too
            precision = DTYPES[dtype]
            output = replace(output, aux_TA=output.aux_TA.to(precision), last_hidden_ND=output.last_hidden_ND.to(precision))
        faults = find_faults(batch, output, embed_TD=None)
        output = cleaned(output, faults)
        aux, aux_scale = to_stored(output.aux_TA, dtype, num_scales=3)
        last_hidden, last_hidden_scale = to_stored(output.last_hidden_ND, dtype, num_scales=1)
        tensors = {"argmax": output.argmax_N, "lse": output.lse_N, "aux": aux, "last_hidden": last_hidden}
        if aux_scale is not None:
            tensors["aux_scale"] = aux_scale
        if last_hidden_scale is not None:
            tensors["last_hidden_scale"] = last_hidden_scale
        if not aux.is_cuda:
            return cls(tensors, faults.by_place, None)
        moved = {name: to_pinned(tensor) for name, tensor in tensors.items()}
        by_place = to_pinned(faults.by_place)
        return cls(moved, by_place, torch.cuda.current_stream(aux.device).record_event())


@dataclass(frozen=True)
class LeftOut:
    """A document whose states are not finite. document: its place in the corpus. place: as in `finite.place_names`."""

    document: int
    place: int


class NonFiniteDocument(Exception):
    """Raised by a writer that stops at documents whose states are not finite."""

    def __init__(self, left_out: LeftOut) -> None:
        super().__init__(left_out)
        self.left_out = left_out


@dataclass
class StoreWriter:
    """Writes pieces in threads, at most `depth` of them waiting: who puts another one waits too.

    stops: whether a document whose states are not finite is an error, raised before anything of it is written. left_out:
    documents that are written as zeros; a thread adds them before their shard has its name.
    An error of a thread is raised by the next `put`, or by `close`.
    """

    num_threads: int
    depth: int
    stops: bool = False
    num_bytes: int = 0
    left_out: list[LeftOut] = field(default_factory=list)
    _error: BaseException | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self._room = threading.Semaphore(self.depth + self.num_threads)
        self._threads = ThreadPoolExecutor(self.num_threads, thread_name_prefix="store-writer")

    def put(self, piece: Piece) -> None:
        self._room.acquire()
        self._check()
        self._threads.submit(self._write, piece)

    def stop(self) -> None:
        """Wait for the threads, and write nothing more."""
        self._threads.shutdown(wait=True)

    def close(self) -> None:
        """Wait until all is written."""
        self.stop()
        self._check()

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    def _write(self, piece: Piece) -> None:
        try:
            if self._error is None:
                left_out = _left_out(piece)
                if left_out and self.stops:
                    raise NonFiniteDocument(left_out[0])
                with self._lock:
                    self.left_out += left_out
                num_bytes = _write_piece(piece)
                with self._lock:
                    self.num_bytes += num_bytes
        except BaseException as error:
            self._error = self._error or error
        finally:
            self._room.release()


def _left_out(piece: Piece) -> list[LeftOut]:
    """Return the documents of a piece whose states are not finite; waits until the piece is on the host."""
    if piece.ready is not None:
        piece.ready.synchronize()
    first = piece.file.shard.first_document + piece.first_document
    return [LeftOut(first + index, faults.index(True)) for index, faults in enumerate(piece.faults.tolist()) if any(faults)]


def _write_piece(piece: Piece) -> int:
    """Write a piece that is on the host; returns the bytes."""
    is_left_out_T = torch.repeat_interleave(piece.faults.any(1), torch.tensor(piece.batch.host_lengths))
    rows = {name: as_bytes(tensor) for name, tensor in piece.tensors.items()}
    slots_N = piece.slots_N.numpy().astype(np.int32)
    rows |= {
        "input_ids": piece.batch.input_ids_T.numpy().astype(np.int32),
        "slots": slots_N + np.int32(piece.first_token),
        "assistant_mask": (piece.batch.assistant_mask_T & ~is_left_out_T).numpy(),
    }
    for name, values in rows.items():
        piece.file.write(name, piece.first_slot if name in BY_SLOT else piece.first_token, values)
    token_ends = np.cumsum(piece.batch.host_lengths)
    slot_ends = np.searchsorted(slots_N, token_ends)
    token_starts, slot_starts = (np.concatenate(([0], ends[:-1])) for ends in (token_ends, slot_ends))
    checksums = []
    for tokens, slots in zip(zip(token_starts, token_ends, strict=True), zip(slot_starts, slot_ends, strict=True), strict=True):
        own = {name: rows[name][slice(*(slots if name in BY_SLOT else tokens))] for name in rows}
        own["slots"] = own["slots"] - np.int32(piece.first_token + tokens[0])
        checksums.append(document_checksum([own[name] for name in piece.file.layout.places if name in own]))
    ends = [(first + own_ends).tolist() for first, own_ends in ((piece.first_token, token_ends), (piece.first_slot, slot_ends))]
    if piece.file.note(piece.first_document, checksums, *ends):
        piece.file.finish()
    return sum(values.nbytes for values in rows.values())


def as_bytes(tensor: torch.Tensor) -> np.ndarray:
    """Rows of a tensor on the host as numpy has them; formats that it does not know, as bytes."""
    if tensor.dtype in (torch.bfloat16, torch.float8_e4m3fn):
        tensor = tensor.contiguous().view(torch.uint8)
    return tensor.numpy()
