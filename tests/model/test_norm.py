"""RMSNorm: zero-centred weights, dtype, scale."""

import numpy as np
import pytest

from minstep.norm import rms_norm


def test_a_zero_weight_gives_unit_root_mean_square() -> None:
    x = np.random.default_rng(0).standard_normal((5, 32)) * 7
    y = rms_norm(x, np.zeros(32), 0.0)
    np.testing.assert_allclose(np.sqrt(np.square(y).mean(axis=-1)), 1, rtol=1e-14)


def test_the_weight_is_added_to_one() -> None:
    x = np.random.default_rng(0).standard_normal((5, 4))
    doubled = rms_norm(x, np.ones(4), 1e-5)
    np.testing.assert_allclose(doubled, 2 * rms_norm(x, np.zeros(4), 1e-5), rtol=1e-15)


def test_epsilon_stands_inside_the_root() -> None:
    assert rms_norm(np.zeros((1, 3)), np.zeros(3), 1e-5).tolist() == [[0, 0, 0]]
    assert rms_norm(np.ones((1, 3)), np.zeros(3), 3.0)[0, 0] == pytest.approx(0.5)


def test_what_is_too_large_to_square_becomes_zero_as_in_the_released_code() -> None:
    for dtype, least, most in (("float32", 1e18, 1e20), ("float64", 1e153, 1e155)):
        x = np.array([[1, -1, 1, 0]], dtype)
        assert abs(rms_norm(x * least, np.zeros(4), 1e-5)[0, 0] - (4 / 3) ** 0.5) < 1e-6
        with np.errstate(over="ignore", invalid="ignore"):
            assert rms_norm(x * most, np.zeros(4), 1e-5).tolist() == [[0, 0, 0, 0]]
            assert np.isnan(rms_norm(x * np.inf, np.zeros(4), 1e-5)).all()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("stored", ["float32", "float64"])
def test_the_input_decides_the_dtype(dtype: str, stored: str) -> None:
    x = np.ones((2, 3, 4), dtype)
    assert rms_norm(x, np.zeros(4, stored), 1e-5).dtype == dtype
