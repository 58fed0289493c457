"""Dataset statistics as one self-contained HTML page: figures, plots and samples."""

import html
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from engine.data.dataset_stats import VOCAB_SIZES, DatasetStats
from engine.host.files import write_text

Run = tuple[str, bool]  # text, and whether its tokens are assistant tokens
INK = "#24292f"
ASSISTANT = "#1a7f37"
QUIET = "#8c959f"
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #24292f; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.4rem } h2 { font-size: 1.1rem; margin-top: 2rem }
table { border-collapse: collapse } td { padding: .15rem 1rem .15rem 0; vertical-align: top }
td:last-child { font-variant-numeric: tabular-nums }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(26rem, 1fr)); gap: 1rem }
.plots svg { width: 100%; height: auto }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f6f8fa; padding: .8rem; border-radius: 6px; color: #57606a }
pre b { font-weight: normal; color: #1a7f37; background: #dafbe1 }
"""


def write_page(path: Path, title: str, stats: DatasetStats, samples: Sequence[tuple[str, Sequence[Run]]]) -> None:
    """Write the page to `path`.

    samples: a heading and the text of each sample, as runs of assistant and other text.
    Raises ImportError if matplotlib is missing, and OSError if the path cannot be written.
    """
    rows = []
    for name, value in stats.facts().items():
        label = html.escape(name.replace("_", " "))
        rows.append(f"<tr><td>{label}</td><td>{html.escape(_shown(value))}</td></tr>")
    table = "\n".join(rows)
    shown = "\n".join(f"<h3>{html.escape(heading)}</h3>\n<pre>{_coloured(runs)}</pre>" for heading, runs in samples)
    page = f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{html.escape(title)}</title><style>{STYLE}</style>
<h1>{html.escape(title)}</h1>
<table>
{table}
</table>
<h2>Plots</h2>
<div class="plots">
{"".join(plots(stats))}
</div>
<h2>Samples</h2>
<p>Assistant tokens, which carry loss, are shown in green.</p>
{shown}
</html>
"""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, page)


def plots(stats: DatasetStats) -> list[str]:
    """Return the plots as SVG.

    They show document lengths, the share of assistant tokens, rows by drafted token, and coverage by
    vocabulary size.
    """
    from matplotlib.figure import Figure

    drawn = []
    for draw in (_lengths, _shares, _rows, _coverage):
        figure = Figure(figsize=(5.2, 3), layout="constrained")
        axes = figure.subplots()
        axes.spines[["top", "right"]].set_visible(False)
        draw(axes, stats)
        axes.title.set_fontsize(10)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
        drawn.append(buffer.getvalue().partition("<svg")[1] + buffer.getvalue().partition("<svg")[2])
    return drawn


def _lengths(axes, stats: DatasetStats) -> None:
    axes.hist(stats.lengths, bins=40, color=ASSISTANT)
    axes.axvline(stats.max_tokens, color=QUIET, linestyle="--", label=f"max_tokens {stats.max_tokens:,}")
    axes.set(title="Tokens per document", ylabel="documents")
    axes.legend(frameon=False)


def _shares(axes, stats: DatasetStats) -> None:
    axes.hist(stats.assistant_tokens / stats.lengths, bins=40, range=(0, 1), color=ASSISTANT)
    axes.set(title="Share of assistant tokens per document", ylabel="documents")


def _rows(axes, stats: DatasetStats) -> None:
    steps = np.arange(len(stats.rows_S))
    axes.bar(steps, stats.alive_S, color="#aceebb", label="computed")
    axes.bar(steps, stats.rows_S, width=0.5, color=ASSISTANT, label="carry loss")
    axes.set(title="Rows by drafted token, as a share of all positions", ylim=(0, 1), xticks=steps)
    axes.legend(frameon=False)


def _coverage(axes, stats: DatasetStats) -> None:
    sizes = np.unique(np.geomspace(100, max(VOCAB_SIZES), 60).astype(int))
    axes.semilogx(sizes, [stats.coverage(size) for size in sizes], color=INK)
    for size in VOCAB_SIZES:
        covered = stats.coverage(size)
        axes.plot(size, covered, "o", color=ASSISTANT, markersize=4)
        axes.annotate(f"{size // 1000}k: {covered:.1%}", (size, covered - 0.05), rotation=90, fontsize=8, va="top", ha="center")
    axes.set(title="Coverage by size of the draft vocabulary", xlabel="tokens", ylim=(0, 1.05))


def _coloured(runs: Sequence[Run]) -> str:
    return "".join(f"<b>{html.escape(text)}</b>" if is_assistant else html.escape(text) for text, is_assistant in runs)


def _shown(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{int(size):,}: {share:.2%}" for size, share in value.items())
    if isinstance(value, list):
        return " / ".join(map(_shown, value))
    return f"{value:,}" if isinstance(value, int) else str(value)
