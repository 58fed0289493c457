"""Run test files in parallel processes, one per file, and count their outcomes as they end.

GPU tests spend most of their time compiling Triton kernels on the CPU, so several files can share
the GPU.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
GPU_MARK = "mark.gpu"
POLL_S = 0.2
NO_TESTS = 5  # pytest's exit status if it selected nothing


@dataclass
class FileResult:
    """Outcomes of one test file.

    status: pytest's exit status; None while it runs. problems: one line per failed test.
    """

    file: str
    status: int | None = None
    seconds: float = 0.0
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    problems: list[str] = field(default_factory=list)


def main() -> int:
    options = parse_options()
    files = options.files or files_with_gpu_tests()
    results = run_files(files, options.marker, options.processes, options.json)
    return 1 if any(result.status not in (0, NO_TESTS) for result in results) else 0


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--json", type=Path, required=True, help="file for the results, rewritten as files end")
    parser.add_argument("--marker", default="gpu", help="pytest's -m; default: %(default)s")
    parser.add_argument("--files", nargs="+", metavar="FILE", help="default: all files that have GPU tests of the engine")
    parser.add_argument("--processes", type=int, default=max(1, (os.cpu_count() or 2) - 2), help="default: %(default)s")
    return parser.parse_args()


def files_with_gpu_tests() -> list[str]:
    """Return the test files that mark tests with `gpu`, those of kernels first.

    Tests of benchmarks are left out, because the benchmarks are parts of the suite themselves.
    """
    found = []
    for file in sorted((ROOT / "tests").rglob("test_*.py")):
        name = file.relative_to(ROOT).as_posix()
        if not name.startswith("tests/benchmarks/") and GPU_MARK in file.read_text(encoding="utf-8"):
            found.append(name)
    return sorted(found, key=lambda name: not name.startswith("tests/kernels/"))


def run_files(files: list[str], marker: str, processes: int, json_file: Path) -> list[FileResult]:
    """Run pytest once per file, at most `processes` at a time.

    The results are written whenever a file ends.
    """
    results = [FileResult(file) for file in files]
    waiting = list(results)
    running: list[tuple[FileResult, subprocess.Popen, float]] = []
    with tempfile.TemporaryDirectory() as scratch:
        while waiting or running:
            while waiting and len(running) < processes:
                result = waiting.pop(0)
                running.append((result, _start(result, marker, Path(scratch)), time.monotonic()))
            time.sleep(POLL_S)
            for entry in list(running):
                result, process, start_s = entry
                if process.poll() is None:
                    continue
                running.remove(entry)
                result.seconds = round(time.monotonic() - start_s, 1)
                result.status = process.returncode
                _read_report(result, _report_of(result, Path(scratch)))
                _write(results, json_file)
    return results


def _start(result: FileResult, marker: str, scratch: Path) -> subprocess.Popen:
    """Start pytest for one file, with one thread, because many files run at the same time."""
    report = f"--junitxml={_report_of(result, scratch)}"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", marker, report, result.file]
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})


def _report_of(result: FileResult, scratch: Path) -> Path:
    return scratch / (result.file.replace("/", "-") + ".xml")


def _read_report(result: FileResult, report: Path) -> None:
    """Fill in counts and problems from pytest's JUnit file; a crashed process writes none."""
    if not report.is_file():
        result.problems.append(f"{result.file}: ended with status {result.status} and left no report")
        return
    for case in ElementTree.parse(report).iter("testcase"):
        problem = case.find("failure")
        if problem is None:
            problem = case.find("error")
        if problem is not None:
            result.failed += 1
            first_line = (problem.get("message") or "").strip().partition("\n")[0]
            result.problems.append(f"{case.get('name')}: {first_line[:300]}")
        elif case.find("skipped") is not None:
            result.skipped += 1
        else:
            result.passed += 1


def _write(results: list[FileResult], json_file: Path) -> None:
    """Replace the results file; it starts with readable lines."""
    ended = [result for result in results if result.status is not None]
    passed = sum(result.passed for result in ended)
    failed = sum(result.failed for result in ended)
    skipped = sum(result.skipped for result in ended)
    lines = [f"{passed} passed, {failed} failed, {skipped} skipped in {len(ended)} of {len(results)} files"]
    for result in ended:
        lines += [f"{result.file}: {problem}" for problem in result.problems[:5]]
    record = {"lines": lines, "files": [asdict(result) for result in results]}
    scratch = json_file.with_suffix(".new")
    scratch.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    scratch.replace(json_file)


if __name__ == "__main__":
    sys.exit(main())
