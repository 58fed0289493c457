"""Sections of a run's report: its checkpoints and drafts, and its warnings."""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from engine.config.sections import BAD_STEPS, CHECKPOINTS, DRAFT, DRAFT_LAST, METRICS
from engine.evaluation.page_parts import escaped, of_run, seconds_text, table, warning
from engine.evaluation.report import SUMMARY
from engine.evaluation.run_record import Line, RunRecord, finite
from engine.host.checkpoint_files import COMPLETE
from engine.host.units import counted

Entry = TypeVar("Entry")
STEP = re.compile(r"step_(\d+)")
MOST_ROWS = 50  # of checkpoints, warnings or bad steps that are shown


@dataclass(frozen=True)
class StoredFiles:
    """A checkpoint or a draft on the disk.

    step: None = unknown. num_bytes: of all its files. written_s: time at which it was finished.
    problem: what is missing, judged by names and sizes; None = nothing.
    """

    name: str
    step: int | None
    num_bytes: int
    written_s: float
    problem: str | None


def files_section(run: RunRecord, runs: Sequence[RunRecord]) -> str:
    """Return the tables of checkpoints and drafts, or "" if there are none."""
    checkpoints = sorted(_checkpoints(run.folder / CHECKPOINTS), key=lambda found: found.step or 0, reverse=True)
    drafts = list(_drafts(run))
    ended_s = _end(run)
    end = "the last logged step" if run.summary is None else "the end"
    rows = []
    for found in [*drafts, *checkpoints[:MOST_ROWS]]:
        step = "unknown" if found.step is None else f"{found.step:,}"
        rows.append(
            (found.name, step, _size(found.num_bytes), _age(found.written_s, ended_s, end), found.problem or "complete")
        )
    shown = table(("folder", "step", "size", "written", "state, by names and sizes of files"), rows)
    if not shown:
        return ""
    more = len(checkpoints) - MOST_ROWS
    rest = f"<p>{more} older checkpoints are not shown.</p>" if more > 0 else ""
    return f"<h2>Drafts and checkpoints{of_run(run, runs)}</h2>{shown}{rest}"


def _checkpoints(folder: Path) -> Iterator[StoredFiles]:
    for path in folder.iterdir() if folder.is_dir() else ():
        found = STEP.fullmatch(path.name)
        if found is not None and path.is_dir():
            with suppress(FileNotFoundError):  # the run may delete an old checkpoint meanwhile
                yield _checkpoint(path, int(found[1]))


def _checkpoint(path: Path, step: int) -> StoredFiles:
    complete = path / COMPLETE
    written_s = (complete if complete.exists() else path).stat().st_mtime
    return StoredFiles(f"{CHECKPOINTS}/{path.name}", step, _bytes_in(path), written_s, _problem_of(path))


def _problem_of(folder: Path) -> str | None:
    """Return what is wrong with a checkpoint by the sizes of its files, or None. Nothing but `complete.json` is read."""
    try:
        files = json.loads((folder / COMPLETE).read_text(encoding="utf-8"))["files"]
        expected = {str(name): int(facts["num_bytes"]) for name, facts in files.items()}
    except FileNotFoundError:
        return f"not complete: no {COMPLETE}"
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return f"{COMPLETE} is damaged"
    for name, num_bytes in expected.items():
        path = folder / name
        found = path.stat().st_size if path.is_file() else None
        if found is None:
            return f"{name} is missing"
        if found != num_bytes:
            return f"{name} has {found:,} bytes instead of {num_bytes:,}"
    return None


def _drafts(run: RunRecord) -> Iterator[StoredFiles]:
    """Yield the exported drafts. Their steps follow from the evaluations, or from the last step of a run that has ended."""
    kept = [] if run.best is None else [run.best["step"]]
    evaluated = [line["step"] for line in run.evaluations]
    last = [run.metrics[-1]["step"]] if run.metrics and run.summary is not None else []
    steps = {DRAFT: kept or ([] if evaluated else last), DRAFT_LAST: evaluated}
    for name, known in steps.items():
        path = run.folder / name
        if path.is_dir():
            with suppress(FileNotFoundError):  # the run may replace the draft meanwhile
                yield _draft(path, int(known[-1]) if known else None)


def _draft(path: Path, step: int | None) -> StoredFiles:
    newest_s = max((inner.stat().st_mtime for inner in path.iterdir()), default=path.stat().st_mtime)
    problem = None if any(path.glob("*.safetensors")) else "no weights"
    return StoredFiles(path.name, step, _bytes_in(path), newest_s, problem)


def _bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _end(run: RunRecord) -> float | None:
    """Return the time at which the run ended, or has logged last; None = it has left no file."""
    for name in (SUMMARY, METRICS):
        path = run.folder / name
        if path.is_file():
            return path.stat().st_mtime
    return None


def _age(written_s: float, ended_s: float | None, end: str) -> str:
    """Return when files were written. end: name of the moment `ended_s`."""
    if ended_s is None:
        return "-"
    before_s = ended_s - written_s
    return f"{seconds_text(before_s)} before {end}" if before_s >= 1 else f"at {end}"


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.2f} MiB"


def warnings_section(run: RunRecord, runs: Sequence[RunRecord]) -> str:
    """Return the list of problems: files that cannot be read, documents left out, bad steps, warnings."""
    parts = [warning(note) for note in run.notes]
    left_out = (run.summary or {}).get("left_out") or []
    if left_out:
        because = "because the target's states are not finite; summary.json lists them"
        parts.append(warning(f"Left out: {counted(len(left_out), 'document')}, {because}."))
    if any(line.get("non_finite") for line in run.metrics):
        parts.append(warning("Some metrics were not finite."))
    bad_steps = _bad_steps(run.folder / BAD_STEPS)
    name = f"{counted(len(bad_steps), 'list')} of bad steps (a loss or a gradient that was not finite, or a spike)"
    parts.append(_listed(name, bad_steps, _bad_step_text))
    warnings = _by_name(run.warnings)
    parts.append(_listed(counted(len(warnings), "warning"), warnings, _warning_text))
    shown = "".join(part for part in parts if part)
    heading = f"<h2>Warnings{of_run(run, runs)}</h2>" if shown and len(runs) > 1 else ""
    return heading + shown


def _listed(name: str, entries: Sequence[Entry], text_of: Callable[[Entry], str]) -> str:
    """Return a list of the newest entries, or "" if there are none.

    name: number and kind of all entries. text_of: returns the text of an entry that is shown.
    """
    if not entries:
        return ""
    shown = entries[-MOST_ROWS:]
    items = "".join(f"<li>{escaped(text_of(entry))}</li>" for entry in shown)
    which = f"; the last {MOST_ROWS}" if len(entries) > MOST_ROWS else ""
    return f'<details class="warning" open><summary>{name}{which}</summary><ul>{items}</ul></details>'


def _by_name(warnings: Sequence[Line]) -> list[list[Line]]:
    """Return the warnings, those of one name on several ranks together; lines without a rank stay alone."""
    groups: dict[int | str, list[Line]] = {}
    for number, line in enumerate(warnings):
        key = number if line.get("rank") is None else str(line.get("name"))
        groups.setdefault(key, []).append(line)
    return list(groups.values())


def _warning_text(lines: Sequence[Line]) -> str:
    """Return the text of a warning, with the figures of the rank that had it first."""
    first = lines[0]
    step = finite(first.get("step"))
    place = "" if step is None else f"step {step:,.0f}: "
    name = first.get("name")
    counts = [finite(line.get("count")) or 1.0 for line in lines]
    up_to = "up to " if len(set(counts)) > 1 else ""
    times = f", {up_to}{max(counts):,.0f} times" if max(counts) >= 2 else ""
    ranks = f", on {len(lines):,} ranks" if len(lines) > 1 else ""
    return f"{place}{first.get('text', '')}" + (f" ({name}{times}{ranks})" if name else "")


def _bad_steps(folder: Path) -> list[tuple[int, Path]]:
    """Return step and path of each list of a bad step, in the order of the steps."""
    paths = folder.glob("step_*.json") if folder.is_dir() else ()
    places = []
    for path in paths:
        found = STEP.match(path.name)
        if found is not None:
            places.append((int(found[1]), path))
    return sorted(places)


def _bad_step_text(place: tuple[int, Path]) -> str:
    step, path = place
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        detail = f"rank {facts['rank']}: {facts['reason']}; {counted(len(facts['documents']), 'document')}"
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        detail = "the list cannot be read"
    return f"step {step:,}, {detail} ({BAD_STEPS}/{path.name})"
