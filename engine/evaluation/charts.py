"""Charts as inline SVG, which need no library and follow the colours of the page that they are in."""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

WIDTH, HEIGHT = 520, 240  # of a chart, in units of its view box
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 12, 28  # margins
MOST_POINTS = 400  # of a line; a longer one is thinned out
FEW_POINTS = 100  # a line of more has its running mean drawn over it
NUM_TICKS = 5
DASHES = ("", "6 4")  # of the runs that a chart compares


@dataclass(frozen=True)
class Line:
    """A line of a chart.

    colour: number of the colour, from 0. run: number of the run that it belongs to.
    half_widths: half the width of a band around each value; None = no band.
    """

    name: str
    steps: Sequence[float]
    values: Sequence[float | None]
    colour: int = 0
    run: int = 0
    half_widths: Sequence[float | None] | None = None


def line_chart(title: str, lines: Sequence[Line], log: bool = False, from_zero: bool = False) -> str:
    """Return a chart of lines over optimizer steps, or "" if no line has a value.

    log: whether the values' axis is logarithmic. from_zero: whether it begins at zero.
    """
    drawn = [_Points.of(line, log) for line in lines]
    points = [point for line in drawn for point in line.points]
    if not points:
        return ""
    lows = [low for line in drawn for low, _ in line.bands.values()]
    highs = [high for line in drawn for _, high in line.bands.values()]
    horizontal = _Axis.over([x for x, _ in points], LEFT, WIDTH - RIGHT)
    values = [y for _, y in points] + lows + highs + ([0.0] if from_zero else [])
    vertical = _Axis.over(values, HEIGHT - BOTTOM, TOP, log)
    parts = [_grid(horizontal, vertical)]
    parts += [_line(line, horizontal, vertical) for line in drawn]
    label = html.escape(title)
    svg = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'
    return f"<figure><figcaption>{label}{_legend(lines)}</figcaption>{svg}</figure>"


@dataclass(frozen=True)
class Bar:
    """A stacked bar. parts: name and value of each part, in order."""

    name: str
    parts: Sequence[tuple[str, float]]


def stacked_bars(title: str, bars: Sequence[Bar], unit: str) -> str:
    """Return horizontal stacked bars on a common scale, or "" if they are empty. unit: of the values."""
    longest = max((sum(value for _, value in bar.parts) for bar in bars), default=0.0)
    if longest <= 0:
        return ""
    names = list(dict.fromkeys(name for bar in bars for name, _ in bar.parts))
    rows = []
    for bar in bars:
        cells = []
        for name, value in bar.parts:
            share = 100 * value / longest
            shown = f"{html.escape(name)}: {number(value)} {unit}"
            cells.append(f'<span class="c{names.index(name) % 8}" style="width:{share:.2f}%" title="{shown}"></span>')
        total = number(sum(value for _, value in bar.parts))
        rows.append(f'<div class="bar"><b>{html.escape(bar.name)}</b><div>{"".join(cells)}</div><i>{total} {unit}</i></div>')
    swatches = "".join(f'<span class="key c{index % 8}">{html.escape(name)}</span>' for index, name in enumerate(names))
    return f"<figure><figcaption>{html.escape(title)}{swatches}</figcaption>{''.join(rows)}</figure>"


def number(value: float) -> str:
    """Return a number with three significant digits, without an exponent where it would be short."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else str(value)
    if 1e-4 <= abs(value) < 1e6:
        digits = max(0, 2 - math.floor(math.log10(abs(value))))
        text = f"{value:,.{digits}f}"
        return text.rstrip("0").rstrip(".") if "." in text else text
    return f"{value:.2e}"


@dataclass(frozen=True)
class _Points:
    """The points of a line that can be drawn.

    smooth: their running mean, if they are many; [] = none. bands: low and high end of the band, by step.
    """

    line: Line
    points: list[tuple[float, float]]
    smooth: list[tuple[float, float]]
    bands: dict[float, tuple[float, float]]

    @classmethod
    def of(cls, line: Line, log: bool) -> "_Points":
        places = []
        for index, value in enumerate(line.values):
            if value is not None and math.isfinite(value) and (value > 0 or not log):
                places.append((index, float(value)))
        points = []
        bands = {}
        for index, value in _thinned(places):
            step = float(line.steps[index])
            points.append((step, value))
            half = None if line.half_widths is None else line.half_widths[index]
            if half is not None:
                bands[step] = (value - half, value + half)
        smooth = []
        if len(places) > FEW_POINTS and line.half_widths is None:
            means = _running_mean([value for _, value in places], len(places) // FEW_POINTS)
            evenly = range(0, len(places), max(1, len(places) // FEW_POINTS))
            smooth = [(float(line.steps[places[index][0]]), means[index]) for index in evenly]
        return cls(line, points, smooth, bands)


def _running_mean(values: Sequence[float], reach: int) -> list[float]:
    """Return for each value the mean over it and `reach` values on either side."""
    sums = [0.0, *accumulate(values)]
    means = []
    for index in range(len(values)):
        first = max(0, index - reach)
        end = min(len(values), index + reach + 1)
        means.append((sums[end] - sums[first]) / (end - first))
    return means


def _thinned(places: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Return at most `MOST_POINTS` points: of each stretch of a longer line the lowest and the highest, and the last of all."""
    if len(places) <= MOST_POINTS:
        return list(places)
    stride = -(-2 * len(places) // (MOST_POINTS - 1))
    kept: list[tuple[int, float]] = []
    for first in range(0, len(places), stride):
        stretch = places[first : first + stride]
        ends = {min(stretch, key=lambda place: place[1]), max(stretch, key=lambda place: place[1])}
        kept += sorted(ends)
    return kept if kept[-1] == places[-1] else [*kept, places[-1]]


@dataclass(frozen=True)
class _Axis:
    """A scale from values to coordinates."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    @classmethod
    def over(cls, values: Sequence[float], start: float, end: float, log: bool = False) -> "_Axis":
        low = min(values)
        high = max(values)
        if low == high and log:
            low = low / 2
            high = high * 2
        elif low == high:
            margin = max(0.5, 0.01 * abs(low))
            low = low - margin
            high = high + margin
        return cls(low, high, start, end, log)

    def __call__(self, value: float) -> float:
        if self.log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[float]:
        if self.log:
            return [self.low * (self.high / self.low) ** (index / (NUM_TICKS - 1)) for index in range(NUM_TICKS)]
        rough = (self.high - self.low) / (NUM_TICKS - 1)
        power = 10 ** math.floor(math.log10(rough))
        step = min((factor * power for factor in (1, 2, 5, 10)), key=lambda candidate: abs(math.log(candidate / rough)))
        first = math.ceil(self.low / step)
        return [index * step for index in range(first, math.floor(self.high / step) + 1)]

    def label(self, tick: float) -> str:
        """Return the text of a tick, with as many digits as tell it from its neighbours."""
        ticks = self.ticks()
        short = [number(other) for other in ticks]
        if self.log or len(set(short)) == len(short) or len(ticks) < 2:
            return number(tick)
        digits = max(0, -math.floor(math.log10(ticks[1] - ticks[0])))
        return f"{tick:,.{digits}f}"


def _grid(horizontal: _Axis, vertical: _Axis) -> str:
    parts = []
    for tick in vertical.ticks():
        y = vertical(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{vertical.label(tick)}</text>')
    for tick in horizontal.ticks():
        parts.append(f'<text x="{horizontal(tick):.1f}" y="{HEIGHT - 8}" text-anchor="middle">{horizontal.label(tick)}</text>')
    return "".join(parts)


def _line(drawn: _Points, horizontal: _Axis, vertical: _Axis) -> str:
    line = drawn.line
    parts = []
    if drawn.bands:
        upper = [f"{horizontal(step):.1f},{vertical(high):.1f}" for step, (_, high) in drawn.bands.items()]
        lower = [f"{horizontal(step):.1f},{vertical(low):.1f}" for step, (low, _) in reversed(drawn.bands.items())]
        parts.append(f'<polygon class="band s{line.colour % 8}" points="{" ".join(upper + lower)}"/>')
    dash = DASHES[line.run % len(DASHES)]
    for points, look in ((drawn.points, "faint" if drawn.smooth else ""), (drawn.smooth, "")):
        if points:
            places = " ".join(f"{horizontal(x):.1f},{vertical(y):.1f}" for x, y in points)
            parts.append(f'<polyline class="s{line.colour % 8} {look}" stroke-dasharray="{dash}" points="{places}"/>')
    if drawn.points:
        x, y = drawn.points[-1]
        shown = f"{html.escape(line.name)}: {number(y)} at step {x:,.0f}"
        place = f'cx="{horizontal(x):.1f}" cy="{vertical(y):.1f}" r="3"'
        parts.append(f'<circle class="s{line.colour % 8}" {place}><title>{shown}</title></circle>')
    return "".join(parts)


def _legend(lines: Sequence[Line]) -> str:
    if len(lines) == 1:
        return ""
    keys = []
    for line in lines:
        dashed = " dashed" if DASHES[line.run % len(DASHES)] else ""
        keys.append(f'<span class="key k{line.colour % 8}{dashed}">{html.escape(line.name)}</span>')
    return "".join(keys)
