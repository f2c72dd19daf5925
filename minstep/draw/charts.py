"""Charts of what was measured, as SVG text: lines, grouped bars, and the load of each expert.

Checked by: tests/draw/test_charts.py
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from minstep.draw.svg import INKS, card, rect, text, widest
from minstep.tap import Array

Point = tuple[float, float]
PLOT_WIDTH, PLOT_HEIGHT, LEFT, TOP, BELOW = 560, 300, 72, 60, 58  # in units of the canvas
POINTS = 600  # drawn of one line, at most
ROW, BARS, WORDS = 54, 40, 170  # of the load chart: row, highest bar, and the words beside
ROUNDING = 1e-9  # of what is drawn
LOW, MOST = 0.1, 4.0  # multiples of the fair share: below is marked, above is cut off


class Axis(NamedTuple):
    """An axis from `low` to `high` with round numbers at `ticks`, equal steps or factors apart."""

    low: float
    high: float
    ticks: list[float]
    step: float | None  # None: the axis is logarithmic

    def share(self, value: float) -> float:
        """How far along the axis a value lies: 0 at its beginning, 1 at its end."""
        low, high = self.low, self.high
        if self.step is None:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return (value - low) / (high - low)

    def label(self, tick: float) -> str:
        """A tick's number, with as many decimals as the distance of ticks has."""
        if self.step is None:
            large = f"{tick / 1e6:,.0f}M" if tick >= 1e6 else f"{tick:,.0f}"
            return large if tick >= 1 else f"{tick:g}".replace("e-0", "e-")
        decimals = max(0, -math.floor(math.log10(self.step) + ROUNDING))
        return f"{tick:,.{decimals}f}"


def axis(values: Sequence[float], base: int = 0, is_tight: bool = False) -> Axis:
    """The axis that shows all values, from tick to tick, or just as far as they go if `is_tight`.

    With a `base` it is logarithmic, a tick at each power of it. Raises ValueError where a value on
    such an axis is not above 0.
    Checked by: tests/draw/test_charts.py
    """
    low, high = min(values), max(values)
    if base:
        if low <= 0:
            raise ValueError(f"{low} is on a logarithmic axis, expected numbers above 0")
        first = math.floor(math.log(low, base) + ROUNDING)
        last = max(first + 1, math.ceil(math.log(high, base) - ROUNDING))
        ticks, step = [float(base) ** n for n in range(first, last + 1)], None
    else:
        ticks, step = _round_ticks(low, high)
    if not is_tight:
        return Axis(ticks[0], ticks[-1], ticks, step)
    high = high if high > low else ticks[-1]
    return Axis(low, high, [tick for tick in ticks if low <= tick <= high], step)


def _round_ticks(low: float, high: float) -> tuple[list[float], float]:
    """Round numbers from `low` or just below to `high` or just above, at most ten; their step."""
    if low == high:
        low, high = low - max(0.5, abs(low) / 2), high + max(0.5, abs(high) / 2)
    span = (high - low) * (1 - ROUNDING)  # so that a last bit does not decide
    power = 10.0 ** math.floor(math.log10(span / 5))
    step = next(power * n for n in (1, 2, 5, 10) if power * n * 8 >= span)
    first, last = math.floor(low / step + ROUNDING), math.ceil(high / step - ROUNDING)
    return [step * n for n in range(first, last + 1)], step


def line_chart(
    title: str,
    series: Mapping[str, Sequence[Point]],
    x_label: str,
    y_label: str,
    *,
    bases: tuple[int, int] = (0, 0),
    x_marks: Mapping[str, float] | None = None,
    y_marks: Mapping[str, float] | None = None,
) -> str:
    """Lines through points (x, y) with round numbers on the axes, named where they end.

    `bases`: of x and y where an axis is logarithmic, 0 where it is not. Marks are dashed lines
    across the plot, {words: value}. A line of more than about 600 points keeps the lowest and
    highest of each stretch. Raises ValueError for a number that is not finite, a series without
    points, or more than six of them.
    """
    for name, points in series.items():
        if not points:
            raise ValueError(f"{name}: has no points, expected at least one")
    _check(title, series, (number for points in series.values() for p in points for number in p))
    xs, ys = ([p[k] for points in series.values() for p in points] for k in (0, 1))
    across, upward = axis(xs, bases[0], is_tight=True), axis(ys, bases[1])

    def place(point: Point) -> Point:
        return LEFT + PLOT_WIDTH * across.share(point[0]), _height(point[1], upward)

    lines = [*_y_axis(upward, y_label, PLOT_WIDTH)]
    for x in across.ticks:
        at, bottom = LEFT + PLOT_WIDTH * across.share(x), TOP + PLOT_HEIGHT
        lines.append(f'<path class="line" d="M{at:.1f} {bottom}v5"/>')
        lines.append(text(at, bottom + 18, across.label(x), "muted mid"))
    lines.append(text(LEFT + PLOT_WIDTH / 2, TOP + PLOT_HEIGHT + 40, x_label, "mid"))
    ends = {}
    for n, (name, points) in enumerate(series.items()):
        placed = [place(point) for point in _thinned(points)]
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in placed)
        lines.append(f'<path class="curve s{n}" d="M{path}"/>')
        ends[name] = placed[-1][1]
    places = {words: LEFT + PLOT_WIDTH * across.share(x) for words, x in (x_marks or {}).items()}
    heights = {words: _height(y, upward) for words, y in (y_marks or {}).items()}
    lines += [*_x_marks(places), *_y_marks(heights)]
    for name, y in _spread(ends):
        n, x = list(series).index(name), LEFT + PLOT_WIDTH + 12
        lines.append(f'<path class="curve s{n}" d="M{x} {y:.1f}h28"/>')
        lines.append(text(x + 34, y + 4, name))
    description = "; ".join(
        f"{name}: {y_label} from {points[0][1]:.4g} to {points[-1][1]:.4g}"
        for name, points in series.items()
    )
    height = TOP + PLOT_HEIGHT + BELOW
    return card(title, f"{description}.", lines, LEFT + PLOT_WIDTH + 58 + widest(series), height)


def bar_chart(title: str, groups: Mapping[str, Mapping[str, float]]) -> str:
    """Bars from 0 up, side by side in each group, in one order of names: {group: {name: value}}.

    A group may lack a name: its place stays free. Raises ValueError for a number that is negative
    or not finite, for no bars at all, or for more than six names.
    """
    names = list(dict.fromkeys(name for group in groups.values() for name in group))
    values = [value for group in groups.values() for value in group.values()]
    _check(title, names, values)
    if min(values) < 0:
        raise ValueError(f"{title}: has a bar of {min(values)}, expected 0 or more")
    upward = axis([0, max(values) or 1])
    pitch = 38
    width = max(280, len(groups) * (len(names) * pitch + 30) + 20)
    span = (width - 20) / len(groups)
    lines = [*_y_axis(upward, "", width)]
    for g, (label, group) in enumerate(groups.items()):
        middle = LEFT + 10 + (g + 0.5) * span
        lines.append(text(middle, TOP + PLOT_HEIGHT + 18, label, "mid"))
        for name, value in group.items():
            x, y = middle + (names.index(name) - len(names) / 2) * pitch, _height(value, upward)
            kind = f"bar s{names.index(name)}"
            lines.append(rect(x + 3, y, pitch - 6, TOP + PLOT_HEIGHT - y, kind, 1))
            lines.append(text(x + pitch / 2, y - 5, f"{value:.2f}", "mid"))
    for n, name in enumerate(names):
        x, y = LEFT + width + 12, TOP + 12 + n * 20
        lines += [rect(x, y - 10, 14, 12, f"bar s{n}", 1), text(x + 22, y, name)]
    description = "; ".join(
        f"{label}: " + ", ".join(f"{name} {value:.2f}" for name, value in group.items())
        for label, group in groups.items()
    )
    right = LEFT + width + 46 + widest(names)
    return card(title, f"{description}.", lines, right, TOP + PLOT_HEIGHT + 34)


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
    lines, parts, gutter = list[str](), list[str](), 40 + widest(layers)
    for n, layer in enumerate(layers):
        lines.append(text(24, TOP + 20 + n * ROW + BARS / 2, layer))
    for c, (name, column) in enumerate(shares.items()):
        x = gutter + c * (pitch * most + WORDS)
        lines.append(text(x, TOP + 2, name))
        for n, share in enumerate(column):
            lines += _panel(x, TOP + 16 + n * ROW + BARS, pitch, share, top)
        least, largest = min(share.min() for share in column), max(s.max() for s in column)
        parts.append(f"{name}: from {least:.2f} to {largest:.2f} of the fair share")
    x, y = 24, TOP + 24 + len(layers) * ROW
    lines += [f'<path class="fair" d="M{x} {y - 4}h24"/>', text(x + 32, y, "fair share")]
    lines += [f'<path class="tenth" d="M{x + 116} {y - 4}h24"/>', text(x + 148, y, "a tenth of it")]
    lines += [rect(x + 246, y - 10, 12, 12, "low", 0), text(x + 266, y, "expert below a tenth")]
    lines += [text(x + 410, y, f"bars above {top:g} are cut off", "muted")] if top == MOST else []
    width = gutter + len(shares) * (pitch * most + WORDS)
    return card(title, "; ".join(parts) + ".", lines, max(width, LEFT + 540), y + 18)


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


def _height(value: float, upward: Axis) -> float:
    return TOP + PLOT_HEIGHT * (1 - upward.share(value))


def _y_axis(upward: Axis, label: str, width: float) -> Iterator[str]:
    for tick in upward.ticks:
        y = _height(tick, upward)
        kind = "line" if tick == upward.low else "grid"
        yield f'<path class="{kind}" d="M{LEFT} {y:.1f}h{width:.0f}"/>'
        yield text(LEFT - 8, y + 4, upward.label(tick), "muted end")
    yield text(24, TOP - 12, label, "muted")


def _x_marks(places: Mapping[str, float]) -> Iterator[str]:
    """Upright lines at x, words at their feet: on the right, or left of what these would cross."""
    for n, (words, x) in enumerate(places.items()):
        end = x + 5 + widest([words])
        crossed = end > LEFT + PLOT_WIDTH or any(x < other < end for other in places.values())
        yield f'<path class="mark" d="M{x:.1f} {TOP}v{PLOT_HEIGHT}"/>'
        side, kind = (-5, "over end") if crossed else (5, "over")
        yield text(x + side, TOP + PLOT_HEIGHT - 8 - 16 * n, words, kind)


def _y_marks(heights: Mapping[str, float]) -> Iterator[str]:
    """Level lines at y, their words on the right below them, or above where one is close below."""
    for words, y in heights.items():
        is_free = not any(0 < other - y < 20 for other in heights.values())
        yield f'<path class="mark" d="M{LEFT} {y:.1f}h{PLOT_WIDTH}"/>'
        yield text(LEFT + PLOT_WIDTH - 8, y + 13 if is_free else y - 5, words, "over end")


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
