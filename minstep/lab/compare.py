"""One pair of tensors -> how far they depart and whether that is rounding; then whole recordings.

Checked by: tests/test_compare.py
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from minstep.tap import Array

# By what an engine computed in: the largest error that is rounding, as a share of the tensor's
# largest value.
TOLERANCES = {"float64": 1e-10, "float32": 2e-5, "bfloat16": 3e-2, "float16": 4e-3}
CHUNK = 1 << 20  # elements in float64 at a time
ROUNDING = 1e-6  # of a float32 score between 0 and 2


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


class Flip(NamedTuple):
    """A token whose experts differ; `margin` is None where neither recording has it."""

    token: int
    ours: tuple[int, ...]
    theirs: tuple[int, ...]
    margin: float | None
    is_tie: bool


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
    if x.shape == shape or x.size != np.prod(shape):
        return x if x.shape == shape else None
    is_batched = _without_batch(x.shape) == _without_batch(shape)
    is_one_row = len(shape) > 0 and shape[0] == 1
    is_merged = x.shape[:1] == shape[:1] and min(x.ndim, len(shape)) == 2
    return x.reshape(shape) if is_batched or is_one_row or is_merged else None


def _without_batch(shape: tuple[int, ...]) -> tuple[int, ...]:
    return _without_batch(shape[1:]) if shape[:1] == (1,) else shape


def expert_flips(
    ours: NDArray[np.integer], theirs: NDArray[np.integer], margin: Array | None, tie: Array | float
) -> list[Flip]:
    """The tokens whose sets of experts [T, A] differ, and whether a tie explains it.

    `margin` [T]: the gap between the last chosen and the first rejected score of ours; `tie`: how
    large a gap rounding may bridge, one for all or [T].
    """
    a, b = np.sort(ours, axis=-1), np.sort(theirs, axis=-1)
    limits = np.broadcast_to(tie, len(a))
    flips = []
    for t in np.flatnonzero((a != b).any(axis=-1)):
        gap = None if margin is None else float(margin[t])
        is_tie = gap is not None and gap <= limits[t]
        sets = tuple(map(int, a[t])), tuple(map(int, b[t]))
        flips.append(Flip(int(t), *sets, gap, is_tie))
    return flips


def score_scale(gate: Array | None) -> float:
    """What errors of scores are relative to, by the router's logits `gate` [T, E], if known.

    An error e of the logits moves a sigmoid by at most e/4, and the gap between two by e/2.
    """
    return max(1.0, _largest(gate) if gate is not None and gate.size else 0.0) / 2


def tie_width(gate: Array | None, other: Array | None, tolerance: float) -> Array:
    """How large a gap between two scores rounding may bridge: for each token [T], or one for all.

    `gate` and `other`: our logits [T, E] and the other engine's. Where both are known the error
    that was seen counts, if it is less than the one that is allowed.
    """
    allowed = np.array(tolerance * score_scale(gate))
    if gate is None or other is None or gate.shape != other.shape:
        return allowed
    return np.minimum(allowed, np.abs(gate - other).max(axis=-1) / 2 + ROUNDING)  # [T]
