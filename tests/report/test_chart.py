"""Strategy: read the coordinates back from the SVG and compare with where the numbers belong on its axes."""

from __future__ import annotations

import itertools
import math
import xml.etree.ElementTree as ElementTree

import pytest

from peft_cpift.report import chart


def points(svg: str, name: str = "line0") -> list[tuple[float, float]]:
    """The points of a line in units of the drawing."""
    line = next(e for e in ElementTree.fromstring(svg).iter("polyline") if name in e.get("class").split())
    return [tuple(map(float, pair.split(","))) for pair in line.get("points").split()]


def labels(svg: str, anchor: str) -> dict[float, float]:
    """Tick -> its position, along y for the axis whose labels end there (`end`), along x for the other (`middle`)."""
    texts = [e for e in ElementTree.fromstring(svg).iter("text") if e.get("text-anchor") == anchor]
    return {float(e.text): float(e.get("y" if anchor == "end" else "x")) for e in texts}


def test_points_lie_where_the_labels_say():
    svg = chart.line_chart("x", [[(0, 1.0), (5, 2.0), (10, 3.0)], [(0, 3.0), (10, 1.0)]])
    across, up = labels(svg, "middle"), labels(svg, "end")
    assert points(svg) == [
        (across[0], up[1]),
        (pytest.approx((across[0] + across[10]) / 2), up[2]),
        (across[10], up[3]),
    ]
    assert points(svg, "line1") == [(across[0], up[3]), (across[10], up[1])]
    assert up[1] > up[3]  # upwards on the page is a smaller y


def test_a_line_fills_the_width():
    found = points(chart.line_chart("x", [[(0, 1.0), (48, 2.0)]]))
    assert [x for x, _ in found] == [chart.LEFT, chart.WIDTH - chart.RIGHT]
    assert list(labels(chart.line_chart("x", [[(0, 1.0), (48, 2.0)]]), "middle")) == [0, 20, 40]


def test_one_point_is_a_dot_and_a_constant_line_is_drawn():
    svg = chart.line_chart("x", [[(4, 1.0)]])
    assert ElementTree.fromstring(svg).find("circle") is not None
    flat = points(chart.line_chart("x", [[(1, 0.0), (2, 0.0)]]))
    assert flat[0][1] == flat[1][1]


def test_a_long_line_is_thinned_to_means():
    svg = chart.line_chart("x", [[(i, float(i % 2)) for i in range(3000)]])
    found, up = points(svg), labels(svg, "end")
    assert len(found) == chart.POINTS
    middle = up[min(up)] + (0.5 - min(up)) / (max(up) - min(up)) * (up[max(up)] - up[min(up)])
    assert all(abs(y - middle) < 0.2 for _, y in found)


def test_every_value_is_in_a_bar():
    values = [0.0, 0.1, 0.1, 0.35, 1.0]
    svg = chart.bar_chart("x", values, bins=10)
    up = labels(svg, "end")
    one = up[0] - up[1]
    heights = [float(bar.get("height")) / one for bar in ElementTree.fromstring(svg).iter("rect")]
    assert heights == pytest.approx([1, 2, 0, 1, 0, 0, 0, 0, 0, 1], abs=0.02)


def test_a_label_is_escaped():
    assert ElementTree.fromstring(chart.bar_chart('a"<b>&', [1.0])).get("aria-label") == 'a"<b>&'


@pytest.mark.parametrize(("low", "high"), [(0, 0), (1, 1), (0.1234, 0.1235), (-3, 7), (1e-9, 3e4), (0, 1e9), (5, 5.1)])
def test_ticks_enclose_and_are_even(low, high):
    ticks = chart.ticks(low, high)
    assert 3 <= len(ticks) <= 7
    assert ticks[0] <= low + 1e-9
    assert ticks[-1] >= high - 1e-9
    assert all(math.isclose(b - a, ticks[1] - ticks[0], rel_tol=1e-6) for a, b in itertools.pairwise(ticks))
    assert all(isinstance(tick, int) for tick in chart.ticks(low, high, whole=True))
