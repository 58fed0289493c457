"""Charts as inline SVG, which need no library and follow the colours of the page that they are in."""

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

WIDTH, HEIGHT = 520, 240  # of a chart, in units of its view box
LEFT, RIGHT, TOP, BOTTOM = 52, 22, 12, 28  # margins
MOST_POINTS = 400  # of a line; a longer one is thinned out
FEW_POINTS = 100  # a line of more has its running mean drawn over it
NUM_TICKS = 5
MOST_DECADES = 7  # that are labelled on an axis of decades
DASHES = ("", "6 4")  # of the runs that a chart compares


@dataclass(frozen=True)
class Line:
    """A line of a chart.

    colour: number of the colour, from 0. run: number of the run that it belongs to.
    half_widths: half the width of a band around each value; None = no band.
    marked: whether each point has a mark, as where they are few. is_joined: whether a line joins the points.
    """

    name: str
    steps: Sequence[float]
    values: Sequence[float | None]
    colour: int = 0
    run: int = 0
    half_widths: Sequence[float | None] | None = None
    marked: bool = False
    is_joined: bool = True


def line_chart(title: str, lines: Sequence[Line], log: bool = False, from_zero: bool = False, across: str = "step") -> str:
    """Return a chart of lines, or "" if no line has a value.

    log: whether the values' axis is logarithmic. from_zero: whether it begins at zero.
    across: name of what the lines' `steps` count, which are optimizer steps by default.
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
    parts += [_line(line, horizontal, vertical, across) for line in drawn]
    label = html.escape(title)
    svg = _svg(label, parts)
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


@dataclass(frozen=True)
class Roof:
    """The limit of a device: products of a dtype at flops_per_s, memory at bytes_per_s."""

    dtype: str
    flops_per_s: float
    bytes_per_s: float

    @property
    def ridge(self) -> float:
        """FLOPs per byte from which on compute is the limit."""
        return self.flops_per_s / self.bytes_per_s

    def at(self, intensity: float) -> float:
        """Return the largest possible FLOP/s for a number of FLOPs per byte."""
        return min(self.flops_per_s, intensity * self.bytes_per_s)


@dataclass(frozen=True)
class RoofPoint:
    """A measured part. intensity: FLOPs per byte. rate: achieved FLOP/s. colour: number of the colour, from 0."""

    name: str
    intensity: float
    rate: float
    colour: int


def roofline_chart(title: str, points: Sequence[RoofPoint], roofs: Sequence[Roof]) -> str:
    """Return a chart of achieved rate over intensity, both logarithmic, or "" without points or roofs.

    A thin line joins each point to the lowest roof above its intensity.
    """
    if not points or not roofs:
        return ""
    intensities = [point.intensity for point in points]
    low, high = min(intensities), max(intensities)
    ridges = [roof.ridge for roof in roofs]
    horizontal = _Axis.of_decades(min(low / 2, *(ridge / 10 for ridge in ridges)), 2 * max(high, *ridges), LEFT, WIDTH - RIGHT)
    rates = [point.rate for point in points]
    lowest = min(rates + [roof.at(horizontal.low) for roof in roofs])
    highest = max(rates + [roof.flops_per_s for roof in roofs])
    vertical = _Axis.of_decades(lowest, highest, HEIGHT - BOTTOM, TOP)
    parts = [_grid(horizontal, vertical)]
    for roof in roofs:
        corners = (horizontal.low, roof.ridge, horizontal.high)
        places = " ".join(f"{horizontal(corner):.1f},{vertical(roof.at(corner)):.1f}" for corner in corners)
        parts.append(f'<polyline class="roof" points="{places}"><title>{html.escape(roof.dtype)}</title></polyline>')
    for point in points:
        x = horizontal(point.intensity)
        y = vertical(point.rate)
        above = vertical(min(roof.at(point.intensity) for roof in roofs))
        colour = point.colour % 8
        shown = f"{html.escape(point.name)}: {number(point.rate)} FLOP/s at {number(point.intensity)} FLOP/byte"
        parts.append(f'<line class="gap" x1="{x:.1f}" x2="{x:.1f}" y1="{y:.1f}" y2="{above:.1f}"/>')
        parts.append(f'<circle class="s{colour}" cx="{x:.1f}" cy="{y:.1f}" r="4"><title>{shown}</title></circle>')
    label = html.escape(title)
    keys = "".join(f'<span class="key k{point.colour % 8}">{html.escape(point.name)}</span>' for point in points)
    svg = _svg(label, parts)
    axes = '<span class="quiet">across: FLOP per byte of memory traffic, up: FLOP/s</span>'
    return f'<figure class="roofline"><figcaption>{label}{keys}</figcaption>{svg}<figcaption>{axes}</figcaption></figure>'


@dataclass(frozen=True)
class HeatMap:
    """Values over two axes.

    cells: value by (row, column); cells may be missing.
    """

    x_label: str
    y_label: str
    columns: Sequence[str]
    rows: Sequence[str]
    cells: Mapping[tuple[str, str], float]


def heat_map(title: str, heat: HeatMap) -> str:
    """Return a chart whose cells are darker the larger their values are, or "" without cells."""
    if not heat.cells:
        return ""
    low = min(heat.cells.values())
    spread = max(heat.cells.values()) - low or 1.0
    width = (WIDTH - LEFT - RIGHT) / len(heat.columns)
    height = (HEIGHT - TOP - BOTTOM) / len(heat.rows)
    parts = []
    for index, column in enumerate(heat.columns):
        x = LEFT + (index + 0.5) * width
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{html.escape(column)}</text>')
    for place, row in enumerate(heat.rows):
        middle = TOP + (place + 0.5) * height
        parts.append(f'<text x="{LEFT - 6}" y="{middle + 4:.1f}" text-anchor="end">{html.escape(row)}</text>')
        for index, column in enumerate(heat.columns):
            value = heat.cells.get((row, column))
            if value is None:
                continue
            x = LEFT + index * width
            opacity = 0.1 + 0.8 * (value - low) / spread
            parts.append(
                f'<rect class="heat" x="{x + 1:.1f}" y="{TOP + place * height + 1:.1f}" width="{width - 2:.1f}" '
                f'height="{height - 2:.1f}" fill-opacity="{opacity:.2f}"/>'
            )
            parts.append(
                f'<text class="cell" x="{x + width / 2:.1f}" y="{middle + 4:.1f}" text-anchor="middle">{value:.2f}</text>'
            )
    label = html.escape(title)
    svg = _svg(label, parts)
    axes = f'<span class="quiet">across: {html.escape(heat.x_label)}, up: {html.escape(heat.y_label)}</span>'
    return f"<figure><figcaption>{label}</figcaption>{svg}<figcaption>{axes}</figcaption></figure>"


def _svg(label: str, parts: Sequence[str]) -> str:
    """Return a drawing of the size of a chart. label: escaped text for those who do not see it."""
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def number(value: float) -> str:
    """Return a number with three significant digits, without an exponent where it would be short."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else str(value)
    if 1e-4 <= abs(value) < 1e6:
        digits = max(0, 2 - math.floor(math.log10(abs(value))))
        text = f"{value:,.{digits}f}"
        return text.rstrip("0").rstrip(".") if "." in text else text
    return f"{value:.2e}"


def with_prefix(value: float, unit: str = "") -> str:
    """Return a number with three digits and a decimal prefix, such as 12.3 TFLOP/s."""
    for power, prefix in ((15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if value >= 0.9995 * 10**power:
            return f"{value / 10**power:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}".rstrip()


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
        for index, value in _thinned(places, FEW_POINTS if line.marked else MOST_POINTS):
            step = float(line.steps[index])
            points.append((step, value))
            half = None if line.half_widths is None else line.half_widths[index]
            if half is not None:
                bands[step] = (value - half, value + half)
        smooth = []
        if len(places) > FEW_POINTS and not line.marked:
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


def _thinned(places: Sequence[tuple[int, float]], most: int) -> list[tuple[int, float]]:
    """Return at most `most` points: of each stretch of a longer line the lowest and the highest, and the last of all."""
    if len(places) <= most:
        return list(places)
    stride = -(-2 * len(places) // (most - 1))
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
    decades: bool = False

    @classmethod
    def of_decades(cls, low: float, high: float, start: float, end: float) -> "_Axis":
        """Return a logarithmic axis that begins and ends at powers of ten."""
        first = math.floor(math.log10(low))
        last = max(first + 1, math.ceil(math.log10(high)))
        return cls(10.0**first, 10.0**last, start, end, log=True, decades=True)

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
        if self.decades:
            first = round(math.log10(self.low))
            last = round(math.log10(self.high))
            stride = -(-(last - first) // MOST_DECADES)
            return [10.0**power for power in range(first, last + 1, stride)]
        if self.log:
            return [self.low * (self.high / self.low) ** (index / (NUM_TICKS - 1)) for index in range(NUM_TICKS)]
        rough = (self.high - self.low) / (NUM_TICKS - 1)
        power = 10 ** math.floor(math.log10(rough))
        step = min((factor * power for factor in (1, 2, 5, 10)), key=lambda candidate: abs(math.log(candidate / rough)))
        first = math.ceil(self.low / step)
        return [index * step for index in range(first, math.floor(self.high / step) + 1)]

    def label(self, tick: float) -> str:
        """Return the text of a tick, with as many digits as tell it from its neighbours."""
        if self.decades:
            return with_prefix(tick)
        ticks = self.ticks()
        short = [number(other) for other in ticks]
        if self.log or len(set(short)) == len(short) or len(ticks) < 2:
            text = number(tick)
            return f"{tick:.3g}" if "e" in text else text
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


def _line(drawn: _Points, horizontal: _Axis, vertical: _Axis, across: str) -> str:
    line = drawn.line
    parts = []
    if drawn.bands:
        upper = [f"{horizontal(step):.1f},{vertical(high):.1f}" for step, (_, high) in drawn.bands.items()]
        lower = [f"{horizontal(step):.1f},{vertical(low):.1f}" for step, (low, _) in reversed(drawn.bands.items())]
        parts.append(f'<polygon class="band s{line.colour % 8}" points="{" ".join(upper + lower)}"/>')
    dash = DASHES[line.run % len(DASHES)]
    for points, look in ((drawn.points, "faint" if drawn.smooth else ""), (drawn.smooth, "")):
        if points and line.is_joined:
            places = " ".join(f"{horizontal(x):.1f},{vertical(y):.1f}" for x, y in points)
            parts.append(f'<polyline class="s{line.colour % 8} {look}" stroke-dasharray="{dash}" points="{places}"/>')
    for x, y in drawn.points if line.marked else drawn.points[-1:]:
        shown = f"{html.escape(line.name)}: {number(y)} at {html.escape(across)} {x:,.0f}"
        place = f'cx="{horizontal(x):.1f}" cy="{vertical(y):.1f}" r="3"'
        look = "" if line.is_joined else " hollow"
        parts.append(f'<circle class="s{line.colour % 8}{look}" {place}><title>{shown}</title></circle>')
    return "".join(parts)


def _legend(lines: Sequence[Line]) -> str:
    if len(lines) == 1:
        return ""
    keys = []
    for line in lines:
        look = " dashed" if DASHES[line.run % len(DASHES)] else ""
        if not line.is_joined:
            look = " dots"
        keys.append(f'<span class="key k{line.colour % 8}{look}">{html.escape(line.name)}</span>')
    return "".join(keys)
