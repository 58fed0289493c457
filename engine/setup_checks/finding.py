"""The results of checks, and the verdict that follows from them. Imports nothing that could be missing."""

from collections.abc import Sequence
from dataclasses import dataclass

from engine.host.units import counted

OK, WARNING, PROBLEM = "ok", "warning", "problem"
LONGEST_LINE = 200  # characters


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    name: what was checked. status: `OK`, `WARNING` (training works, but slower or with limits) or `PROBLEM`.
    text: what was found, with units. fix: one sentence on what to do; "" if the status is `OK`.
    """

    name: str
    status: str
    text: str
    fix: str = ""


def ok(name: str, text: str) -> Finding:
    """Return a finding that needs no action."""
    return Finding(name, OK, text)


def warning(name: str, text: str, fix: str) -> Finding:
    """Return a finding with which training works, but slower or with limits."""
    return Finding(name, WARNING, text, fix)


def problem(name: str, text: str, fix: str) -> Finding:
    """Return a finding with which training fails, or runs on the wrong device."""
    return Finding(name, PROBLEM, text, fix)


def count(findings: Sequence[Finding], status: str) -> int:
    """Return the number of findings of a status."""
    return sum(finding.status == status for finding in findings)


def verdict(findings: Sequence[Finding]) -> str:
    """Return the summary line: `ready`, `ready, with N warnings` or `not ready: N problems`."""
    num_problems = count(findings, PROBLEM)
    num_warnings = count(findings, WARNING)
    if num_problems:
        return f"not ready: {counted(num_problems, 'problem')}"
    if num_warnings:
        return f"ready, with {counted(num_warnings, 'warning')}"
    return "ready"


def first_line(text: str) -> str:
    """Return the first line of a message of another library, at most `LONGEST_LINE` characters of it."""
    line = (text.strip().splitlines() or [""])[0]
    return line if len(line) <= LONGEST_LINE else f"{line[:LONGEST_LINE]}..."


def exit_code(findings: Sequence[Finding]) -> int:
    """Return the exit code of the command: 1 if there is a problem, else 0."""
    return 1 if count(findings, PROBLEM) else 0
