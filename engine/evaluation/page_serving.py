"""The page of a benchmark of servers: throughput, speed-up, latency and acceptance over batch size."""

from collections.abc import Callable, Sequence
from statistics import median

from engine.evaluation.charts import Line, line_chart
from engine.evaluation.page_parts import escaped, seconds_text, table, warning, whole_page
from engine.serving.serving_results import PLAIN, ServingCell

HEADINGS = (
    "setting",
    "batch",
    "tokens/s",
    "requests/s",
    "first token p50",
    "p90",
    "p99",
    "whole reply p50",
    "p90",
    "p99",
    "acceptance length",
    "replies with other tokens",
    "speed-up (smallest to largest)",
)
ACROSS = "batch size"
Value = Callable[[ServingCell], float | None]


def serving_page(title: str, subtitle: str, cells: Sequence[ServingCell], is_complete: bool = True) -> str:
    """Return the page as self-contained HTML.

    title, subtitle: plain text. is_complete: whether all settings were measured.
    """
    body = [f"<h1>{escaped(title)}</h1>", f'<p class="quiet">{escaped(subtitle)}</p>']
    if not is_complete:
        body.append(warning("The benchmark ended early: settings that were not measured are missing."))
    for name in dict.fromkeys(cell.prompts for cell in cells):
        body.append(_section(name, [cell for cell in cells if cell.prompts == name]))
    return whole_page(escaped(title), body)


def _section(name: str, cells: Sequence[ServingCell]) -> str:
    """Return charts and a table of one set of prompts."""
    charts = [
        line_chart(
            "Output tokens per second, over batch size", _lines(cells, _tokens_per_s, _half_spread), False, True, ACROSS
        ),
        line_chart("Speed-up by the draft, over batch size", _lines(cells, _speed_up), False, True, ACROSS),
        line_chart("Seconds to the first token, median", _lines(cells, _first_token), False, True, ACROSS),
        line_chart("Seconds to the whole reply, median", _lines(cells, _latency), False, True, ACROSS),
        line_chart("Acceptance length, reported by the server", _lines(cells, _length), False, True, ACROSS),
    ]
    rows = [_row(cell) for cell in cells]
    return f'<h2>Prompts of {escaped(name)}</h2><div class="charts">{"".join(charts)}</div>{table(HEADINGS, rows)}'


def _lines(cells: Sequence[ServingCell], value: Value, half_width: Value | None = None) -> list[Line]:
    """Return one line per setting that has a value; the one without a draft is dashed."""
    settings = list(dict.fromkeys(cell.setting for cell in cells))
    lines = []
    for colour, setting in enumerate(settings):
        own = sorted((cell for cell in cells if cell.setting == setting), key=lambda cell: cell.batch)
        values = [value(cell) for cell in own]
        if all(one is None for one in values):
            continue
        bands = None if half_width is None else [half_width(cell) for cell in own]
        batches = [cell.batch for cell in own]
        lines.append(Line(setting, batches, values, colour, int(setting == PLAIN), bands, marked=True))
    return lines


def _tokens_per_s(cell: ServingCell) -> float:
    return median(cell.tokens_per_s)


def _half_spread(cell: ServingCell) -> float:
    """Return half the difference between the fastest and the slowest repeat."""
    return (max(cell.tokens_per_s) - min(cell.tokens_per_s)) / 2


def _speed_up(cell: ServingCell) -> float | None:
    return None if cell.speed_up is None else cell.speed_up.middle


def _first_token(cell: ServingCell) -> float:
    return cell.first_token_s[50]


def _latency(cell: ServingCell) -> float:
    return cell.latency_s[50]


def _length(cell: ServingCell) -> float | None:
    return None if cell.acceptance is None else cell.acceptance.length


def _row(cell: ServingCell) -> list[str]:
    row = [cell.setting, str(cell.batch), f"{median(cell.tokens_per_s):,.1f}", f"{median(cell.requests_per_s):.2f}"]
    row += [seconds_text(value) for value in cell.first_token_s.values()]
    row += [seconds_text(value) for value in cell.latency_s.values()]
    length = _length(cell)
    row.append("-" if length is None else f"{length:.2f}")
    row.append("-" if cell.mismatches is None else f"{cell.mismatches} of {cell.num_compared}")
    ratio = cell.speed_up
    row.append("-" if ratio is None else f"{ratio.middle:.2f} ({ratio.low:.2f} to {ratio.high:.2f})")
    return row
