"""Reverse-mode differentiation of functions written in NumPy, the model's own among them.

A Variable stands where an array would stand. NumPy asks it, through __array_ufunc__ and
__array_function__, what each of its functions should do: it computes the value as NumPy would and
remembers how gradients go back. So the forward functions run on Variables as they are, and what
they compute is the same bit for bit.

A rule takes plain arrays and returns the value and one pull for each argument that may be on the
tape: a function from the gradient of the value to that of the argument. Only the functions that the
model and its loss call have a rule: any other is an error, never a gradient that is silently lost.

Source: NumPy enhancement proposals 13 and 18 for the two protocols; reverse accumulation as in any
        text on automatic differentiation. Each rule is checked against central differences.
Differs: a tape that is a list somewhere needs to know when to begin; here each value knows what it
        came from, so several threads can each run a sequence of their own.
Checked by: tests/train/test_tape.py, tests/train/test_gradients.py
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import zip_longest
from operator import attrgetter
from typing import Any, NamedTuple, NoReturn, SupportsIndex

import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin

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


RULES: dict[Any, Rule] = {
    **{ufunc: partial(elementwise, ufunc) for ufunc in ELEMENTWISE},
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


class Node:
    """Where a value came from: the nodes it was computed from, each with the way back to it."""

    __slots__ = ("gradient", "height", "links", "owns", "shape")

    def __init__(self, shape: tuple[int, ...], links: list[tuple["Node", Pull]]) -> None:
        self.shape = shape
        self.links: list[tuple[Node, Pull]] | None = links  # None once a gradient has gone back
        self.height: int = 1 + max((node.height for node, _ in links), default=0)
        self.gradient: Array | None = None
        self.owns = False  # whether the gradient's memory is nobody else's

    def receive(self, added: Array | Part) -> None:
        """Add what came back from one use of the value."""
        if isinstance(added, Part):
            if self.gradient is None:
                self.gradient, self.owns = np.zeros(self.shape, added.gradient.dtype), True
            self._own()
            add_part(self.gradient, added)
        elif self.gradient is None:
            self.gradient = added
        else:
            self._own()
            self.gradient += added

    def _own(self) -> None:
        if not self.owns and self.gradient is not None:
            self.gradient, self.owns = self.gradient.copy(), True


class Variable(NDArrayOperatorsMixin):
    """An array on the tape. Its values are never written to: an assignment makes new ones.

    What has no rule in RULES is refused with a TypeError, and so is what would make a plain array
    of it, or write it into one: the gradient would be lost.
    """

    __slots__ = ("node", "value")

    def __init__(self, value: Array, node: Node | None = None) -> None:
        self.value = value
        self.node = Node(np.shape(value), []) if node is None else node

    @property
    def gradient(self) -> Array | None:
        """After `backward`, for a variable that nothing was computed into; None if it had no part.

        In the shape and dtype of the value. It may be read-only, or another variable's as well.
        """
        return self.node.gradient

    @property
    def shape(self) -> tuple[int, ...]:
        """The value's shape."""
        return np.shape(self.value)

    @property
    def dtype(self) -> np.dtype[Any]:
        """The value's dtype."""
        return self.value.dtype

    @property
    def size(self) -> int:
        """The number of the value's elements."""
        return self.value.size

    def __len__(self) -> int:
        return len(self.value)

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **options: Any) -> Any:
        out = options.pop("out", (None,))[0]
        if method != "__call__" or options or not (out is None or isinstance(out, Variable)):
            return NotImplemented
        if ufunc in STEPS:
            return ufunc(*map(_value, inputs))
        if ufunc not in RULES:
            return NotImplemented
        result = _recorded(RULES[ufunc], inputs, {})
        if out is None:
            return result
        if (result.shape, result.dtype) != (out.shape, out.dtype):
            raise TypeError(f"{ufunc.__name__} in place would change the shape or dtype")
        out.value, out.node = result.value, result.node  # x += y is a new value under an old name
        return out

    def __array_function__(self, function: Any, types: Any, inputs: Any, options: Any) -> Any:
        if function in STEPS:
            return function(*map(_value, inputs), **options)
        if function is np.zeros_like:
            return Variable(np.zeros_like(*map(_value, inputs), **options))
        if function not in RULES:
            return NotImplemented
        return _recorded(RULES[function], inputs, options)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NoReturn:
        raise TypeError("a Variable cannot become a plain array: its gradient would be lost")

    def __bool__(self) -> NoReturn:
        raise TypeError("a Variable is neither true nor false: a branch has no gradient")

    def __getitem__(self, index: Any) -> "Variable":
        return _recorded(item, (self, index), {})

    def __setitem__(self, index: Any, y: Any) -> None:
        new = _recorded(replaced, (self, index, y), {})
        self.value, self.node = new.value, new.node

    def sum(self, axis: Any = None, keepdims: bool = False) -> Any:
        """As of an array, like the methods below."""
        return np.sum(self, axis=axis, keepdims=keepdims)

    def mean(self, axis: Any = None, keepdims: bool = False) -> Any:
        """np.mean."""
        return np.mean(self, axis=axis, keepdims=keepdims)

    def max(self, axis: int, keepdims: bool = False) -> Any:
        """np.max."""
        return np.max(self, axis=axis, keepdims=keepdims)

    def reshape(self, *shape: Any) -> Any:
        """np.reshape, its shape as one tuple or as several numbers."""
        return np.reshape(self, shape[0] if isinstance(shape[0], tuple) else shape)

    def transpose(self, *axes: SupportsIndex) -> Any:
        """np.transpose."""
        return np.transpose(self, axes or None)

    def swapaxes(self, a: int, b: int) -> Any:
        """np.swapaxes."""
        return np.swapaxes(self, a, b)

    @property
    def T(self) -> Any:
        """The value with its axes reversed."""
        return self.transpose()


def _value(x: Any) -> Any:
    """The plain array of a variable, or of each in a sequence; anything else as it is."""
    if isinstance(x, Variable):
        return x.value
    return type(x)(map(_value, x)) if type(x) in (list, tuple) else x


def _recorded(rule: Callable[..., Pulled], inputs: Any, options: dict[str, Any]) -> Variable:
    """Apply a rule to the values, and keep the way back to each variable among the inputs."""
    value, pulls = rule(*map(_value, inputs), **options)
    return Variable(value, Node(np.shape(value), list(_links(inputs, pulls))))


def _links(inputs: Any, pulls: Any) -> Iterator[tuple[Node, Pull]]:
    """The node of each variable, with its pull; arrays in a sequence have a list of pulls."""
    for x, pull in zip_longest(inputs, pulls):
        if isinstance(x, Variable):
            if pull is None:
                raise TypeError("a Variable stands where no gradient can be taken")
            yield x.node, pull
        elif isinstance(pull, list):
            yield from _links(x, pull)


def backward(loss: Variable) -> None:
    """Send the gradient of `loss`, one number, back to all that it was computed from.

    Variables that were given, not computed, then have `gradient`. What lies between is let go of on
    the way: a loss goes back once, and what two losses share has to be computed for each. Raises
    ValueError for a loss of several numbers, and for one that was let go of.
    """
    if loss.size != 1:
        raise ValueError(f"the loss has shape {list(loss.shape)}, expected one number")
    nodes = {loss.node: None}  # in the order of the walk, which a set would not keep
    waiting = [loss.node]
    while waiting:
        links = waiting.pop().links
        if links is None:
            raise ValueError("the loss, or a part of it, has gone back already")
        for node, _ in links:
            if node not in nodes:
                nodes[node] = None
                waiting.append(node)
    loss.node.receive(np.ones(loss.shape, loss.dtype))
    for node in sorted(nodes, key=attrgetter("height"), reverse=True):  # users before the used
        if node.links:
            for source, pull in node.links:
                assert node.gradient is not None
                source.receive(pull(node.gradient))
            node.gradient, node.links = None, None
