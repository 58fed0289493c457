"""Run the parts of the suite one after the other in a time limit, and keep the results on disk."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu_suite.parts import DEVICE, JSON, SuitePart
from benchmarks.gpu_suite.summary import lines_of, problems_of

ROOT = Path(__file__).resolve().parents[2]
POLL_S = 0.1
SAVE_EVERY_S = 2.0
GRACE_S = 5.0
LOG_TAIL_CHARACTERS = 3000


@dataclass(frozen=True)
class Suite:
    """Settings of a run of the suite.

    folder: folder for suite.json and suite.log. seconds: time limit.
    tiny: whether to use shapes small enough for a CPU.
    """

    folder: Path
    device: str
    tiny: bool
    seconds: float


@dataclass
class PartResult:
    """Result of a part.

    status: "not reached", "skipped", "running", "passed", "failed", "out of time" or "interrupted".
    results: the JSON that the part has written so far.
    log_tail: the end of its output, unless it passed.
    """

    name: str
    status: str = "not reached"
    reason: str = ""
    seconds: float = 0.0
    limit_s: float = 0.0
    command: str = ""
    results: Any = None
    log_tail: str = ""


@dataclass
class SuiteRecord:
    """The content of suite.json."""

    about: dict[str, Any]
    seconds: float = 0.0
    finished: bool = False
    parts: list[PartResult] = field(default_factory=list)

    def save(self, folder: Path) -> None:
        """Replace suite.json atomically, so that a reader never sees an incomplete file."""
        text = json.dumps(asdict(self), indent=1)
        scratch = folder / "suite.json.new"
        scratch.write_text(text + "\n", encoding="utf-8")
        scratch.replace(folder / "suite.json")


class Interrupted(Exception):
    """Raised when a signal asks the suite to stop."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


def missing_packages(part: SuitePart, device: str) -> list[str]:
    """Return the packages that a part needs on this device and that cannot be imported."""
    needs = part.needs + (part.needs_on_gpu if device == "cuda" else ())
    return [package for package in needs if importlib.util.find_spec(package) is None]


def run_suite(parts: Sequence[SuitePart], suite: Suite) -> int:
    """Run the parts, print their results, and return the exit status of the command."""
    suite.folder.mkdir(parents=True, exist_ok=True)
    (suite.folder / "suite.log").write_text("", encoding="utf-8")
    record = SuiteRecord(about=_about(suite), parts=[PartResult(part.name) for part in parts])
    start_s = time.monotonic()
    before = _raise_on_signals()
    try:
        for index, part in enumerate(parts):
            elapsed_s = time.monotonic() - start_s
            runnable = [later for later in parts[index:] if not missing_packages(later, suite.device)]
            limit_s = time_limit_s(part, runnable, suite.seconds - elapsed_s)
            _run_part(part, record.parts[index], suite, limit_s, record, start_s)
            _show(record.parts[index])
        record.finished = True
    except Interrupted as interrupted:
        print(f"stopped by {interrupted}; the results so far are kept", flush=True)
        return 128 + interrupted.number
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        record.seconds = time.monotonic() - start_s
        record.save(suite.folder)
        _show_totals(record, suite.folder)
    bad = [part.name for part in record.parts if part.status not in ("passed", "skipped")]
    return 1 if bad else 0


def time_limit_s(part: SuitePart, remaining: Sequence[SuitePart], left_s: float) -> float:
    """Return the time limit of a part in seconds: its share of the remaining time.

    remaining: the parts that have not run yet, including this one. left_s: remaining seconds.
    """
    total = sum(later.weight for later in remaining)
    if total == 0:
        return 0.0
    return max(0.0, left_s * part.weight / total)


def _run_part(part: SuitePart, result: PartResult, suite: Suite, limit_s: float, record: SuiteRecord, start_s: float) -> None:
    """Run one part in a new process group and fill in its result."""
    missing = missing_packages(part, suite.device)
    if missing:
        result.status = "skipped"
        result.reason = f"not installed: {', '.join(missing)}"
        return
    with tempfile.TemporaryDirectory() as scratch:
        results_file = Path(scratch) / "results.json"
        log_file = Path(scratch) / "log.txt"
        words = part.tiny if suite.tiny else part.command
        filled = [word.replace(JSON, str(results_file)).replace(DEVICE, suite.device) for word in words]
        result.command = " ".join(["python", *words]).replace(DEVICE, suite.device)
        result.status = "running"
        result.limit_s = round(limit_s, 1)
        with log_file.open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, *filled],
                cwd=ROOT,
                env=_environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            _watch(process, result, results_file, limit_s, record, suite, start_s)
        except Interrupted:
            result.status = "interrupted"
            raise
        finally:
            end_group(process)
            result.results = _read_json(results_file) or result.results
            _fail_for_problems(result)
            output = log_file.read_text(encoding="utf-8", errors="replace")
            if result.status != "passed":
                result.log_tail = output[-LOG_TAIL_CHARACTERS:]
            with (suite.folder / "suite.log").open("a", encoding="utf-8") as whole:
                whole.write(f"==== {result.name}: {result.status}\n{output}\n")


def _watch(
    process: subprocess.Popen,
    result: PartResult,
    results_file: Path,
    limit_s: float,
    record: SuiteRecord,
    suite: Suite,
    start_s: float,
) -> None:
    """Wait for the process until its time limit, and save its results every few seconds."""
    begin_s = time.monotonic()
    saved_s = begin_s - SAVE_EVERY_S
    while process.poll() is None:
        now_s = time.monotonic()
        result.seconds = round(now_s - begin_s, 1)
        if now_s - begin_s > limit_s:
            result.status = "out of time"
            result.reason = f"more than its {limit_s:.0f} s"
            return
        if now_s - saved_s >= SAVE_EVERY_S:
            saved_s = now_s
            result.results = _read_json(results_file) or result.results
            record.seconds = now_s - start_s
            record.save(suite.folder)
        time.sleep(POLL_S)
    result.seconds = round(time.monotonic() - begin_s, 1)
    if process.returncode == 0:
        result.status = "passed"
    else:
        result.status = "failed"
        result.reason = f"exit status {process.returncode}"


def _fail_for_problems(result: PartResult) -> None:
    """Mark a part that ended normally as failed if its results contain errors."""
    problems = problems_of(result.results)
    if result.status == "passed" and problems:
        result.status = "failed"
        result.reason = f"{len(problems)} errors, the first: {problems[0]}"


def end_group(process: subprocess.Popen) -> None:
    """End a process group: send SIGTERM first, and SIGKILL after a few seconds."""
    for number, patience_s in ((signal.SIGTERM, GRACE_S), (signal.SIGKILL, GRACE_S)):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(patience_s)
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def _environment() -> dict[str, str]:
    """Return the environment of a part: the checkout is importable and output is unbuffered."""
    paths = [str(ROOT)]
    if os.environ.get("PYTHONPATH"):
        paths.append(os.environ["PYTHONPATH"])
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}


def _read_json(file: Path) -> Any:
    """Return the JSON that a part has written, or None if there is no complete file."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _about(suite: Suite) -> dict[str, Any]:
    """Return the command, machine, versions and commit."""
    import torch

    from benchmarks.record import machine_and_versions

    words = ["python", "benchmarks/run_gpu_suite.py", "--minutes", f"{suite.seconds / 60:g}", "--device", suite.device]
    if suite.tiny:
        words.append("--tiny")
    return {"command": " ".join(words)} | machine_and_versions(torch.device(suite.device))


def _raise_on_signals() -> dict[int, Any]:
    """Let SIGINT and SIGTERM raise `Interrupted`; return the previous handlers."""

    def stop(number: int, frame: object) -> None:
        raise Interrupted(number)

    return {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}


def _show(result: PartResult) -> None:
    reason = f" ({result.reason})" if result.reason else ""
    print(f"{result.name}: {result.status}{reason}, {result.seconds:.0f} s", flush=True)
    for line in lines_of(result.name, result.results):
        print(f"  {line}", flush=True)
    if result.status in ("failed", "out of time"):
        for line in result.log_tail.splitlines()[-15:]:
            print(f"  | {line}", flush=True)


def _show_totals(record: SuiteRecord, folder: Path) -> None:
    counts: dict[str, int] = {}
    for part in record.parts:
        counts[part.status] = counts.get(part.status, 0) + 1
    summary = ", ".join(f"{count} {status}" for status, count in counts.items())
    print(f"{summary} in {record.seconds:.0f} s; see {folder / 'suite.json'}", flush=True)
