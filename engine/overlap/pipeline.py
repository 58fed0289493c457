"""The scheduler: prepares work in order on one side while the other side consumes it.

Batches, their order and all results are the same in every placement and for every look-ahead; only
the time at which work is done differs.
"""

import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import torch

from engine.host.pinned_copy import TimeMark
from engine.overlap.look_ahead import Limits, LookAhead
from engine.overlap.step_clock import DATA, DRAFT_PARTS, TARGET_FORWARD, TRANSFER, WAIT, StepClock
from engine.overlap.streams import Handover, SideStream
from engine.overlap.thread_turns import Turns, TurnsEnded

PRODUCER_THREAD = "overlap-producer"

Item = TypeVar("Item")
Work = TypeVar("Work")


class Producer(Generic[Item, Work]):
    """The side of a pipeline that prepares work.

    items: what is prepared, in order.
    prepare: prepares one item. It may call `Pipeline.pause` between parts of its work.
    num_bytes: returns the memory that the work of an item takes.
    """

    def __init__(
        self, items: Iterable[Item], prepare: Callable[[Item], Work], num_bytes: Callable[[Item], int] = lambda item: 0
    ) -> None:
        self.items = items
        self.prepare = prepare
        self.num_bytes = num_bytes


class Pipeline(ABC, Generic[Item, Work]):
    """Base class: iterates over prepared work, in order, one batch at a time.

    Use it as a context manager, which ends the producer's thread. Work stays valid until `release`
    is called after it was taken. An error of the producer is raised in place of its result.
    """

    def __init__(self, clock: StepClock) -> None:
        self._clock = clock

    def __enter__(self) -> "Pipeline[Item, Work]":
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def __iter__(self) -> "Pipeline[Item, Work]":
        return self

    @abstractmethod
    def __next__(self) -> Work:
        """Return the next work. Raises StopIteration after the last one."""

    def _read(self, items: Iterator[Item]) -> tuple[Item] | None:
        """Return the next item in a tuple, or None at the end."""
        with self._clock.host_span(DATA):
            for item in items:
                return (item,)
        return None

    def close(self) -> None:
        """End the producer; work that was prepared but not taken is dropped."""

    def set_limits(self, limits: Limits) -> None:
        """Change the limits of the look-ahead. Serial execution has none."""

    def release(self) -> None:
        """Let the memory of all work taken so far be used again.

        Operations that the caller has already queued on its current stream may still read it.
        """

    def pause(self) -> None:
        """Let the consumer run, if the two sides run in turns; called by `prepare`."""

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Context manager for a part of the consumer's step, which is timed as `name`.

        Before it, the producer gets its turn, if the two sides run in turns.
        """
        with self._clock.span(name):
            yield


class SerialPipeline(Pipeline[Item, Work]):
    """Prepares each item when it is asked for, in the caller's thread; the reference."""

    def __init__(self, producer: Producer[Item, Work], clock: StepClock) -> None:
        super().__init__(clock)
        self._producer = producer
        self._items = iter(producer.items)

    def __next__(self) -> Work:
        with self._clock.host_span(DATA):
            item = next(self._items)
        with self._clock.span(TARGET_FORWARD):
            return self._producer.prepare(item)


class _End:
    """Marks the end of the work. error: what ended it; None = all items are prepared."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error


class ThreadedPipeline(Pipeline[Item, Work]):
    """Prepares items in a thread of its own and, on a GPU, on a stream of its own.

    The producer runs whenever the limits of the look-ahead allow it. It must not issue collectives
    if the consumer does, because their order would depend on timing; see `TurnsPipeline`.
    """

    def __init__(
        self, producer: Producer[Item, Work], clock: StepClock, limits: Limits, device: torch.device, priority: int = 0
    ) -> None:
        """Start the producer's thread; it prepares nothing before the first item is asked for.

        priority: of the producer's CUDA stream; lower numbers run first.
        """
        super().__init__(clock)
        self._producer = producer
        self._state = LookAhead(limits)
        self._changed = threading.Condition()
        self._side = SideStream(device, priority, limits.num_bytes)
        self._finished: deque[Handover | _End] = deque()
        self._num_begun = 0
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name=PRODUCER_THREAD, daemon=True)
        self._thread.start()

    def set_limits(self, limits: Limits) -> None:
        with self._changed:
            self._state.limits = limits
            self._changed.notify_all()

    def __next__(self) -> Work:
        with self._clock.span(WAIT):
            with self._changed:
                self._state.ask()
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._finished)
                finished = self._finished[0]
                if isinstance(finished, _End):
                    self._state.num_asked -= 1
                    raise finished.error or StopIteration
                self._finished.popleft()
                self._state.take()
                self._changed.notify_all()
            work = self._side.receive(finished)
        return work

    def release(self) -> None:
        self._side.release()

    def close(self) -> None:
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._thread.join()
        self._finished.append(_End())

    def _run(self) -> None:
        """Prepare all items; the body of the producer's thread."""
        end = _End()
        try:
            self._side.enter_thread()
            self._wait_until_asked()
            items = iter(self._producer.items)
            while (item := self._read(items)) is not None:
                if not self._begin(self._producer.num_bytes(item[0])):
                    return
                handover = self._prepare(item[0])
                self._finish(handover)
        except BaseException as error:
            end = _End(error)
        self._end_with(end)

    def _wait_until_asked(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._state.num_asked > 0 or self._is_closed)

    def _begin(self, num_bytes: int) -> bool:
        """Wait until the next item may begin; returns False if the pipeline was closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_closed or self._state.may_begin(self._num_begun, num_bytes))
            if self._is_closed:
                return False
            self._state.begin(self._num_begun, num_bytes)
            self._num_begun += 1
            return True

    def _prepare(self, item: Item) -> Handover:
        with self._side.current():
            with self._clock.span(TARGET_FORWARD, self._num_begun - 1):
                work = self._producer.prepare(item)
            with self._clock.span(TRANSFER):
                return self._side.hand_over(work)

    def _finish(self, handover: Handover) -> None:
        with self._changed:
            self._finished.append(handover)
            self._state.finish(self._num_begun - 1)
            self._changed.notify_all()

    def _end_with(self, end: _End) -> None:
        with self._changed:
            self._finished.append(end)
            self._changed.notify_all()


class TurnsPipeline(Pipeline[Item, Work]):
    """Prepares items in a thread that runs only in turns which the consumer gives it.

    For producers that issue collectives. Control passes at the beginning of each part of the
    consumer's step and at the producer's pauses. The order in which a rank issues operations
    follows from the number of batches, parts and pauses alone. It is therefore the same on every
    rank, if the ranks have equally many batches and `num_bytes` returns the same for all of them.
    On a GPU the operations still run at the same time, because issuing them does not wait for them.
    """

    def __init__(
        self,
        producer: Producer[Item, Work],
        clock: StepClock,
        limits: Limits,
        device: torch.device,
        priority: int = 0,
        num_pauses: int = 0,
    ) -> None:
        """Start the producer's thread, which waits for its first turn.

        num_pauses: how often preparing an item calls `pause`. Turns are spread evenly over the
        parts of the consumer's step.
        """
        super().__init__(clock)
        self._producer = producer
        self._items = iter(producer.items)
        self._state = LookAhead(limits)
        self._side = SideStream(device, priority, limits.num_bytes)
        self._turns = Turns()
        self._turns_per_item = num_pauses + 1
        self._due = 0  # turns, in units of 1 / len(DRAFT_PARTS)
        self._num_begun = 0
        self._next_item: tuple[Item] | None = None
        self._current: tuple[Item] | None = None
        self._began: TimeMark | None = None
        self._finished: deque[Handover | _End] = deque()
        self._thread = threading.Thread(target=self._run, name=PRODUCER_THREAD, daemon=True)
        self._thread.start()

    def set_limits(self, limits: Limits) -> None:
        self._state.limits = limits

    def __next__(self) -> Work:
        self._state.ask()
        try:
            while not self._finished:
                if not self._turn() and not self._finished:
                    raise StopIteration
            finished = self._finished[0]
            if isinstance(finished, _End):
                assert finished.error is not None, "the end of the items is not queued"
                raise finished.error
        except BaseException:
            self._state.num_asked -= 1
            raise
        self._finished.popleft()
        self._state.take()
        with self._clock.span(WAIT):
            work = self._side.receive(finished)
        return work

    def release(self) -> None:
        self._side.release()

    def close(self) -> None:
        self._turns.end()
        self._thread.join()

    def pause(self) -> None:
        if threading.current_thread() is not self._thread:
            return
        assert self._began is not None, "only `prepare` pauses"
        self._clock.add(TARGET_FORWARD, self._began, self._num_begun - 1)
        self._turns.give_back()
        self._began = self._clock.mark()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        self._due += self._turns_per_item
        while self._due >= len(DRAFT_PARTS):
            self._due -= len(DRAFT_PARTS)
            if not self._turn():
                self._due = 0
        with self._clock.span(name):
            yield

    def _turn(self) -> bool:
        """Let the producer run to its next pause or the end of its item.

        Returns False if it has nothing to do: all items are prepared, or the look-ahead is full.
        """
        if self._current is None and not self._begin():
            return False
        return self._turns.give()

    def _begin(self) -> bool:
        """Give the producer its next item, and return whether there is one that may begin."""
        if self._finished and isinstance(self._finished[-1], _End):
            return False
        if self._next_item is None:
            self._next_item = self._read_item()
        if self._next_item is None:
            return False
        num_bytes = self._producer.num_bytes(self._next_item[0])
        if not self._state.may_begin(self._num_begun, num_bytes):
            return False
        self._state.begin(self._num_begun, num_bytes)
        self._num_begun += 1
        self._current = self._next_item
        self._next_item = None
        return True

    def _read_item(self) -> tuple[Item] | None:
        """Return the next item, or None at the end; an error is queued behind the work before it."""
        try:
            return self._read(self._items)
        except BaseException as error:
            self._finished.append(_End(error))
            return None

    def _run(self) -> None:
        """Prepare one item after the other; the body of the producer's thread."""
        try:
            self._side.enter_thread()
            self._turns.wait()
            while True:
                self._finish(self._prepare())
                self._turns.give_back()
        except TurnsEnded:
            pass
        except BaseException as error:
            self._finished.append(_End(error))
        finally:
            self._turns.leave()

    def _finish(self, finished: Handover | _End) -> None:
        self._finished.append(finished)
        self._state.finish(self._num_begun - 1)
        self._current = None

    def _prepare(self) -> Handover | _End:
        assert self._current is not None
        try:
            with self._side.current():
                self._began = self._clock.mark()
                work = self._producer.prepare(self._current[0])
                self._clock.add(TARGET_FORWARD, self._began, self._num_begun - 1)
                with self._clock.span(TRANSFER):
                    return self._side.hand_over(work)
        except TurnsEnded:
            raise
        except BaseException as error:
            return _End(error)
