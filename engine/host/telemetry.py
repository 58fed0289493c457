"""Console output of a run: notes, stages with their durations, and a progress bar.

Rank 0 prints everything; the other ranks print warnings only.
"""

import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 5
CONTROL_CHARACTERS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tab and newline


def visible(text: str) -> str:
    """Return text of others that can be printed: control characters, which a terminal would obey, become `\\x1b`."""
    return CONTROL_CHARACTERS.sub(lambda match: f"\\x{ord(match[0]):02x}", text)


class Telemetry:
    """Console of a run, and the duration of each of its stages.

    speaks: whether this rank prints. stage_s: seconds per stage, by name.
    """

    def __init__(self, speaks: bool) -> None:
        self.console = Console(quiet=not speaks, highlight=False, soft_wrap=True)
        self.stage_s: dict[str, float] = {}

    def note(self, text: str, style: str | None = None) -> None:
        """Print a line verbatim: square brackets, which occur in paths, are not markup."""
        self.console.print(text, style=style, markup=False)

    def warn(self, text: str) -> None:
        """Print a line to standard error, on any rank."""
        Console(stderr=True, highlight=False, soft_wrap=True).print(text, style="yellow", markup=False)

    def note_of_node(self, text: str, local_rank: int) -> None:
        """Print a line about a node: on rank 0 a note, on the first rank of another node a warning with its host name."""
        if not self.console.quiet:
            self.note(text)
        elif local_rank == 0:
            self.warn(f"  {socket.gethostname()}: {text.strip()}")

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Print the name of a stage and record its duration in seconds."""
        self.note(name, style="bold")
        start = time.perf_counter()
        yield
        self.stage_s[name] = round(time.perf_counter() - start, 2)

    @contextmanager
    def progress(self, total: int, unit: str) -> Iterator["ProgressBar"]:
        """Show a progress bar over `total` units, or regular lines if there is no terminal."""
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
        self._telemetry = telemetry
        self._progress = progress
        self._task = task
        self._total = total
        self._start = self._last_line = time.perf_counter()
        self._first = self._done = 0

    def start_at(self, done: int) -> None:
        """Start with `done` units already finished, as a resumed run does."""
        self._first = self._done = done
        self._progress.update(self._task, completed=done)

    def advance(self, text: str) -> None:
        """Show that one more unit is finished."""
        self.move_to(self._done + 1, text)

    def move_to(self, done: int, text: str) -> None:
        """Show that `done` units are finished.

        Without a terminal, print a line every `SECONDS_BETWEEN_LINES` seconds and one at the end.
        """
        self._done = done
        self._progress.update(self._task, completed=done, description=text)
        now = time.perf_counter()
        if self._progress.disable and (now - self._last_line >= SECONDS_BETWEEN_LINES or done == self._total):
            self._last_line = now
            elapsed_s = now - self._start
            left_s = elapsed_s / max(1, done - self._first) * (self._total - done)
            self._telemetry.note(f"  {done:,}/{self._total:,}  {text}  {elapsed_s:.0f} s, {left_s:.0f} s left")
