"""The scheduler of target forwards and draft steps: the target may run ahead while the draft trains.

Batches, their order and every result are the same as one after the other; only when the target runs changes.
"""

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, TypeVar

import torch

Item = TypeVar("Item")
Work = TypeVar("Work")


def run_ahead(items: Iterable[Item], prepare: Callable[[Item], Work], depth: int, device: torch.device) -> Iterator[Work]:
    """`prepare(item)` for each item, in order, at most `depth` items before they are asked for; 0 = when asked.

    Ahead, `prepare` runs in a thread of its own and, on a GPU, on a side stream that the consumer's stream waits for.
    An error in `prepare` is raised where its result would have been.
    """
    if depth == 0:
        yield from map(prepare, items)
        return
    results: queue.SimpleQueue[_Result] = queue.SimpleQueue()
    room, stop = threading.Semaphore(depth), threading.Event()
    worker = threading.Thread(target=_produce, args=(items, prepare, results, room, stop, device), daemon=True)
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
                _hand_over(result, torch.cuda.current_stream(device))
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


def _produce(items, prepare, results: queue.SimpleQueue, room: threading.Semaphore, stop: threading.Event, device) -> None:
    try:
        stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        for item in items:
            room.acquire()
            if stop.is_set():
                return
            with torch.cuda.stream(stream):
                work = prepare(item)
                ready = stream and stream.record_event()
            results.put(_Result(work, ready))
        results.put(_END)
    except BaseException as error:
        results.put(_Result(error=error))


def _hand_over(result: _Result, stream: torch.cuda.Stream) -> None:
    """Order `stream` after the result, and keep the result's memory from reuse until `stream` is done with it."""
    stream.wait_event(result.ready)
    for tensor in _tensors(result.work):
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
