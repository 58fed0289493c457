"""Sections of a run's report: its main figures, the difference of two runs, and what speculative decoding has shown."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engine.config.sections import DRAFT, SPLIT
from engine.evaluation.charts import number
from engine.evaluation.grid import part_of_block
from engine.evaluation.page_parts import escaped, length_text, suffix, table
from engine.evaluation.run_record import RunRecord, column, finite
from engine.models.draft_folder import read_draft_config
from engine.serving.draft_kinds import draft_kind


@dataclass(frozen=True)
class Figure:
    """A mean over the last logged steps.

    more_is_better: None = neither direction is better.
    of_draft_ranks: whether it covers only the ranks that train the draft, whatever else the job runs.
    """

    key: str
    name: str
    more_is_better: bool | None
    of_draft_ranks: bool = False


FIGURES = (
    Figure("loss", "loss", False),
    Figure("simulated_acceptance_length", "simulated acceptance length", True),
    Figure("tokens_per_s", "tokens/s", True),
    Figure("step_s", "seconds per step", False),
    Figure("overlap_efficiency", "overlap efficiency", True),
    Figure("mfu", "model FLOPs utilization", True, of_draft_ranks=True),
    Figure("memory_gib", "memory, GiB", False),
    Figure("joules_per_million_tokens", "joules per million tokens", False, of_draft_ranks=True),
)
NO_VERDICT = "no verdict: the placements or the numbers of ranks differ"
REPORTS = {"before": "untrained draft", "after": "trained draft", "prompt_lookup": "prompt lookup"}


def tiles(run: RunRecord, runs: Sequence[RunRecord]) -> str:
    """Return the main figures of a run."""
    facts: list[tuple[str, str]] = []
    best = run.best
    if run.measured is not None:
        facts.append(("acceptance length", length_text(run.measured)))
    if best is not None:
        facts.append(("best draft", f"step {best['step']:,}"))
    held_out = last_held_out_loss(run)
    if held_out is not None:
        facts.append(("held-out loss", number(held_out)))
    for figure in FIGURES:
        value = run.mean(figure.key)
        if value is not None:
            facts.append((figure.name, number(value)))
    shown = "".join(f"<div>{escaped(name)}<b>{escaped(value)}</b></div>" for name, value in facts)
    heading = f"<h2>{escaped(run.name)}</h2>" if len(runs) > 1 else ""
    return f'{heading}<div class="tiles">{shown}</div>' if shown else ""


def last_held_out_loss(run: RunRecord) -> float | None:
    """Return the held-out loss that was measured last, or None."""
    losses = [loss for loss in column(run.evaluations, "held_out_loss") if loss is not None]
    return losses[-1] if losses else None


def comparison(runs: Sequence[RunRecord]) -> str:
    """Return a table of the differences of two runs, or "" for one run."""
    if len(runs) != 2:
        return ""
    one, two = runs
    rows = []
    if one.measured is not None and two.measured is not None:
        rows.append(_acceptance_row(one.measured, two.measured))
    held_out = Figure("held_out_loss", "held-out loss", False)
    rows += _figure_rows(held_out, last_held_out_loss(one), last_held_out_loss(two))
    is_comparable = _ranks(one) == _ranks(two)
    for figure in FIGURES:
        found = _figure_rows(figure, one.mean(figure.key), two.mean(figure.key))
        if figure.of_draft_ranks and not is_comparable:
            found = [(*row[:-1], NO_VERDICT) for row in found]
        rows += found
    compared = table(("", one.name, two.name, "difference", ""), rows)
    what = "Means over the last tenth of the logged steps; acceptance length and held-out loss as measured last."
    return f'<h2>Difference of the two runs</h2><p class="quiet">{what}</p>{compared}' if compared else ""


def _ranks(run: RunRecord) -> tuple[Any, ...]:
    """Return what the figures of the draft's ranks depend on: placement of the target, and numbers of ranks."""
    work = run.work or {}
    is_split = run.option("overlap", "placement") == SPLIT
    return is_split, run.reads_store, work.get("draft_ranks"), work.get("target_ranks")


def _acceptance_row(one: Mapping[str, Any], two: Mapping[str, Any]) -> tuple[str, ...]:
    lengths = one["acceptance_length"], two["acceptance_length"]
    spreads = finite(one.get("confidence")), finite(two.get("confidence"))
    verdict = _verdict(*lengths, more_is_better=True)
    if spreads[0] is None or spreads[1] is None:
        verdict = f"{verdict}; too few prompts for an interval"
    elif abs(lengths[1] - lengths[0]) <= math.hypot(spreads[0], spreads[1]):
        verdict = "within the 95% confidence interval of the difference"
    return ("acceptance length, measured", length_text(one), length_text(two), _percent(*lengths), verdict)


def _figure_rows(figure: Figure, one: float | None, two: float | None) -> list[tuple[str, ...]]:
    """Return the row of a figure, or no row if a run does not have it."""
    if one is None or two is None:
        return []
    verdict = "" if figure.more_is_better is None else _verdict(one, two, figure.more_is_better)
    return [(figure.name, number(one), number(two), _percent(one, two), verdict)]


def _percent(one: float, two: float) -> str:
    return f"{100 * (two - one) / abs(one):+.1f}%" if one else "-"


def _verdict(one: float, two: float, more_is_better: bool) -> str:
    if one == two:
        return "equal"
    return "better" if (two > one) == more_is_better else "worse"


def acceptance(runs: Sequence[RunRecord]) -> str:
    """Return a table of what speculative decoding has shown."""
    rows = []
    for run in runs:
        for key, name in REPORTS.items():
            report = run.report(key)
            if report is not None:
                rows.append(_report_row(name + suffix(run, runs), report))
    headings = ("drafting", "acceptance length", "accepted by depth", "speed against plain decoding", "prompts")
    shown = table(headings, rows)
    notes = dict.fromkeys(note for note in map(_part_note, runs) if note is not None)
    quiet = "".join(f'<p class="quiet">{escaped(note)}</p>' for note in notes)
    return f"<h2>Speculative decoding</h2>{shown}{quiet}" if shown else ""


def _part_note(run: RunRecord) -> str | None:
    """Return what to say of an acceptance that was measured with a part of a block; None = nothing."""
    depths = (run.report("after") or {}).get("acceptance_per_depth")
    try:
        kind = draft_kind(read_draft_config(run.folder / DRAFT))
    except ValueError:
        return None
    return part_of_block(len(depths), kind) if kind is not None and isinstance(depths, list) else None


def _report_row(name: str, report: Mapping[str, Any]) -> tuple[str, ...]:
    depths = " ".join("-" if share is None else f"{share:.0%}" for share in report.get("acceptance_per_depth") or ())
    drafted, plain = finite(report.get("tokens_per_s")), finite(report.get("plain_tokens_per_s"))
    speed = f"{drafted / plain:.2f}x" if drafted and plain else "-"
    return (name, length_text(report), depths, speed, str(report["num_prompts"]))
