"""The log of a training run; metrics are read from the device one step late, without host sync."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from engine.batch import DraftOutput, MicroBatch
from engine.config.sections import METRICS
from engine.host.pinned_copy import HostCopy, TimeMark
from engine.overlap.step_clock import TARGET_FORWARD, StepClock, draft_seconds, efficiency, split_ratio
from engine.parallel.mesh import PendingSum, World
from engine.parallel.zero import ZeroDraft
from engine.runtime.fault_watch import FaultWatch
from engine.runtime.metrics import MetricsFile, StepMetrics, used_memory

SECONDS_AFTER_ERROR = 2.0  # time that a failed run waits for metrics still being copied
SECONDS_BETWEEN_LOOKS = 0.01


@dataclass(frozen=True)
class LogSettings:
    """Settings of a training log.

    output_dir: folder of `metrics.jsonl`. every_steps: optimizer steps between lines.
    first_step: steps already taken by an earlier run. num_steps: number of the last step.
    """

    output_dir: Path
    every_steps: int
    first_step: int
    num_steps: int


@dataclass(frozen=True)
class _PendingLine:
    """A line of the log whose sums are still being copied to the host.

    num_steps: steps since the last line. loss_divisor: as in `StepMetrics.values`.
    paused_s: time in which nothing was trained. grad_norm: of the last step; None = unknown.
    memory_gib: of this rank.
    """

    step: int
    learning_rate: float
    num_steps: int
    loss_divisor: int
    sums: PendingSum
    began: TimeMark
    ended: TimeMark
    paused_s: float
    grad_norm: HostCopy | None
    memory_gib: float


class TrainLog:
    """Writer of step metrics to `metrics.jsonl`, the monitors and a line for the progress bar.

    A step's metrics are read after the next step has been issued, at a flush, or at the end of the
    `with` block. After an error, metrics that arrive within `SECONDS_AFTER_ERROR` are still
    written; other ranks may never send theirs.
    """

    def __init__(self, settings: LogSettings, zero: ZeroDraft, world: World, watch: FaultWatch, clock: StepClock) -> None:
        self._settings = settings
        self._zero = zero
        self._world = world
        self._watch = watch
        self._clock = clock
        self._metrics = StepMetrics(zero.objective.num_steps, zero.objective.step_weights, world.device)
        self._file: MetricsFile | None = None
        if world.is_main:
            self._file = MetricsFile(settings.output_dir / METRICS, settings.first_step)
        self._pending: _PendingLine | None = None
        self._last_step = settings.first_step
        self._last_mark = TimeMark(world.device)
        self._paused_s = 0.0  # since the last line
        self.line = "loss ..."
        self.split_ratio: str | None = None  # of the last line, see `split_ratio`

    def __enter__(self) -> "TrainLog":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            self.flush()
        else:
            self._flush_what_arrives()

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Context manager around work that is not training, whose time does not count as that of a step."""
        began_s = time.perf_counter()
        yield
        self._paused_s += time.perf_counter() - began_s

    def state(self) -> Any:
        """Return what this rank has not logged yet, for a checkpoint; waits for the device."""
        return {"last_step": self._last_step, "sums": self._metrics.sums.cpu()}

    def restore(self, states: Sequence[Any]) -> None:
        """Continue with what the ranks of an earlier run had not logged, in any number of them."""
        if not states:
            return
        self._last_step = states[0]["last_step"]
        if self._world.is_main:  # sums over ranks may begin on any of them
            for state in states:
                self._metrics.sums += state["sums"].to(self._metrics.sums.device)

    def count(self, step: int, output: DraftOutput, micro: MicroBatch) -> None:
        """Add one micro-batch of a step, without a host sync."""
        self._metrics.add(output, micro.num_tokens, micro.num_left_out)
        self._watch.add(step, output, micro)

    def end_step(self, step: int) -> None:
        """End a step: write pending metrics, and start to read those of this step if it is logged.

        A collective if the step is logged. Raises NonFiniteError if an earlier step had a fault
        that ends the run.
        """
        self._write_pending()
        self._watch.read(until_step=step - 1)
        self._watch.count_skipped(step, self._zero.num_skipped_steps)
        is_last = step == self._settings.num_steps
        if step % self._settings.every_steps == 0 or is_last:
            self._pending = self._start_line(step)
        if is_last:
            self.flush()

    def flush(self) -> None:
        """Write the metrics of all finished steps and check them for faults; waits for the device.

        Raises NonFiniteError as `end_step` does.
        """
        self._write_pending()
        self._watch.read(until_step=self._settings.num_steps)

    def _write_pending(self) -> None:
        pending = self._pending
        if pending is not None:
            self._pending = None
            self._write(pending)

    def _start_line(self, step: int) -> _PendingLine:
        mark = TimeMark(self._world.device)
        grad_norm = self._zero.grad_norm
        num_steps = step - self._last_step
        parts = 1
        if not self._zero.objective.is_normalised_globally:
            parts = self._world.size * self._zero.accumulation_steps
        line = _PendingLine(
            step=step,
            learning_rate=self._zero.learning_rate,
            loss_divisor=num_steps * parts,
            num_steps=num_steps,
            sums=self._metrics.start_read(self._world, self._clock.take_seconds()),
            began=self._last_mark,
            ended=mark,
            paused_s=self._paused_s,
            grad_norm=None if grad_norm is None else HostCopy(grad_norm),
            memory_gib=used_memory(self._world.device) / 2**30,
        )
        self._last_step = step
        self._last_mark = mark
        self._paused_s = 0.0
        return line

    def _write(self, pending: _PendingLine) -> None:
        sums = pending.sums.wait()
        metrics = self._metrics.values(sums, pending.loss_divisor)
        interval_s = pending.ended.seconds_since(pending.began) - pending.paused_s
        tokens_per_s = metrics["tokens"] / interval_s
        step_s = interval_s / pending.num_steps
        parts_s = self._metrics.seconds(sums, pending.num_steps * self._world.size)
        self.split_ratio = split_ratio(parts_s) or self.split_ratio
        metrics |= {"step_s": step_s, "parts_s": parts_s, "overlap_efficiency": efficiency(parts_s, step_s)}
        metrics |= {"step": pending.step, "lr": pending.learning_rate, "tokens_per_s": tokens_per_s}
        grad_norm = None if pending.grad_norm is None else pending.grad_norm.wait().item()
        metrics |= {"grad_norm": grad_norm, "memory_gib": pending.memory_gib}
        self.line = _progress_line(metrics)
        if self._file is not None:
            self._file.write(metrics)
            scalars = {name: value for name, value in metrics.items() if isinstance(value, float)}
            if pending.step > self._file.last_step:  # monitors have earlier steps already, with the same values
                self._zero.write_monitors(scalars, pending.step)

    def _flush_what_arrives(self) -> None:
        """Write the pending line if its sums arrive within `SECONDS_AFTER_ERROR`."""
        deadline = time.monotonic() + SECONDS_AFTER_ERROR
        while self._pending is not None and time.monotonic() < deadline:
            if self._pending.sums.is_ready():
                self._write_pending()
            else:
                time.sleep(SECONDS_BETWEEN_LOOKS)


def _progress_line(metrics: dict[str, Any]) -> str:
    accuracy = " ".join(f"{share:.0%}" for share in metrics["accuracy_per_step"])
    parts_s = metrics["parts_s"]
    sides = f"target {parts_s[TARGET_FORWARD]:.2g} s, draft {draft_seconds(parts_s):.2g} s of {metrics['step_s']:.2g} s"
    return f"loss {metrics['loss']:.3f}  accuracy {accuracy}  {metrics['tokens_per_s']:,.0f} tokens/s  {sides}"
