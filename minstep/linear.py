"""linear(x, W): the one door for every product with a weight, whatever the weight is stored as."""

from typing import Any, Protocol, TypeGuard

import numpy as np
from numpy.typing import DTypeLike, NDArray

from minstep.fast.pages import SMALL, check, used
from minstep.fast.threads import LARGE, each, scratch
from minstep.tap import Array

BLOCK = 5 << 18  # weight elements converted at a time: 5 MB of float32, which stay in cache
FEW = 8  # rows of x up to which converting a stored weight takes longer than multiplying


class StoredArray(Protocol):
    """An array-like that becomes float only when converted, such as a BF16Array."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, index: Any) -> "StoredArray": ...

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]: ...

    def into(self, out: NDArray[np.float32]) -> None:
        """Write the values into `out`, which has the same shape."""

    def times(self, x: NDArray[np.float32], out: NDArray[np.float32]) -> None:
        """Write x @ self.T, for few rows of x [..., I], into `out` [..., O]."""


Weight = NDArray[Any] | StoredArray


def linear(x: Array, weight: Weight) -> Array:
    """x @ weight.T, without a bias: no projection of this model has one.

    x [..., I] float32 or float64; weight [..., O, I], stored in any float type: one matrix, or a
    stack of them, ready to compute with, for as many matrices in x. Returns [..., O] in x's dtype.
    A weight of another dtype is converted a block of rows at a time, never as a whole; the blocks
    of a large product are shared out to threads, and are the same for any number of them.
    Source: nn.Linear(bias=False) throughout modeling_step3p5.py.
    Checked by: tests/model/test_linear.py
    """
    outputs, inputs = weight.shape[-2:]
    count, size = x.size // inputs, outputs * inputs
    if size > SMALL:
        check(weight)
    is_small = size * (1 + count // 16) < LARGE  # sixteen rows cost as much as reading the weight
    is_whole = is_small or len(weight.shape) > 2 or not isinstance(weight, np.ndarray)
    if is_whole and is_ready(weight, x.dtype):
        return x @ weight.swapaxes(-1, -2)  # [..., O]
    blocks = 1 if is_small else 2 * -(-size // (2 * BLOCK))  # of equal size, so that two threads
    rows = -(-outputs // blocks)  # end together
    y = np.empty((*x.shape[:-1], outputs), x.dtype)  # [..., O]
    is_few = count <= FEW and x.dtype == np.float32

    def multiply(start: int) -> None:
        stored, out = weight[start : start + rows], y[..., start : start + rows]  # [B, I], [..., B]
        if is_few and not isinstance(stored, np.ndarray):
            stored.times(x, out)
        else:
            np.matmul(x, ready(stored, x.dtype).T, out=out)
        used(stored)

    for _ in each(multiply, zip(range(0, outputs, rows))):
        pass
    return y


def is_ready(weight: Weight, dtype: DTypeLike) -> TypeGuard[Array]:
    """Whether a weight computes in `dtype` as it is; one on a tape (see train/) is no ndarray."""
    # A stored array has no dtype, and None would be equal to float64.
    return hasattr(weight, "dtype") and weight.dtype == dtype


def ready(weight: Weight, dtype: DTypeLike) -> Array:
    """The weight in `dtype`: itself, or a copy in memory that the thread's next call reuses."""
    if is_ready(weight, dtype):
        return weight
    out = scratch(weight.shape, dtype)  # [O, I] float32 or float64
    if isinstance(weight, np.ndarray):
        np.copyto(out, weight, casting="same_kind")
    elif out.dtype == np.float32:
        weight.into(out)
    else:
        np.copyto(out, ready(weight, np.float32))
    return out


def as_float(weight: Weight, dtype: DTypeLike) -> Array:
    """A stored weight as a plain array of `dtype`, same shape; no copy where it is one."""
    return weight if is_ready(weight, dtype) else np.asarray(weight, dtype=dtype)
