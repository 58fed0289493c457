"""Scheduler of target forwards and draft steps: the target may run ahead while the draft trains.

Batches, their order and all results are the same as in serial execution; only the timing of the
target's forwards changes.
"""

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, TypeVar

import torch

from engine.config.strict import ConfigError

Item = TypeVar("Item")
Work = TypeVar("Work")
RUN_AHEAD = "overlap.run_ahead"


def check_run_ahead(depth: int, target_ranks: int, device: torch.device) -> None:
    """Raise ConfigError if the target would run ahead while ranks shard it over NCCL.

    The worker thread would issue the target's collectives and the main thread those of ZeRO, on
    different communicators and in an order that differs between ranks. NCCL does not allow that, so
    the job would hang. gloo supports it.

    depth: batches to run ahead. target_ranks: ranks that share one copy of the target.
    """
    if depth and target_ranks > 1 and device.type == "cuda":
        problem = (
            f"is not possible on GPUs while {target_ranks} ranks share the target, because their collectives could deadlock"
        )
        raise ConfigError(f"{problem}; set it to 0, or capture first and train from target.store", key=RUN_AHEAD, value=depth)


def run_ahead(items: Iterable[Item], prepare: Callable[[Item], Work], depth: int, device: torch.device) -> Iterator[Work]:
    """Yield `prepare(item)` for each item, in order, prepared at most `depth` items in advance.

    With a depth of 0, each item is prepared when it is requested. Otherwise `prepare` runs in a
    separate thread and, on a GPU, on a side stream. That stream waits for the work already queued
    on the consumer's stream, such as the loading of weights, and the consumer's stream waits for
    each result. An error in `prepare` is raised in place of its result.
    """
    if depth == 0:
        yield from map(prepare, items)
        return
    results: queue.SimpleQueue[_Result] = queue.SimpleQueue()
    room = threading.Semaphore(depth)
    stop = threading.Event()
    side = _SideStream(device)
    worker = threading.Thread(target=_produce, args=(items, prepare, results, room, stop, side), daemon=True)
    worker.start()
    try:
        while True:
            room.release()
            result = results.get()
            if result is _END:
                return
            if result.error is not None:
                raise result.error
            if result.ready is not None:
                _hand_over(result.work, result.ready, torch.cuda.current_stream(device))
            yield result.work
    finally:
        stop.set()
        room.release()
        worker.join()


@dataclass(frozen=True)
class _Result:
    work: Any = None
    ready: torch.cuda.Event | None = None
    error: BaseException | None = None


_END = _Result()


class _SideStream:
    """CUDA stream of the worker thread; does nothing on a CPU."""

    def __init__(self, device: torch.device) -> None:
        """Create the stream; must be called by the consumer's thread.

        Only that thread knows its current stream, on which weights may still be loading.
        """
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)
            self._stream.wait_stream(torch.cuda.current_stream(device))

    def enter_thread(self) -> None:
        """Make the device current in the calling thread.

        A new thread starts on GPU 0 and would create a CUDA context there.
        """
        if self._stream is not None:
            torch.cuda.set_device(self._device)

    def run(self, prepare: Callable[[Item], Work], item: Item) -> "_Result":
        """Prepare an item on the stream, and record an event for when its result is ready."""
        with torch.cuda.stream(self._stream):
            work = prepare(item)
        ready = None if self._stream is None else self._stream.record_event()
        return _Result(work, ready)


def _produce(
    items: Iterable[Item],
    prepare: Callable[[Item], Work],
    results: "queue.SimpleQueue[_Result]",
    room: threading.Semaphore,
    stop: threading.Event,
    side: _SideStream,
) -> None:
    try:
        side.enter_thread()
        for item in items:
            room.acquire()
            if stop.is_set():
                return
            results.put(side.run(prepare, item))
        results.put(_END)
    except BaseException as error:
        results.put(_Result(error=error))


def _hand_over(work: Any, ready: torch.cuda.Event, stream: torch.cuda.Stream) -> None:
    """Make `stream` wait for the result, and keep the result's memory until `stream` is done."""
    stream.wait_event(ready)
    for tensor in _tensors(work):
        tensor.record_stream(stream)


def _tensors(work: Any) -> Iterator[torch.Tensor]:
    if isinstance(work, torch.Tensor):
        if work.is_cuda:
            yield work
    elif isinstance(work, list | tuple):
        for part in work:
            yield from _tensors(part)
    elif is_dataclass(work):
        for part in fields(work):
            yield from _tensors(getattr(work, part.name))
