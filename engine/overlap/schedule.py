"""The schedule of a training run: micro-batches in order, timed parts, placement and checks."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, Protocol

import torch

from engine.config.sections import AUTO, COLOCATED, SERIAL, STORED, OverlapSection
from engine.host.files import write_text
from engine.overlap.collective_order import CollectiveOrder
from engine.overlap.look_ahead import Limits
from engine.overlap.pipeline import Item, Pipeline, Producer, Work
from engine.overlap.placement import MeasuredPlacement, PeakMemory, Settings, SwitchingPipeline, can_run_in_turns, open_pipeline
from engine.overlap.step_clock import StepClock, TraceEvent
from engine.parallel.mesh import World

HIGH = -1  # CUDA's priority; lower numbers run first, and streams have 0 otherwise


@contextmanager
def _after_and_before(stream: torch.cuda.Stream) -> Iterator[None]:
    """Context manager in which a stream is current; it runs after earlier work and before later work."""
    outer = torch.cuda.current_stream(stream.device)
    stream.wait_stream(outer)
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        outer.wait_stream(stream)


def gather_trace(clock: StepClock, rank: int, world: World) -> list[TraceEvent]:
    """Return the timeline of all ranks of a world; a collective. rank: this rank, as the timeline shows it."""
    return [event for own in world.gather(clock.trace_events(rank)) for event in own]


def write_trace(path: Path, clock: StepClock, world: World, others: Sequence[TraceEvent] = ()) -> None:
    """Write the timeline of all ranks for ui.perfetto.dev; a collective.

    others: events of ranks outside of this world.
    """
    events = [*others, *gather_trace(clock, world.rank, world)]
    if world.is_main:
        write_text(path, json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))


def limits_of(look_ahead: int, section: OverlapSection) -> Limits:
    """Return the limits of a look-ahead. look_ahead: micro-batches."""
    num_bytes = None if section.look_ahead_mb is None else section.look_ahead_mb << 20
    return Limits(look_ahead, num_bytes)


class Groups(Protocol):
    """Parts of the work of a side, between which it can pause.

    num_pauses: places between two parts.
    """

    num_pauses: int

    def calling(self, function: Callable[[], None]) -> AbstractContextManager[None]:
        """Context manager in which the side calls a function at every such place."""
        ...


@dataclass(frozen=True)
class Side:
    """The side that prepares micro-batches.

    placement: `serial`, `colocated` or `auto`. look_ahead: micro-batches.
    num_ranks: ranks that prepare a micro-batch together, with collectives if there are several.
    groups: parts of its work; None = it does not pause.
    reads_store: whether it reads hidden states that were captured earlier.
    """

    placement: str
    look_ahead: int
    num_ranks: int = 1
    groups: Groups | None = None
    reads_store: bool = False


class Schedule(Generic[Item, Work]):
    """Runs the two sides of training, and accounts for the time of every part of a step.

    clock: the times of this rank.
    """

    def __init__(
        self,
        pipeline: Pipeline[Item, Work],
        clock: StepClock,
        world: World,
        measured: MeasuredPlacement | None = None,
        order: CollectiveOrder | None = None,
        draft_stream: torch.cuda.Stream | None = None,
        placement: str | None = None,
    ) -> None:
        """Create a schedule.

        placement: `serial`, `colocated`, `split` or `stored`; None = `measured` chooses it.
        measured: chooses the placement. order: of this rank's collectives, if it is checked.
        draft_stream: on which the draft runs; None = the current stream.
        """
        self.clock = clock
        self._pipeline = pipeline
        self._world = world
        self._measured = measured
        self._order = order
        self._draft_stream = draft_stream
        self._placement = placement
        self._on_exit = ExitStack()

    @classmethod
    def on_same_ranks(
        cls,
        producer: Producer[Item, Work],
        side: Side,
        section: OverlapSection,
        world: World,
        clock: StepClock,
        note: Callable[[str], None],
    ) -> "Schedule[Item, Work]":
        """Return a schedule for a target that runs on the draft's ranks; nothing runs before the first `take`.

        clock: takes the times of this rank. note: writes a line to the log.
        """
        limits = limits_of(side.look_ahead, section)
        placement = side.placement
        if placement == AUTO and (side.look_ahead == 0 or not can_run_in_turns(side.num_ranks, world.device)):
            placement = SERIAL
        memory = PeakMemory(world.device) if placement == AUTO else None
        prepare = producer.prepare if memory is None else memory.measured(producer.prepare)
        order = CollectiveOrder() if section.check_order else None
        if order is not None:
            prepare = order.recorded(prepare)
        measurable = Producer(producer.items, prepare, producer.num_bytes)
        settings = Settings(
            placement=placement,
            limits=limits,
            has_collectives=side.num_ranks > 1,
            num_pauses=0 if side.groups is None else side.groups.num_pauses,
            priority=HIGH if section.priority == "target" else 0,
        )
        pipeline: Pipeline[Item, Work]
        measured = None
        if memory is None:
            pipeline = open_pipeline(measurable, clock, settings, world.device)
        else:
            colocated = replace(settings, placement=COLOCATED)
            switching = SwitchingPipeline(measurable, clock, lambda rest: open_pipeline(rest, clock, colocated, world.device))
            measured = MeasuredPlacement(switching, limits.batches, world, note, memory)
            pipeline = switching
        draft_stream = None
        if section.priority == "draft" and world.device.type == "cuda":
            draft_stream = torch.cuda.Stream(world.device, priority=HIGH)
        known = None if measured is not None else placement
        if side.reads_store:
            known = STORED
        schedule = cls(pipeline, clock, world, measured, order, draft_stream, known)
        if side.groups is not None and side.num_ranks > 1 and placement != SERIAL:
            schedule._on_exit.enter_context(side.groups.calling(pipeline.pause))
        return schedule

    @property
    def chosen(self) -> str | None:
        """The placement that the first steps have shown to be faster; None = not measured, or not yet."""
        return None if self._measured is None else self._measured.chosen

    @property
    def placement(self) -> str | None:
        """Where micro-batches are prepared: `serial`, `colocated`, `split` or `stored`; None = not chosen yet."""
        return self._placement or self.chosen

    def __enter__(self) -> "Schedule[Item, Work]":
        if self._draft_stream is not None:
            self._on_exit.enter_context(_after_and_before(self._draft_stream))
        self._on_exit.enter_context(self._pipeline)
        if self._order is not None:
            self._on_exit.enter_context(self._order.recording())
        return self

    def __exit__(self, *error: Any) -> None:
        self._on_exit.__exit__(*error)

    def take(self, step: int, count: int) -> list[Work]:
        """Begin a step and return its micro-batches; those of earlier steps may no longer be used."""
        self.clock.step = step
        if self._measured is not None:
            self._measured.begin_step()
        self._pipeline.release()
        return [next(self._pipeline) for _ in range(count)]

    def part(self, name: str) -> AbstractContextManager[None]:
        """Context manager for a part of the draft's step, which is timed as `name`."""
        return self._pipeline.part(name)

    def end_step(self) -> None:
        """End a step. Raises CollectiveOrderError; a collective if the order is checked."""
        if self._measured is not None:
            self._measured.end_step()
        if self._order is not None:
            self._order.compare(self._world)
