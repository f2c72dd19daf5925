"""Counts what the model's own code multiplies and reads, at the level of NumPy's array protocols.

A Counted is an ndarray that stays one through views, copies and every NumPy function. Each product
of matrices adds 2*m*k*n to its counter, under the weight that is in it, or under none: scores and
mixed values. Of each weight a mask of its shape keeps which elements were read, by a product, by
arithmetic, or by an index that copies. How the code groups its work makes no difference: a product
may be a loop of small ones or one of stacks, and an expert may be copied before it is used.
Source: NumPy enhancement proposals 13 and 18.
"""

import math
from collections import Counter
from typing import Any

import numpy as np

from minstep.config import Config
from minstep.model import ModelWeights
from minstep.store.random_checkpoint import random_tensors
from minstep.weights import assemble

PRODUCTS = {np.matmul, np.vecdot, np.matvec, np.vecmat} if hasattr(np, "matvec") else {np.matmul}
REFUSED = {np.inner, np.tensordot, np.vdot, np.outer, np.kron}  # products that nobody uses yet
NOTHING = ""  # the name of what is no weight


class Tally:
    """FLOPs by the weight's name, and which elements of each weight were read."""

    def __init__(self) -> None:
        self.flops: Counter[str] = Counter()
        self.read: dict[str, np.ndarray] = {}
        self.start: dict[str, int] = {}  # where in memory each weight begins

    def weight(self, name: str, x: np.ndarray) -> "Counted":
        """A weight whose use is counted."""
        counted = np.ascontiguousarray(x).view(Counted)
        counted.tally, counted.name = self, name
        self.read[name] = np.zeros(x.shape, bool)
        self.start[name] = counted.ctypes.data
        return counted

    def mark(self, x: "Counted") -> None:
        """The elements of a view of a weight have been read; a copy was marked when it was made."""
        mask, offset = self.read.get(x.name), x.ctypes.data - self.start.get(x.name, 0)
        if mask is None or not 0 <= offset < mask.size * x.itemsize or not x.size:
            return
        steps = [step // x.itemsize for step in x.strides]
        np.ndarray(x.shape, bool, mask, offset // x.itemsize, steps)[...] = True

    def elements(self, name: str) -> int:
        """How many elements of a weight were read."""
        return int(self.read[name].sum())


class Counted(np.ndarray):
    """An array whose use is counted: a weight, or what came from one."""

    tally: Tally
    name: str

    def __array_finalize__(self, source: Any) -> None:
        self.tally = getattr(source, "tally", None)  # type: ignore[assignment]
        self.name = getattr(source, "name", NOTHING)

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **options: Any) -> Any:
        counted = [x for x in inputs if isinstance(x, Counted)]
        for x in counted:
            self.tally.mark(x)
        outs = tuple(map(_plain, options.pop("out", ())))
        if outs:
            options["out"] = outs
        result = getattr(ufunc, method)(*map(_plain, inputs), **options)
        if ufunc in PRODUCTS:
            self._product(inputs, 2 * result.size * np.shape(inputs[0])[-1])
        return _counted(result, self.tally)

    def __array_function__(self, function: Any, types: Any, inputs: Any, options: Any) -> Any:
        assert function not in REFUSED, f"count {function.__name__} before it is used"
        for x in _inside(inputs):
            self.tally.mark(x)
        result = function(*map(_bare, inputs), **{k: _bare(v) for k, v in options.items()})
        if function is np.dot:
            self._product(inputs, 2 * np.size(result) * np.shape(inputs[0])[-1])
        elif function is np.einsum:
            self._product(inputs[1:], 2 * _indices(*inputs))
        names = {x.name for x in _inside(inputs)}
        return _counted(result, self.tally, names.pop() if len(names) == 1 else NOTHING)

    def _product(self, inputs: Any, flops: int) -> None:
        names = [x.name for x in _inside(tuple(inputs)) if x.name]
        self.tally.flops[names[0] if names else NOTHING] += flops

    def __getitem__(self, index: Any) -> Any:
        found = super().__getitem__(_bare(index))
        if not isinstance(found, Counted) or self.name not in self.tally.read:
            return found
        if not np.may_share_memory(
            _plain(found), _plain(self)
        ):  # a copy: what was copied has been read
            mask, offset = self.tally.read[self.name], self.ctypes.data
            steps = [step // self.itemsize for step in self.strides]
            first = (offset - self.tally.start[self.name]) // self.itemsize
            if 0 <= first < mask.size:
                np.ndarray(self.shape, bool, mask, first, steps)[_bare(index)] = True
        return found


def _indices(letters: str, *arrays: Any) -> int:
    """How many products of numbers an einsum of two arrays has: one for each set of indices."""
    names = letters.split("->")[0].split(",")
    assert len(arrays) == 2 and "." not in letters, f"count einsum {letters} before it is used"
    sizes: dict[str, int] = {}
    for indices, x in zip(names, arrays, strict=True):
        sizes |= dict(zip(indices, x.shape, strict=True))
    return math.prod(sizes.values())


def _plain(x: Any) -> Any:
    return x.view(np.ndarray) if isinstance(x, Counted) else x


def _bare(x: Any) -> Any:
    """Plain arrays, in sequences too."""
    return type(x)(map(_bare, x)) if type(x) in (tuple, list) else _plain(x)


def _inside(x: Any) -> list[Counted]:
    if isinstance(x, Counted):
        return [x]
    return [y for item in x for y in _inside(item)] if type(x) in (tuple, list) else []


def _counted(x: Any, tally: Tally, name: str = NOTHING) -> Any:
    """Float arrays stay counted; numbers and indices need not be."""
    if type(x) in (tuple, list):
        return type(x)(_counted(y, tally, name) for y in x)
    if not isinstance(x, np.ndarray) or x.dtype.kind != "f":
        return x
    x = x.view(Counted)
    x.tally, x.name = tally, name
    return x


def counted_model(config: Config, seed: int = 0) -> tuple[ModelWeights, Tally]:
    """Random float32 weights that are counted, and the tally; a tied head is the embedding."""
    tally = Tally()
    drawn = dict(random_tensors(config, np.random.default_rng(seed)))
    held = {name: tally.weight(name, np.asarray(x)) for name, x in drawn.items()}
    return assemble(config, lambda name, _: held[name]), tally
