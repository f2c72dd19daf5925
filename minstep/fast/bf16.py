"""bfloat16 without a NumPy dtype for it: the upper half of a float32, kept as uint16."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from minstep.fast.threads import scratch


class BF16Array:
    """A stored bfloat16 tensor: it slices like an array and turns to float only when converted.

    `bits` is uint16 of any shape, often a view into a memory map. np.asarray(a, dtype=np.float32)
    converts exactly; so does float64.
    Checked by: tests/model/test_linear.py
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

    def times(self, x: NDArray[np.float32], out: NDArray[np.float32]) -> None:
        """Write x @ self.T, for few rows of x [..., I], into `out` [..., O].

        Two weights are one 32-bit word, and each is a float32 once the other one's bits are zero.
        That moves two thirds of the bytes through the cache that `into` and one product do, which
        is what a single row waits for.
        """
        O, I = self.shape
        if I % 2:
            exact = scratch((O, I), np.float32)  # [O, I]
            self.into(exact)
            np.matmul(x, exact.T, out=out)
            return
        words = self.bits.view(np.uint32)  # [O, I/2]
        half = scratch((O, I // 2), np.float32)  # [O, I/2]
        np.left_shift(words, 16, out=half.view(np.uint32))
        np.matmul(np.ascontiguousarray(x[..., ::2]), half.T, out=out)
        np.bitwise_and(words, 0xFFFF0000, out=half.view(np.uint32))
        out += np.ascontiguousarray(x[..., 1::2]) @ half.T


def to_bf16(x: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The bits of the nearest bfloat16 of each finite float32, ties to even; same shape."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
