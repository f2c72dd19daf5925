"""Two recordings of one prompt, a pair of tensors at a time, in the model's order.

Checked by: tests/test_diff.py
"""

from collections.abc import Collection, Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from minstep.config import Config
from minstep.files import InputError
from minstep.lab.compare import (
    TOLERANCES,
    Comparison,
    First,
    Flip,
    compare,
    expert_flips,
    fitted,
    score_scale,
    tie_width,
)
from minstep.lab.forms import Widths, config_widths, derived, sibling_widths
from minstep.lab.names import is_weight, model_order, mtp_layers, split
from minstep.lab.recording import Recording
from minstep.tap import Array

AFTER_IDS = ("moe.weights.unscaled", "moe.weights", "moe.unscaled", "moe", "mlp", "")


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
            if split(name)[1] == "moe.weights":
                return float(r.array(name).sum(axis=-1, dtype=np.float64).mean())
    return None


def check_same_prompt(ours: Recording, theirs: Recording) -> None:
    """Raise InputError where the two were recorded from different prompts."""
    a, b, where = ours.tokens, theirs.tokens, f"{theirs.path}: was recorded from another prompt"
    if a is not None and b is not None and a != b:
        n = next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
        if n is None:
            raise InputError(f"{where}: {len(b)} tokens, expected {len(a)} as in {ours.path}")
        raise InputError(f"{where}: token {n} is {b[n]}, expected {a[n]} as in {ours.path}")
    if None not in (ours.rows, theirs.rows) and ours.rows != theirs.rows:
        raise InputError(f"{where}: {theirs.rows} rows, expected {ours.rows} as in {ours.path}")


def tolerance_of(*recordings: Recording) -> float:
    """The tolerance for a comparison: that of the least precise engine."""
    return max(TOLERANCES[recording.engine_dtype] for recording in recordings)


def compare_all(
    ours: Recording,
    theirs: Recording,
    names: Iterable[str],
    tolerance: float,
    mtp: Collection[int] = (),
    grows: bool = False,
) -> Iterator[Comparison]:
    """Compare tensors of one forward pass that both can give, one pair in memory at a time.

    `names` in the model's order; `mtp`: numbers of the MTP layers, whose rows past the shorter
    recording's end do not count. Where a tie between experts fell otherwise, the token's row is
    left out of what follows in its layer, and after that layer every row from that token on. With
    `grows` the tolerance is for one layer, and what n layers compute has sqrt(n) of it: rounding
    errors that do not know of each other add up like that.
    """
    one, passed = tolerance, 1  # layers
    layer: int | None = None
    end: int | None = None  # the first row that a tie in an earlier layer has touched
    flipped: list[int] = []  # rows that a tie in this layer has
    for name in names:
        at, part = split(name)
        if at != layer:
            end = min([*flipped, *([] if end is None else [end])], default=None)
            layer, flipped = at, []
            passed = passed + 1 if at is None else at + 1
            tolerance = one * passed**0.5 if grows else one
        a, b = ours.array(name), theirs.array(name)
        a, b = _common_rows(name, a, b, at in mtp)
        same = fitted(b, a.shape)
        if same is None or is_weight(name) or not a.ndim:
            yield compare(name, a, b, tolerance)
            continue
        axis = 1 if part.endswith(".probs") else 0
        first = (ours.rows or 1) - 1 if name == "lm_head" and len(a) == 1 else 0
        rows = np.arange(first, first + a.shape[axis])  # [rows]
        is_kept = rows < (first + len(rows) if end is None else end)
        if part in AFTER_IDS:
            is_kept &= ~np.isin(rows, flipped)
        left_out = int((~is_kept).sum())
        if left_out:
            a, same, rows = a.compress(is_kept, axis), same.compress(is_kept, axis), rows[is_kept]
        if part in ("moe.margin", "moe.ids"):
            c, flips = _compare_choice(name, a, same, rows, ours, theirs, tolerance)
            flipped = [int(rows[flip.token]) for flip in flips if flip.is_tie]
        else:
            c = compare(name, a, same, tolerance)
        if c.first is not None:
            place = list(c.first.place)
            place[axis] = int(rows[place[axis]])
            c = c._replace(first=c.first._replace(place=tuple(place)))
        yield c._replace(left_out=c.left_out + left_out)


def _compare_choice(
    name: str,
    a: Array,
    b: Array,
    rows: NDArray[np.integer],
    ours: Recording,
    theirs: Recording,
    tolerance: float,
) -> tuple[Comparison, list[Flip]]:
    """Compare the router's margins [T], or the experts [T, A] that it chose and how they differ."""
    at = name.rpartition(".")[0]
    gate, other = (_rows_of(r, f"{at}.gate", rows, 2) for r in (ours, theirs))
    width = tie_width(gate, other, tolerance)
    if name.endswith(".margin"):
        return compare(name, a, b, tolerance, score_scale(gate)), []
    margins = [_rows_of(r, f"{at}.margin", rows, 1) for r in (ours, theirs)]
    margin = margins[1] if margins[0] is None else margins[0]
    c = compare(name, a, b, tolerance)
    if a.ndim != 2:
        return c, []
    flips = expert_flips(a, b, margin, width)
    wrong = [flip for flip in flips if not flip.is_tie]
    if not wrong:
        return c._replace(first=None, is_match=True, left_out=len(flips)), flips
    flip = wrong[0]
    n = next(n for n, (x, y) in enumerate(zip(flip.ours, flip.theirs, strict=True)) if x != y)
    note = f"wrong router: {len(wrong)} of {len(a)} tokens have other experts, "
    limit = float(np.broadcast_to(width, len(a))[flip.token])
    note += (
        "and no margin was recorded that would tell a tie"
        if flip.margin is None
        else f"not at a tie: margin {flip.margin:.1e}, a tie is at most {limit:.1e}"
    )
    first = First((flip.token, n), flip.ours[n], flip.theirs[n])
    return c._replace(first=first, note=note), flips


def _rows_of(r: Recording, name: str, rows: NDArray[np.integer], axes: int) -> Array | None:
    """Some rows of a tensor that need not be there, nor of the shape expected."""
    if name not in r.forms or len(r.shape(name)) != axes:
        return None
    x = r.array(name)
    return x[rows] if len(rows) == 0 or rows.max() < len(x) else None


def _common_rows(name: str, a: Array, b: Array, is_mtp: bool) -> tuple[Array, Array]:
    """Both without rows that only one has: the last of an MTP layer, all but the last of logits."""
    if not a.ndim or not b.ndim or len(a) == len(b) or is_weight(name):
        return a, b
    if name == "lm_head" and 1 in (len(a), len(b)):  # engines that only want the next token
        return a[-1:], b[-1:]
    rows = min(len(a), len(b))
    return (a[:rows], b[:rows]) if is_mtp else (a, b)
