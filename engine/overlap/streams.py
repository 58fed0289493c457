"""CUDA streams and buffers through which prepared work reaches its consumer."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

META = torch.device("meta")
ALIGNMENT = 256  # bytes; as PyTorch's CUDA allocator aligns tensors


def map_tensors(work: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return a copy of nested lists, tuples and dataclasses with every tensor replaced by `change(tensor)`."""
    if isinstance(work, Tensor):
        return change(work)
    if isinstance(work, list):
        return [map_tensors(part, change) for part in work]
    if isinstance(work, tuple):
        return tuple(map_tensors(part, change) for part in work)
    if is_dataclass(work) and not isinstance(work, type):
        changed = {}
        for part in fields(work):
            value = getattr(work, part.name)
            new_value = map_tensors(value, change)
            if new_value is not value:
                changed[part.name] = new_value
        return replace(work, **changed) if changed else work
    return work


def size_of(work: Any, device: torch.device | None = None) -> int:
    """Return the bytes that the tensors of `work` take in a buffer. device: count those on it alone; None = all."""
    sizes: list[int] = []

    def add(tensor: Tensor) -> Tensor:
        if device is None or tensor.device == device:
            sizes.append(_aligned(tensor.nbytes))
        return tensor

    map_tensors(work, add)
    return sum(sizes)


def _in_places(work: Any, block: Tensor, device: torch.device, use: Callable[[Tensor, Tensor], Tensor]) -> Any:
    """Return `work` with each tensor on `device` replaced by `use(its place in the block, tensor)`."""
    start = 0

    def change(tensor: Tensor) -> Tensor:
        nonlocal start
        if tensor.device != device:
            return tensor
        place = block[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        start += _aligned(tensor.nbytes)
        return use(place, tensor)

    return map_tensors(work, change)


class Buffer:
    """A reusable block of device memory that holds the tensors of one batch of work.

    released: event after which the consumer no longer reads the buffer; None = it never has.
    """

    def __init__(self) -> None:
        self._block: Tensor | None = None
        self.released: torch.cuda.Event | None = None

    @property
    def num_bytes(self) -> int:
        return 0 if self._block is None else self._block.numel()

    def fill(self, work: Any, device: torch.device) -> Any:
        """Return `work` with its tensors on `device` copied into this buffer, on the current stream.

        The buffer grows if it is too small, so that it no longer allocates after the largest batch.
        Other tensors are kept as they are.
        """
        block = self.block(size_of(work, device), device)
        return _in_places(work, block, device, lambda place, tensor: place.copy_(tensor))

    def block(self, num_bytes: int, device: torch.device) -> Tensor:
        """Return the first `num_bytes` of the buffer, uint8; it grows if it is too small."""
        if num_bytes > self.num_bytes:
            self._block = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        if self._block is None:
            return torch.empty(0, dtype=torch.uint8)
        return self._block[:num_bytes]

    def views(self, layout: Any) -> Any:
        """Return the tensors that lie in the buffer.

        layout: tensors of their shapes and types on the meta device, in the order of `fill`.
        """
        assert self._block is not None, "nothing was received"
        return _in_places(layout, self._block, META, lambda place, tensor: place)


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


class Ring:
    """Buffers that are used again.

    limit: bytes that free buffers and the one to be taken may have together; None = no limit.
    """

    def __init__(self, limit: int | None = None) -> None:
        self._limit = limit
        self._lock = threading.Lock()  # the producer takes buffers while the consumer gives them back
        self._free: list[Buffer] = []
        self.buffers: list[Buffer] = []

    def take(self, num_bytes: int) -> tuple[Buffer, list[Buffer]]:
        """Return a buffer that no one uses, and buffers that are dropped to stay within the limit.

        It is the smallest free one that is large enough, else the largest, which then grows.
        """
        with self._lock:
            return self._take(num_bytes)

    def _take(self, num_bytes: int) -> tuple[Buffer, list[Buffer]]:
        free = sorted(self._free, key=lambda buffer: buffer.num_bytes)
        fitting = [buffer for buffer in free if buffer.num_bytes >= num_bytes]
        buffer = fitting[0] if fitting else (free[-1] if free else self._new())
        others = [other for other in free if other is not buffer]
        needed = max(num_bytes, buffer.num_bytes)
        dropped: list[Buffer] = []
        while others and self._limit is not None and needed + sum(other.num_bytes for other in others) > self._limit:
            dropped.append(others.pop())
        self._free = others
        self.buffers = [kept for kept in self.buffers if kept not in dropped]
        return buffer, dropped

    def give_back(self, buffer: Buffer, released: torch.cuda.Event | None) -> None:
        """Return a buffer to the ring. released: event after which its contents are no longer read."""
        buffer.released = released
        with self._lock:
            self._free.append(buffer)

    def _new(self) -> Buffer:
        buffer = Buffer()
        self.buffers.append(buffer)
        return buffer


@dataclass(frozen=True)
class Handover:
    """Work on its way from the producer to the consumer.

    ready: event after which the work may be read; None on a CPU.
    buffer: where it lies; None on a CPU, where the tensors themselves are handed over.
    """

    work: Any
    ready: torch.cuda.Event | None = None
    buffer: Buffer | None = None


class SideStream:
    """CUDA stream of a producer that shares a GPU with its consumer; does nothing on a CPU.

    Results are copied from the producer's own memory to buffers that are reused, so that the
    allocator never waits for another stream and the memory of the look-ahead is bounded. The copy
    reads and writes each byte once, which is far less than what the producer itself reads.
    """

    def __init__(self, device: torch.device, priority: int = 0, limit: int | None = None) -> None:
        """Create the stream; must be called by the consumer's thread.

        Only that thread knows its current stream, on which weights may still be loading.
        priority: CUDA's stream priority; lower numbers run first. limit: of the buffers, in bytes.
        """
        self._device = device
        self._ring = Ring(limit)
        self._received: list[Buffer] = []
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device, priority=priority)
            self._stream.wait_stream(torch.cuda.current_stream(device))

    def enter_thread(self) -> None:
        """Make the device current in the calling thread.

        A new thread starts on GPU 0 and would create a CUDA context there.
        """
        if self._stream is not None:
            torch.cuda.set_device(self._device)

    @contextmanager
    def current(self) -> Iterator[None]:
        """Context manager in which the calling thread queues its work on this stream."""
        if self._stream is None:
            yield
            return
        with torch.cuda.stream(self._stream):
            yield

    @property
    def device(self) -> torch.device:
        return self._device

    def free_buffer(self, num_bytes: int) -> Buffer:
        """Return a buffer that may be overwritten on this stream; the stream waits for its last reader."""
        buffer, dropped = self._ring.take(num_bytes)
        for unused in (buffer, *dropped):
            # The memory of a dropped buffer may be allocated again on this stream.
            if self._stream is not None and unused.released is not None:
                self._stream.wait_event(unused.released)
        return buffer

    def hand_over(self, result: Any) -> Handover:
        """Copy a result to a buffer, within `current`, and return it for the consumer."""
        stream = self._stream
        if stream is None:
            return Handover(result)
        buffer = self.free_buffer(size_of(result, self._device))
        work = buffer.fill(result, self._device)
        return Handover(work, stream.record_event(), buffer)

    def receive(self, handover: Handover) -> Any:
        """Return the work; on a GPU the caller's stream waits for it, not the host."""
        if handover.ready is not None:
            torch.cuda.current_stream(self._device).wait_event(handover.ready)
        if handover.buffer is not None:
            self._received.append(handover.buffer)
        return handover.work

    def release(self) -> None:
        """Let the buffers of all work received so far be used again.

        Work that the caller has queued on its current stream may still read them.
        """
        if not self._received:
            return
        released = None if self._stream is None else torch.cuda.current_stream(self._device).record_event()
        for buffer in self._received:
            self._ring.give_back(buffer, released)
        self._received = []
