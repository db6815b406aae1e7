"""Curves and histograms as inline SVG without scripts, readable without colour and by screen readers.

Colours are CSS classes (`s0`, `s1` …) of the page, which has a light and a dark theme; every other line is also
dashed. Texts are escaped here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

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


def chart(name: str, title: str, description: str, lines: Sequence[Line], axes: Axes, band: Band | None = None) -> str:
    """An SVG with axes, a legend and the description below it; `name` makes its ids unique."""
    floor, mark = axes.floor, axes.mark
    drawn = [line for line in lines if any(map(math.isfinite, line.y))]
    if not drawn:
        return ""
    x = _Scale([v for line in drawn for v in line.x], LEFT, WIDE - RIGHT, whole=mark is None)
    heights = [v for line in drawn for v in line.y] + ([floor] if floor is not None else [])
    y = _Scale(heights + ([*band.low, *band.high] if band else []), HIGH - BOTTOM, TOP)
    parts = [_axes(x, y, axes.x_label, axes.y_label)]
    if mark is not None and x.low <= mark <= x.high:
        parts.append(f'<line class="mark" x1="{x(mark):.1f}" x2="{x(mark):.1f}" y1="{TOP}" y2="{HIGH - BOTTOM}"/>')
    if band:
        edge = [*zip(band.x, band.high, strict=True), *reversed([*zip(band.x, band.low, strict=True)])]
        parts.append(f'<polygon class="band" points="{_points(edge, x, y)}"/>')
    for line in drawn:
        dots = [*zip(line.x, line.y, strict=True)]
        parts.append(f'<polyline class="line {line.style}" points="{_points(dots, x, y)}"/>')
    key = "".join(f'<li><svg viewBox="0 0 28 8" aria-hidden="true"><line class="line {line.style}" x1="0" y1="4" '
                  f'x2="28" y2="4"/></svg>{escape(line.name)}</li>' for line in drawn)
    return (f'<figure class="chart"><figcaption>{escape(title)}</figcaption>'
            f'<svg viewBox="0 0 {WIDE} {HIGH}" role="img" aria-labelledby="{name}-t" '
            f'aria-describedby="{name}-d"><title id="{name}-t">{escape(title)}</title>{"".join(parts)}</svg>'
            f'<ul class="key">{key}</ul><p class="soft small" id="{name}-d">{escape(description)}</p></figure>')


def interval_bar(low: float, high: float, rows: Sequence[tuple[float, float, float, str]]) -> str:
    """Values with their intervals on one axis from `low` to `high`: (value, lowest, highest, CSS class) from the top.

    Hidden from screen readers: the figures stand beside it.
    """
    span = max(high - low, 1e-9)
    parts = []
    for at, (value, start, end, style) in enumerate(rows):
        x0, x1, xv = (4 + 112 * min(max((v - low) / span, 0), 1) for v in (start, end, value))
        y = 7 + 10 * at
        parts.append(f'<line class="rule" x1="4" x2="116" y1="{y}" y2="{y}"/>'
                     f'<line class="bar {style}" x1="{x0:.1f}" x2="{x1:.1f}" y1="{y}" y2="{y}"/>'
                     f'<circle class="dot {style}" cx="{xv:.1f}" cy="{y}" r="3.5"/>')
    return (f'<svg class="interval" viewBox="0 0 120 {4 + 10 * len(rows)}" aria-hidden="true" focusable="false">'
            f'{"".join(parts)}</svg>')


def binned(values: Sequence[float], bins: int) -> tuple[list[float], list[float], list[float], list[float]]:
    """Centre (1-based), mean, lowest and highest of bins of equal size; NaN and infinity are left out."""
    size = max(1, math.ceil(len(values) / bins))
    centre: list[float] = []
    mean: list[float] = []
    low: list[float] = []
    high: list[float] = []
    for start in range(0, len(values), size):
        finite = [v for v in values[start:start + size] if math.isfinite(v)]
        if finite:
            centre.append(start + (min(size, len(values) - start) + 1) / 2)
            mean.append(sum(finite) / len(finite))
            low.append(min(finite))
            high.append(max(finite))
    return centre, mean, low, high


def outline(values: Sequence[float], low: float, high: float, bins: int = 40) -> tuple[list[float], list[float]]:
    """The share of values in each bin as the corners of a step curve: x and y."""
    counts = [0] * bins
    for value in values:
        counts[min(bins - 1, max(0, int((value - low) / max(high - low, 1e-9) * bins)))] += 1
    edges = [low + (high - low) * i / bins for i in range(bins + 1)]
    total = max(1, len(values))
    x = [edge for i in range(bins) for edge in (edges[i], edges[i + 1])]
    return x, [count / total for count in counts for _ in range(2)]


class _Scale:
    """Values to user units along one axis, with round ticks."""

    def __init__(self, values: Sequence[float], start: float, end: float, whole: bool = False) -> None:
        finite = [float(v) for v in values if math.isfinite(v)]
        low, high = min(finite), max(finite)
        if low == high:
            room = 0.5 if whole else abs(low) / 10 or 0.1
            low -= room
            high += room
        step = 10 ** math.floor(math.log10((high - low) / 4))
        step = next(step * m for m in (1, 2, 5, 10) if (high - low) / (step * m) <= 5.5)
        step = max(step, 1) if whole else step
        self.low = low if whole else math.floor(low / step) * step
        self.high = high if whole else math.ceil(high / step) * step
        first = math.ceil(self.low / step - 1e-9)
        self.ticks = [i * step for i in range(first, math.floor(self.high / step + 1e-9) + 1)]
        self.digits = max(0, -math.floor(math.log10(step) + 1e-9))
        self.start, self.end = start, end

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def _axes(x: _Scale, y: _Scale, x_label: str, y_label: str) -> str:
    lines = []
    for tick in y.ticks:
        at = y(tick)
        lines.append(f'<line class="rule" x1="{LEFT}" x2="{WIDE - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>'
                     f'<text x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{tick:.{y.digits}f}</text>')
    for tick in x.ticks:
        lines.append(f'<text x="{x(tick):.1f}" y="{HIGH - BOTTOM + 17}" text-anchor="middle">{tick:,.{x.digits}f}'
                     '</text>')
    middle = (TOP + HIGH - BOTTOM) / 2
    lines.append(f'<text class="name" x="{(LEFT + WIDE - RIGHT) / 2}" y="{HIGH - 5}" text-anchor="middle">'
                 f'{escape(x_label)}</text><text class="name" x="12" y="{middle}" text-anchor="middle" '
                 f'transform="rotate(-90 12 {middle})">{escape(y_label)}</text>')
    return "".join(lines)


def _points(dots: Sequence[tuple[float, float]], x: _Scale, y: _Scale) -> str:
    return " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in dots if math.isfinite(a) and math.isfinite(b))
