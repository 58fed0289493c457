"""Pieces of HTML that the sections of reports share, and the page around them."""

import html
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.evaluation.run_record import RunRecord, finite
from engine.host.telemetry import visible
from engine.overlap.step_clock import BACKWARD, DATA, DRAFT_FORWARD, OPTIMIZER, TARGET_FORWARD, TRANSFER, WAIT

PART_NAMES = {
    DATA: "reading data",
    TARGET_FORWARD: "target forward",
    TRANSFER: "transfer",
    WAIT: "waiting for the target",
    DRAFT_FORWARD: "draft forward",
    BACKWARD: "draft backward",
    OPTIMIZER: "optimizer",
}
STYLE = Path(__file__).with_name("run_page.css")
LONGEST_TEXT = 1000  # characters of a text from a file that are shown
# Errors of a section that was made from files with unexpected contents.
UNEXPECTED = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, OSError, RecursionError)


def escaped(value: Any) -> str:
    """Return a text from a file so that a page shows it: shortened, with visible control characters."""
    text = str(value)
    shortened = text if len(text) <= LONGEST_TEXT else f"{text[:LONGEST_TEXT]} ..."
    return html.escape(visible(shortened))


def whole_page(title: str, parts: Sequence[str]) -> str:
    """Return a self-contained HTML page. title, parts: as HTML; empty parts are left out."""
    style = STYLE.read_text(encoding="utf-8")
    page = (
        '<!doctype html>\n<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{title}</title><style>{style}</style>\n" + "\n".join(part for part in parts if part) + "\n</html>\n"
    )
    return page.encode("utf-8", errors="replace").decode("utf-8")  # JSON may hold half a surrogate pair


def warning(text: str) -> str:
    return f'<p class="warning">{escaped(text)}</p>'


def guarded(subject: str, render: Callable[[], str]) -> str:
    """Return a section, or a note where the files that it reads hold something unexpected."""
    try:
        return render()
    except UNEXPECTED as error:
        return warning(f"{subject} cannot be shown: {type(error).__name__}: {error}")


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table of texts, or "" without rows."""
    if not rows:
        return ""
    head = "".join(f"<th>{escaped(heading)}</th>" for heading in headings)
    body = "".join("<tr>" + "".join(f"<td>{escaped(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="table"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def suffix(run: RunRecord, runs: Sequence[RunRecord]) -> str:
    """Return what tells the lines of one run from those of another."""
    return f", {run.name}" if len(runs) > 1 else ""


def of_run(run: RunRecord, runs: Sequence[RunRecord]) -> str:
    """Return the end of a heading, as HTML."""
    return f" of {escaped(run.name)}" if len(runs) > 1 else ""


def length_text(report: Mapping[str, Any]) -> str:
    """Return an acceptance length with its confidence interval."""
    confidence = finite(report.get("confidence"))
    spread = "" if confidence is None else f" ± {confidence:.2f}"
    return f"{report['acceptance_length']:.2f}{spread}"


def seconds_text(seconds: float) -> str:
    """Return a duration with three digits: s, ms or µs below a minute, then min, h or days."""
    for divisor, unit in ((86400, "days"), (3600, "h"), (60, "min"), (1, "s"), (1e-3, "ms")):
        if seconds >= (2 if divisor >= 60 else 1) * divisor:
            return f"{seconds / divisor:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} µs"
