"""Orthogonalised updates: against the singular value decomposition, in every layout."""

import numpy as np
import pytest

from minstep.tap import Array
from minstep.train.optimizer import orthogonalised

RNG = np.random.default_rng(0)


def nearest(x: Array) -> Array:
    """The exact orthogonal factor."""
    u, _, v = np.linalg.svd(x, full_matrices=False)
    return u @ v


def spread(rows: int, columns: int, smallest: float) -> Array:
    """A matrix of Frobenius norm near 1 with singular values spread evenly over the decades."""
    values = np.geomspace(smallest, 1, min(rows, columns))
    u, _, v = np.linalg.svd(RNG.standard_normal((rows, columns)), full_matrices=False)
    return u * (values / np.linalg.norm(values)) @ v


@pytest.mark.parametrize("shape", [(24, 24), (24, 40), (40, 24), (1, 7), (7, 1)])
def test_it_is_near_the_orthogonal_factor(shape: tuple[int, int]) -> None:
    x = spread(*shape, 0.01)
    np.testing.assert_allclose(orthogonalised(x), nearest(x), atol=0.004)


@pytest.mark.parametrize(
    ("steps", "smallest", "low", "high"),
    [(6, 1e-3, 0.993479, 1.001185), (5, 1e-3, 0.840145, 1.123559), (6, 1e-4, 0.179643, 1.001185)],
)
def test_singular_values_end_where_the_docstring_says(
    steps: int, smallest: float, low: float, high: float
) -> None:
    x = np.geomspace(smallest, 1, 20_000)
    pairs = np.zeros((len(x), 2, 2))  # x, and what makes the Frobenius norm 1
    pairs[:, 0, 0], pairs[:, 1, 1] = x, np.sqrt(1 - x * x)
    ends = orthogonalised(pairs, steps)[:, 0, 0]
    assert ends.min() == pytest.approx(low, abs=3e-6)
    assert ends.max() == pytest.approx(high, abs=3e-6)


def test_float32_is_as_good() -> None:
    x = spread(64, 128, 0.01)
    single = orthogonalised(x.astype(np.float32))
    assert single.dtype == np.float32
    np.testing.assert_allclose(single, orthogonalised(x), atol=1e-5)


@pytest.mark.parametrize("shape", [(5, 8, 12), (5, 12, 8)])
def test_each_matrix_of_a_stack_stands_for_itself(shape: tuple[int, ...]) -> None:
    sizes = np.geomspace(0.01, 100, 5)[:, None, None]
    stack = (RNG.standard_normal(shape) * sizes).astype(np.float32)
    together = orthogonalised(stack)
    assert together.shape == shape and together.dtype == np.float32
    np.testing.assert_array_equal(together, [orthogonalised(x) for x in stack])


def test_the_size_of_an_update_does_not_matter_until_it_is_tiny() -> None:
    x = spread(6, 9, 0.1)
    np.testing.assert_allclose(orthogonalised(x * 1e3), orthogonalised(x), atol=1e-5)
    np.testing.assert_allclose(orthogonalised(x * 1e-3), orthogonalised(x), atol=1e-3)
    assert np.abs(orthogonalised(x * 1e-12)).max() < 0.01


def test_zeros_stay_zero_beside_others() -> None:
    stack = np.stack([np.zeros((3, 4)), RNG.standard_normal((3, 4))])
    together = orthogonalised(stack)
    assert not together[0].any()
    np.testing.assert_allclose(together[1], nearest(stack[1]), atol=0.01)
    assert not orthogonalised(np.zeros((4, 3), np.float32)).any()


def test_the_update_is_not_written_to() -> None:
    x = RNG.standard_normal((4, 3))
    before = x.copy()
    orthogonalised(x)
    np.testing.assert_array_equal(x, before)
