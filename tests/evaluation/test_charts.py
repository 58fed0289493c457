"""The roofline chart is drawn to scale, and marks are drawn where a line has few points."""

import math
import re

import pytest

from engine.evaluation.charts import FEW_POINTS, Line, Roof, RoofPoint, line_chart, roofline_chart, with_prefix


def test_a_point_lies_under_the_roof_by_the_share_that_it_reaches():
    roof = Roof("bfloat16", 1e15, 1e12)  # the ridge is at 1000 FLOP/byte
    chart = roofline_chart("x", [RoofPoint("a", 100.0, 1e13, 0), RoofPoint("b", 1e4, 1e15, 1)], [roof])
    corners = [tuple(map(float, place.split(","))) for place in re.findall(r'class="roof" points="([^"]*)"', chart)[0].split()]
    points = [tuple(map(float, place)) for place in re.findall(r'<circle[^>]* cx="([\d.]+)" cy="([\d.]+)"', chart)]
    (left, bottom), (ridge, top), (_, still_top) = corners
    assert top == still_top == points[1][1], "it reaches the peak"
    decades = math.log10(1000 / 10)  # from the left end to the ridge, over which the roof rises as much
    assert points[0][0] == pytest.approx(left + (ridge - left) / decades, abs=0.2)
    assert points[0][1] == pytest.approx(top + 2 * (bottom - top) / decades, abs=0.2), "a hundredth of the peak"
    assert roofline_chart("x", [], [roof]) == roofline_chart("x", [RoofPoint("a", 1.0, 1.0, 0)], []) == ""


def test_marks_are_drawn_at_each_point_and_joined_only_if_asked():
    values = [1.0, None, 2.0]
    marked = line_chart("x", [Line("a", [1, 2, 3], values, marked=True)])
    assert marked.count("<circle") == 2 and marked.count("<polyline") == 1
    long = line_chart("x", [Line("a", range(5000), [1.0, 2.0] * 2500, marked=True)])
    assert 50 < long.count("<circle") <= FEW_POINTS
    dots = line_chart("x", [Line("a", [1, 2, 3], values, marked=True, is_joined=False), Line("b", [1], [1.0])])
    assert dots.count("hollow") == 2 and dots.count("<polyline") == 1 and "dots" in dots


@pytest.mark.parametrize(("value", "text"), [(999.9, "1 kB"), (12.34, "12.3 B"), (4.8e12, "4.8 TB"), (0.5, "0.5 B")])
def test_prefixes(value, text):
    assert with_prefix(value, "B") == text
