"""Curves and histograms as inline SVG without scripts, readable without colour and by screen readers.

Colours are CSS classes (`s0`, `s1` …) of the page, which has a light and a dark theme; every other line is also
dashed. Texts are escaped here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from eval.report.page import template

BINS = 40  # of a histogram
WIDE, HIGH, LEFT, RIGHT, TOP, BOTTOM = 440, 250, 48, 12, 12, 40  # user units; a page scales the whole


class Line(NamedTuple):
    """One curve; `style` is its CSS classes."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    style: str = "s0"


class Band(NamedTuple):
    """The area between two curves."""

    x: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]


class Axes(NamedTuple):
    """`floor` is a y that the axis must include, `mark` an x with a vertical line; without a mark x counts steps."""

    x_label: str
    y_label: str
    floor: float | None = None
    mark: float | None = None


FIGURE = template("""
<figure class="chart"><figcaption>{title}</figcaption>
<svg viewBox="0 0 {wide} {high}" role="img" aria-labelledby="{name}-t" aria-describedby="{name}-d">
<title id="{name}-t">{title}</title>{drawing}</svg>
<ul class="key">{key}</ul>
<p class="soft small" id="{name}-d">{description}</p></figure>
""")


def chart(name: str, title: str, description: str, lines: Sequence[Line], axes: Axes, band: Band | None = None) -> str:
    """Return an SVG with axes, a legend and the description below it; `name` makes its ids unique."""
    lines = [line for line in lines if any(map(math.isfinite, line.y))]
    if not lines:
        return ""
    x_values: list[float] = []
    y_values: list[float] = [] if axes.floor is None else [axes.floor]
    for line in lines:
        x_values += line.x
        y_values += line.y
    if band:
        y_values += [*band.low, *band.high]
    x = _Scale(x_values, LEFT, WIDE - RIGHT, whole=axes.mark is None)
    y = _Scale(y_values, HIGH - BOTTOM, TOP)
    drawing = _axes(x, y, axes.x_label, axes.y_label)
    if axes.mark is not None and x.low <= axes.mark <= x.high:
        at = x(axes.mark)
        drawing += f'<line class="mark" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{HIGH - BOTTOM}"/>'
    if band:
        edge_x = [*band.x, *reversed(band.x)]
        edge_y = [*band.high, *reversed(band.low)]
        drawing += f'<polygon class="band" points="{_points(edge_x, edge_y, x, y)}"/>'
    key = ""
    for line in lines:
        drawing += f'<polyline class="line {line.style}" points="{_points(line.x, line.y, x, y)}"/>'
        key += (f'<li><svg viewBox="0 0 28 8" aria-hidden="true"><line class="line {line.style}" x1="0" y1="4" '
                f'x2="28" y2="4"/></svg>{escape(line.name)}</li>')
    return FIGURE.format(name=name, title=escape(title), wide=WIDE, high=HIGH, drawing=drawing, key=key,
                         description=escape(description))


def interval_bar(low: float, high: float, rows: Sequence[tuple[float, float, float, str]]) -> str:
    """Draw rows of (value, lowest, highest, CSS class) on one axis from `low` to `high`, the first on top.

    Hidden from screen readers: the figures stand beside it.
    """
    span = max(high - low, 1e-9)

    def x(value: float) -> float:
        return 4 + 112 * min(max((value - low) / span, 0), 1)

    drawing = ""
    for number, (value, start, end, style) in enumerate(rows):
        y = 7 + 10 * number
        drawing += (f'<line class="rule" x1="4" x2="116" y1="{y}" y2="{y}"/>'
                    f'<line class="bar {style}" x1="{x(start):.1f}" x2="{x(end):.1f}" y1="{y}" y2="{y}"/>'
                    f'<circle class="dot {style}" cx="{x(value):.1f}" cy="{y}" r="3.5"/>')
    height = 4 + 10 * len(rows)
    return (f'<svg class="interval" viewBox="0 0 120 {height}" aria-hidden="true" focusable="false">{drawing}</svg>')


def binned(values: Sequence[float], bins: int) -> tuple[list[float], list[float], list[float], list[float]]:
    """Return centre (1-based), mean, lowest and highest of bins of equal size; NaN and infinity are left out."""
    size = max(1, math.ceil(len(values) / bins))
    centre: list[float] = []
    mean: list[float] = []
    low: list[float] = []
    high: list[float] = []
    for start in range(0, len(values), size):
        finite = list(filter(math.isfinite, values[start:start + size]))
        if finite:
            centre.append(start + (min(size, len(values) - start) + 1) / 2)
            mean.append(sum(finite) / len(finite))
            low.append(min(finite))
            high.append(max(finite))
    return centre, mean, low, high


def outline(values: Sequence[float], low: float, high: float) -> tuple[list[float], list[float]]:
    """Return the share of values in each of BINS bins as the corners of a step curve: x and y."""
    counts = [0] * BINS
    for value in values:
        bin = int((value - low) / max(high - low, 1e-9) * BINS)
        counts[min(BINS - 1, max(0, bin))] += 1
    x: list[float] = []
    y: list[float] = []
    for i, count in enumerate(counts):
        x += [low + (high - low) * i / BINS, low + (high - low) * (i + 1) / BINS]
        y += 2 * [count / max(1, len(values))]
    return x, y


class _Scale:
    """Values to user units along one axis, with round ticks."""

    def __init__(self, values: Sequence[float], start: float, end: float, whole: bool = False) -> None:
        finite = list(filter(math.isfinite, values))
        low, high = min(finite), max(finite)
        if low == high:
            room = 0.5 if whole else abs(low) / 10 or 0.1
            low -= room
            high += room
        power = 10 ** math.floor(math.log10((high - low) / 4))
        step = next(power * factor for factor in (1, 2, 5, 10) if (high - low) / (power * factor) <= 5.5)
        if whole:
            step = max(step, 1)
        self.low = low if whole else math.floor(low / step) * step
        self.high = high if whole else math.ceil(high / step) * step
        first = math.ceil(self.low / step - 1e-9)
        self.ticks = [i * step for i in range(first, math.floor(self.high / step + 1e-9) + 1)]
        self.digits = max(0, -math.floor(math.log10(step) + 1e-9))
        self.start, self.end = start, end

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def _axes(x: _Scale, y: _Scale, x_label: str, y_label: str) -> str:
    drawing = ""
    for tick in y.ticks:
        at = y(tick)
        drawing += (f'<line class="rule" x1="{LEFT}" x2="{WIDE - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>'
                    f'<text x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{tick:.{y.digits}f}</text>')
    for tick in x.ticks:
        label = f"{tick:,.{x.digits}f}"
        drawing += f'<text x="{x(tick):.1f}" y="{HIGH - BOTTOM + 17}" text-anchor="middle">{label}</text>'
    centre, middle = (LEFT + WIDE - RIGHT) / 2, (TOP + HIGH - BOTTOM) / 2
    return drawing + (
        f'<text class="name" x="{centre}" y="{HIGH - 5}" text-anchor="middle">{escape(x_label)}</text>'
        f'<text class="name" x="12" y="{middle}" text-anchor="middle" transform="rotate(-90 12 {middle})">'
        f'{escape(y_label)}</text>')


def _points(xs: Sequence[float], ys: Sequence[float], x: _Scale, y: _Scale) -> str:
    points = []
    for a, b in zip(xs, ys, strict=True):
        if math.isfinite(a) and math.isfinite(b):
            points.append(f"{x(a):.1f},{y(b):.1f}")
    return " ".join(points)
