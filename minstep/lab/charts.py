"""Charts of what was measured, as SVG text: lines, grouped bars, and the load of each expert.

Series differ by dashes or outline and stand in one order, so that colour is never needed.
Checked by: tests/test_charts.py
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from minstep.lab.svg import Colours, document, rect, text
from minstep.tap import Array

Point = tuple[float, float]
PLOT_WIDTH, PLOT_HEIGHT, LEFT, TOP, BELOW = 560, 300, 72, 60, 58  # in units of the canvas
LETTER, TITLE_LETTER = 6.8, 10.5  # the width of a wide font's characters
POINTS = 600  # drawn of one line, at most
ROUNDING = 1e-9  # of what is drawn
ROW, BARS, WORDS = 54, 40, 170  # of the load chart: row, highest bar, and what is said beside
LOW, MOST = 0.1, 4.0  # multiples of the fair share: below is marked, above is cut off
INKS = (
    *(("#2563c9", "#6cb0ff"), ("#b45309", "#f0a13a"), ("#6f36d9", "#c4a7ff")),
    *(("#d6246e", "#ff4f93"), ("#1a7f37", "#3fb950"), ("#59636e", "#9198a1")),
)
DASHES = ("none", "8 4", "2 3", "12 3 2 3", "5 2", "1 5")
KINDS: Colours = {  # the chart's own classes: fill and stroke on a light page and on a dark one
    ".grid": ("none", "#d8dee4", "none", "#2a3038"),
    ".low": ("#fbd3e2", "none", "#5c1736", "none"),
    ".fair": ("none", "#1f2328", "none", "#e6edf3"),
    ".tenth": ("none", "#d6246e", "none", "#ff4f93"),
    ".cut": ("#ffffff", "none", "#0d1117", "none"),
    **{f".curve.s{n}": ("none", light, "none", dark) for n, (light, dark) in enumerate(INKS)},
    **{f".bar.s{n}": (light, light, dark, dark) for n, (light, dark) in enumerate(INKS)},
}
RULES = ".end{text-anchor:end} .curve{stroke-width:1.8;stroke-linejoin:round}"
RULES += " .bar{fill-opacity:.3;stroke-width:1.5} .bar.s0{fill-opacity:1} .tenth"
RULES += "{stroke-dasharray:4 3}" + "".join(
    f" .s{n}{{stroke-dasharray:{dash}}}" for n, dash in enumerate(DASHES)
)


def line_chart(
    title: str, series: Mapping[str, Sequence[Point]], x_label: str, y_label: str
) -> str:
    """Lines through points (x, y) with round numbers on the axes, named where they end.

    A line of more than about 600 points keeps the lowest and highest of each stretch. Raises
    ValueError for a number that is not finite, a series without points, or more than six of them.
    """
    for name, points in series.items():
        if not points:
            raise ValueError(f"{name}: has no points, expected at least one")
    _check(title, series, (number for points in series.values() for p in points for number in p))
    xs, ys = ([p[k] for points in series.values() for p in points] for k in (0, 1))
    x_ticks, y_ticks = _ticks(min(xs), max(xs)), _ticks(min(ys), max(ys))
    left, right = min(xs), max(xs) if max(xs) > min(xs) else x_ticks[-1]

    def place(point: Point) -> Point:
        return LEFT + PLOT_WIDTH * (point[0] - left) / (right - left), _height(point[1], y_ticks)

    lines = [*_y_axis(y_ticks, y_label, PLOT_WIDTH)]
    for x in (x for x in x_ticks if left <= x <= right):
        at, bottom = place((x, 0))[0], TOP + PLOT_HEIGHT
        lines.append(f'<path class="line" d="M{at:.1f} {bottom}v5"/>')
        lines.append(text(at, bottom + 18, _number(x, x_ticks), "muted mid"))
    lines.append(text(LEFT + PLOT_WIDTH / 2, TOP + PLOT_HEIGHT + 40, x_label, "mid"))
    ends = {}
    for n, (name, points) in enumerate(series.items()):
        placed = [place(point) for point in _thinned(points)]
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in placed)
        lines.append(f'<path class="curve s{n}" d="M{path}"/>')
        ends[name] = placed[-1][1]
    for name, y in _spread(ends):
        n, x = list(series).index(name), LEFT + PLOT_WIDTH + 12
        lines.append(f'<path class="curve s{n}" d="M{x} {y:.1f}h28"/>')
        lines.append(text(x + 34, y + 4, name))
    said = "; ".join(
        f"{name}: {y_label} from {points[0][1]:.4g} to {points[-1][1]:.4g}"
        for name, points in series.items()
    )
    height = TOP + PLOT_HEIGHT + BELOW
    return _page(title, f"{said}.", lines, PLOT_WIDTH + 58 + _widest(series), height)


def bar_chart(title: str, groups: Mapping[str, Mapping[str, float]], y_label: str = "") -> str:
    """Bars from 0 up, side by side in each group, in one order of names: {group: {name: value}}.

    A group may lack a name: its place stays free. Raises ValueError for a number that is negative
    or not finite, for no bars at all, or for more than six names.
    """
    names = list(dict.fromkeys(name for group in groups.values() for name in group))
    values = [value for group in groups.values() for value in group.values()]
    _check(title, names, values)
    if min(values) < 0:
        raise ValueError(f"{title}: has a bar of {min(values)}, expected 0 or more")
    ticks = _ticks(0, max(values) or 1)
    pitch = 38
    width = max(280, len(groups) * (len(names) * pitch + 30) + 20)
    span = (width - 20) / len(groups)
    lines = [*_y_axis(ticks, y_label, width)]
    for g, (label, group) in enumerate(groups.items()):
        middle = LEFT + 10 + (g + 0.5) * span
        lines.append(text(middle, TOP + PLOT_HEIGHT + 18, label, "mid"))
        for name, value in group.items():
            x, y = middle + (names.index(name) - len(names) / 2) * pitch, _height(value, ticks)
            kind = f"bar s{names.index(name)}"
            lines.append(rect(x + 3, y, pitch - 6, TOP + PLOT_HEIGHT - y, kind, 1))
            lines.append(text(x + pitch / 2, y - 5, f"{value:.2f}", "mid"))
    for n, name in enumerate(names):
        x, y = LEFT + width + 12, TOP + 12 + n * 20
        lines += [rect(x, y - 10, 14, 12, f"bar s{n}", 1), text(x + 22, y, name)]
    said = "; ".join(
        f"{label}: " + ", ".join(f"{name} {value:.2f}" for name, value in group.items())
        for label, group in groups.items()
    )
    return _page(title, f"{said}.", lines, width + 46 + _widest(names), TOP + PLOT_HEIGHT + 34)


def load_chart(title: str, loads: Mapping[str, Mapping[str, Array]]) -> str:
    """How many tokens each expert got: {column: {layer: counts [E]}}, a row of bars per layer.

    A bar is a multiple of the fair share, which is the layer's mean. Columns stand side by side on
    one scale, to compare the same layers. Raises ValueError for counts that are not finite or
    negative, for a layer without any, or for columns that differ in their layers.
    """
    layers = [*next(iter(loads.values()), {})]
    if not layers or any([*column] != layers for column in loads.values()):
        raise ValueError(f"{title}: expected columns that have the same layers")
    shares = {name: [_shares(*row) for row in column.items()] for name, column in loads.items()}
    every = [share for column in shares.values() for share in column]
    most = max(map(len, every))
    top = min(MOST, max(2.0, math.ceil(max(share.max() for share in every) - ROUNDING)))
    pitch = min(14.0, max(2.0, 230 / most))
    lines, said, gutter = list[str](), list[str](), 40 + _widest(layers)
    for n, layer in enumerate(layers):
        lines.append(text(24, TOP + 20 + n * ROW + BARS / 2, layer))
    for c, (name, column) in enumerate(shares.items()):
        x = gutter + c * (pitch * most + WORDS)
        lines.append(text(x, TOP + 2, name))
        for n, share in enumerate(column):
            lines += _panel(x, TOP + 16 + n * ROW + BARS, pitch, share, top)
        least, largest = min(share.min() for share in column), max(s.max() for s in column)
        said.append(f"{name}: from {least:.2f} to {largest:.2f} of the fair share")
    x, y = 24, TOP + 24 + len(layers) * ROW
    lines += [f'<path class="fair" d="M{x} {y - 4}h24"/>', text(x + 32, y, "fair share")]
    lines += [f'<path class="tenth" d="M{x + 116} {y - 4}h24"/>', text(x + 148, y, "a tenth of it")]
    lines += [rect(x + 246, y - 10, 12, 12, "low", 0), text(x + 266, y, "expert below a tenth")]
    lines += [text(x + 410, y, f"bars above {top:g} are cut off", "muted")] if top == MOST else []
    width = gutter + len(shares) * (pitch * most + WORDS) - LEFT
    return _page(title, "; ".join(said) + ".", lines, max(width, 540), y + 18)


def _panel(x: float, base: float, pitch: float, share: Array, top: float) -> Iterator[str]:
    """The bars of one layer above the line `base`, and beside them the extremes in words."""
    for e, value in enumerate(share.tolist()):
        at, height = x + e * pitch, BARS * min(value, top) / top
        if value < LOW:
            yield rect(at, base - BARS, pitch, BARS, "low", 0)
        yield rect(at + pitch * 0.12, base - height, pitch * 0.76, height, "bar s0", 0)
        if value > top:
            yield rect(at, base - BARS + 4, pitch, 2, "cut", 0)
    for level, kind in ((0.0, "grid"), (LOW, "tenth"), (1.0, "fair")):
        y = base - BARS * level / top
        yield f'<path class="{kind}" d="M{x:.1f} {y:.1f}h{len(share) * pitch:.1f}"/>'
    for word, e, up in (("most", int(share.argmax()), 24), ("least", int(share.argmin()), 8)):
        words = f"{word} {share[e]:.2f} (expert {e})"
        yield text(x + len(share) * pitch + 10, base - up, words, "muted")


def _shares(layer: str, counts: Array) -> Array:
    """Counts [E] as multiples of their mean."""
    counts = np.asarray(counts, dtype=np.float64)
    if counts.ndim != 1 or not np.isfinite(counts).all() or counts.min(initial=0) < 0:
        raise ValueError(f"{layer}: expected a count of 0 or more for each expert")
    if counts.sum() == 0:
        raise ValueError(f"{layer}: has no tokens, expected at least one")
    return counts / counts.mean()


def _check(title: str, names: Iterable[str], numbers: Iterable[float]) -> None:
    numbers, count = list(numbers), len(list(names))
    if not all(map(math.isfinite, numbers)):
        raise ValueError(f"{title}: has a number that is not finite")
    if not numbers or count > len(INKS):
        raise ValueError(f"{title}: has {count} series, expected 1 to {len(INKS)}")


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers from `low` or just below to `high` or just above, at most ten of them."""
    if low == high:
        low, high = low - max(0.5, abs(low) / 2), high + max(0.5, abs(high) / 2)
    span = (high - low) * (1 - ROUNDING)  # so that a last bit does not decide
    power = 10.0 ** math.floor(math.log10(span / 5))
    step = next(power * n for n in (1, 2, 5, 10) if power * n * 8 >= span)
    first, last = math.floor(low / step + ROUNDING), math.ceil(high / step - ROUNDING)
    return [step * n for n in range(first, last + 1)]


def _number(value: float, ticks: Sequence[float]) -> str:
    """A number with as many decimals as the distance of ticks has."""
    decimals = max(0, -math.floor(math.log10(ticks[1] - ticks[0]) + 1e-9))
    return f"{value:,.{decimals}f}"


def _height(value: float, ticks: Sequence[float]) -> float:
    return TOP + PLOT_HEIGHT * (1 - (value - ticks[0]) / (ticks[-1] - ticks[0]))


def _y_axis(ticks: Sequence[float], label: str, width: float) -> Iterator[str]:
    for tick in ticks:
        y = _height(tick, ticks)
        kind = "line" if tick == ticks[0] else "grid"
        yield f'<path class="{kind}" d="M{LEFT} {y:.1f}h{width:.0f}"/>'
        yield text(LEFT - 8, y + 4, _number(tick, ticks), "muted end")
    yield text(24, TOP - 12, label, "muted")


def _thinned(points: Sequence[Point]) -> Sequence[Point]:
    stretch = math.ceil(2 * len(points) / POINTS)
    if stretch <= 2:
        return points
    kept = {0, len(points) - 1}
    for start in range(0, len(points), stretch):
        part = range(start, min(start + stretch, len(points)))
        kept |= {min(part, key=lambda n: points[n][1]), max(part, key=lambda n: points[n][1])}
    return [points[n] for n in sorted(kept)]


def _spread(ends: Mapping[str, float]) -> list[tuple[str, float]]:
    """The names from top to bottom, each at least 16 units below the one before."""
    names, places = sorted(ends, key=lambda name: ends[name]), list[float]()
    for n, name in enumerate(names):
        lowest = TOP + PLOT_HEIGHT - 16.0 * (len(names) - 1 - n)
        places.append(min(max(ends[name], places[-1] + 16 if places else 0.0), lowest))
    return list(zip(names, places, strict=True))


def _widest(names: Iterable[str]) -> float:
    return max(map(len, names)) * LETTER


def _page(title: str, said: str, lines: Iterable[str], width: float, height: int) -> str:
    """The chart on a card, `width` units wide right of the y axis, or as wide as the title."""
    across = math.ceil(max(LEFT + width, 24 + len(title) * TITLE_LETTER) + 24)
    card = rect(0.5, 0.5, across - 1, height - 1, "card", 10)
    head = [card, text(24, 32, title, "title")]
    return document((across, height), title, said, [*head, *lines], KINDS, RULES)
