"""What a person sees while a run works: notes, stages with their time, a progress bar. Rank 0 speaks, the others are quiet."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LINES_WITHOUT_TERMINAL = 20


class Telemetry:
    """The console of a run, and how long each of its stages took."""

    def __init__(self, speaks: bool) -> None:
        self.console = Console(quiet=not speaks, highlight=False, soft_wrap=True)
        self.stage_s: dict[str, float] = {}

    def note(self, text: str, style: str | None = None) -> None:
        """Print a line as it is: square brackets, as paths have them, are no markup."""
        self.console.print(text, style=style, markup=False)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Announce a stage and keep its duration in seconds."""
        self.note(name, style="bold")
        start = time.perf_counter()
        yield
        self.stage_s[name] = round(time.perf_counter() - start, 2)

    @contextmanager
    def progress(self, total: int, unit: str) -> Iterator["ProgressBar"]:
        """A bar over `total` units, or at most twenty-one lines where there is no terminal."""
        columns = (
            BarColumn(24),
            MofNCompleteColumn(),
            TextColumn("{task.description}", markup=False),
            TimeElapsedColumn(),
            TextColumn("left"),
        )
        with Progress(*columns, TimeRemainingColumn(), console=self.console, disable=not self.console.is_terminal) as progress:
            yield ProgressBar(self, progress, progress.add_task(unit, total=total), total)


class ProgressBar:
    def __init__(self, telemetry: Telemetry, progress: Progress, task: Any, total: int) -> None:
        self._telemetry, self._progress, self._task, self._total = telemetry, progress, task, total
        self._start, self._done, self._first = time.perf_counter(), 0, 0

    def start_at(self, done: int) -> None:
        """Begin with `done` units already there, as a resumed run does."""
        self._done = self._first = done
        self._progress.update(self._task, completed=done)

    def advance(self, text: str) -> None:
        self._done += 1
        self._progress.update(self._task, completed=self._done, description=text)
        every = -(-self._total // LINES_WITHOUT_TERMINAL)
        if self._progress.disable and (self._done % every == 0 or self._done == self._total):
            elapsed_s = time.perf_counter() - self._start
            left_s = elapsed_s / max(1, self._done - self._first) * (self._total - self._done)
            self._telemetry.note(f"  {self._done}/{self._total}  {text}  {elapsed_s:.0f} s, {left_s:.0f} s left")
