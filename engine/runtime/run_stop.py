"""The end of a run before its last step, on which all ranks agree."""

import time
from pathlib import Path

import torch

from engine.batch import to_device
from engine.parallel.mesh import PendingSum, World
from engine.runtime.progress import Progress

STOP = "STOP"  # file in the output folder; a run that finds it stops
FILE_REASON = "the file"
SECONDS_BETWEEN_LOOKS = 1.0
EXIT_CODE = 75  # of a run that was stopped by a signal, is saved and can be resumed (EX_TEMPFAIL of sysexits.h)
EXIT_CODE_OF_FILE = 76  # of one that was stopped by the file; a scheduler shall not continue it by itself


class RunStoppedError(Exception):
    """A run has stopped before its last step, because it was asked to, and is saved.

    step: number of its last step. code: exit code of the job.
    """

    def __init__(self, step: int, last_step: int, reason: str) -> None:
        super().__init__(f"stopped by {reason} after step {step} of {last_step}, which is saved")
        self.step = step
        self.code = EXIT_CODE_OF_FILE if reason.startswith(FILE_REASON) else EXIT_CODE


class StopAgreement:
    """Lets all ranks stop after the same step, without a host sync.

    Signals reach the ranks of a job at different times. The ranks therefore sum a flag after each
    step, and read it a step later.
    """

    def __init__(self, world: World, progress: Progress, output_dir: Path) -> None:
        """Create it. progress: holds the request of this rank. output_dir: where a file named STOP stops the run."""
        self._world = world
        self._progress = progress
        self._file = output_dir / STOP
        self._looked_s = 0.0
        self._pending: PendingSum | None = None

    def end_step(self) -> bool:
        """Return whether the run shall stop after this step, the same on every rank; a collective."""
        self._look_for_file()
        is_asked = self._progress.stop_reason is not None
        if self._world.size == 1:
            return is_asked
        pending = self._pending
        flag = to_device(torch.tensor([int(is_asked)], dtype=torch.int32), self._world.device)
        self._pending = self._world.start_sum(flag)
        return pending is not None and int(pending.wait()) > 0

    def reason(self) -> str:
        """Return what has asked for the stop, and remove the file that has; a collective."""
        reasons = [reason for reason in self._world.gather(self._progress.stop_reason) if reason is not None]
        if self._world.is_main:
            self._file.unlink(missing_ok=True)
        return reasons[0]

    def _look_for_file(self) -> None:
        now_s = time.monotonic()
        if self._world.is_main and now_s - self._looked_s > SECONDS_BETWEEN_LOOKS:
            self._looked_s = now_s
            if self._file.exists():
                self._progress.ask_to_stop(f"{FILE_REASON} {self._file}")
