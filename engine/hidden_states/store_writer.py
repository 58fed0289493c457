"""Writing of shards while the target runs.

Pieces wait in a bounded queue, and threads compute their checksums and write them in place.

A shard is written to `NAME.partial`. Its full size is reserved first, so that a full disk is
noticed before a forward is spent on the shard. The file is renamed once it is complete and on the
disk, so a file with the final name is always complete, even if the process is killed.
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
        """Create the partial file. Raises OSError if its bytes cannot be reserved."""
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
            # These two mean that the file system cannot reserve space.
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
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
        """Write rows of a tensor to their place in the file."""
        if not rows.size:  # of slots, if the draft learns from tokens alone
            return
        place = self.layout.places[name]
        data = np.ascontiguousarray(rows).view(np.uint8).data.cast("B")
        offset = place.offset + first_row * place.row_bytes
        while data:
            written = os.pwrite(self._descriptor, data, offset)
            data = data[written:]
            offset += written

    def note(self, first_document: int, checksums: list[int], token_ends: list[int], slot_ends: list[int]) -> bool:
        """Record consecutive documents as written; returns whether the shard is now complete.

        first_document: index within the shard. checksums, token_ends, slot_ends: of each document,
        the ends within the shard.
        """
        documents = slice(first_document, first_document + len(checksums))
        with self._lock:
            self._checksums[documents] = checksums
            for name, ends in (("token_bounds", token_ends), ("slot_bounds", slot_ends)):
                self._bounds[name][documents.start + 1 : documents.stop + 1] = ends
            self._missing -= len(checksums)
            return self._missing == 0

    def finish(self) -> None:
        """Complete the file, and rename it to its final name once it is on the disk."""
        for name, values in (self._bounds | {"checksums": self._checksums}).items():
            self.write(name, 0, values)
        checksum = shard_checksum(self._checksums, *self._bounds.values())
        os.pwrite(self._descriptor, self.layout.header(checksum), 0)
        os.fsync(self._descriptor)
        self._close()
        os.replace(self._partial, self._path)
        sync(self._path.parent)

    def abandon(self) -> None:
        """Close the file, and delete it unless it has its final name."""
        self._close()
        self._partial.unlink(missing_ok=True)

    def _close(self) -> None:
        if self._file is not None:
            os.close(self._file)
        self._file = None


def shard_checksum(checksums: np.ndarray, token_bounds: np.ndarray, slot_bounds: np.ndarray) -> str:
    """Return the checksum of a shard, 16 hexadecimal digits.

    checksums: int64 [n], of its documents.
    token_bounds, slot_bounds: int64 [n + 1], where the documents' rows start and end.
    """
    return xxhash.xxh3_64(np.concatenate((checksums, token_bounds, slot_bounds)).tobytes()).hexdigest()


@dataclass(frozen=True)
class Place:
    """Some documents of a shard that go through the target together, and where they are in the shard.

    first_document, first_token, first_slot: indices within the shard.
    batch, slots_N: the documents and their slots, on the host.
    """

    file: ShardFile
    first_document: int
    first_token: int
    first_slot: int
    batch: PackedBatch
    slots_N: torch.Tensor


@dataclass(frozen=True)
class Piece(Place):
    """Documents of a shard with the target's output for them.

    tensors: rows of the shard's tensors. They are on the host once `ready` has happened.
    faults: bool [num_documents, A + 2], `StateFaults.by_place`; on the host at the same time.
    """

    tensors: dict[str, torch.Tensor]
    faults: torch.Tensor
    ready: torch.cuda.Event | None = None


@dataclass(frozen=True)
class StoredTensors:
    """A target's output in the format of a shard, on its way to the host. Fields as in `Piece`."""

    tensors: dict[str, torch.Tensor]
    faults: torch.Tensor
    ready: torch.cuda.Event | None

    @classmethod
    def of(cls, batch: PackedBatch, output: TargetOutput, dtype: str) -> "StoredTensors":
        """Convert a target's output to the format of a shard, with zeros where it is not finite.

        All states of a document are set to zero if one of them is not finite.
        batch: on the device of `output`. `output.aux_TA` may be changed in place.
        """
        if dtype != "float8_e4m3":  # finds overflow in the store's precision too
            precision = DTYPES[dtype]
            output = replace(output, aux_TA=output.aux_TA.to(precision), last_hidden_ND=output.last_hidden_ND.to(precision))
        faults = find_faults(batch, output, embed_TD=None)
        output = cleaned(output, faults)
        aux, aux_scale = to_stored(output.aux_TA, dtype, num_scales=output.num_aux)
        last_hidden, last_hidden_scale = to_stored(output.last_hidden_ND, dtype, num_scales=1)
        argmax_N, lse_N = output.head_stats
        tensors = {"argmax": argmax_N, "lse": lse_N, "aux": aux, "last_hidden": last_hidden}
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
    """A document whose states are not finite.

    document: its index in the corpus. place: index in `finite.place_names`.
    """

    document: int
    place: int


class NonFiniteDocument(Exception):
    """Error of a writer that stops at a document whose states are not finite."""

    def __init__(self, left_out: LeftOut) -> None:
        super().__init__(left_out)
        self.left_out = left_out


@dataclass
class StoreWriter:
    """Writer of pieces in threads; `put` blocks while `depth` pieces wait.

    stops: whether a document whose states are not finite is an error, which is raised before
    anything of the document is written.
    left_out: documents that are written as zeros. A thread adds them before their shard gets its
    final name.
    An error in a thread is raised by the next `put`, or by `close`.
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
        """Wait for the threads to write all pieces, and accept no more."""
        self._threads.shutdown(wait=True)

    def close(self) -> None:
        """Wait until everything is written. Raises the first error of a thread."""
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
    """Write a piece that is on the host; returns the number of bytes written."""
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
    """Return a host tensor as a numpy array, as bytes in formats that numpy does not know."""
    if tensor.dtype in (torch.bfloat16, torch.float8_e4m3fn):
        tensor = tensor.contiguous().view(torch.uint8)
    return tensor.numpy()
