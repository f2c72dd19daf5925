"""Pairs of tensors, in the model's order -> how far each departs, and whether that is rounding.

Checked by: tests/parity/test_compare.py, tests/parity/test_diff.py
"""

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from minstep.errors import shown
from minstep.parity.engine_tensors import Recording
from minstep.parity.names import ENDS, is_weight
from minstep.parity.router_ties import Choice, Mask, score_scale, too_many
from minstep.store.stages import split
from minstep.tap import Array
from minstep.validation import NotFinite

# By what an engine computed in: the largest error that is rounding, as a share of the tensor's
# largest value.
TOLERANCES = {"float64": 1e-10, "float32": 2e-5, "bfloat16": 3e-2, "float16": 4e-3}
CHUNK = 1 << 20  # elements in float64 at a time
WIDE = 32  # columns from which on the length of a row says something
ROWS = 2.0  # times the tolerance: how far a row may be off, by its own length
MASSIVE = 8.0  # times the median column: columns that would hide all others
BY_ROW = ("self_attn.o_proj", "moe", "share_expert", "mlp", "")  # "": a layer's output

AFTER_IDS = "moe.weights.unscaled moe.weights moe.unscaled moe mlp model.norm lm_head".split()
AFTER_IDS += ENDS
STARTS = ("model.embed_tokens", "model.layers.0.input_layernorm")  # nothing of the port is in them
Judge = Callable[[int, float], Choice | None]


class First(NamedTuple):
    """The first element that departs: where it is, and both values."""

    place: tuple[int, ...]
    ours: float
    theirs: float


class Comparison(NamedTuple):
    """What came of one pair. Errors are shares of the largest value of ours.

    For sets of experts an error is the share of a token's experts that differ. `left_out` counts
    rows that were not compared, or sets that were not held against it, because a tie between
    experts fell otherwise. `note` says what the figures do not.
    """

    name: str
    shape: tuple[int, ...]
    max_error: float
    mean_error: float
    cosine: float
    first: First | None
    is_match: bool
    tolerance: float
    left_out: int = 0
    note: str = ""

    @property
    def is_empty(self) -> bool:
        """Whether every row was left out, so that a match says nothing."""
        return self.left_out > 0 and 0 in self.shape

    @property
    def reason(self) -> str:
        """Why it departs, in words."""
        error = f"error {self.max_error:.1e} of the largest value, tolerance {self.tolerance:.2g}"
        return self.note or error


def compare(
    name: str, ours: Array, theirs: Array, tolerance: float, scale: float | None = None
) -> Comparison:
    """Compare two tensors, any shape; ours is the reference.

    Errors are relative to the largest value of ours, or to `scale`. A batch axis of size 1 or
    merged heads are no difference; any other shape is a mismatch. Expert ids compare as sets.
    """
    same = fitted(theirs, ours.shape)
    if same is None:
        note = f"shape {list(ours.shape)} against {list(theirs.shape)}"
        return Comparison(name, ours.shape, np.inf, np.inf, 0.0, None, False, tolerance, note=note)
    if name.endswith(".moe.ids") and ours.ndim == 2:
        return _compare_sets(name, ours, same, tolerance)
    a, b = ours.reshape(-1), same.reshape(-1)
    chunks = [slice(n, n + CHUNK) for n in range(0, a.size, CHUNK)]
    largest = [max((_largest(x[c]) for c in chunks), default=0.0) for x in (a, b)]
    scale = scale or largest[0] or largest[1] or 1.0
    unit = max(largest) or 1.0  # squares of the largest values might overflow
    total = worst = dot = norm_a = norm_b = 0.0
    first: First | None = None
    for c in chunks:
        x, y = a[c].astype(np.float64), b[c].astype(np.float64)
        error = np.abs(x - y) / scale
        total, worst = total + float(error.sum()), max(worst, float(error.max()))
        if first is None and worst > tolerance:
            n = int(np.argmax(error > tolerance))
            index = np.unravel_index(c.start + n, ours.shape)
            first = First(tuple(int(i) for i in index), float(x[n]), float(y[n]))
        x, y = x / unit, y / unit
        dot, norm_a, norm_b = dot + float(x @ y), norm_a + float(x @ x), norm_b + float(y @ y)
    norm = np.sqrt(norm_a) * np.sqrt(norm_b)
    cosine = min(1.0, float(dot / norm)) if norm else float(norm_a == norm_b)
    mean = total / max(1, a.size)
    return Comparison(name, ours.shape, worst, mean, cosine, first, first is None, tolerance)


def _largest(x: Array) -> float:
    return float(np.abs(x.astype(np.float64)).max())


def _compare_sets(name: str, ours: Array, theirs: Array, tolerance: float) -> Comparison:
    """Sets of experts [T, A]: the cosine is that of the sets written as zeros and ones."""
    a, b = np.sort(ours, axis=-1), np.sort(theirs, axis=-1)
    shared = np.array([len(np.intersect1d(x, y)) for x, y in zip(a, b, strict=True)])  # [T]
    error = 1 - shared / max(1, a.shape[-1])
    first = None
    if error.any():
        index = tuple(int(i) for i in np.argwhere(a != b)[0])
        first = First(index, int(a[index]), int(b[index]))
    mean = float(error.mean()) if error.size else 0.0
    worst = float(error.max(initial=0.0))
    return Comparison(name, a.shape, worst, mean, 1 - mean, first, first is None, tolerance)


def fitted(x: Array, shape: tuple[int, ...]) -> Array | None:
    """x in another shape where only axes of size 1 in front, or merged heads, differ; else None."""
    if x.shape == shape or x.size != math.prod(shape):
        return x if x.shape == shape else None
    is_batched = _without_batch(x.shape) == _without_batch(shape)
    is_one_row = len(shape) > 0 and shape[0] == 1
    is_merged = x.shape[:1] == shape[:1] and min(x.ndim, len(shape)) == 2
    return x.reshape(shape) if is_batched or is_one_row or is_merged else None


def _without_batch(shape: tuple[int, ...]) -> tuple[int, ...]:
    return _without_batch(shape[1:]) if shape[:1] == (1,) else shape


def row_errors(name: str, ours: Array, theirs: Array) -> Array | None:
    """How far each row [T] is off as a share of its own length; None for what has no such rows.

    One large row hides errors in all others from `compare`, and one large column, as residual
    streams have them, those in all others: such columns are left out here.
    """
    if split(name)[1] not in BY_ROW or ours.ndim != 2 or ours.shape[1] < WIDE or not ours.size:
        return None
    largest = np.maximum(ours.max(axis=0), -ours.min(axis=0))
    kept = largest <= MASSIVE * np.median(largest)
    errors, unit = np.empty(len(ours)), float(largest.max()) or 1.0  # whose square is a number
    for start in range(0, len(ours), step := max(1, CHUNK // ours.shape[1])):
        x, y = (z[start : start + step, kept].astype(np.float64) / unit for z in (ours, theirs))
        length = np.linalg.norm(x, axis=1)
        errors[start : start + step] = np.linalg.norm(x - y, axis=1) / np.where(length, length, 1)
    return errors


def departing(name: str, ours: Array, theirs: Array, tolerance: float) -> Array:
    """Which rows [T] of two tensors [T, ...] of one shape depart, by any element or as a whole."""
    x, y = (z.reshape(len(z), -1).astype(np.float64) for z in (ours, theirs))
    away = np.abs(x - y).max(axis=1, initial=0.0) > tolerance * (_largest(x) if x.size else 1.0)
    errors = row_errors(name, ours, theirs)
    return away if errors is None else away | (errors > ROWS * tolerance)


def tolerance_of(*recordings: Recording) -> float:
    """The tolerance for a comparison: that of the least precise engine."""
    return max(TOLERANCES[recording.engine_dtype] for recording in recordings)


class _Ties:
    """Which rows of the layer at hand, and of those before it, a tie between experts has touched.

    `tied`: rows of this layer; `lacks`: as in Choice.
    """

    def __init__(self) -> None:
        self.tied = self._unsure = np.zeros(0, np.intp)
        self.lacks = ""
        self._end: int | None = None  # the first row that a tie in an earlier layer has touched

    def enter(self, known: Choice | None) -> None:
        """Begin the next layer."""
        touched = [*self.tied.tolist(), *([] if self._end is None else [self._end])]
        self._end = min(touched, default=None)
        none = np.zeros(0, np.intp)
        self.tied = np.flatnonzero(known.tied) if known else none
        self._unsure = np.flatnonzero(known.unsure) if known else none
        self.lacks = known.lacks if known else ""

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
            c = _compare_choice(name, a, same, np.isin(rows, ties.tied), tolerance, ties.lacks)
        else:
            c = _by_row(compare(name, a, same, tolerance), a, same, rows)
            if part in AFTER_IDS and ties.lacks and not ties.tied.size and not c.is_match:
                c = c._replace(note=f"{c.reason}, perhaps after a tie ({ties.lacks})")
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
    name: str, a: Array, b: Array, tied: Mask, tolerance: float, lacks: str
) -> Comparison:
    """Compare the experts [T, A] that the routers chose, but those of rows that are ties.

    `lacks`: what is missing to tell a tie from a wrong router; then no row is known to be one.
    """
    c = compare(name, a, b, tolerance)
    if a.ndim != 2 or c.is_match:
        return c
    a, b = np.sort(a, axis=-1), np.sort(b, axis=-1)
    is_wrong = (a != b) & ~(tied & (not lacks))[:, None]  # [T, A]
    if not is_wrong.any():
        return c._replace(first=None, is_match=True, left_out=int(tied.sum()))
    count = int(is_wrong.any(axis=-1).sum())
    note = f"{count} of {len(a)} tokens have other experts"
    if lacks:
        note += f", at a tie or by a wrong router ({lacks})"
    else:
        note = f"wrong router: {note}, not at a tie"
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


def comparison_table(rows: Sequence[Comparison]) -> str:
    """One line for each tensor: name, shape, errors, cosine, verdict."""
    names = [shown(row.name) for row in rows]
    width = max(map(len, names))
    shapes = [str(list(row.shape)) for row in rows]
    wide = max(map(len, shapes))
    lines = [f"{'tensor':{width}}  {'shape':{wide}}  max error  mean error    cosine  verdict"]
    for row, name, shape in zip(rows, names, shapes, strict=True):
        verdict = "not compared" if row.is_empty else "ok" if row.is_match else "departs"
        if row.left_out:
            verdict += f", {row.left_out} rows left out"
        figures = f"{row.max_error:9.1e}  {row.mean_error:10.1e}  {row.cosine:8.6f}"
        if row.is_empty:
            figures = f"{'-':>9}  {'-':>10}  {'-':>8}"
        lines.append(f"{name:{width}}  {shape:{wide}}  {figures}  {verdict}")
    return "\n".join(lines)


def describe(row: Comparison) -> str:
    """One line on a tensor that departs: its name, the error and the first element."""
    line = f"{shown(row.name)}: {row.reason}"
    if row.first is not None:
        place, ours, theirs = row.first
        line += f", first at {list(place)}: {ours:.6g} against {theirs:.6g}"
    return line + (": perhaps another prompt or other weights" if row.name in STARTS else "")


def row_json(row: Comparison) -> dict[str, Any]:
    """One comparison as a JSON object."""
    errors = {"max_error": row.max_error, "mean_error": row.mean_error}
    return {
        "name": row.name,
        "shape": list(row.shape),
        **{key: x if math.isfinite(x) else None for key, x in errors.items()},
        "cosine": row.cosine,
        "match": row.is_match,
        "compared": not row.is_empty,
        "tolerance": row.tolerance,
        "first": row.first and dict(zip(("index", "ours", "theirs"), row.first, strict=True)),
        "left_out": row.left_out,
        "note": row.note,
    }
