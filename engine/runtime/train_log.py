"""The log of a training run; metrics are read from the device one step late, without host sync."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from engine.batch import DraftOutput, MicroBatch
from engine.config.sections import METRICS, SHOWN_TTT_STEPS
from engine.host.hardware import HardwareReading, HardwareSampler
from engine.host.pinned_copy import HostCopy, TimeMark
from engine.overlap.bottleneck import time_shares
from engine.overlap.step_clock import StepClock, efficiency, split_ratio
from engine.parallel.mesh import PendingSum, World
from engine.parallel.zero import ZeroDraft
from engine.runtime.fault_watch import FaultWatch
from engine.runtime.metrics import MetricsFile, StepMetrics, used_memory
from engine.runtime.run_warnings import LoggedInterval, RunWarnings

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
    memory_gib, reading: of this rank. placement: as in `Schedule.placement`, at this step.
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
    reading: HardwareReading
    placement: str | None


class TrainLog:
    """Writer of step metrics to `metrics.jsonl`, the monitors and a line for the progress bar.

    A step's metrics are read after the next step has been issued, at a flush, or at the end of the
    `with` block. After an error, metrics that arrive within `SECONDS_AFTER_ERROR` are still
    written; other ranks may never send theirs.

    placement: of the schedule, as in `Schedule.placement`.
    """

    def __init__(
        self,
        settings: LogSettings,
        zero: ZeroDraft,
        world: World,
        watch: FaultWatch,
        clock: StepClock,
        hardware: HardwareSampler,
        warnings: RunWarnings,
    ) -> None:
        self._settings = settings
        self._zero = zero
        self._world = world
        self._watch = watch
        self._clock = clock
        self._hardware = hardware
        self._warnings = warnings
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
        self.placement: str | None = None

    def __enter__(self) -> "TrainLog":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            self.flush()
            self.write_warnings()
        else:
            self._flush_what_arrives()

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Context manager around work that is not training, whose time does not count as that of a step."""
        began_s = time.perf_counter()
        with self._hardware.pause():
            yield
        self._paused_s += time.perf_counter() - began_s

    def state(self) -> Any:
        """Return what this rank has not logged yet, for a checkpoint; waits for the device."""
        self._metrics.measure({"joules": self._hardware.take_joules(), **self._clock.take_seconds()})
        now = TimeMark(self._world.device)
        sums = self._metrics.state()
        seconds = now.seconds_since(self._last_mark) - self._paused_s
        return {"last_step": self._last_step, "sums": sums, "seconds": seconds}

    def restore(self, states: Sequence[Any]) -> None:
        """Continue with what the ranks of an earlier run had not logged, in any number of them; a collective."""
        if not states:
            return
        self._last_step = states[0]["last_step"]
        last_logged = self._world.decide(lambda: 0 if self._file is None else self._file.last_kept_step)
        if last_logged > self._last_step:  # the earlier run had ended there, and has logged these steps after its checkpoint
            self._last_step = last_logged
            return
        self._paused_s = -states[0].get("seconds", 0.0)  # of steps that the earlier run has taken
        if self._world.is_main:  # sums over ranks may begin on any of them
            for state in states:
                self._metrics.restore(state["sums"])

    def count(self, step: int, output: DraftOutput, micro: MicroBatch) -> None:
        """Add one micro-batch of a step, without a host sync."""
        self._metrics.add(output, micro.num_tokens, micro.num_left_out)
        self._metrics.measure({"peak_s": micro.peak_s})
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

    def finish(self, step: int) -> None:
        """Log the steps up to the last one of a run that has ended early; a collective."""
        if self._last_step < step:
            self._write_pending()
            self._pending = self._start_line(step)
        self.flush()

    def flush(self) -> None:
        """Write the metrics of all finished steps and check them for faults; waits for the device.

        Raises NonFiniteError as `end_step` does.
        """
        self._write_pending()
        self._watch.read(until_step=self._settings.num_steps)

    def write_warnings(self) -> None:
        """Write the warnings of all ranks so far; a collective that waits."""
        self._warnings.write()

    def _write_pending(self) -> None:
        pending = self._pending
        if pending is not None:
            self._pending = None
            self._write(pending)

    def _start_line(self, step: int) -> _PendingLine:
        mark = TimeMark(self._world.device)
        grad_norm = self._zero.grad_norm
        num_steps = step - self._last_step
        num_means = self._zero.objective.divisor_scope.num_means(self._world.size, self._zero.accumulation_steps)
        reading = self._hardware.take()
        self._metrics.measure({"joules": reading.joules, **self._clock.take_seconds()})
        line = _PendingLine(
            step=step,
            learning_rate=self._zero.learning_rate,
            loss_divisor=num_steps * num_means,
            num_steps=num_steps,
            sums=self._metrics.start_read(self._world),
            began=self._last_mark,
            ended=mark,
            paused_s=self._paused_s,
            grad_norm=None if grad_norm is None else HostCopy(grad_norm),
            memory_gib=used_memory(self._world.device) / 2**30,
            reading=reading,
            placement=self.placement,
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
        metrics |= {"placement": pending.placement}
        metrics |= {"step": pending.step, "lr": pending.learning_rate, "tokens_per_s": tokens_per_s}
        grad_norm = None if pending.grad_norm is None else pending.grad_norm.wait().item()
        metrics |= {"grad_norm": grad_norm, "memory_gib": pending.memory_gib}
        metrics |= pending.reading.metrics() | self._rates(sums, metrics["tokens"], interval_s)
        if grad_norm is not None:
            self._watch.judge_grad_norm(pending.step, grad_norm)
        self.line = _progress_line(metrics)
        if self._file is not None:
            self._file.write(metrics)
            scalars = {name: value for name, value in metrics.items() if isinstance(value, float)}
            if pending.step > self._file.last_step:  # monitors have earlier steps already, with the same values
                self._zero.write_monitors(scalars, pending.step)
        self._warnings.add(pending.step, LoggedInterval(interval_s, step_s, parts_s, pending.reading, pending.placement))

    def _rates(self, sums: torch.Tensor, num_tokens: int, interval_s: float) -> dict[str, float | None]:
        """Return what all ranks together have used of energy and of their peak FLOP/s; None = unknown."""
        on_host = self._metrics.on_host(sums)
        joules = on_host["joules"]
        peak_s = on_host["peak_s"]
        return {
            "joules_per_million_tokens": None if joules is None or not num_tokens else joules / num_tokens * 1e6,
            "mfu": None if peak_s is None else peak_s / (interval_s * self._world.size),
        }

    def _flush_what_arrives(self) -> None:
        """Write the pending line if its sums arrive within `SECONDS_AFTER_ERROR`."""
        deadline = time.monotonic() + SECONDS_AFTER_ERROR
        while self._pending is not None and time.monotonic() < deadline:
            if self._pending.sums.is_ready():
                self._write_pending()
            else:
                time.sleep(SECONDS_BETWEEN_LOOKS)


def _progress_line(metrics: dict[str, Any]) -> str:
    per_step = metrics["accuracy_per_step"]
    accuracy = " ".join(f"{per_step[step]:.0%}" for step in SHOWN_TTT_STEPS if step < len(per_step))
    parts = [
        f"loss {metrics['loss']:.3f}",
        f"accuracy {accuracy}",
        f"acceptance {metrics['simulated_acceptance_length']:.2f}",
        f"{metrics['tokens_per_s']:,.0f} tokens/s",
        _time_line(metrics),
        f"{metrics['memory_gib']:.1f} GiB",
    ]
    if metrics["mfu"] is not None:
        parts.insert(4, f"MFU {metrics['mfu']:.0%}")
    return "  ".join(parts)


def _time_line(metrics: dict[str, Any]) -> str:
    """Return the shares of a step's time; that of a target that runs at the same time comes last."""
    shares = time_shares(metrics["parts_s"], metrics["step_s"], metrics["placement"])
    target = f"target {shares.target:.0%}"
    draft_side = f"draft {shares.draft:.0%}, waiting {shares.waiting:.0%}, rest {shares.rest:.0%}"
    return f"{draft_side}, overlapped by {target}" if shares.overlaps else f"{target}, {draft_side}"
