"""linear over every kind of stored weight, and bfloat16 bit for bit."""

import numpy as np
import pytest

from minstep import linear as module
from minstep.fast.bf16 import BF16Array, to_bf16
from minstep.linear import as_float, linear

RNG = np.random.default_rng(0)
BITS = to_bf16(RNG.standard_normal((37, 20), np.float32))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("block", [1 << 20, 64])
def test_a_stored_weight_gives_what_converting_it_first_gives(
    dtype: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BLOCK", block)
    monkeypatch.setattr(module, "LARGE", block)
    x = RNG.standard_normal((5, 20)).astype(dtype)
    single = as_float(BF16Array(BITS), np.float32)
    expected = x @ single.astype(dtype).T
    for stored in (BF16Array(BITS), single, single.astype(np.float64)):
        got = linear(x, stored)
        assert got.dtype == dtype
        np.testing.assert_allclose(
            got, expected, rtol=0, atol=4 * np.finfo(dtype).eps * np.abs(expected).max()
        )


@pytest.mark.parametrize("width", [1, 19, 20, 64])
@pytest.mark.parametrize("rows", [1, module.FEW, module.FEW + 1])
def test_few_rows_give_what_many_do(rows: int, width: int) -> None:
    x = RNG.standard_normal((2, rows, width), np.float32)[0]
    stored = BF16Array(to_bf16(RNG.standard_normal((13, width), np.float32)))
    expected = x.astype(np.float64) @ as_float(stored, np.float64).T
    for weight in (stored, stored[2:9]):
        part = expected if weight is stored else expected[:, 2:9]
        got = linear(x, weight)
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, part, rtol=0, atol=2e-6 * np.abs(expected).max())


def test_a_stack_of_weights_multiplies_a_stack_of_rows() -> None:
    x, stack = RNG.standard_normal((6, 2, 20)), RNG.standard_normal((6, 7, 20))
    expected = np.stack([a @ w.T for a, w in zip(x, stack, strict=True)])
    np.testing.assert_allclose(linear(x, stack), expected, rtol=1e-13, atol=1e-13)


def test_every_finite_bfloat16_converts_exactly_and_back() -> None:
    every = np.arange(1 << 16, dtype=np.uint16)
    finite = every[(every & 0x7F80) != 0x7F80]
    exact = as_float(BF16Array(finite), np.float32)
    assert np.array_equal(to_bf16(exact), finite)
    assert exact[1] == 2.0**-133 and exact[0x3F80] == 1 and exact[0xC000 - 0x80] == -2


def test_rounding_is_to_nearest_and_ties_go_to_even() -> None:
    step = 2.0**-7
    x = np.array([1 + step / 2, 1 + 1.5 * step, 1 + 0.51 * step, -1 - step / 4], np.float32)
    rounded = as_float(BF16Array(to_bf16(x)), np.float64)
    assert rounded.tolist() == [1, 1 + 2 * step, 1 + step, -1]


def test_slices_stay_stored_and_know_their_shape() -> None:
    stored = BF16Array(np.stack([BITS, BITS + 1]))
    assert stored.shape == (2, 37, 20) and len(stored) == 2 and stored[1].shape == (37, 20)
    assert isinstance(stored[1], BF16Array)
    rows = as_float(stored[1][np.array([3, 3, 0])], np.float32)
    assert np.array_equal(rows, as_float(BF16Array(BITS + 1), np.float32)[[3, 3, 0]])
    with pytest.raises(ValueError, match="without a copy"):
        np.array(stored, copy=False)
