"""Reverse-mode differentiation of functions written in NumPy, the model's own among them.

A Variable stands where an array would stand. NumPy asks it, through __array_ufunc__ and
__array_function__, what each of its functions should do: it computes the value as NumPy would and
remembers how gradients go back. So the forward functions run on Variables as they are, and what
they compute is the same bit for bit.

Source: NumPy enhancement proposals 13 and 18 for the two protocols; reverse accumulation as in any
        text on automatic differentiation.
Differs: a tape that is a list somewhere needs to know when to begin; here each value knows what it
        came from, so several threads can each run a sequence of their own.
Checked by: tests/train/test_tape.py
"""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import zip_longest
from operator import attrgetter
from typing import Any, NoReturn, SupportsIndex

import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin

from minstep.tap import Array
from minstep.train.gradients import (
    ELEMENTWISE,
    RULES,
    STEPS,
    Part,
    Pull,
    Pulled,
    Rule,
    add_part,
    elementwise,
    item,
    replaced,
)

EVERY: dict[Any, Rule] = {ufunc: partial(elementwise, ufunc) for ufunc in ELEMENTWISE} | RULES


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

    What NumPy has no rule for in gradients.py is refused with a TypeError, and so is what would
    make a plain array of it, or write it into one: the gradient would be lost.
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
        if ufunc not in EVERY:
            return NotImplemented
        result = _recorded(EVERY[ufunc], inputs, {})
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
        if function not in EVERY:
            return NotImplemented
        return _recorded(EVERY[function], inputs, options)

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
