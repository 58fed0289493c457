"""The two ends of a pipeline whose producers and consumers are different ranks.

A consumer asks for each batch with a credit, for which it has a free buffer. Producers begin a
batch when they have its credit, so that the look-ahead of every consumer stays within its limits.
All batches have one order (`Sides.producer_of`), in which every producer prepares and sends and
every consumer receives. The oldest batch that has not arrived is therefore the next one of both its
producer and its consumer, and no cycle of ranks can wait for each other.
"""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic

import torch

from engine.host.pinned_copy import TimeMark
from engine.overlap.bridge import CREDIT, SECONDS, Arrival, Bridge
from engine.overlap.look_ahead import Limits, LookAhead
from engine.overlap.pipeline import Item, Pipeline, Work
from engine.overlap.step_clock import TARGET_FORWARD, TRANSFER, WAIT, StepClock
from engine.overlap.streams import Buffer, Handover, SideStream, size_of


@dataclass(frozen=True)
class _OnItsWay(Generic[Item]):
    """A batch for which a buffer waits.

    layout: tensors on the meta device, as they lie in the buffer.
    arrival, seconds: its states, and the time of the target's forward.
    """

    item: Item
    layout: Any
    buffer: Buffer
    arrival: Arrival
    seconds: Arrival


class SplitPipeline(Pipeline[Item, Work]):
    """The consumer's end: receives what other ranks have prepared."""

    def __init__(
        self,
        items: Iterable[Item],
        layout: Callable[[Item], Any],
        finish: Callable[[Item, Any], Work],
        clock: StepClock,
        limits: Limits,
        bridge: Bridge,
        device: torch.device,
    ) -> None:
        """Prepare to receive; nothing is asked for before the first item.

        layout: returns tensors on the meta device like those that arrive for an item.
        finish: makes the work of an item from what has arrived.
        """
        super().__init__(clock)
        self._items = iter(items)
        self._layout = layout
        self._finish = finish
        self._state = LookAhead(limits)
        self._bridge = bridge
        self._side = SideStream(device, limit=limits.num_bytes)
        self._next: tuple[Item] | None = None
        self._num_begun = 0
        self._on_its_way: deque[_OnItsWay[Item]] = deque()

    def __next__(self) -> Work:
        self._state.ask()
        self._ask_for_batches()
        if not self._on_its_way:
            self._state.num_asked -= 1
            raise StopIteration
        batch = self._on_its_way.popleft()
        with self._clock.span(WAIT):
            batch.arrival.wait()
        sides = self._bridge.sides
        # Each target rank prepares a batch for every draft rank at this ratio.
        share = sides.num_draft / sides.num_target
        self._clock.add_seconds(TARGET_FORWARD, batch.seconds.wait().item() * share)
        with self._clock.span(TRANSFER):
            work = self._finish(batch.item, batch.buffer.views(batch.layout))
        self._state.finish(self._state.num_taken)
        self._state.take()
        self._ask_for_batches()
        return self._side.receive(Handover(work, None, batch.buffer))

    def release(self) -> None:
        self._side.release()
        self._ask_for_batches()

    def _ask_for_batches(self) -> None:
        """Send a credit for every batch that the look-ahead admits, and wait for none."""
        while self._state.num_asked > 0:
            if self._next is None:
                self._next = self._read(self._items)
            if self._next is None:
                return
            (item,) = self._next
            layout = self._layout(item)
            num_bytes = size_of(layout)
            if not self._state.may_begin(self._num_begun, num_bytes):
                return
            self._state.begin(self._num_begun, num_bytes)
            self._on_its_way.append(self._receive(item, layout, num_bytes))
            self._num_begun += 1
            self._next = None

    def _receive(self, item: Item, layout: Any, num_bytes: int) -> _OnItsWay[Item]:
        """Let the next batch be prepared, and begin to receive it."""
        source = self._bridge.sides.producer_of(self._bridge.rank, self._num_begun)
        buffer = self._side.free_buffer(num_bytes)
        with self._side.current():
            arrival = self._bridge.receive_data(buffer.block(num_bytes, self._side.device), source)
        seconds = self._bridge.receive_number(source, SECONDS)
        self._bridge.send_number(self._num_begun, source, CREDIT)
        return _OnItsWay(item, layout, buffer, arrival, seconds)


def send_batches(
    batches: Iterable[tuple[int, int, Item]],
    prepare: Callable[[Item], Any],
    bridge: Bridge,
    clock: StepClock,
    device: torch.device,
) -> None:
    """The producer's end: prepare and send batches in the order of `Sides.batches_of`.

    batches: draft rank, index and item of each. prepare: makes the states to send, on `device`.
    One batch may be on its way while the next one is prepared.
    """
    buffers = (Buffer(), Buffer())
    sending: deque[Arrival] = deque()
    forwards: deque[tuple[TimeMark, TimeMark]] = deque(maxlen=4)
    for number, (draft_rank, index, item) in enumerate(batches):
        credit = bridge.receive_number(draft_rank, CREDIT).wait().item()
        assert credit == index, f"a credit for batch {credit:.0f}, expected {index}"
        began = clock.mark()
        states = prepare(item)
        ended = clock.mark()
        clock.add(TARGET_FORWARD, began, index)
        if len(sending) == len(buffers):
            sending.popleft().wait()
        buffer = buffers[number % 2]
        buffer.fill(states, device)
        block = buffer.block(size_of(states, device), device)
        sending.append(bridge.send_data(block, draft_rank))
        forwards.append((began, ended))
        bridge.send_number(_latest_s(forwards), draft_rank, SECONDS)
    while sending:
        sending.popleft().wait()


def _latest_s(forwards: Sequence[tuple[TimeMark, TimeMark]]) -> float:
    """Return the time of the latest forward that the device has passed; 0 if there is none yet."""
    for began, ended in reversed(forwards):
        if ended.is_passed():
            return ended.seconds_since(began)
    return 0.0
