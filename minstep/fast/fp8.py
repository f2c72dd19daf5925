"""float8_e4m3fn in blocks: 8-bit floats with one float32 scale for each block of a weight.

A code is a sign, 4 bits of exponent e and 3 bits of mantissa m. Its value is 2^(e - 7) * (1 + m/8),
or 2^-6 * m/8 where e is 0. There is no infinity; e = 15 with m = 7 is not a number.
Source: arXiv 2209.05433, table 1; the `fn` variant is the one that has no infinity.
Checked by: tests/fast/test_fp8.py
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from minstep.errors import InputError
from minstep.fast.threads import scratch

LARGEST = 448.0  # the largest finite value
# A code in the upper bits of a float32, the sign over the top bit, exponent and mantissa where
# float32 has the low ones of its own: its value times 2^-120, because the exponent's bias is 7, not
# 127. Shifting a sign-extended int32 by 20 leaves copies of the sign between, which the mask drops.
SHIFT, MASK, REBIAS = 20, np.int32(-0x78100000), np.float32(2.0**120)


class FP8Array:
    """A stored FP8 tensor: it slices like an array and turns to float only when converted.

    `bits` uint8 [..., O, I]; `scales` float32 [..., ceil(O / rows), ceil(I / columns)]: a value is
    its code's, times the scale of its block. Only the first axis can be sliced or indexed; `name`
    and `first`, the row in the tensor where a slice begins, say where a NaN is.
    """

    def __init__(
        self,
        bits: NDArray[np.uint8],
        scales: NDArray[np.float32],
        block: tuple[int, int],
        name: str,
        first: int = 0,
    ) -> None:
        self.bits, self.scales, self.block, self.name, self.first = bits, scales, block, name, first

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's shape."""
        return self.bits.shape

    def __len__(self) -> int:
        return len(self.bits)

    def __getitem__(self, index: Any) -> "FP8Array":
        if isinstance(index, slice) and self.bits.ndim == 2:
            start = index.indices(len(self))[0]
            return FP8Array(
                self.bits[index], self.scales, self.block, self.name, self.first + start
            )
        if self.bits.ndim == 2:
            raise TypeError(f"{self.name}: rows of an FP8 tensor are taken as a slice")
        name = f"{self.name}[{index}]"
        return FP8Array(self.bits[index], self.scales[index], self.block, name)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        if copy is False:
            raise ValueError("an FP8 tensor cannot become an array without a copy")
        exact = np.empty(self.shape, np.float32)
        self.into(exact)
        return exact if dtype is None else exact.astype(dtype, copy=False)

    def into(self, out: NDArray[np.float32]) -> None:
        """Write the values, each rounded once to float32, into `out`, which has the same shape.

        Raises InputError for a NaN, naming its place, and for scales that are not finite. A scale
        of 128 or more would overflow with the bias in it, so there the bias is made good first.
        """
        if self.bits.ndim > 2:
            for index in range(len(self)):
                self[index].into(out[index])
            return
        wide = out.view(np.int32)
        np.copyto(wide, self.bits.view(np.int8))
        sizes = self.bits & 0x7F
        if sizes.max(initial=0) == 0x7F:
            row, column = np.argwhere(sizes == 0x7F)[0].tolist()
            place = f"[{self.first + row}, {column}]"
            raise InputError(f"{self.name}: is not a number at {place}, expected finite weights")
        np.left_shift(wide, SHIFT, out=wide)
        np.bitwise_and(wide, MASK, out=wide)
        rows, columns = self.block
        width = min(columns, out.shape[1])
        rebias = REBIAS
        largest = np.abs(self.scales).max(initial=0)
        if not largest < np.inf:
            raise InputError(f"{self.name}: a scale of it is {largest}, expected finite scales")
        if largest >= 128:
            out *= REBIAS
            rebias = np.float32(1)
        end = self.first + len(self)
        for start in range(self.first - self.first % rows, end, rows):
            scales = np.repeat(self.scales[start // rows] * rebias, width)[: out.shape[1]]
            out[max(0, start - self.first) : start + rows - self.first] *= scales

    def times(self, x: NDArray[np.float32], out: NDArray[np.float32]) -> None:
        """Write x @ self.T, x [..., I], into `out` [..., O]."""
        exact = scratch(self.shape, np.float32)  # [O, I]
        self.into(exact)
        np.matmul(x, exact.T, out=out)


def to_fp8(
    x: NDArray[np.float32], block: tuple[int, int]
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """The nearest FP8 tensor: codes of x's shape, and scales that make each block reach LARGEST.

    x [..., O, I] finite. Returns codes uint8 [..., O, I] and scales float32 as in FP8Array.
    """
    rows, columns = block
    blocks = [-(-n // size) for n, size in zip(x.shape[-2:], block, strict=True)]
    scales = np.ones((*x.shape[:-2], *blocks), np.float32)
    codes = np.empty(x.shape, np.uint8)
    for i in range(blocks[0]):
        for j in range(blocks[1]):
            part = np.s_[..., i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]
            largest = np.abs(x[part]).max(axis=(-2, -1)) / np.float32(LARGEST)
            scale = scales[..., i, j] = np.where(largest > 0, largest, np.float32(1))
            codes[part] = _nearest((x[part] / scale[..., None, None]).astype(np.float32))
    return codes, scales


def _nearest(x: NDArray[np.float32]) -> NDArray[np.uint8]:
    """The code of the nearest FP8 value, ties to the even code; |x| at most LARGEST or so."""
    positive = np.arange(0x7F, dtype=np.uint8)  # codes in the order of their values
    values = np.asarray(FP8Array(positive[None], np.ones((1, 1), np.float32), (1, 127), ""))[0]
    middles = (values[1:] + values[:-1]) / 2  # exact in float32
    size = np.abs(x)
    below = np.searchsorted(middles, size, side="left")  # a tie goes to the lower code
    above = np.searchsorted(middles, size, side="right")
    code = np.where(below % 2 == 0, below, above) + 0x80 * np.signbit(x)
    return code.astype(np.uint8)
