"""Contents of a run's folder for its report; files may be missing, cut off or edited by hand."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from engine.config.sections import METRICS, RECIPE, WARNINGS
from engine.evaluation.grid import GRID
from engine.evaluation.history import EVALUATIONS
from engine.evaluation.report import SUMMARY
from engine.evaluation.samples import SAMPLES
from engine.host.units import counted

AVERAGED = 0.1  # share of the last logged steps that tables and bars average over
WORK = "work.json"
Line = Mapping[str, Any]


def finite(value: Any) -> float | None:
    """Return a value as a number, or None if it is none or not finite."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


@dataclass(frozen=True)
class RunRecord:
    """The contents of a run's folder so far.

    metrics, evaluations: lines of the files, each with a step. samples, warnings: lines of the files.
    summary: None = the run has not ended. work: counted work of a step; None = unknown.
    config: the recipe as text. notes: what could not be read.
    grid: acceptance for several shapes of trees; None = not measured.
    title: instead of the folder's name, where two runs have the same one.
    """

    folder: Path
    metrics: Sequence[Line]
    evaluations: Sequence[Line]
    samples: Sequence[Line]
    warnings: Sequence[Line]
    summary: Line | None
    work: Line | None
    config: str
    notes: Sequence[str] = ()
    title: str = ""
    grid: Line | None = None

    @classmethod
    def read(cls, folder: Path) -> "RunRecord":
        """Read a run's folder; what cannot be read is left out with a note. Raises ValueError if it is no run's folder."""
        config = folder / RECIPE
        if not config.is_file():
            raise ValueError(f"{folder} is not the output_dir of a run: it has no {RECIPE}")
        reader = _Reader(folder)
        return cls(
            folder=folder,
            metrics=reader.lines_with_step(METRICS),
            evaluations=reader.lines_with_step(EVALUATIONS),
            samples=reader.lines(SAMPLES),
            warnings=reader.lines(WARNINGS),
            summary=reader.facts(SUMMARY),
            work=reader.facts(WORK),
            config=reader.text(RECIPE) or "",
            grid=reader.facts(GRID),
            notes=tuple(reader.notes),
        )

    @property
    def name(self) -> str:
        return self.title or self.folder.name or str(self.folder)

    @cached_property
    def recipe(self) -> Mapping[str, Any]:
        """The recipe; {} if it cannot be read."""
        try:
            recipe = yaml.safe_load(self.config)
        except (yaml.YAMLError, ValueError, RecursionError):
            return {}
        return recipe if isinstance(recipe, dict) else {}

    def option(self, section: str, name: str) -> Any:
        """Return an option of the recipe, or None if the recipe does not state it."""
        values = self.recipe.get(section)
        return values.get(name) if isinstance(values, dict) else None

    @property
    def reads_store(self) -> bool:
        """Whether the run reads captured hidden states."""
        return self.option("target", "store") is not None

    @property
    def placement(self) -> str | None:
        """Where micro-batches were prepared at the last logged step, as in `Schedule.placement`; None = unknown."""
        placement = self.metrics[-1].get("placement") if self.metrics else None
        return placement if isinstance(placement, str) else None

    def column(self, key: str, index: int | None = None) -> list[float | None]:
        """Return a value of every logged step. index: of a list."""
        return column(self.metrics, key, index)

    @property
    def steps(self) -> list[float]:
        return [line["step"] for line in self.metrics]

    def mean(self, key: str) -> float | None:
        """Return the mean of a value over the last logged steps."""
        values = [value for value in self.column(key)[-self._num_averaged :] if value is not None]
        return sum(values) / len(values) if values else None

    def mean_parts(self) -> dict[str, float]:
        """Return the mean seconds of each part of the last logged steps."""
        lines = [line["parts_s"] for line in self.metrics[-self._num_averaged :] if isinstance(line.get("parts_s"), dict)]
        means = {}
        for name in lines[0] if lines else ():
            values = [value for value in column(lines, name) if value is not None]
            if values:
                means[name] = sum(values) / len(values)
        return means

    @property
    def best(self) -> Line | None:
        """The evaluation of the best draft, or None if `draft` is not known to hold it."""
        kept = [line for line in self.evaluations if line.get("is_kept") and not line.get("is_gone")]
        return kept[-1] if kept else None

    @property
    def measured(self) -> Line | None:
        """The acceptance that was measured at the end of the run, or so far for the best draft; None = it was not measured."""
        report = self.report("after") or self.best
        return None if report is None or finite(report.get("acceptance_length")) is None else report

    def report(self, name: str) -> Line | None:
        """Return an acceptance report of the summary, or None if nothing was measured."""
        report = (self.summary or {}).get(name)
        if not isinstance(report, dict) or not finite(report.get("num_prompts")):
            return None
        return report if finite(report.get("acceptance_length")) is not None else None

    @property
    def _num_averaged(self) -> int:
        return max(1, int(len(self.metrics) * AVERAGED))


def column(lines: Sequence[Line], key: str, index: int | None = None) -> list[float | None]:
    """Return a value of every line, None where it is missing or no finite number. index: of a list."""
    values: list[float | None] = []
    for line in lines:
        value = line.get(key)
        if index is not None:
            value = value[index] if isinstance(value, list) and index < len(value) else None
        values.append(finite(value))
    return values


class _Reader:
    """Reads files of a run. notes: what could not be read."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.notes: list[str] = []

    def text(self, name: str) -> str | None:
        """Return the contents of a file, or None if there is none."""
        path = self._folder / name
        if not path.exists():
            return None
        try:
            return path.read_bytes().decode("utf-8", errors="replace")
        except OSError as error:
            self.notes.append(f"{name} cannot be read: {error.strerror}.")
            return None

    def facts(self, name: str) -> Line | None:
        """Return the object in a JSON file, or None if there is none."""
        text = self.text(name)
        if text is None:
            return None
        facts = _parsed(text)
        if facts is None:
            self.notes.append(f"{name} is not a JSON object, and is left out.")
        return facts

    def lines(self, name: str) -> list[Line]:
        """Return the objects in a JSONL file. An incomplete last line, which may still be written, is left out."""
        text = self.text(name) or ""
        found = [_parsed(line) for line in text.split("\n")[:-1] if line.strip()]
        return self._kept(name, [line for line in found if line is not None], len(found))

    def lines_with_step(self, name: str) -> list[Line]:
        """Return the lines of a file whose `step` is a number."""
        found = self.lines(name)
        return self._kept(name, [line for line in found if finite(line.get("step")) is not None], len(found))

    def _kept(self, name: str, kept: list[Line], num_found: int) -> list[Line]:
        if len(kept) < num_found:
            self.notes.append(f"{name}: {counted(num_found - len(kept), 'line')} left out that cannot be read.")
        return kept


def _parsed(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
