"""One pair of tensors -> how far they depart, and whether that is rounding.

Checked by: tests/parity/test_compare.py
"""

import math
from typing import NamedTuple

import numpy as np

from minstep.store.stages import split
from minstep.tap import Array

# By what an engine computed in: the largest error that is rounding, as a share of the tensor's
# largest value.
TOLERANCES = {"float64": 1e-10, "float32": 2e-5, "bfloat16": 3e-2, "float16": 4e-3}
CHUNK = 1 << 20  # elements in float64 at a time
WIDE = 32  # columns from which on the length of a row says something
ROWS = 2.0  # times the tolerance: how far a row may be off, by its own length
MASSIVE = 8.0  # times the median column: columns that would hide all others
BY_ROW = ("self_attn.o_proj", "moe", "share_expert", "mlp", "")  # "": a layer's output


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
