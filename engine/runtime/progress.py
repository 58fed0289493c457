"""What the main thread of a rank is doing, as the watch over the job sees it."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

STEPS_UNTIL_LIMIT = 3  # the first steps may compile kernels
LONGEST_PARTS = 10  # a part of a step may take this many times as long as the longest one before


class Progress:
    """The progress of the main thread of this rank, read by other threads.

    part: the part of a step that runs, or "". step: number of the step. count: parts begun or ended so far.
    in_training: whether training has begun and not ended.
    stop_reason: why the run shall end after the current step, such as "SIGTERM"; None = it shall go on.
    """

    def __init__(self, hang_s: float = 0.0) -> None:
        """Create it. hang_s: shortest time without progress in a step that counts as a hang; 0 = none does."""
        self.part = ""
        self.step = 0
        self.count = 0
        self.in_training = False
        self.stop_reason: str | None = None
        self._hang_s = hang_s
        self._is_paused = False
        self._since_s = time.monotonic()
        self._longest_s = 0.0
        self._num_steps = 0

    def begin_step(self, step: int) -> None:
        """Note that a step has begun."""
        self.mark("")
        self.step = step
        self._num_steps += 1

    def mark(self, part: str) -> None:
        """Note that a part of a step has begun, or ended if `part` is "".

        Calls from other threads than the main one are ignored.
        """
        if threading.current_thread() is not threading.main_thread():
            return
        now_s = time.monotonic()
        if self.in_steps and self._num_steps > 1:  # the first step compiles kernels and creates communicators
            self._longest_s = max(self._longest_s, now_s - self._since_s)
        self._since_s = now_s
        self.part = part
        self.count += 1

    @contextmanager
    def training(self) -> Iterator[None]:
        """Context manager around the steps of a run."""
        self._since_s = time.monotonic()
        self.in_training = True
        try:
            yield
        finally:
            self.in_training = False

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Context manager around work between steps whose time is not known, such as a checkpoint."""
        self._is_paused = True
        try:
            yield
        finally:
            self._since_s = time.monotonic()
            self._is_paused = False

    def ask_to_stop(self, reason: str) -> None:
        """Ask for the end of the run after the current step; the first reason is kept."""
        if self.stop_reason is None:
            self.stop_reason = reason

    @property
    def in_steps(self) -> bool:
        """Whether a step of training runs."""
        return self.in_training and not self._is_paused

    @property
    def _is_limited(self) -> bool:
        return self.in_steps and self._hang_s > 0 and self._num_steps > STEPS_UNTIL_LIMIT

    @property
    def seconds(self) -> float:
        """Time since the last mark."""
        return time.monotonic() - self._since_s

    @property
    def is_stuck(self) -> bool:
        """Whether a step has made no progress for longer than it may."""
        return self._is_limited and self.seconds > max(self._hang_s, LONGEST_PARTS * self._longest_s)

    @property
    def where(self) -> str:
        """The step and its part, for messages."""
        if not self.in_training:
            return "outside of training"
        return f"step {self.step}, {self.part}" if self.part else f"step {self.step}"
