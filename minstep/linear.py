"""linear(x, W): the one door for every product with a weight, whatever the weight is stored as."""

from typing import Any, Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray

from minstep.tap import Array

BLOCK = 1 << 20  # weight elements converted at a time: 4 MB of float32 stays in cache


class StoredArray(Protocol):
    """An array-like that becomes float only when sliced and converted, such as a BF16Array."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, index: Any) -> "StoredArray": ...

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]: ...


Weight = NDArray[Any] | StoredArray


def linear(x: Array, weight: Weight) -> Array:
    """x @ weight.T, without a bias: no projection of this model has one.

    x [..., I] float32 or float64; weight [O, I], stored in any float type. Returns [..., O] in
    x's dtype. A weight of another dtype is converted in blocks of rows, never as a whole.
    Source: nn.Linear(bias=False) throughout modeling_step3p5.py.
    Checked by: tests/test_linear.py
    """
    if isinstance(weight, np.ndarray) and weight.dtype == x.dtype:
        return x @ weight.T  # [..., O]
    outputs, inputs = weight.shape
    rows = max(1, BLOCK // inputs)
    y = np.empty((*x.shape[:-1], outputs), x.dtype)  # [..., O]
    for start in range(0, outputs, rows):
        part = as_float(weight[start : start + rows], x.dtype)  # [B, I]
        y[..., start : start + rows] = x @ part.T  # [..., B]
    return y


def as_float(weight: Weight, dtype: DTypeLike) -> Array:
    """A stored weight as a plain array of `dtype`, same shape; no copy where it is one."""
    return np.asarray(weight, dtype=dtype)
