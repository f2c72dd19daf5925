"""SwiGLU, its clamps, and the activations under it."""

import numpy as np
import pytest

from minstep.activations import sigmoid, silu, softmax
from minstep.mlp import MLPWeights, swiglu

IDENTITY = MLPWeights(np.eye(3), np.eye(3), np.eye(3))


def test_without_a_limit_it_is_silu_times_up() -> None:
    x = np.array([[-2.0, 0.5, 30.0]])
    np.testing.assert_allclose(swiglu(x, IDENTITY, None), x * x / (1 + np.exp(-x)), rtol=1e-14)


def test_the_limit_caps_silu_above_and_up_on_both_sides() -> None:
    x = np.array([[-5.0, 0.5, 30.0]])
    expected = [[silu(x)[0, 0] * -2, silu(x)[0, 1] * 0.5, 2.0 * 2.0]]
    np.testing.assert_allclose(swiglu(x, IDENTITY, 2.0), expected, rtol=1e-14)


def test_the_cap_is_on_silu_and_not_on_its_input() -> None:
    x = np.array([[1.9, 2.1, 2.2]])  # silu(2.2) is 1.98: below the limit although the input is not
    np.testing.assert_allclose(swiglu(x, IDENTITY, 2.0), silu(x) * np.minimum(x, 2.0), rtol=1e-14)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_activations_keep_the_dtype_and_survive_any_size(dtype: str) -> None:
    x = np.array([-1e30, -1000, -90, 0, 90, 1000, 1e30], dtype)
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        for result in (sigmoid(x), silu(x), softmax(x)):
            assert result.dtype == dtype and np.isfinite(result).all()
    assert sigmoid(x)[0] == 0 and sigmoid(x)[3] == 0.5 and sigmoid(x)[-1] == 1
    assert softmax(x).sum() == 1
    stored = MLPWeights(*(w.astype("float32") for w in IDENTITY))
    assert swiglu(x[None, 2:5], stored, 1.0).dtype == dtype


def test_small_scores_keep_their_relative_precision() -> None:
    assert sigmoid(np.float32([-30.0]))[0] == pytest.approx(np.exp(-30), rel=1e-6)
