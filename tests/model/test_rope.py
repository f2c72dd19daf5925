"""Rotation: distance only, partial, per kind; Llama-3 scaling at its borders."""

import math

import numpy as np
import pytest

from minstep.config import Llama3Scaling, RopeSpec
from minstep.rope import inverse_frequencies, rotate, rotation

PARTIAL = RopeSpec(1e4, 6, None)
SCALED = RopeSpec(5e6, 64, Llama3Scaling(2.0, 1.0, 32.0, 131072))


@pytest.mark.parametrize("spec", [PARTIAL, RopeSpec(5e6, 12, Llama3Scaling(2.0, 1.0, 32.0, 64))])
def test_a_score_depends_on_the_distance_only(spec: RopeSpec) -> None:
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((2, 1, 1, 12))

    def score(query: int, key: int) -> float:
        turned_q = rotate(q, rotation(np.array([query]), spec, np.float64))
        turned_k = rotate(k, rotation(np.array([key]), spec, np.float64))
        return float((turned_q * turned_k).sum())

    assert score(9, 4) == pytest.approx(score(1005, 1000), abs=1e-11)
    assert abs(score(9, 4) - score(9, 5)) > 1e-3


def test_the_dimensions_beyond_the_rotary_width_pass_unchanged() -> None:
    x = np.random.default_rng(0).standard_normal((4, 2, 12))
    turned = rotate(x, rotation(np.arange(4), PARTIAL, np.float64))
    assert np.array_equal(turned[..., 6:], x[..., 6:])
    assert np.array_equal(turned[0], x[0])
    assert not np.allclose(turned[1:, :, :6], x[1:, :, :6])


def test_a_rotation_keeps_every_pair_length() -> None:
    x = np.random.default_rng(0).standard_normal((4, 2, 12))
    turned = rotate(x, rotation(np.arange(4), PARTIAL, np.float64))
    lengths = [np.hypot(y[..., :3], y[..., 3:6]) for y in (x, turned)]
    np.testing.assert_allclose(*lengths, rtol=1e-14)


def test_frequencies_run_over_the_rotary_width() -> None:
    expected = [1e4 ** (-2 * i / 6) for i in range(3)]
    np.testing.assert_allclose(inverse_frequencies(PARTIAL, np.float64), expected, rtol=1e-15)


def test_llama3_scaling_keeps_short_wavelengths_and_halves_long_ones() -> None:
    plain = inverse_frequencies(SCALED._replace(scaling=None), np.float64)
    scaled = inverse_frequencies(SCALED, np.float64)
    turns = 131072 * plain / (2 * math.pi)
    assert np.array_equal(scaled[turns >= 32], plain[turns >= 32])
    np.testing.assert_allclose(scaled[turns <= 1], plain[turns <= 1] / 2, rtol=1e-15)
    between = (turns > 1) & (turns < 32)
    assert between.any() and (turns <= 1).any() and (turns >= 32).any()
    share = (turns[between] - 1) / 31
    expected = plain[between] * (share + (1 - share) / 2)
    np.testing.assert_allclose(scaled[between], expected, rtol=1e-14)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_tables_and_rotated_heads_keep_their_dtype(dtype: str) -> None:
    table = rotation(np.arange(3), SCALED, dtype)
    assert table.cos.dtype == table.sin.dtype == dtype
    assert table.cos.shape == (3, 32)
    assert rotate(np.ones((3, 2, 128), dtype), table).dtype == dtype


def test_the_float32_angle_at_the_last_position_is_off_by_at_most_a_sixtieth() -> None:
    last = np.array([262143])
    single, double = (
        np.outer(last.astype(dtype), inverse_frequencies(SCALED, dtype))
        for dtype in (np.float32, np.float64)
    )
    assert 1e-3 < np.abs(single - double).max() < 1 / 60
