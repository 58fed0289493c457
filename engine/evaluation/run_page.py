"""The report of a run, or of two, as one self-contained HTML page."""

import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from engine.config.sections import METRICS
from engine.evaluation.charts import Bar, Line, line_chart, number, stacked_bars
from engine.evaluation.history import EVALUATIONS
from engine.evaluation.report import SUMMARY
from engine.host.files import write_text

SHOWN_TTT_STEPS = (0, 2, 6)  # TTT steps whose accuracy is drawn: the 1st, 3rd and 7th
AVERAGED = 0.1  # share of the last logged steps that the table and the bars average over
PART_NAMES = {
    "draft_forward": "draft forward",
    "backward": "backward",
    "optimizer": "optimizer",
    "wait_for_target": "waiting for the target",
}
TARGET_PART_NAMES = {"data": "reading data", "target_forward": "target forward", "transfer": "transfer"}
STYLE = Path(__file__).with_name("run_page.css")


@dataclass(frozen=True)
class RunRecord:
    """The contents of a run's folder so far.

    metrics, evaluations: lines of the files. summary: None = the run has not ended. config: the recipe as text.
    title: instead of the folder's name, where two runs have the same one.
    """

    folder: Path
    metrics: Sequence[Mapping[str, Any]]
    evaluations: Sequence[Mapping[str, Any]]
    summary: Mapping[str, Any] | None
    config: str
    title: str = ""

    @classmethod
    def read(cls, folder: Path) -> "RunRecord":
        """Read a run's folder. Raises ValueError if it is not one."""
        config = folder / "config.yaml"
        if not config.is_file():
            raise ValueError(f"{folder} is not the output_dir of a run: it has no config.yaml")
        summary = folder / SUMMARY
        return cls(
            folder,
            _lines(folder / METRICS),
            _lines(folder / EVALUATIONS),
            json.loads(summary.read_text(encoding="utf-8")) if summary.is_file() else None,
            config.read_text(encoding="utf-8"),
        )

    @property
    def name(self) -> str:
        return self.title or self.folder.name or str(self.folder)

    @property
    def reads_store(self) -> bool:
        """Whether the run reads captured hidden states."""
        target = (yaml.safe_load(self.config) or {}).get("target") or {}
        return target.get("store") is not None

    def column(self, key: str, index: int | None = None) -> list[float | None]:
        """Return a value of every logged step. index: of a list."""
        values = []
        for line in self.metrics:
            value = line.get(key)
            if index is not None:
                value = value[index] if isinstance(value, list) and index < len(value) else None
            values.append(value)
        return values

    @property
    def steps(self) -> list[float]:
        return [line["step"] for line in self.metrics]

    def mean(self, key: str) -> float | None:
        """Return the mean of a value over the last logged steps."""
        values = [value for value in self.column(key)[-self._num_averaged :] if value is not None]
        return sum(values) / len(values) if values else None

    def mean_parts(self) -> dict[str, float]:
        """Return the mean seconds of each part of the last logged steps."""
        lines = [line["parts_s"] for line in self.metrics[-self._num_averaged :] if "parts_s" in line]
        return {name: sum(line[name] for line in lines) / len(lines) for name in lines[0]} if lines else {}

    @property
    def _num_averaged(self) -> int:
        return max(1, int(len(self.metrics) * AVERAGED))


def _lines(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a JSONL file; an incomplete last line is left out."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def write_run_page(folders: Sequence[Path], path: Path) -> None:
    """Write the report of one or two runs. Raises ValueError for a folder that is no run, and WriteError."""
    runs = [RunRecord.read(folder) for folder in folders]
    write_text(path, run_page(runs), shared=True)  # the run and a user may write it at the same time


def run_page(runs: Sequence[RunRecord]) -> str:
    """Return the page."""
    if len({run.name for run in runs}) < len(runs):
        runs = [replace(run, title=str(run.folder)) for run in runs]
    title = html.escape(" and ".join(run.name for run in runs))
    body = [f"<h1>{title}</h1>"]
    body += [f'<p class="quiet">{html.escape(_subtitle(run))}</p>' for run in runs]
    body += [_warnings(run) for run in runs]
    body += [_tiles(run, runs) for run in runs]
    charts = "".join(_charts(runs))
    body.append(f'<h2>Training</h2><div class="charts">{charts}</div>' if charts else "<p>No step has been logged yet.</p>")
    body.append(_step_time(runs))
    body.append(_acceptance(runs))
    for run in runs:
        config = f"<details><summary>config.yaml</summary><pre>{html.escape(run.config)}</pre></details>"
        body.append(f"<h2>Configuration{_of(run, runs)}</h2>{config}")
    style = STYLE.read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{title}</title><style>{style}</style>\n" + "\n".join(part for part in body if part) + "\n</html>\n"
    )


def _of(run: RunRecord, runs: Sequence[RunRecord]) -> str:
    return f" of {html.escape(run.name)}" if len(runs) > 1 else ""


def _subtitle(run: RunRecord) -> str:
    recipe = yaml.safe_load(run.config) or {}
    target = (recipe.get("target") or {}).get("path", "?")
    method = (recipe.get("draft") or {}).get("method", "eagle3")
    state = "finished" if run.summary is not None else "not finished"
    last = f"step {run.metrics[-1]['step']:,}" if run.metrics else "no step logged"
    return f"{run.folder}: {method} draft for {target}, {last}, {state}"


def _tiles(run: RunRecord, runs: Sequence[RunRecord]) -> str:
    facts: list[tuple[str, str]] = []
    after = (run.summary or {}).get("after")
    if after is not None and not after["num_prompts"]:
        after = None
    comparable = [line for line in run.evaluations if not line.get("is_gone")]
    best = max(comparable, key=lambda line: line["acceptance_length"], default=None)
    measured = after or best
    if measured is not None:
        facts.append(("acceptance length", _length(measured)))
        if best is not None:
            facts.append(("best draft", f"step {best['step']:,}"))
    names = {
        "loss": "loss",
        "simulated_acceptance_length": "simulated acceptance length",
        "tokens_per_s": "tokens/s",
        "step_s": "seconds per step",
        "overlap_efficiency": "overlap efficiency",
        "memory_gib": "memory, GiB",
    }
    for key, name in names.items():
        value = run.mean(key)
        if value is not None:
            facts.append((name, number(value)))
    tiles = "".join(f"<div>{html.escape(name)}<b>{html.escape(value)}</b></div>" for name, value in facts)
    heading = f"<h2>{html.escape(run.name)}</h2>" if len(runs) > 1 else ""
    return f'{heading}<div class="tiles">{tiles}</div>' if tiles else ""


def _length(report: Mapping[str, Any]) -> str:
    """Return an acceptance length with its confidence interval."""
    confidence = report.get("confidence")
    spread = "" if confidence is None else f" ± {confidence:.2f}"
    return f"{report['acceptance_length']:.2f}{spread}"


def _charts(runs: Sequence[RunRecord]) -> list[str]:
    def lines(key: str, name: str, colour: int = 0, index: int | None = None) -> list[Line]:
        found = []
        for number_of_run, run in enumerate(runs):
            values = run.column(key, index)
            if any(value is not None for value in values):
                found.append(Line(name + _suffix(run, runs), run.steps, values, colour, number_of_run))
        return found

    def per_ttt_step(key: str) -> list[Line]:
        found = []
        for colour, index in enumerate(SHOWN_TTT_STEPS):
            found += lines(key, f"step {index + 1}", colour, index)
        return found

    evaluations = []
    for number_of_run, run in enumerate(runs):
        if run.evaluations:
            evaluations.append(
                Line(
                    "measured" + _suffix(run, runs),
                    [line["step"] for line in run.evaluations],
                    [line["acceptance_length"] for line in run.evaluations],
                    1,
                    number_of_run,
                    [line["confidence"] for line in run.evaluations],
                )
            )
    simulated = lines("simulated_acceptance_length", "simulated, in training")
    return [
        line_chart("Loss, over optimizer steps", lines("loss", "loss")),
        line_chart("Loss of single TTT steps", per_ttt_step("loss_per_step")),
        line_chart("Top-1 accuracy of single TTT steps", per_ttt_step("accuracy_per_step"), from_zero=True),
        line_chart("Acceptance length; the band is the 95% confidence interval", simulated + evaluations),
        line_chart("Learning rate", lines("lr", "learning rate"), from_zero=True),
        line_chart("Gradient norm", lines("grad_norm", "gradient norm"), log=True),
        line_chart("Tokens per second", lines("tokens_per_s", "tokens/s"), from_zero=True),
        line_chart("Memory of rank 0, GiB", lines("memory_gib", "memory"), from_zero=True),
    ]


def _suffix(run: RunRecord, runs: Sequence[RunRecord]) -> str:
    return f", {run.name}" if len(runs) > 1 else ""


def _step_time(runs: Sequence[RunRecord]) -> str:
    """Return the time of a step by part, and what would shorten it."""
    bars = []
    advice = []
    for run in runs:
        parts_s = run.mean_parts()
        step_s = run.mean("step_s")
        if not parts_s or step_s is None:
            continue
        shown = [(name, parts_s[key]) for key, name in PART_NAMES.items()]
        rest_s = step_s - sum(value for _, value in shown)
        own = _suffix(run, runs)
        bars.append(Bar(f"step{own}", [*shown, ("rest", max(0.0, rest_s))]))
        target = [(name, parts_s[key]) for key, name in TARGET_PART_NAMES.items()]
        bars.append(Bar(f"target side{own}", target))
        sentence = bottleneck(parts_s, step_s, run.reads_store)
        advice.append(f"<p>{html.escape(own.removeprefix(', '))} {html.escape(sentence)}</p>")
    chart = stacked_bars("Mean of the last tenth of the logged steps", bars, "s")
    return f"<h2>Where the time of a step goes</h2>{chart}{''.join(advice)}" if chart else ""


def bottleneck(parts_s: Mapping[str, float], step_s: float, reads_store: bool = False) -> str:
    """Return a sentence that names what a step waits for most, and the option that would change it.

    parts_s: mean seconds of each part. reads_store: whether hidden states are read from a store.
    """
    draft_s = parts_s["draft_forward"] + parts_s["backward"] + parts_s["optimizer"]
    target_s = parts_s["target_forward"]
    is_serial = target_s > 0.2 * step_s and target_s + draft_s <= 1.1 * step_s
    is_waiting = parts_s["wait_for_target"] > 0.1 * step_s
    reads_longest = parts_s["data"] > max(target_s, 0.2 * step_s)
    if (is_waiting or is_serial) and (reads_longest or reads_store):
        return "The draft waits for data: put the store or data.cache_dir on a faster disk, or raise overlap.look_ahead."
    if is_waiting:
        ways = "give it more ranks (overlap.placement=split with a larger overlap.target_ranks), share it (parallel.tp_size)"
        return f"The draft waits for the target: {ways}, or capture its hidden states once if there are several epochs."
    if is_serial:
        return "Target and draft run one after the other: overlap.placement=colocated or split would hide the shorter one."
    return "The draft's own forward and backward are the longest part: more ranks for the draft shorten a step."


def _acceptance(runs: Sequence[RunRecord]) -> str:
    """Return a table of what speculative decoding has shown."""
    rows = []
    for run in runs:
        for key, name in (("before", "untrained draft"), ("after", "trained draft"), ("prompt_lookup", "prompt lookup")):
            report = (run.summary or {}).get(key)
            if not report or not report["num_prompts"]:
                continue
            depths = " ".join("-" if share is None else f"{share:.0%}" for share in report["acceptance_per_depth"])
            speed = "-"
            if report.get("tokens_per_s") and report.get("plain_tokens_per_s"):
                speed = f"{report['tokens_per_s'] / report['plain_tokens_per_s']:.2f}x"
            cells = [name + _suffix(run, runs), _length(report), depths, speed, str(report["num_prompts"])]
            rows.append("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>")
    if not rows:
        return ""
    headings = ("drafting", "acceptance length", "accepted by depth", "speed against plain decoding", "prompts")
    head = "".join(f"<th>{heading}</th>" for heading in headings)
    return f'<h2>Speculative decoding</h2><div class="table"><table><tr>{head}</tr>{"".join(rows)}</table></div>'


def _warnings(run: RunRecord) -> str:
    left_out = (run.summary or {}).get("left_out") or []
    parts = []
    if left_out:
        problem = "because the target's states are not finite; summary.json lists them"
        parts.append(f"{len(left_out)} documents were left out, {problem}.")
    if any(line.get("non_finite") for line in run.metrics):
        parts.append("Some metrics were not finite.")
    return "".join(f'<p class="warning">{html.escape(part)}</p>' for part in parts)
