"""Two recordings of one prompt, a pair of tensors at a time, in the model's order.

Checked by: tests/parity/test_diff.py
"""

from collections.abc import Callable, Collection, Iterable, Iterator
from functools import partial

import numpy as np
from numpy.typing import NDArray

from minstep.config import Config
from minstep.parity.compare import (
    ROWS,
    TOLERANCES,
    Comparison,
    First,
    compare,
    departing,
    fitted,
    row_errors,
)
from minstep.parity.forms import Widths, config_widths, derived, sibling_widths
from minstep.parity.names import ENDS, is_weight, model_order, mtp_layers
from minstep.parity.recording import Recording
from minstep.parity.router_ties import (
    Choice,
    Mask,
    score_scale,
    too_many,
)
from minstep.store.stages import split
from minstep.tap import Array
from minstep.validation import NotFinite

AFTER_IDS = "moe.weights.unscaled moe.weights moe.unscaled moe mlp model.norm lm_head".split()
AFTER_IDS += ENDS
Judge = Callable[[int, float], Choice | None]


def align(one: Recording, other: Recording, config: Config | None = None) -> list[str]:
    """Our names of what can be compared, in the model's order.

    A tensor is, where one recording holds it and the other at least what it is made of: both learn
    how. Sizes and the routed scaling factor are the config's, else those of the other recording.
    """
    held = one.shapes(), other.shapes()
    factor = _factor(one, other, config)
    _learn(one, held[1], factor, config_widths(config) if config else sibling_widths(*held))
    _learn(other, held[0], factor, config_widths(config) if config else sibling_widths(*held[::-1]))
    common = one.forms.keys() & other.forms.keys() & (held[0].keys() | held[1].keys())
    mtp = mtp_layers((*one.forms, *other.forms), config)
    return sorted(common, key=lambda name: model_order(name, mtp))


def _learn(r: Recording, wanted: Iterable[str], factor: float | None, widths: Widths) -> None:
    """Add forms for those of the wanted tensors that can be made of what is there."""
    forms = {name: derived(name, r.forms, factor, widths) for name in wanted}
    r.forms |= {name: form for name, form in forms.items() if form}


def _factor(one: Recording, other: Recording, config: Config | None) -> float | None:
    """The routed scaling factor: the config's, else what the weights of a token's experts sum to.

    Nothing is read unless one of the two has what is not scaled yet.
    """
    for spec in config.layers if config else ():
        if spec.moe:
            return spec.moe.scaling_factor
    if not any(name.endswith(".unscaled") for name in (*one.forms, *other.forms)):
        return None
    for r in (one, other):
        for name in r.forms:
            if split(name)[1] == "moe.weights" and (x := r.if_any(name, 2)) is not None:
                return float(x.sum(axis=-1, dtype=np.float64).mean())
    return None


def tolerance_of(*recordings: Recording) -> float:
    """The tolerance for a comparison: that of the least precise engine."""
    return max(TOLERANCES[recording.engine_dtype] for recording in recordings)


class _Ties:
    """Which rows of the layer at hand, and of those before it, a tie between experts has touched.

    `tied`: rows of this layer; `is_blind`: as in Choice.
    """

    def __init__(self) -> None:
        self.tied = self._unsure = np.zeros(0, np.intp)
        self.is_blind = False
        self._end: int | None = None  # the first row that a tie in an earlier layer has touched

    def enter(self, known: Choice | None) -> None:
        """Begin the next layer."""
        touched = [*self.tied.tolist(), *([] if self._end is None else [self._end])]
        self._end = min(touched, default=None)
        none = np.zeros(0, np.intp)
        self.tied = np.flatnonzero(known.tied) if known else none
        self._unsure = np.flatnonzero(known.unsure) if known else none
        self.is_blind = known is not None and known.is_blind

    def kept(self, rows: NDArray[np.integer]) -> Mask:
        """Which rows no tie in an earlier layer has touched."""
        return np.ones(len(rows), bool) if self._end is None else rows < self._end

    def kept_after(
        self, is_kept: Mask, rows: NDArray[np.integer], departs: Callable[[], Mask]
    ) -> Mask:
        """Which of these are left behind the router: a row that departs where nobody recorded its
        experts is a tie too, unless too many are.
        """
        is_kept = is_kept & ~np.isin(rows, self.tied)
        guessed = is_kept & np.isin(rows, self._unsure)
        if guessed.any():
            guessed &= departs()
        if not too_many(guessed):
            is_kept &= ~guessed
            self.tied = np.union1d(self.tied, rows[guessed])
        return is_kept


def compare_all(
    ours: Recording,
    theirs: Recording,
    names: Iterable[str],
    tolerance: float,
    mtp: Collection[int] = (),
    grows: bool = False,
    judge: Judge = lambda n, tolerance: None,
) -> Iterator[Comparison]:
    """Compare tensors of one forward pass that both can give, one pair in memory at a time.

    `names` in the model's order; `mtp`: numbers of the MTP layers, which may have more rows than
    their depth leaves of the prompt: those that only one recording has do not count. `judge`: what
    is known of the experts of a layer, by its number and tolerance. Where a tie between experts
    fell otherwise, the token's row is left out of what follows in its layer, and so is a row that
    departs where nobody recorded its experts; after that layer every row from that token on. With
    `grows` the tolerance is for one layer, and what n layers compute has sqrt(n) of it: rounding
    errors that do not know of each other add up like that. What is not finite in theirs departs.
    """
    one, passed = tolerance, 1  # layers
    layer, ties = None, _Ties()
    depths = {n: n - min(mtp) + 1 for n in mtp}
    for name in names:
        at, part = split(name)
        if at != layer:
            layer, passed = at, passed + 1 if at is None else at + 1
            tolerance = one * passed**0.5 if grows else one
            if at is not None:  # what follows the last layer looks at no other row
                ties.enter(judge(at, tolerance))
        a = ours.array(name)
        try:
            b = theirs.array(name)
        except NotFinite as error:
            nan = Comparison(name, a.shape, np.inf, np.inf, 0.0, None, False, tolerance)
            yield nan._replace(note=error.what)
            continue
        depth = None if at is None else depths.get(at)
        least = None if depth is None else max(1, (theirs.rows or ours.rows or 0) - depth)
        a, b = _common_rows(name, a, b, least)
        same = fitted(b, a.shape)
        if same is None or is_weight(name) or not a.ndim:
            yield compare(name, a, b, tolerance)
            continue
        axis = 1 if part.endswith(".probs") else 0
        first = (theirs.rows or 1) - 1 if name == "lm_head" and len(a) == 1 else 0
        rows = np.arange(first, first + a.shape[axis])  # [rows]
        is_kept = ties.kept(rows)
        if part in AFTER_IDS:
            is_kept = ties.kept_after(is_kept, rows, partial(departing, name, a, same, tolerance))
        left_out = int((~is_kept).sum())
        if left_out:
            a, same, rows = a.compress(is_kept, axis), same.compress(is_kept, axis), rows[is_kept]
        if part == "moe.margin":
            gate = ours.if_any(name.replace("margin", "gate"), 2)
            c = compare(name, a, same, tolerance, score_scale(gate))
        elif part == "moe.ids":
            c = _compare_choice(name, a, same, np.isin(rows, ties.tied), tolerance, ties.is_blind)
        else:
            c = _by_row(compare(name, a, same, tolerance), a, same, rows)
        if c.first is not None:
            place = list(c.first.place)
            place[axis] = int(rows[place[axis]])
            c = c._replace(first=c.first._replace(place=tuple(place)))
        yield c._replace(left_out=c.left_out + left_out)


def _by_row(c: Comparison, a: Array, b: Array, rows: NDArray[np.integer]) -> Comparison:
    """The comparison, and what it says of the first row that is off by its own length."""
    errors = row_errors(c.name, a, b) if c.is_match else None
    limit = ROWS * c.tolerance
    if errors is None or errors.max() <= limit:
        return c
    n = int(np.argmax(errors > limit))
    note = f"row {rows[n]}: error {errors[n]:.1e} of its own length, tolerance {limit:.2g}"
    return c._replace(is_match=False, note=note)


def _compare_choice(
    name: str, a: Array, b: Array, tied: Mask, tolerance: float, is_blind: bool
) -> Comparison:
    """Compare the experts [T, A] that the routers chose, but those of rows that are ties."""
    c = compare(name, a, b, tolerance)
    if a.ndim != 2 or c.is_match:
        return c
    a, b = np.sort(a, axis=-1), np.sort(b, axis=-1)
    is_wrong = (a != b) & ~tied[:, None]  # [T, A]
    if not is_wrong.any():
        return c._replace(first=None, is_match=True, left_out=int(tied.sum()))
    count = int(is_wrong.any(axis=-1).sum())
    note = f"wrong router: {count} of {len(a)} tokens have other experts, not at a tie"
    note += " with any bias of the router that our choices allow" if is_blind else ""
    t, n = (int(i) for i in np.argwhere(is_wrong)[0])
    return c._replace(first=First((t, n), int(a[t, n]), int(b[t, n])), note=note)


def _common_rows(name: str, a: Array, b: Array, least: int | None) -> tuple[Array, Array]:
    """Both without rows that only one has: the last of an MTP layer, all but the last of logits.

    `least`: the rows that an MTP layer must have in both; None in a main layer.
    """
    if not a.ndim or not b.ndim or is_weight(name):
        return a, b
    if name == "lm_head" and 1 in (len(a), len(b)):  # engines that only want the next token
        return a[-1:], b[-1:]
    are_probs = name.endswith(".probs") and a.ndim == b.ndim == 3
    rows = min(a.shape[2], b.shape[2]) if are_probs else min(len(a), len(b))
    if least is None or rows < least:
        return a, b
    return (a[:, :rows, :rows], b[:, :rows, :rows]) if are_probs else (a[:rows], b[:rows])
