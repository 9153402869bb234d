"""Pictures are whole XML, put numbers where they belong, and can be read without their colours."""

import math
import re
import xml.etree.ElementTree as ElementTree

import pytest

from alignkit.observe import page
from alignkit.observe.plot import DARK, LIGHT, Series, histogram_series, line_chart

SVG = "{http://www.w3.org/2000/svg}"


def parsed(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg)


def texts(svg: str) -> list[str]:
    return [text.text for text in parsed(svg).iter(f"{SVG}text")]


def places(svg: str, name: str) -> list[list[float]]:
    """The numbers in the paths of a class."""
    paths = [path for path in parsed(svg).iter(f"{SVG}path") if path.get("class") == name]
    return [[float(x) for x in re.findall(r"-?[\d.]+", path.get("d"))] for path in paths]


def test_points_lie_where_the_axes_say():
    svg = line_chart([Series("a", [0, 5, 10], [0, 1, 4], kind="line")], "x", "y")
    ticks = {text.text: text for text in parsed(svg).iter(f"{SVG}text") if text.get("text-anchor") == "middle"}
    line, _ = places(svg, "c0")  # and that of the legend
    left, right = (float(ticks[name].get("x")) for name in ("0", "10"))
    assert line[0::2] == pytest.approx([left, (left + right) / 2, right], abs=0.06)
    heights = [line[1], line[5]]
    assert (line[3] - heights[0]) / (heights[1] - heights[0]) == pytest.approx(1 / 4, abs=0.002)
    assert heights[1] < heights[0], "up is more"


def test_an_interval_is_a_bar_from_end_to_end():
    svg = line_chart([Series("a", [1, 2], [5, 5], [0, math.nan], [10, math.nan])])
    (bar,) = places(svg, "c0 thin")
    grid = sorted({y for x, y, _ in places(svg, "grid") if x == 58})
    assert sorted(bar[1:]) == pytest.approx([grid[0], grid[-1]], abs=0.06)


@pytest.mark.parametrize(
    "low, high, expected",
    [(0, 1, "0 0.2 0.4 0.6 0.8 1"), (0.5, 1, "0.5 0.6 0.7 0.8 0.9 1"), (-3, 42, "−10 0 10 20 30 40 50"),
     (0, 1234, "0 500 1000 1500"), (3e-4, 5e-4, "0.0003 0.00035 0.0004 0.00045 0.0005")],
)  # fmt: skip
def test_ticks_are_round_numbers(low, high, expected):
    svg = line_chart([Series("", [low, high], [0, 1])])
    assert " ".join(texts(svg)[: len(expected.split())]) == expected


def test_what_is_not_finite_or_not_there_is_left_out():
    svg = line_chart([Series("a", [0, 1, math.nan, 2], [0, math.inf, 1, 2])])
    assert "nan" not in svg and "inf" not in svg and len(places(svg, "m0")) == 2 + 1
    parsed(line_chart([]))
    parsed(line_chart([Series("one", [3], [3])]))
    parsed(line_chart(histogram_series({"none": []})))


def test_names_are_text_and_not_markup():
    svg = line_chart([Series("a < b & c", [0, 1], [0, 1])], x_label="<script>", title='"x"')
    assert "a < b & c" in texts(svg) and "<script" not in svg
    html = page.page("<b>", [page.paragraph("1 < 2"), page.table(["&"], [["<i>"]])])
    assert "<i>" not in html and "1 &lt; 2" in html


def test_series_differ_in_colour_dash_and_marker_in_light_and_dark():
    series = [Series(str(i), [0, 1], [i, i + 1]) for i in range(4)]
    svg = line_chart([Series("guide", [0, 1], [0, 1], kind="guide"), *series])
    paths = [path for path in parsed(svg).iter(f"{SVG}path") if re.fullmatch(r"[cm]\d", path.get("class"))]
    lines = {path.get("class"): path.get("stroke-dasharray") for path in paths if path.get("class")[0] == "c"}
    assert len(set(lines.values())) == 4
    shapes = {path.get("class"): re.sub(r"[\d. -]", "", path.get("d")) for path in paths if path.get("class")[0] == "m"}
    assert len(shapes) == 4 and len(set(shapes.values())) >= 3
    light, dark = svg.split("@media (prefers-color-scheme:dark)")
    assert all(colour in light for colour in LIGHT) and all(colour in dark for colour in DARK)


def test_a_histogram_counts_shares():
    a, b = histogram_series({"a": [0.0, 0.1, 0.9, 1.0], "b": [0.6]}, bins=2)
    assert a.x == pytest.approx([0.0, 0.5, 1.0])
    assert a.y == [0.5, 0.5, 0.5] and b.y == [0.0, 1.0, 1.0]


def test_a_page_needs_nothing_from_outside():
    html = page.page("t", [page.pictures([(line_chart([Series("a", [0, 1], [0, 1])]), "caption")])])
    ElementTree.fromstring(html.partition("\n")[2])
    assert not re.search(r"<script|src=|href=|@import|url\(", html)
    assert "prefers-color-scheme:dark" in html and 'name="viewport"' in html
