"""The axes of charts: where a number lies along one, and the round numbers written beside it."""

import math
from collections.abc import Sequence
from typing import NamedTuple

ROUNDING = 1e-9  # of what is drawn


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
