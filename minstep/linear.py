"""linear(x, W): the one door for every product with a weight, whatever the weight is stored as."""

from typing import Any, Protocol, TypeGuard

import numpy as np
from numpy.typing import DTypeLike, NDArray

from minstep.pages import used
from minstep.parallel import LARGE, each, scratch
from minstep.tap import Array

BLOCK = 1 << 21  # weight elements converted at a time: 8 MB of float32, which stay in cache


class StoredArray(Protocol):
    """An array-like that becomes float only when converted, such as a BF16Array."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, index: Any) -> "StoredArray": ...

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]: ...

    def into(self, out: NDArray[np.float32]) -> None:
        """Write the values into `out`, which has the same shape."""


Weight = NDArray[Any] | StoredArray


def linear(x: Array, weight: Weight) -> Array:
    """x @ weight.T, without a bias: no projection of this model has one.

    x [..., I] float32 or float64; weight [O, I], stored in any float type. Returns [..., O] in
    x's dtype. A weight of another dtype is converted a block of rows at a time, never as a whole;
    the blocks of a large weight are shared out to threads, and are the same for any number of them.
    Source: nn.Linear(bias=False) throughout modeling_step3p5.py.
    Checked by: tests/test_linear.py
    """
    outputs, inputs = weight.shape
    if is_ready(weight, x.dtype) and (weight.size < LARGE or not isinstance(weight, np.ndarray)):
        return x @ weight.T  # [..., O]
    rows = max(1, BLOCK // inputs)
    y = np.empty((*x.shape[:-1], outputs), x.dtype)  # [..., O]

    def multiply(start: int) -> None:
        stored = weight[start : start + rows]  # [B, I]
        np.matmul(x, ready(stored, x.dtype).T, out=y[..., start : start + rows])
        used(stored)

    for _ in each(multiply, zip(range(0, outputs, rows))):
        pass
    return y


def is_ready(weight: Weight, dtype: DTypeLike) -> TypeGuard[Array]:
    """Whether a weight computes in `dtype` as it is; one on a tape (see train/) is no ndarray."""
    # A stored array has no dtype, and None would be equal to float64.
    return hasattr(weight, "dtype") and weight.dtype == dtype


def ready(weight: Weight, dtype: DTypeLike) -> Array:
    """The weight in `dtype`, same shape: itself, or in memory that the thread's next call reuses.

    Source: measured, see docs/10-weights.md.
    """
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
