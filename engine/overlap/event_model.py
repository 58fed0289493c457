"""Discrete-event model of the scheduler: when every batch is prepared, sent and trained on.

It uses the rule of the look-ahead and the order of batches that the runtime uses. The planner
predicts with it how long a step takes.
"""

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from engine.overlap.bridge import Sides
from engine.overlap.look_ahead import Limits, LookAhead


@dataclass(frozen=True)
class BatchCost:
    """Cost of one micro-batch.

    target_s: its forward. transfer_s: its way to the draft's rank. draft_s: its training step.
    num_bytes: memory that it takes while it waits.
    """

    target_s: float
    draft_s: float
    transfer_s: float = 0.0
    num_bytes: int = 0


@dataclass
class Timeline:
    """Result of the model.

    step_ends_s: end of every optimizer step.
    target_s, draft_s: time that all ranks of a side have worked.
    most_bytes: largest look-ahead of any draft rank, in bytes.
    taken: draft rank and index of every batch, in the order in which they were taken.
    """

    step_ends_s: list[float] = field(default_factory=list)
    target_s: float = 0.0
    draft_s: float = 0.0
    most_bytes: int = 0
    taken: list[tuple[int, int]] = field(default_factory=list)

    def step_s(self, first: int) -> float:
        """Return the mean time of a step from step `first` on, which is not the first."""
        return (self.step_ends_s[-1] - self.step_ends_s[first - 1]) / (len(self.step_ends_s) - first)


class Deadlock(RuntimeError):
    """No side can go on."""


class EventModel:
    """Model of a run in which the target has ranks of its own.

    A draft rank admits its batches in order. The ranks of a copy of the target begin an admitted
    batch each at the same time, and end at the same time.
    The draft's ranks end every step at the same time. A target rank prepares its next batch while
    its last one is on its way.
    """

    def __init__(
        self,
        sides: Sides,
        limits: Limits,
        num_steps: int,
        per_step: int,
        cost: Callable[[int, int], BatchCost],
    ) -> None:
        """per_step: micro-batches of a draft rank per step. cost: of a batch, by draft rank and index."""
        self._sides = sides
        self._num_steps = num_steps
        self._per_step = per_step
        self._cost = cost
        self._states = [LookAhead(limits) for _ in range(sides.num_draft)]
        self._replicas = [
            _Replica(sides, first, num_steps * per_step) for first in range(0, sides.num_target, sides.replica_size)
        ]
        self._num_credits = [0] * sides.num_draft
        self._link_free_s = [0.0] * sides.num_target
        self._held = [0] * sides.num_draft  # batches of the current step that a draft rank has taken
        self._num_trained = 0
        self._events: list[tuple[float, int, Callable[[float], None]]] = []
        self._num_events = 0
        self._timeline = Timeline()

    def run(self) -> Timeline:
        """Run the model to the end. Raises Deadlock if it stops before."""
        for state in self._states:
            state.ask()
        now = 0.0
        self._begin_batches(now)
        while self._events:
            now, _, event = heapq.heappop(self._events)
            event(now)
            self._take_batches(now)
            self._begin_batches(now)
        if len(self._timeline.step_ends_s) < self._num_steps:
            raise Deadlock(f"after {len(self._timeline.step_ends_s)} of {self._num_steps} steps, at {now:.3g} s")
        return self._timeline

    def _at(self, time_s: float, event: Callable[[float], None]) -> None:
        self._num_events += 1
        heapq.heappush(self._events, (time_s, self._num_events, event))

    def _begin_batches(self, now: float) -> None:
        for rank in range(self._sides.num_draft):
            self._give_credits(rank)
        for replica in self._replicas:
            batches = replica.next_batches()
            if replica.is_busy or not batches or not all(index < self._num_credits[rank] for rank, index in batches):
                continue
            costs = [self._cost(rank, index) for rank, index in batches]
            self._timeline.target_s += sum(cost.target_s for cost in costs)
            replica.is_busy = True
            end_s = now + max(cost.target_s for cost in costs)
            self._at(end_s, partial(self._send, replica))

    def _give_credits(self, rank: int) -> None:
        """Admit the batches of a draft rank, in order, as far as its limits allow."""
        state = self._states[rank]
        while self._num_credits[rank] < self._num_steps * self._per_step:
            index = self._num_credits[rank]
            num_bytes = self._cost(rank, index).num_bytes
            if not state.may_begin(index, num_bytes):
                return
            state.begin(index, num_bytes)
            self._num_credits[rank] += 1
            self._timeline.most_bytes = max(self._timeline.most_bytes, state.bytes_ahead)

    def _send(self, replica: "_Replica", now: float) -> None:
        for rank, index in replica.next_batches():
            producer = self._sides.producer_of(rank, index) - self._sides.num_draft
            arrived_s = max(now, self._link_free_s[producer]) + self._cost(rank, index).transfer_s
            self._link_free_s[producer] = arrived_s
            self._at(arrived_s, partial(self._arrive, rank, index))
        replica.num_done += 1
        replica.is_busy = False

    def _arrive(self, rank: int, index: int, now: float) -> None:
        self._states[rank].finish(index)

    def _take_batches(self, now: float) -> None:
        for rank, state in enumerate(self._states):
            while state.num_asked > state.num_taken and state.is_ready:
                self._timeline.taken.append((rank, state.num_taken))
                state.take()
                self._held[rank] += 1
                if self._held[rank] == self._per_step:
                    self._train(now, rank)
                else:
                    state.ask()

    def _train(self, now: float, rank: int) -> None:
        last = self._states[rank].num_taken
        seconds = sum(self._cost(rank, index).draft_s for index in range(last - self._per_step, last))
        self._timeline.draft_s += seconds
        self._at(now + seconds, self._end_training)

    def _end_training(self, now: float) -> None:
        self._num_trained += 1
        if self._num_trained < self._sides.num_draft:
            return
        self._num_trained = 0
        self._timeline.step_ends_s.append(now)
        if len(self._timeline.step_ends_s) == self._num_steps:
            return
        for rank, state in enumerate(self._states):
            self._held[rank] = 0
            state.ask()


class _Replica:
    """A copy of the target, whose ranks prepare one batch each at the same time."""

    def __init__(self, sides: Sides, first: int, num_batches: int) -> None:
        self._by_rank = [sides.batches_of(first + rank, num_batches) for rank in range(sides.replica_size)]
        self.num_done = 0
        self.is_busy = False

    def next_batches(self) -> list[tuple[int, int]]:
        """Return draft rank and index of the batches that are prepared next; empty at the end."""
        return [batches[self.num_done] for batches in self._by_rank if self.num_done < len(batches)]
