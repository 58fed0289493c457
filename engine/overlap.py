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
    """`prepare(item)` for each item, in order, up to `depth` items before they are asked for; 0 = when asked.

    Ahead, `prepare` runs in a thread of its own and, on a GPU, on a side stream that the consumer's stream waits for.
    An error in `prepare` is raised where its result would have been.
    """
    if depth == 0:
        yield from map(prepare, items)
        return
    results: queue.Queue = queue.Queue(maxsize=depth)
    stop = threading.Event()
    worker = threading.Thread(target=_produce, args=(items, prepare, results, stop, device), daemon=True)
    worker.start()
    try:
        while (result := results.get()) is not _END:
            if result.error is not None:
                raise result.error
            if result.ready is not None:
                _hand_over(result, torch.cuda.current_stream(device))
            yield result.work
    finally:
        stop.set()
        worker.join()


@dataclass(frozen=True)
class _Result:
    work: Any = None
    ready: torch.cuda.Event | None = None
    error: BaseException | None = None


_END = _Result()


def _produce(items, prepare, results: queue.Queue, stop: threading.Event, device: torch.device) -> None:
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    try:
        for item in items:
            with torch.cuda.stream(stream):
                result = _Result(prepare(item), stream and stream.record_event())
            if not _put(results, result, stop):
                return
        _put(results, _END, stop)
    except BaseException as error:
        _put(results, _Result(error=error), stop)


def _put(results: queue.Queue, result: _Result, stop: threading.Event) -> bool:
    while not stop.is_set():
        try:
            results.put(result, timeout=0.2)
            return True
        except queue.Full:
            continue
    return False


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
