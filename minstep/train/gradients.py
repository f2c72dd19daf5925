"""What each NumPy function sends back: its value, and the gradient of each of its arguments.

A rule takes plain arrays and returns the value and one pull for each argument that may be on the
tape: a function from the gradient of the value to that of the argument. Nothing here knows of the
tape, and only the functions that the model and its loss call have a rule: any other is an error
there, never a gradient that is silently lost.

Source: the chain rule; each rule is checked against central differences.
Checked by: tests/train/test_gradients.py
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from minstep.tap import Array


class Part(NamedTuple):
    """The gradient of an argument of which only x[index] was read: zero everywhere else."""

    index: Any
    gradient: Array


Pull = Callable[[Array], Array | Part]
Pulled = tuple[Array, Sequence[Any]]  # the value; a pull, or a list of them, for each argument
Rule = Callable[..., Pulled]
Derivative = Callable[..., Array]  # of gradient, value and the arguments

# One derivative for each argument of an elementwise function: g is the gradient of its value y.
ELEMENTWISE: dict[np.ufunc, tuple[Derivative, ...]] = {
    np.add: (lambda g, y, a, b: g, lambda g, y, a, b: g),
    np.subtract: (lambda g, y, a, b: g, lambda g, y, a, b: -g),
    np.multiply: (lambda g, y, a, b: g * b, lambda g, y, a, b: g * a),
    np.divide: (lambda g, y, a, b: g / b, lambda g, y, a, b: -g * y / b),
    np.negative: (lambda g, y, a: -g,),
    np.exp: (lambda g, y, a: g * y,),
    np.log: (lambda g, y, a: g / a,),
    np.sqrt: (lambda g, y, a: g / (2 * y),),
    np.square: (lambda g, y, a: g * (2 * a),),
    # At 0 the slope is taken from above: with x >= 0 beside it, sigmoid's own slope comes out.
    np.absolute: (lambda g, y, a: np.where(a >= 0, g, -g),),
    np.minimum: (lambda g, y, a, b: g * (a <= b), lambda g, y, a, b: g * (a > b)),
}
# Steps have no slope anywhere: what they return is no longer on the tape.
STEPS = frozenset(
    (np.greater_equal, np.greater, np.less_equal, np.less, np.equal, np.argsort, np.isfinite)
)


def elementwise(ufunc: np.ufunc, *arguments: Any) -> Pulled:
    """A function of ELEMENTWISE; gradients are summed over the axes along which NumPy repeated."""
    y = ufunc(*arguments)

    def pull(derivative: Derivative, shape: tuple[int, ...]) -> Pull:
        return lambda g: summed(derivative(g, y, *arguments), shape)

    pairs = zip(ELEMENTWISE[ufunc], arguments, strict=True)
    return y, [pull(derivative, np.shape(argument)) for derivative, argument in pairs]


def summed(gradient: Array, shape: tuple[int, ...]) -> Array:
    """The gradient of an argument of `shape` that was repeated to the gradient's shape."""
    if gradient.shape == shape:
        return gradient
    extra = gradient.ndim - len(shape)
    repeated = [n + extra for n, size in enumerate(shape) if size != gradient.shape[n + extra]]
    return gradient.sum(axis=(*range(extra), *repeated)).reshape(shape)


def matmul(a: Array, b: Array) -> Pulled:
    """a [..., N, I] @ b [..., I, O]."""
    if min(np.ndim(a), np.ndim(b)) < 2:
        raise TypeError("matmul on a tape takes matrices, not vectors")
    return a @ b, (
        lambda g: summed(g @ b.swapaxes(-1, -2), a.shape),
        lambda g: summed(a.swapaxes(-1, -2) @ g, b.shape),
    )


def total(x: Array, axis: Any = None, keepdims: bool = False) -> Pulled:
    """x.sum()."""
    return x.sum(axis=axis, keepdims=keepdims), (lambda g: _spread(g, x, axis, keepdims),)


def mean(x: Array, axis: Any = None, keepdims: bool = False) -> Pulled:
    """x.mean()."""
    value = x.mean(axis=axis, keepdims=keepdims)
    share = np.asarray(value).size / x.size
    return value, (lambda g: _spread(g * share, x, axis, keepdims),)


def _spread(gradient: Array, x: Array, axis: Any, keepdims: bool) -> Array:
    """The gradient of a sum, for each of its terms."""
    if not keepdims and axis is not None:
        gradient = np.expand_dims(gradient, axis)
    return np.broadcast_to(gradient, x.shape)


def largest(x: Array, axis: int, keepdims: bool = False) -> Pulled:
    """x.max() over one axis; of several that are equally large, the first one has the slope."""

    def pull(g: Array) -> Part:
        where = np.expand_dims(x.argmax(axis=axis), axis)
        return Part(_along(where, axis), g if keepdims else np.expand_dims(g, axis))

    return x.max(axis=axis, keepdims=keepdims), (pull,)


def _along(indices: Array, axis: int) -> tuple[Array, ...]:
    """The index with which x[index] is np.take_along_axis(x, indices, axis)."""
    index: list[Array] = list(np.ix_(*map(np.arange, indices.shape)))
    index[axis] = indices
    return tuple(index)


def take_along_axis(x: Array, indices: Array, axis: int) -> Pulled:
    """np.take_along_axis: indices are no variable."""
    value = np.take_along_axis(x, indices, axis)
    return value, (lambda g: Part(_along(indices, axis), g),)


def where(condition: Array, a: Any, b: Any) -> Pulled:
    """np.where: the condition is no variable."""
    return np.where(condition, a, b), (
        None,
        lambda g: summed(np.where(condition, g, 0), np.shape(a)),
        lambda g: summed(np.where(condition, 0, g), np.shape(b)),
    )


def clip(x: Array, low: float, high: float) -> Pulled:
    """np.clip: no slope outside."""
    return np.clip(x, low, high), (lambda g: g * ((low <= x) & (x <= high)),)


def concatenate(arrays: Sequence[Array], axis: int = 0) -> Pulled:
    """np.concatenate: each array has its part of the gradient."""
    ends = np.cumsum([x.shape[axis] for x in arrays])

    def pull(start: int, end: int) -> Pull:
        return lambda g: g.swapaxes(0, axis)[start:end].swapaxes(0, axis)

    starts = [0, *ends[:-1]]
    return np.concatenate(arrays, axis), [
        [pull(start, end) for start, end in zip(starts, ends, strict=True)]
    ]


def reshape(x: Array, shape: tuple[int, ...]) -> Pulled:
    """x.reshape()."""
    return x.reshape(shape), (lambda g: g.reshape(x.shape),)


def transpose(x: Array, axes: Sequence[int] | None = None) -> Pulled:
    """x.transpose(); without axes they are reversed."""
    back = None if axes is None else np.argsort(np.mod(axes, x.ndim))
    return x.transpose(axes), (lambda g: g.transpose(back),)


def swapaxes(x: Array, a: int, b: int) -> Pulled:
    """x.swapaxes()."""
    return x.swapaxes(a, b), (lambda g: g.swapaxes(a, b),)


def item(x: Array, index: Any) -> Pulled:
    """x[index]."""
    return x[index], (lambda g: Part(index, g),)


def replaced(x: Array, index: Any, y: Array) -> Pulled:
    """x after x[index] = y, as a new array: what was there before has no slope left.

    Raises TypeError for an index other than slices, numbers, or an array of rows that differ.
    """
    if not (_is_basic(index) or (_is_rows(index) and _differ(index, len(x)))):
        raise TypeError("an assignment on a tape takes slices, numbers or rows that differ")
    value = x.copy()
    value[index] = y

    def pull(g: Array) -> Array:
        kept = g.copy()
        kept[index] = 0
        return kept

    return value, (pull, None, lambda g: summed(g[index], np.shape(y)))


def add_part(gradient: Array, part: Part) -> None:
    """gradient[index] += part, in place; what was read several times adds up."""
    index, added = part
    if _is_basic(index):
        gradient[index] += added
    elif _is_rows(index):
        order = np.argsort(index % len(gradient), kind="stable")
        rows, starts = np.unique(index[order] % len(gradient), return_index=True)
        # np.add.at is slower on whole rows.
        gradient[rows] += np.add.reduceat(added[order], starts, axis=0)
    else:
        np.add.at(gradient, index, added)


def _is_basic(index: Any) -> bool:
    """Whether an index reads nothing twice by its form alone: numbers, slices, None and `...`."""
    parts = index if isinstance(index, tuple) else (index,)
    return all(isinstance(i, (int, np.integer, slice, type(None), type(...))) for i in parts)


def _is_rows(index: Any) -> bool:
    return isinstance(index, np.ndarray) and index.ndim == 1 and index.dtype.kind in "iu"


def _differ(rows: Array, count: int) -> bool:
    return len(np.unique(rows % count)) == len(rows)


RULES: dict[Callable[..., Any], Rule] = {
    np.matmul: matmul,
    np.sum: total,
    np.mean: mean,
    np.max: largest,
    np.take_along_axis: take_along_axis,
    np.where: where,
    np.clip: clip,
    np.concatenate: concatenate,
    np.reshape: reshape,
    np.transpose: transpose,
    np.swapaxes: swapaxes,
}
