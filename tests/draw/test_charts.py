"""The charts: well-formed, the same each time, on their canvas, and drawn where the numbers say."""

import itertools
import math
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from minstep.draw.charts import (
    BARS,
    LEFT,
    PLOT_HEIGHT,
    PLOT_WIDTH,
    POINTS,
    TOP,
    bar_chart,
    line_chart,
    load_chart,
)
from minstep.draw.svg import DASHES, INKS
from minstep.tap import Array

SVG = "{http://www.w3.org/2000/svg}"
NASTY = 'a <b> & "c" é ]]>'
CURVE = [(float(x), 2 + 5 * math.exp(-x / 300)) for x in range(1200)]
LOADS = {"on": {"layers.2": np.full(16, 7), "layers.3": np.arange(16)}}
CHARTS = {
    "line": line_chart(NASTY, {NASTY: CURVE, "held out": CURVE[::50]}, "step", NASTY),
    "negative": line_chart("t", {"a": [(-1e-6, -3e-5), (2e-6, 1e-5)]}, "x", "y"),
    "one point": line_chart("t", {"a": [(5.0, 0.0)]}, "x", "y"),
    "constant": line_chart("t", {"a": [(0.0, -2.0), (9e5, -2.0)]}, "x", "y"),
    "six": line_chart("t", {f"series {n}": CURVE for n in range(6)}, "step", "loss"),
    "bar": bar_chart(NASTY, {NASTY: {NASTY: 0.25, "b": 1.0}, "2": {"b": 0.5}}),
    "zeros": bar_chart("A title that is a good deal wider than its few bars", {"a": {"b": 0.0}}),
    "six bars": bar_chart("t", {str(g): {f"n{k}": k for k in range(6)} for g in range(5)}),
    "load": load_chart(NASTY, {NASTY: {NASTY: np.arange(16)}}),
    "columns": load_chart("t", {c: {str(n): np.eye(16)[n] for n in range(4)} for c in "abc"}),
    "released": load_chart("t", {"on": {f"model.layers.{n}.moe": np.ones(288) for n in (3, 4)}}),
}


def figure(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg)


def texts(svg: str) -> list[str]:
    return [element.text or "" for element in figure(svg).iter(f"{SVG}text")]


def marks(svg: str, kind: str) -> list[ElementTree.Element]:
    """Rectangles and paths whose class is `kind`."""
    return [element for element in figure(svg).iter() if element.get("class") == kind]


def points_of(svg: str, n: int) -> Array:
    """The points [N, 2] of the curve of series n, in units of the canvas."""
    path = marks(svg, f"curve s{n}")[0].get("d", "")
    return np.array([pair.split() for pair in path.removeprefix("M").split("L")], np.float64)


def sizes(svg: str, kind: str) -> list[float]:
    return [float(mark.get("height", "nan")) for mark in marks(svg, kind)]


@pytest.mark.parametrize("name", CHARTS)
def test_a_chart_is_well_formed_and_stays_on_its_canvas(name: str) -> None:
    chart = figure(CHARTS[name])
    assert chart.findtext(f"{SVG}title") and chart.findtext(f"{SVG}desc")
    width, height = float(chart.get("width", 0)), float(chart.get("height", 0))
    for mark in chart.iter(f"{SVG}rect"):
        x, y, w, h = (float(mark.get(key, -1)) for key in ("x", "y", "width", "height"))
        assert 0 <= x <= x + w <= width and 0 <= y <= y + h <= height
    for element in chart.iter(f"{SVG}text"):
        kind, words = element.get("class", ""), element.text or ""
        wide = len(words) * {"title": 10.5}.get(kind, 6.8)
        start = float(element.get("x", -1)) - wide * ("mid" in kind) / 2 - wide * ("end" in kind)
        assert 0 <= start and start + wide <= width, words
        assert 12 <= float(element.get("y", -1)) <= height - 4, words
    for path in marks(CHARTS[name], "curve s0"):
        x, y = (float(number) for number in re.findall(r"[\d.]+", path.get("d", ""))[:2])
        assert 0 <= x <= width and TOP <= y <= TOP + PLOT_HEIGHT
    assert "nan" not in CHARTS[name] and "inf" not in CHARTS[name]


@pytest.mark.parametrize("name", ["line", "bar", "load"])
def test_text_is_shown_as_it_is_given(name: str) -> None:
    assert texts(CHARTS[name]).count(NASTY) >= 3
    assert figure(CHARTS[name]).findtext(f"{SVG}title") == NASTY


def test_the_same_numbers_give_the_same_bytes() -> None:
    again = line_chart(NASTY, {NASTY: CURVE, "held out": CURVE[::50]}, "step", NASTY)
    assert again == CHARTS["line"]
    other = line_chart(NASTY, {NASTY: CURVE[::-1], "held out": CURVE[::50]}, "step", NASTY)
    assert other != CHARTS["line"]
    # Another machine's last bit of a number does not show.
    nudged = [(x, y * (1 + 1e-15)) for x, y in CURVE]
    assert line_chart(NASTY, {NASTY: nudged, "held out": nudged[::50]}, "step", NASTY) == again


@pytest.mark.parametrize("name", CHARTS)
def test_every_class_has_a_colour_for_light_and_for_dark_pages(name: str) -> None:
    style = figure(CHARTS[name]).findtext(f"{SVG}style") or ""
    light, dark = style.split("@media (prefers-color-scheme:dark)")
    for element in figure(CHARTS[name]).iter():
        classes = set((element.get("class") or "").split()) - {"mid", "end", "title"}
        for rules in (light, dark):
            named = re.escape("".join(f".{name}" for name in sorted(classes)))
            assert re.search(named + "[,{]", rules), element.attrib


def test_six_series_differ_without_colour() -> None:
    style = figure(CHARTS["six"]).findtext(f"{SVG}style") or ""
    assert len(set(DASHES)) == len(DASHES) == len(INKS)
    for n, dash in enumerate(DASHES):
        assert f".s{n}{{stroke-dasharray:{dash}}}" in style
        assert len(marks(CHARTS["six"], f"curve s{n}")) == 2  # the line, and its sample at the name


def test_points_lie_where_the_axes_say() -> None:
    svg = line_chart("t", {"a": [(0.0, 0.0), (50.0, 5.0), (200.0, 10.0)]}, "x", "y")
    places = points_of(svg, 0)
    assert places[:, 0] == pytest.approx([LEFT, LEFT + PLOT_WIDTH / 4, LEFT + PLOT_WIDTH])
    assert places[:, 1] == pytest.approx([TOP + PLOT_HEIGHT, TOP + PLOT_HEIGHT / 2, TOP])
    assert {"0", "2", "4", "6", "8", "10"} <= set(texts(svg))  # y
    assert {"0", "50", "100", "150", "200"} <= set(texts(svg))  # x


RANGES = [(0, 1), (0, 3100), (-7, 2), (1.8, 9.3), (0.0123, 0.0124), (1e6, 3e6), (5, 5), (0, 0.61)]


@pytest.mark.parametrize(("low", "high"), RANGES)
def test_ticks_are_few_round_numbers_around_the_data(low: float, high: float) -> None:
    svg = line_chart("t", {"a": [(0.0, low), (1.0, high)]}, "x", "y")
    words = [mark.text or "" for mark in marks(svg, "muted end")]
    ticks = [float(word.replace(",", "")) for word in words]
    steps = np.diff(ticks)
    assert 4 <= len(ticks) <= 11
    assert ticks[0] <= low + 1e-12 and high - 1e-12 <= ticks[-1]
    assert steps == pytest.approx(steps[0])  # they would not be, were digits missing
    assert f"{steps[0]:.3e}"[:5] in ("1.000", "2.000", "5.000")


def test_many_points_are_thinned_and_extremes_and_ends_stay() -> None:
    rng = np.random.default_rng(0)
    curve = [(float(n), float(y)) for n, y in enumerate(rng.random(20_000))]
    curve[7_777], curve[13_131] = (7777.0, 9.0), (13131.0, -9.0)
    svg = line_chart("t", {"a": curve}, "x", "y")
    places = points_of(svg, 0)
    assert POINTS / 2 < len(places) <= POINTS + 2
    assert (np.diff(places[:, 0]) >= 0).all()
    assert places[0, 0] == LEFT and places[-1, 0] == LEFT + PLOT_WIDTH
    spike, dip = places[places[:, 1].argmin()], places[places[:, 1].argmax()]
    scale = PLOT_WIDTH / 19_999
    assert spike[0] == pytest.approx(LEFT + 7_777 * scale, abs=0.06)
    assert dip[0] == pytest.approx(LEFT + 13_131 * scale, abs=0.06)


def test_names_at_the_line_ends_keep_their_order_and_do_not_overlap() -> None:
    ends = {"c": 2.0, "a": 1.0, "b": 1.001, "e": 10.0, "d": 2.01}
    svg = line_chart("t", {n: [(0.0, 5.0), (1.0, y)] for n, y in ends.items()}, "x", "y")
    found = {e.text: float(e.get("y", 0)) for e in figure(svg).iter(f"{SVG}text")}
    assert sorted(ends, key=lambda name: -found[name]) == sorted(ends, key=lambda name: ends[name])
    places = sorted(found[name] for name in ends)
    assert all(below - above >= 15.9 for above, below in itertools.pairwise(places))
    assert TOP <= places[0] and places[-1] <= TOP + PLOT_HEIGHT + 5


def test_bars_are_as_high_as_their_values_and_say_them() -> None:
    svg = bar_chart("t", {"d1": {"a": 0.8, "b": 0.2}, "d2": {"b": 0.4}, "d3": {"a": 0.0}})
    assert sizes(svg, "bar s0") == pytest.approx([PLOT_HEIGHT, 0, 12])  # 12: the key
    assert sizes(svg, "bar s1") == pytest.approx([PLOT_HEIGHT / 4, PLOT_HEIGHT / 2, 12])
    assert [word for word in texts(svg) if "." in word][-4:] == ["0.80", "0.20", "0.40", "0.00"]
    b1, b2 = (float(mark.get("x", 0)) for mark in marks(svg, "bar s1")[:2])
    d1, d2 = (
        float(e.get("x", 0)) for e in figure(svg).iter(f"{SVG}text") if e.text in ("d1", "d2")
    )
    assert b1 - d1 == pytest.approx(b2 - d2)  # a name has its place in each group


def test_loads_are_multiples_of_the_fair_share() -> None:
    counts = np.array([0, 1, 20, 99, 100, 380])  # the fair share is 100
    svg = load_chart("t", {"on": {"layers.2": counts}})
    assert sizes(svg, "bar s0") == pytest.approx(BARS * counts / 400, abs=1e-3)
    assert {"most 3.80 (expert 5)", "least 0.00 (expert 0)", "layers.2", "on"} <= set(texts(svg))
    (fair,) = (mark.get("d") for mark in marks(svg, "fair")[:1])
    (tenth,) = (mark.get("d") for mark in marks(svg, "tenth")[:1])
    base = max(float(m.get("y", 0)) + float(m.get("height", 0)) for m in marks(svg, "bar s0"))
    assert fair and f" {base - BARS / 4:.1f}h" in fair
    assert tenth and f" {base - BARS / 40:.1f}h" in tenth
    assert len(marks(svg, "low")) == 2 + 1  # two experts and the key
    assert not marks(svg, "cut") and "cut off" not in svg.replace("bars above 4 are cut off", "")


def test_a_bar_above_the_scale_is_cut_and_said_so() -> None:
    svg = load_chart("t", {"off": {"layers.2": np.array([1, 1, 1, 1, 1, 1, 1, 93])}})
    assert max(sizes(svg, "bar s0")) == BARS and len(marks(svg, "cut")) == 1
    assert {"bars above 4 are cut off", "most 7.44 (expert 7)"} <= set(texts(svg))
    even = load_chart("t", {"on": {"layers.2": np.ones(8)}})
    assert "cut off" not in even and set(sizes(even, "bar s0")) == {BARS / 2}


def test_columns_share_layers_and_scale() -> None:
    off = {"layers.2": np.array([0, 0, 0, 40]), "layers.3": np.array([1, 1, 1, 1])}
    svg = load_chart("t", {"on": {name: np.full(4, 3) for name in off}, "off": off})
    assert sizes(svg, "bar s0") == pytest.approx([10] * 8 + [0, 0, 0, 40] + [10] * 4)
    assert texts(svg).count("layers.2") == 1
    rows = [float(mark.get("y", 0)) for mark in marks(svg, "bar s0")]
    assert rows[4] == rows[12]  # a layer stands at one height in both columns


NOT_FINITE = [math.nan, math.inf, -math.inf]


@pytest.mark.parametrize("bad", NOT_FINITE)
def test_numbers_that_are_not_finite_are_refused(bad: float) -> None:
    for point in ((bad, 0.0), (0.0, bad)):
        with pytest.raises(ValueError, match="not finite"):
            line_chart("t", {"a": [(0.0, 1.0), point]}, "x", "y")
    with pytest.raises(ValueError, match="not finite"):
        bar_chart("t", {"a": {"b": 1.0, "c": bad}})
    with pytest.raises(ValueError, match=r"layers\.2: expected a count"):
        load_chart("t", {"on": {"layers.2": np.array([1.0, bad])}})


def test_charts_of_nothing_or_of_too_much_are_refused() -> None:
    with pytest.raises(ValueError, match="0 series, expected 1 to 6"):
        line_chart("t", {}, "x", "y")
    with pytest.raises(ValueError, match="b: has no points"):
        line_chart("t", {"a": [(0.0, 1.0)], "b": []}, "x", "y")
    with pytest.raises(ValueError, match="7 series"):
        line_chart("t", {str(n): [(0.0, 1.0)] for n in range(7)}, "x", "y")
    with pytest.raises(ValueError, match="0 series"):
        bar_chart("t", {"a": {}})
    with pytest.raises(ValueError, match="-0.5, expected 0 or more"):
        bar_chart("t", {"a": {"b": -0.5}})
    with pytest.raises(ValueError, match="same layers"):
        load_chart("t", {})
    with pytest.raises(ValueError, match="same layers"):
        load_chart("t", {**LOADS, "off": {"layers.3": np.ones(16)}})
    with pytest.raises(ValueError, match="no tokens"):
        load_chart("t", {"on": {"layers.2": np.zeros(4)}})
    for counts in (np.array([-1, 2]), np.ones((2, 2))):
        with pytest.raises(ValueError, match="count of 0 or more"):
            load_chart("t", {"on": {"layers.2": counts}})


def test_a_logarithmic_axis_has_a_tick_at_each_power_of_its_base() -> None:
    curve = [(4.0**n, 10.0 ** (n - 2)) for n in range(3, 10)]
    svg = line_chart("t", {"a": curve}, "x", "y", bases=(4, 10))
    places = points_of(svg, 0)
    assert places[:, 0] == pytest.approx(np.linspace(LEFT, LEFT + PLOT_WIDTH, 7), abs=0.06)
    assert places[:, 1] == pytest.approx(np.linspace(TOP + PLOT_HEIGHT, TOP, 7), abs=0.06)
    assert {"64", "4,096", "262,144", "10", "10,000", "1M", "10M"} <= set(texts(svg))
    tiny = line_chart("t", {"a": [(1.0, 0.004), (2.0, 0.02)]}, "x", "y", bases=(0, 10))
    assert {"0.001", "0.01", "0.1"} <= set(texts(tiny))
    for bad in (0.0, -1.0):
        with pytest.raises(ValueError, match="expected numbers above 0"):
            line_chart("t", {"a": [(1.0, 1.0), (2.0, bad)]}, "x", "y", bases=(0, 10))


def test_marks_lie_at_their_value_and_their_words_cross_no_other_mark() -> None:
    x_marks = {"a long name of the first": 4.0, "second": 6.0, "at the very right end": 10.0}
    y_marks = {"upper": 5.2, "lower": 5.0, "low": 1.0}
    curve = {"a": [(0.0, 0.0), (10.0, 10.0)]}
    svg = line_chart("t", curve, "x", "y", x_marks=x_marks, y_marks=y_marks)
    paths = [mark.get("d") for mark in marks(svg, "mark")]
    upright = [LEFT + PLOT_WIDTH * x / 10 for x in x_marks.values()]
    level = [TOP + PLOT_HEIGHT * (1 - y / 10) for y in y_marks.values()]
    assert paths == [f"M{x:.1f} {TOP}v{PLOT_HEIGHT}" for x in upright] + [
        f"M{LEFT} {y:.1f}h{PLOT_WIDTH}" for y in level
    ]
    found = {e.text: e for e in figure(svg).iter(f"{SVG}text")}
    for words, is_right in zip(x_marks, (False, True, False), strict=True):
        assert (found[words].get("class") == "over") is is_right, words
    assert len({found[words].get("y") for words in x_marks}) == 3
    for words, y, is_above in zip(y_marks, level, (True, False, False), strict=True):
        assert (float(found[words].get("y", 0)) < y) is is_above, words
