"""The choice between executing target and draft one after the other or at the same time."""

from collections.abc import Callable
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


class MeasuredPlacement:
    """Chooses between serial and colocated execution from the first steps of a run.

    The run begins serially. After `WARM_UP_STEPS` and `MEASURED_STEPS` steps it continues with a
    look-ahead for as many steps, and then with whichever was faster. The result of the run is the
    same in any case. If the memory would not suffice for both sides at once, it stays serial.
    """

    def __init__(
        self, pipeline: Pipeline, limits: Limits, world: World, note: Callable[[str], None], memory: "PeakMemory"
    ) -> None:
        """Start serially.

        pipeline: one that can look ahead. limits: of its look-ahead, if that is faster.
        memory: measures the pipeline's `prepare`.
        """
        self._pipeline = pipeline
        self._limits = limits
        self._world = world
        self._note = note
        self._num_steps = 0
        self._marks: list[TimeMark] = []
        self._memory = memory
        pipeline.set_limits(Limits(0))

    def end_step(self) -> None:
        """Count a step, and change the placement if it is time; then a collective that waits for the device."""
        phase = WARM_UP_STEPS + MEASURED_STEPS
        if self._num_steps >= 2 * phase:
            return
        self._num_steps += 1
        if self._num_steps in (WARM_UP_STEPS, phase, phase + WARM_UP_STEPS, 2 * phase):
            self._marks.append(TimeMark(self._world.device))
        if self._num_steps == phase:
            self._begin_look_ahead()
        elif self._num_steps == 2 * phase:
            self._decide()

    def _begin_look_ahead(self) -> None:
        missing = max(self._world.gather(self._memory.missing_bytes(self._limits.batches)))
        if missing > 0:
            self._note(
                f"  overlap: serial, because running both sides at once would need {missing / 2**30:,.1f} GiB more memory"
            )
            self._num_steps = 2 * (WARM_UP_STEPS + MEASURED_STEPS)
            return
        self._memory.stop()
        self._pipeline.set_limits(self._limits)

    def _decide(self) -> None:
        if self._world.device.type == "cuda":
            torch.cuda.synchronize(self._world.device)
        serial_s = self._marks[1].seconds_since(self._marks[0]) / MEASURED_STEPS
        colocated_s = self._marks[3].seconds_since(self._marks[2]) / MEASURED_STEPS
        is_faster = self._world.decide(lambda: colocated_s < serial_s * (1 - LEAST_GAIN))
        if not is_faster:
            self._pipeline.set_limits(Limits(0))
        chosen = COLOCATED if is_faster else SERIAL
        self._note(f"  overlap: {chosen}; a step takes {serial_s:.3g} s serially and {colocated_s:.3g} s colocated")


class PeakMemory:
    """Measures the peak memory of the two sides of serial execution on a GPU; does nothing on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._is_on = device.type == "cuda"
        self._preparing = self._other = self._work = 0

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
