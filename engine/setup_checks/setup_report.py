"""The report of the checks: a line per finding as soon as it is there, or one JSON object at the end."""

import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

from engine.setup_checks.finding import OK, PROBLEM, WARNING, Finding, count, exit_code, problem, verdict

NAME_WIDTH = 20
STATUS_WIDTH = len(WARNING)
COLOURS = {OK: "\x1b[32m", WARNING: "\x1b[33m", PROBLEM: "\x1b[31m"}
NO_COLOUR = "\x1b[0m"
SECONDS_BETWEEN_LINES = 5.0  # of progress, if there is no terminal
SECONDS_FOR_OUTPUT = 1.0  # for a line that another thread is writing; its reader may have stopped


class SetupReport:
    """Findings of all checks so far, which rank 0 prints.

    findings: in the order in which they were made. facts: what was measured, by name, for JSON.
    check: the check that runs.
    """

    def __init__(self, speaks: bool, as_json: bool) -> None:
        """Create an empty report.

        speaks: whether this rank prints.
        as_json: whether to print one JSON object at the end instead of lines. Standard output then
            becomes standard error for all other code, since libraries print lines of their own.
        """
        self.findings: list[Finding] = []
        self.facts: dict[str, Any] = {}
        self.check = "start"
        self._doing = ""  # the last text of `busy`
        self._speaks = speaks
        self._as_json = as_json
        self._is_finished = False
        self._has_cause = False  # whether a finding says why the checks end early
        self._began_s = time.monotonic()
        self._progress_s = self._began_s  # time of the last line of progress
        self._shows_progress = False  # whether the terminal's current line is one of progress
        self._lock = threading.RLock()
        self._output: TextIO = sys.stdout
        if as_json:
            sys.stdout = sys.stderr
            with suppress(OSError, ValueError):  # a stream without a file
                self._output.flush()
                self._output = os.fdopen(os.dup(self._output.fileno()), "w", encoding="utf-8")
                os.dup2(sys.stderr.fileno(), 1)

    @property
    def exit_code(self) -> int:
        return exit_code(self.findings)

    def note(self, text: str) -> None:
        """Print a line that is no finding."""
        with self._lock:
            self._print(text)

    def begin(self, check: str) -> None:
        """Print the heading of a check that begins now."""
        with self._lock:
            self.check = check
            self._doing = ""
            self._print(check, "\x1b[1m")
            self._progress_s = time.monotonic()

    def add(self, *findings: Finding) -> None:
        """Add findings, and print them."""
        with self._lock:
            for finding in findings:
                self.findings.append(finding)
                status = finding.status.ljust(STATUS_WIDTH)
                self._print(f"  {status}  {finding.name.ljust(NAME_WIDTH)} {finding.text}", COLOURS[finding.status])
                if finding.fix:
                    indent = " " * (STATUS_WIDTH + 4)
                    self._print(f"{indent}{'to fix'.ljust(NAME_WIDTH)} {finding.fix}")

    def busy(self, text: str) -> None:
        """Show what a long check is doing: on the terminal's last line, or as a line every few seconds."""
        with self._lock:
            self._doing = text
            if not self._speaks or self._as_json or self._is_finished:
                return
            now_s = time.monotonic()
            if self._output.isatty():
                self._write(f"\r\x1b[K    {text}")
                self._shows_progress = True
            elif now_s - self._progress_s > SECONDS_BETWEEN_LINES:
                self._progress_s = now_s
                self._write(f"    {text}\n")

    @contextmanager
    def limit(self, seconds: float, fix: str, end: Callable[[str], object]) -> Iterator[None]:
        """Context manager around a check that ends the job if it takes longer than `seconds`.

        It becomes a problem with the given `fix`; then `end` is called with a text, in another
        thread. Only rank 0 has a limit, because the end of rank 0 ends the others.
        """
        if not self._speaks:
            yield
            return

        def expire() -> None:
            text = f"did not end within {seconds:.0f} s" + (f": {self._doing}" if self._doing else "")
            with self._lock_soon() as is_locked:
                if is_locked:
                    self._has_cause = True
                    self.add(problem(self.check, text, fix))
            end(f"{self.check}: {text}")

        timer = threading.Timer(seconds, expire)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def finish(self) -> None:
        """Print the summary, once."""
        with self._lock:
            if self._is_finished:
                return
            self._is_finished = True
            seconds = time.monotonic() - self._began_s
            if not self._speaks:
                return
            if self._as_json:
                self._write(json.dumps(self._as_object(seconds), allow_nan=False) + "\n")
            else:
                status = PROBLEM if self.exit_code else OK
                self._print(f"{verdict(self.findings)} ({seconds:.0f} s)", COLOURS[status])

    def interrupt(self) -> None:
        """Print the summary of checks that were ended from outside.

        Prints nothing if they had ended, or if another thread is still writing after `SECONDS_FOR_OUTPUT`.
        """
        with self._lock_soon() as is_locked:
            if self._is_finished or not is_locked:
                return
            if not self._has_cause:
                fix = "Remove the cause, which a message on standard error names, and run the command again"
                self.add(problem(self.check, "was ended before it had finished", fix))
            self.finish()

    @contextmanager
    def _lock_soon(self) -> Iterator[bool]:
        """Context manager that takes the lock if it becomes free within `SECONDS_FOR_OUTPUT`; yields whether it was."""
        is_locked = self._lock.acquire(timeout=SECONDS_FOR_OUTPUT)
        try:
            yield is_locked
        finally:
            if is_locked:
                self._lock.release()

    def _as_object(self, seconds: float) -> dict[str, Any]:
        return {
            "status": "not ready" if self.exit_code else "ready",
            "summary": verdict(self.findings),
            "num_problems": count(self.findings, PROBLEM),
            "num_warnings": count(self.findings, WARNING),
            "seconds": round(seconds, 1),
            "findings": [vars(finding) for finding in self.findings],
            "facts": _without_infinity(self.facts),
        }

    def _print(self, text: str, colour: str = "") -> None:
        if not self._speaks or self._as_json:
            return
        is_terminal = self._output.isatty()
        if self._shows_progress:
            self._write("\r\x1b[K")
            self._shows_progress = False
        self._write(f"{colour}{text}{NO_COLOUR}\n" if colour and is_terminal else f"{text}\n")

    def _write(self, text: str) -> None:
        with suppress(OSError, ValueError):  # the reader of the output may have gone
            self._output.write(text)
            self._output.flush()


def _without_infinity(value: Any) -> Any:
    """Return plain containers in which numbers that JSON does not have are None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _without_infinity(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_without_infinity(part) for part in value]
    return value
