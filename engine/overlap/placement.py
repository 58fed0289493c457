"""The choice between executing target and draft one after the other or at the same time."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from engine.config.sections import COLOCATED, SERIAL
from engine.config.strict import ConfigError
from engine.host.pinned_copy import TimeMark
from engine.overlap.look_ahead import Limits
from engine.overlap.pipeline import Item, Pipeline, Producer, SerialPipeline, ThreadedPipeline, TurnsPipeline, Work
from engine.overlap.step_clock import StepClock
from engine.parallel.mesh import World

# NCCL orders the operations of several communicators by the order in which the host issues them
# (NCCL_LAUNCH_ORDER_IMPLICIT, which the launcher sets).
NCCL_WITH_LAUNCH_ORDER = (2, 26)
WARM_UP_STEPS = 2  # of each phase that `MeasuredPlacement` compares; kernels are compiled, buffers grow
MEASURED_STEPS = 4
PHASE_STEPS = WARM_UP_STEPS + MEASURED_STEPS
LEAST_GAIN = 0.02  # share of a step; less is within the noise of the measurement
USABLE_MEMORY = 0.95


@dataclass(frozen=True)
class Settings:
    """How a pipeline runs.

    placement: `serial` or `colocated`.
    has_collectives: whether the producer issues collectives, so that it must run in turns.
    num_pauses: pauses of the producer per item; see `TurnsPipeline`.
    priority: of the producer's CUDA stream; lower numbers run first.
    """

    placement: str
    limits: Limits
    has_collectives: bool = False
    num_pauses: int = 0
    priority: int = 0


def open_pipeline(
    producer: Producer[Item, Work], clock: StepClock, settings: Settings, device: torch.device
) -> Pipeline[Item, Work]:
    """Return the pipeline of a placement."""
    if settings.placement == SERIAL:
        return SerialPipeline(producer, clock)
    if settings.has_collectives:
        return TurnsPipeline(producer, clock, settings.limits, device, settings.priority, settings.num_pauses)
    return ThreadedPipeline(producer, clock, settings.limits, device, settings.priority)


def can_run_in_turns(num_ranks: int, device: torch.device) -> bool:
    """Return whether a target that `num_ranks` ranks share can run at the same time as the draft."""
    return num_ranks == 1 or device.type != "cuda" or torch.cuda.nccl.version() >= NCCL_WITH_LAUNCH_ORDER


def check_colocated(placement: str, num_ranks: int, device: torch.device) -> None:
    """Raise ConfigError if ranks that share the target cannot run it at the same time as the draft.

    num_ranks: ranks that share one copy of the target.
    """
    if placement == COLOCATED and not can_run_in_turns(num_ranks, device):
        found, needed = (".".join(map(str, version)) for version in (torch.cuda.nccl.version(), NCCL_WITH_LAUNCH_ORDER))
        problem = f"{num_ranks} ranks share the target, which needs NCCL {needed} or newer, and this one is {found}"
        raise ConfigError(f"{problem}; set it to serial", key="overlap.placement", value=COLOCATED)


class SwitchingPipeline(Pipeline[Item, Work]):
    """Prepares items serially, until `look_ahead` is called between two steps."""

    def __init__(
        self,
        producer: Producer[Item, Work],
        clock: StepClock,
        open_colocated: Callable[[Producer[Item, Work]], Pipeline[Item, Work]],
    ) -> None:
        """open_colocated: returns a pipeline for the rest of the items."""
        super().__init__(clock)
        self._rest = Producer(iter(producer.items), producer.prepare, producer.num_bytes)
        self._open_colocated = open_colocated
        self._current: Pipeline[Item, Work] = SerialPipeline(self._rest, clock)

    def look_ahead(self) -> None:
        """Continue with the colocated pipeline."""
        self._current = self._open_colocated(self._rest)

    def __next__(self) -> Work:
        return next(self._current)

    def close(self) -> None:
        self._current.close()

    def set_limits(self, limits: Limits) -> None:
        self._current.set_limits(limits)

    def release(self) -> None:
        self._current.release()

    def pause(self) -> None:
        self._current.pause()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        with self._current.part(name):
            yield


class MeasuredPlacement:
    """Chooses between serial and colocated execution from the first steps of a run.

    The run begins serially. After `WARM_UP_STEPS` and `MEASURED_STEPS` steps it continues with a
    look-ahead for as many steps, and then with whichever was faster; with a look-ahead of 0, the
    target still runs on a stream of its own, but not ahead. The result of the run is the same in
    any case. If the memory would not suffice for both sides at once, the run stays serial.

    chosen: the placement after these steps; None = not known yet.
    """

    def __init__(
        self,
        pipeline: SwitchingPipeline,
        num_batches: int,
        world: World,
        note: Callable[[str], None],
        memory: "PeakMemory",
    ) -> None:
        """Start serially.

        num_batches: of the look-ahead, if that is faster. memory: measures the pipeline's `prepare`.
        """
        self._pipeline = pipeline
        self._num_batches = num_batches
        self._world = world
        self._note = note
        self._memory = memory
        self._num_steps = 0
        self.chosen: str | None = None
        self._began: TimeMark | None = None
        self._serial: list[tuple[TimeMark, TimeMark]] = []
        self._colocated: list[tuple[TimeMark, TimeMark]] = []

    def begin_step(self) -> None:
        """Mark the beginning of a step; what happens between steps, such as saving, is not measured."""
        if self._num_steps < 2 * PHASE_STEPS:
            self._began = TimeMark(self._world.device)

    def end_step(self) -> None:
        """Count a step, and change the placement if it is time; then a collective that waits for the device."""
        if self._num_steps >= 2 * PHASE_STEPS:
            return
        assert self._began is not None, "no step has begun"
        phase = self._serial if self._num_steps < PHASE_STEPS else self._colocated
        phase.append((self._began, TimeMark(self._world.device)))
        self._num_steps += 1
        if self._num_steps == PHASE_STEPS:
            self._begin_look_ahead()
        elif self._num_steps == 2 * PHASE_STEPS:
            self._decide()

    def _begin_look_ahead(self) -> None:
        missing = max(self._world.gather(self._memory.missing_bytes(self._num_batches)))
        self._memory.stop()
        if missing <= 0:
            self._pipeline.look_ahead()
            return
        problem = f"running both sides at once would need {missing / 2**30:,.1f} GiB more memory"
        self._note(f"  overlap: serial, because {problem}")
        self._num_steps = 2 * PHASE_STEPS
        self.chosen = SERIAL

    def _decide(self) -> None:
        if self._world.device.type == "cuda":
            torch.cuda.synchronize(self._world.device)
        serial_s = _mean_s(self._serial)
        colocated_s = _mean_s(self._colocated)
        is_faster = self._world.decide(lambda: colocated_s < serial_s * (1 - LEAST_GAIN))
        if not is_faster:
            self._pipeline.set_limits(Limits(0))
        self.chosen = COLOCATED if is_faster else SERIAL
        self._note(f"  overlap: {self.chosen}; a step takes {serial_s:.3g} s serially and {colocated_s:.3g} s colocated")


def _mean_s(steps: Sequence[tuple[TimeMark, TimeMark]]) -> float:
    measured = steps[WARM_UP_STEPS:]
    return sum(ended.seconds_since(began) for began, ended in measured) / len(measured)


class PeakMemory:
    """Measures the peak memory of the two sides of serial execution on a GPU; does nothing on a CPU."""

    def __init__(self, device: torch.device) -> None:
        """Begin; earlier peaks do not count."""
        self._device = device
        self._is_on = device.type == "cuda"
        self._preparing = self._other = self._work = 0
        if self._is_on:
            torch.cuda.reset_peak_memory_stats(device)

    def measured(self, prepare: Callable[[Item], Work]) -> Callable[[Item], Work]:
        def call(item: Item) -> Work:
            if not self._is_on:
                return prepare(item)
            self._other = max(self._other, torch.cuda.max_memory_allocated(self._device))
            before = torch.cuda.memory_allocated(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
            work = prepare(item)
            self._preparing = max(self._preparing, torch.cuda.max_memory_allocated(self._device) - before)
            self._work = max(self._work, torch.cuda.memory_allocated(self._device) - before)
            return work

        return call

    def stop(self) -> None:
        self._is_on = False

    def missing_bytes(self, num_batches: int) -> int:
        """Return the bytes by which the GPU is too small to run both sides at once; at most 0 if it is not.

        num_batches: of the look-ahead, each of which is held in addition.
        """
        if not self._is_on:
            return 0
        total = torch.cuda.mem_get_info(self._device)[1]
        needed = self._other + self._preparing + num_batches * self._work
        return needed - int(total * USABLE_MEMORY)
