"""The loop over optimizer steps: it takes micro-batches, trains, logs, saves, and stops if it is asked to."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

from engine.host.telemetry import ProgressBar
from engine.models.normaliser import Normaliser
from engine.overlap.schedule import Schedule
from engine.parallel.mesh import World
from engine.parallel.zero import ZeroDraft
from engine.runtime.checkpoint import Checkpoint, CheckpointWriter, DataState
from engine.runtime.progress import Progress
from engine.runtime.run_stop import RunStoppedError, StopAgreement
from engine.runtime.train_log import TrainLog


@dataclass(frozen=True)
class RunSpan:
    """Optimizer steps of a run.

    done: those that an earlier run has taken. last: number of the last step.
    checkpoint: from which it resumes; None = it begins.
    """

    done: int
    last: int
    checkpoint: Checkpoint | None = None

    @property
    def data_state(self) -> DataState | None:
        """Position of the data after the steps that are done; None = the beginning."""
        return None if self.checkpoint is None else self.checkpoint.data_state


@dataclass(frozen=True)
class Segment:
    """Consecutive optimizer steps, between which nothing but training and saving happens."""

    first: int
    last: int

    @property
    def num_steps(self) -> int:
        return self.last - self.first + 1

    @classmethod
    def after(cls, step: int, every_steps: int, last: int) -> "Segment":
        """Return the steps after `step` up to the next multiple of `every_steps`, or to the step `last`."""
        first = step + 1
        return cls(first, min(last, -(-first // every_steps) * every_steps))


@dataclass(frozen=True)
class Annealing:
    """The end of a run, in which the learning rate falls linearly.

    last: last step of the run. num_steps: steps in which it falls; 0 = it does not.
    """

    last: int
    num_steps: int

    def factor(self, step: int) -> float:
        """Return what the learning rate of a step is multiplied with: 1 before the end, and 1 / (num_steps + 1) at the end."""
        return min(1.0, (self.last + 1 - step) / (self.num_steps + 1))


@dataclass
class TrainingLoop:
    """Takes the steps of a run, a segment at a time.

    open_schedule: returns the schedule of a segment's micro-batches, given the position of the data
    before it. is_saved: whether the run writes checkpoints. every_steps: optimizer steps between them.
    annealing: of the learning rate. position: of the data after the last step.
    """

    zero: ZeroDraft
    world: World
    span: RunSpan
    normalise: Normaliser
    open_schedule: Callable[[Segment, DataState | None], AbstractContextManager[Schedule[Any, Any]]]
    log: TrainLog
    bar: ProgressBar
    progress: Progress
    agreement: StopAgreement
    writer: CheckpointWriter
    every_steps: int
    annealing: Annealing

    def __post_init__(self) -> None:
        self.position = self.span.data_state
        self._saved_step = self.span.done

    @property
    def is_saved(self) -> bool:
        return self.world.shares_output and self.every_steps > 0

    def run(self, segment: Segment) -> None:
        """Take the steps of a segment. Raises RunStoppedError, after a checkpoint was saved, if it was asked to stop."""
        with self.open_schedule(segment, self.position) as schedule:
            schedule.clock.on_part = self.progress.mark
            for step in range(segment.first, segment.last + 1):
                self._step(step, schedule)
                is_last = step == self.span.last
                is_asked = not is_last and self.agreement.end_step()
                is_due = self.every_steps > 0 and step % self.every_steps == 0
                if is_due or is_last or is_asked:
                    self.save(step)
                if is_asked:
                    self._stop_after(step)

    def _step(self, step: int, schedule: Schedule[Any, Any]) -> None:
        self.progress.begin_step(step)
        taken = schedule.take(step, self.zero.accumulation_steps)
        micros = [micro for micro, _ in taken]
        self.zero.rate_factor = self.annealing.factor(step)
        for micro, norms in zip(micros, self.normalise(micros), strict=True):
            self.log.count(step, self.zero.train(micro, norms, schedule.part), micro)
        self.log.placement = schedule.placement
        self.log.end_step(step)
        schedule.end_step()
        self.bar.move_to(step, self.log.line)
        self.position = taken[-1][1]

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Context manager around work between segments that is not training; its beginning is a collective."""
        self.log.flush()
        self.log.write_warnings()
        with self.progress.pause(), self.log.pause():
            yield

    def stop_if_asked(self, step: int) -> None:
        """Raise RunStoppedError, after a checkpoint was saved, if a rank was asked to stop; a collective that waits."""
        if self.world.any_rank([self.progress.stop_reason is not None])[0]:
            self.save(step)
            self._stop_after(step)

    def save(self, step: int) -> None:
        """Begin to write a checkpoint after a step, unless this was done or the run has none; a collective."""
        if not self.is_saved or self._saved_step == step:
            return
        assert self.position is not None, "no step was taken"
        self._saved_step = step
        with self.progress.pause():
            self.log.flush()
            self.log.write_warnings()  # a resumed run continues their counts
            self.writer.save(step, self.position, self.log.state())

    def _stop_after(self, step: int) -> NoReturn:
        """Raise RunStoppedError when the checkpoint is complete. Raises ValueError if it cannot be written."""
        reason = self.agreement.reason()
        if not self.is_saved:
            raise ValueError(f"stopped by {reason} after step {step}, which is not saved, because this run has no checkpoints")
        with self.progress.pause():
            is_complete = self.writer.finish()
        if not is_complete:
            raise ValueError(f"stopped by {reason} after step {step}, which could not be saved; the warning above says why")
        raise RunStoppedError(step, self.span.last, reason)
