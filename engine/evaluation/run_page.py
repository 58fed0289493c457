"""The report of a run, or of two, as one self-contained HTML page."""

import html
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from engine.config.block_sections import BLOCK_METHODS, depth_name
from engine.config.sections import RECIPE, SHOWN_TTT_STEPS
from engine.evaluation.charts import Bar, Line, line_chart, stacked_bars
from engine.evaluation.page_files import files_section, warnings_section
from engine.evaluation.page_grid import grid_section
from engine.evaluation.page_outcome import acceptance, comparison, tiles
from engine.evaluation.page_parts import PART_NAMES, escaped, guarded, of_run, suffix, whole_page
from engine.evaluation.page_roofline import roofline_section
from engine.evaluation.page_samples import samples_section
from engine.evaluation.run_record import RunRecord, column
from engine.host.files import write_text
from engine.host.telemetry import visible
from engine.overlap.bottleneck import bottleneck
from engine.overlap.step_clock import DRAFT_PARTS, PARTS, TARGET_PARTS, WAIT

HELD_OUT_COLOUR = 1
LONGEST_CONFIG = 100_000  # characters that are shown


def write_run_page(folders: Sequence[Path], path: Path) -> None:
    """Write the report of one or two runs. Raises ValueError for a folder that is no run, and WriteError."""
    runs = [RunRecord.read(folder) for folder in folders]
    write_text(path, run_page(runs), shared=True)  # the run and a user may write it at the same time


def run_page(runs: Sequence[RunRecord]) -> str:
    """Return the page. A section whose files hold something unexpected is replaced by a note."""
    if len({run.name for run in runs}) < len(runs):
        runs = [replace(run, title=str(run.folder)) for run in runs]
    title = escaped(" and ".join(run.name for run in runs))
    body = [f"<h1>{title}</h1>"]
    for run in runs:
        body.append(guarded("The state of the run", partial(_subtitle, run)))
    for run in runs:
        body.append(guarded("Warnings", partial(warnings_section, run, runs)))
    for run in runs:
        body.append(guarded("The main figures", partial(tiles, run, runs)))
    body.append(guarded("The difference of the runs", partial(comparison, runs)))
    body.append(guarded("Charts", partial(_training, runs)))
    body.append(guarded("The time of a step", partial(_step_time, runs)))
    for run in runs:
        body.append(guarded("The least time of a step", partial(roofline_section, run, runs)))
    body.append(guarded("Acceptance", partial(acceptance, runs)))
    for run in runs:
        body.append(guarded("Shapes of trees", partial(grid_section, run, runs)))
    for run in runs:
        body.append(guarded("Replies to held-out prompts", partial(samples_section, run, runs)))
    for run in runs:
        body.append(guarded("Drafts and checkpoints", partial(files_section, run, runs)))
    body += [_configuration(run, runs) for run in runs]
    return whole_page(title, body)


def _subtitle(run: RunRecord) -> str:
    target = run.option("target", "path") or "?"
    method = run.option("draft", "method") or "eagle3"
    state = "finished" if run.summary is not None else "not finished"
    last = f"step {run.metrics[-1]['step']:,}" if run.metrics else "no step logged"
    sentence = f"{run.folder}: {method} draft for {target}, {last}, {state}"
    return f'<p class="quiet">{escaped(sentence)}</p>'


def _configuration(run: RunRecord, runs: Sequence[RunRecord]) -> str:
    config = html.escape(visible(run.config[:LONGEST_CONFIG]))
    shown = f"<details><summary>{RECIPE}</summary><pre>{config}</pre></details>"
    return f"<h2>Configuration{of_run(run, runs)}</h2>{shown}"


def _training(runs: Sequence[RunRecord]) -> str:
    charts = "".join(_charts(runs))
    return f'<h2>Training</h2><div class="charts">{charts}</div>' if charts else "<p>No step has been logged yet.</p>"


def _charts(runs: Sequence[RunRecord]) -> list[str]:
    """Return the charts of the values that the runs have."""
    curves = _Curves(runs)
    spread = "held_out_loss_confidence"
    loss = curves.logged("loss", "loss")
    loss += curves.evaluated("held_out_loss", "held-out loss", HELD_OUT_COLOUR, half_widths=spread)
    losses = curves.per_depth("loss_per_step", "held_out_loss_per_step")
    accuracies = curves.per_depth("accuracy_per_step", "held_out_accuracy_per_step")
    depths = " or ".join(dict.fromkeys(depth_name(run.option("draft", "method")) for run in runs))
    lengths = curves.logged("simulated_acceptance_length", "simulated, in training")
    lengths += curves.evaluated("acceptance_length", "measured", HELD_OUT_COLOUR, half_widths="confidence")
    spread = "held_out_acceptance_length_confidence"
    lengths += curves.evaluated("held_out_acceptance_length", "simulated, held-out", 2, half_widths=spread)
    utilization = curves.logged("gpu_utilization", "GPU") + curves.logged("cpu_utilization", "CPU", 1)
    memory = curves.logged("memory_gib", "memory")
    memory += curves.logged("gpu_memory_gib", "GPU", 1) + curves.logged("host_memory_gib", "host", 2)
    return [
        line_chart("Loss, over optimizer steps", loss),
        line_chart(f"Loss by {depths}", losses),
        line_chart(f"Top-1 accuracy by {depths}", accuracies, from_zero=True),
        line_chart("Acceptance length; bands are 95% confidence intervals", lengths),
        line_chart("Learning rate", curves.logged("lr", "learning rate"), from_zero=True),
        line_chart("Gradient norm", curves.logged("grad_norm", "gradient norm"), log=True),
        line_chart("Tokens per second", curves.logged("tokens_per_s", "tokens/s"), from_zero=True),
        line_chart("Model FLOPs utilization", curves.logged("mfu", "MFU"), from_zero=True),
        line_chart("Memory of rank 0, GiB", memory, from_zero=True),
        line_chart("Share of the time that a device is busy", utilization, from_zero=True),
        line_chart("Power of the GPU, W", curves.logged("gpu_power_w", "power"), from_zero=True),
        line_chart("Temperature of the GPU, °C", curves.logged("gpu_temperature_c", "temperature")),
        line_chart("Joules per million tokens", curves.logged("joules_per_million_tokens", "energy"), from_zero=True),
    ]


class _Curves:
    """Makes the lines of charts, one per run that has the value."""

    def __init__(self, runs: Sequence[RunRecord]) -> None:
        self._runs = runs

    def logged(self, key: str, name: str, colour: int = 0, index: int | None = None) -> list[Line]:
        """Return the lines of a value in the metrics. index: of a list."""
        found = []
        for number, run in enumerate(self._runs):
            values = run.column(key, index)
            if any(value is not None for value in values):
                found.append(Line(name + suffix(run, self._runs), run.steps, values, colour, number))
        return found

    def evaluated(
        self,
        key: str,
        name: str,
        colour: int,
        index: int | None = None,
        half_widths: str | None = None,
        is_joined: bool = True,
    ) -> list[Line]:
        """Return the lines of a value in the evaluations. half_widths: key of half the width of a band."""
        found = []
        for number, run in enumerate(self._runs):
            values = column(run.evaluations, key, index)
            if any(value is not None for value in values):
                line = Line(name + suffix(run, self._runs), [line["step"] for line in run.evaluations], values, colour, number)
                widths = None if half_widths is None else column(run.evaluations, half_widths)
                found.append(replace(line, half_widths=widths, marked=True, is_joined=is_joined))
        return found

    def per_depth(self, key: str, held_out_key: str) -> list[Line]:
        """Return the lines of a list with a value per drafted token, and points of the same colours for held-out data."""
        found = []
        name = "token" if all(run.option("draft", "method") in BLOCK_METHODS for run in self._runs) else "step"
        for colour, index in enumerate(SHOWN_TTT_STEPS):
            found += self.logged(key, f"{name} {index + 1}", colour, index)
        for colour, index in enumerate(SHOWN_TTT_STEPS):
            found += self.evaluated(held_out_key, f"{name} {index + 1}, held-out", colour, index, is_joined=False)
        return found


def _step_time(runs: Sequence[RunRecord]) -> str:
    """Return the time of a step by part, and what would shorten it."""
    bars = []
    advice = []
    for run in runs:
        parts_s = run.mean_parts()
        step_s = run.mean("step_s")
        if step_s is None or not parts_s.keys() >= set(PARTS):
            continue
        shown = [(PART_NAMES[key], parts_s[key]) for key in (*DRAFT_PARTS, WAIT)]
        rest_s = step_s - sum(value for _, value in shown)
        own = suffix(run, runs)
        bars.append(Bar(f"step{own}", [*shown, ("rest", max(0.0, rest_s))]))
        target = [(PART_NAMES[key], parts_s[key]) for key in TARGET_PARTS]
        bars.append(Bar(f"target side{own}", target))
        sentence = bottleneck(parts_s, step_s, run.reads_store, run.placement)
        named = f"{run.name}: {sentence}" if len(runs) > 1 else sentence
        advice.append(f"<p>{escaped(named)}</p>")
    chart = stacked_bars("Mean of the last tenth of the logged steps", bars, "s")
    return f"<h2>Where the time of a step goes</h2>{chart}{''.join(advice)}" if chart else ""
