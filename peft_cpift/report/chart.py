"""Small drawings as inline SVG, coloured by the page's own style so that they suit light and dark."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from markupsafe import Markup, escape

WIDTH, HEIGHT = 300, 150
LEFT, RIGHT, TOP, BOTTOM = 44, 18, 10, 24  # right: half of the last number under the axis
POINTS = 150
"""A longer line is thinned to this many points, each the mean of its neighbours (ours)."""

Point = tuple[float, float]


def line_chart(label: str, lines: Sequence[Sequence[Point]]) -> Markup:
    """Lines over one x axis; each is a list of (x, y). The page's style tells the first and the second apart.

    Args:
        label: what the drawing shows, for those who do not see it.
    """
    lines = [_thin(line) for line in lines]
    points = [point for line in lines for point in line]
    first, last = min(x for x, _ in points), max(x for x, _ in points)
    xs, ys = ticks(first, last, whole=True), ticks(min(y for _, y in points), max(y for _, y in points))
    if first < last:  # the line fills the width: no room is left up to the next round number
        xs = [x for x in xs if x <= last]
    x_at = _scale(xs[0], max(last, xs[-1]), LEFT, WIDTH - RIGHT)
    y_at = _scale(ys[0], ys[-1], HEIGHT - BOTTOM, TOP)
    parts = _axes(xs, ys, x_at, y_at)
    for number, line in enumerate(lines):
        path = " ".join(f"{x_at(x):.1f},{y_at(y):.1f}" for x, y in line)
        if len(line) == 1:
            x, y = path.split(",")
            parts.append(f'<circle class="dot line{number}" cx="{x}" cy="{y}" r="3"/>')
        elif line:
            parts.append(f'<polyline class="line line{number}" points="{path}"/>')
    return _svg(label, parts)


def bar_chart(label: str, values: Sequence[float], bins: int = 12) -> Markup:
    """A histogram of values that are not negative, from 0 to the first round number above the largest."""
    xs = ticks(0.0, max(values))
    width = xs[-1] / bins
    counts = [0] * bins
    for value in values:
        counts[min(bins - 1, int(value / width))] += 1
    ys = ticks(0, max(counts), whole=True)
    x_at, y_at = _scale(xs[0], xs[-1], LEFT, WIDTH - RIGHT), _scale(ys[0], ys[-1], HEIGHT - BOTTOM, TOP)
    parts = _axes(xs, ys, x_at, y_at)
    for number, count in enumerate(counts):
        x, y = x_at(number * width), y_at(count)
        size = x_at((number + 1) * width) - x - 1
        parts.append(f'<rect class="bar" x="{x:.1f}" y="{y:.1f}" width="{size:.1f}" height="{y_at(0) - y:.1f}"/>')
    return _svg(label, parts)


def ticks(low: float, high: float, *, whole: bool = False) -> list[float]:
    """Three to six round numbers, evenly spaced, of which the first is at most `low` and the last at least `high`.

    Example:
        >>> ticks(0.82, 1.31), ticks(1, 240, whole=True)
        ([0.8, 1.0, 1.2, 1.4], [0, 100, 200, 300])
    """
    if high <= low:
        low, high = low - (abs(low) * 0.1 or 1), high + (abs(high) * 0.1 or 1)
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    if whole:
        step = max(1, round(step))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step if whole else float(f"{number * step:.10g}") for number in range(first, last + 1)]


def _thin(line: Sequence[Point]) -> Sequence[Point]:
    if len(line) <= POINTS:
        return line
    cuts = [len(line) * number // POINTS for number in range(POINTS + 1)]
    parts = [line[a:b] for a, b in itertools.pairwise(cuts)]
    return [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in parts]


def _scale(low: float, high: float, start: float, end: float):
    return lambda value: start + (value - low) / (high - low) * (end - start)


def _axes(xs: list[float], ys: list[float], x_at, y_at) -> list[str]:
    parts = []
    for y in ys:
        at = f"{y_at(y):.1f}"
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at}" y2="{at}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{at}" text-anchor="end" dominant-baseline="middle">{y:g}</text>')
    for x in xs:
        parts.append(f'<text x="{x_at(x):.1f}" y="{HEIGHT - 6}" text-anchor="middle">{x:g}</text>')
    return parts


def _svg(label: str, parts: list[str]) -> Markup:
    text = escape(label)
    opening = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{text}">'
    return Markup(opening + "".join(parts) + "</svg>")
