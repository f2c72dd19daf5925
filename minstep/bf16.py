"""bfloat16 without a NumPy dtype for it: the upper half of a float32, kept as uint16."""

from typing import Any

import numpy as np
from numpy.typing import NDArray


class BF16Array:
    """A stored bfloat16 tensor: it slices like an array and turns to float only when converted.

    `bits` is uint16 of any shape, often a view into a memory map. np.asarray(a, dtype=np.float32)
    converts exactly; so does float64.
    Checked by: tests/test_linear.py
    """

    def __init__(self, bits: NDArray[np.uint16]) -> None:
        self.bits = bits

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's shape."""
        return self.bits.shape

    def __len__(self) -> int:
        return len(self.bits)

    def __getitem__(self, index: Any) -> "BF16Array":
        return BF16Array(np.asarray(self.bits[index]))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        if copy is False:
            raise ValueError("a bfloat16 tensor cannot become an array without a copy")
        exact = np.empty(self.shape, np.float32)
        self.into(exact)
        return exact if dtype is None else exact.astype(dtype, copy=False)

    def into(self, out: NDArray[np.float32]) -> None:
        """Write the values, exactly, into `out`, which has the same shape.

        Two passes over memory that stays in cache: widen, then shift in place.
        """
        wide = out.view(np.uint32)
        np.copyto(wide, self.bits)
        np.left_shift(wide, 16, out=wide)


def to_bf16(x: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The bits of the nearest bfloat16 of each finite float32, ties to even; same shape."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
