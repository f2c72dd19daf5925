"""One pair of tensors: figures and verdict."""

import numpy as np
import pytest

from minstep.parity import compare as module
from minstep.parity.compare import (
    TOLERANCES,
    compare,
    departing,
    fitted,
    row_errors,
)

IDS = "model.layers.3.moe.ids"


def random(*shape: int, seed: int = 0) -> module.Array:
    return np.random.default_rng(seed).standard_normal(shape)


def test_figures_are_those_of_the_definition() -> None:
    a, b = random(5, 7), random(5, 7) + 1e-3 * random(5, 7, seed=1)
    c = compare("a", a, b, 1e-6)
    assert c.shape == (5, 7) and not c.is_match
    assert c.max_error == pytest.approx(np.abs(a - b).max() / np.abs(a).max())
    assert c.mean_error == pytest.approx(np.abs(a - b).mean() / np.abs(a).max())
    norms = np.linalg.norm(a) * np.linalg.norm(b)
    assert c.cosine == pytest.approx((a * b).sum() / norms)


@pytest.mark.parametrize("chunk", [1, 3, 1 << 20])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_every_single_changed_element_is_found_at_its_index(
    chunk: int, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK", chunk)
    a = random(3, 2, 4).astype(dtype)
    for place in np.ndindex(a.shape):
        b = a.copy()
        b[place] += 1e-3
        c = compare("a", a, b, TOLERANCES[dtype])
        assert c.first == (place, a[place], b[place]) and not c.is_match
        assert c.max_error == pytest.approx(1e-3 / np.abs(a).max(), rel=1e-3)
        assert compare("a", a, b, 1.0).is_match


def test_the_first_element_is_reported_not_the_largest_and_a_small_one_is_passed_over() -> None:
    a = np.full((4, 4), 2.0)
    b = a.copy()
    b[0, 1], b[1, 2], b[3, 3] = 2 + 1e-8, 2.1, 9.0
    c = compare("a", a, b, 1e-6)
    assert c.first == ((1, 2), 2.0, 2.1)
    assert c.max_error == 3.5


def test_equal_tensors_match_with_a_cosine_of_one() -> None:
    for a in (random(4, 4), np.zeros((4, 4)), np.zeros((0, 4)), np.ones(()), np.arange(4)):
        c = compare("a", a, a, 1e-300)
        assert c.is_match and c.first is None
        assert (c.max_error, c.mean_error) == (0, 0) and c.cosine == pytest.approx(1)


def test_zeros_against_something_are_a_mismatch_without_nan() -> None:
    for a, b in ((np.zeros(3), np.ones(3)), (np.ones(3), np.zeros(3))):
        c = compare("a", a, b, 1e-2)
        assert not c.is_match and c.max_error == 1 and c.cosine == 0
        assert c.first == ((0,), a[0], b[0])


def test_values_near_the_end_of_the_range_do_not_overflow() -> None:
    a = np.array([3e38, 1.0], np.float32)
    assert compare("a", a, a, 1e-9).cosine == pytest.approx(1)
    large = np.array([1e300, -1e300])
    c = compare("a", large, -large, 1e-9)
    assert c.max_error == 2 and c.cosine == pytest.approx(-1)


def test_the_error_is_relative_to_the_reference_or_to_what_is_given() -> None:
    a, b = np.array([10.0, 0.0]), np.array([10.0, 0.1])
    assert compare("a", a, b, 0.02).is_match and not compare("a", a, b, 0.005).is_match
    assert compare("a", a, b, 0.02, scale=1.0).first == ((1,), 0.0, 0.1)


def test_other_shapes_are_a_mismatch_that_names_both() -> None:
    c = compare("a", np.ones((3, 4)), np.ones((4, 3)), 1.0)
    assert not c.is_match and c.first is None and c.note == "shape [3, 4] against [4, 3]"
    assert not compare(IDS, np.ones((3, 4), int), np.ones((3, 5), int), 1.0).is_match


def test_batch_axes_and_merged_heads_are_no_other_shape() -> None:
    x = np.arange(24.0)
    for theirs, ours in (
        ((1, 4, 6), (4, 6)),
        ((4, 6), (1, 4, 6)),
        ((4, 6), (4, 3, 2)),
        ((4, 3, 2), (4, 6)),
        ((1, 24), (1, 4, 6)),
        ((24,), (1, 4, 6)),
    ):
        fit = fitted(x.reshape(theirs), ours)
        assert fit is not None and fit.shape == ours and (fit.ravel() == x).all()
    for theirs, ours in (((4, 6), (6, 4)), ((4, 6), (24,)), ((2, 3, 4), (3, 2, 4)), ((24,), (25,))):
        assert fitted(x.reshape(theirs), ours) is None


def test_experts_compare_as_sets() -> None:
    ours = np.array([[0, 3, 5], [1, 2, 4]])
    assert compare(IDS, ours, np.array([[5, 0, 3], [4, 2, 1]], np.int32), 1e-9).is_match
    c = compare(IDS, ours, np.array([[0, 3, 5], [1, 4, 7]]), 0.9)
    assert not c.is_match and c.first == ((1, 1), 2, 4)
    assert c.max_error == pytest.approx(1 / 3) and c.mean_error == pytest.approx(1 / 6)
    assert c.cosine == pytest.approx(5 / 6)


def test_a_row_is_held_against_its_own_length() -> None:
    a = random(6, 40)
    a[0] *= 100
    b = a.copy()
    b[4] *= 1.07
    assert compare("model.layers.3.self_attn.o_proj", a, b, 0.03).is_match  # row 0 hides it
    for part in (".self_attn.o_proj", ".moe", ".share_expert", ".mlp", ""):
        errors = row_errors(f"model.layers.3{part}", a, b)
        assert errors is not None and errors == pytest.approx([0, 0, 0, 0, 0.07, 0])
        for size in (1e-30, 1e-6, 1e6):
            assert row_errors(f"model.layers.3{part}", a * size, b * size) == pytest.approx(errors)
    assert departing("model.layers.3", a, b, 0.03).tolist() == [False] * 4 + [True, False]
    assert not departing("model.layers.3", a, b, 0.04).any()
    assert row_errors("model.layers.3.self_attn.q_proj", a, b) is None
    assert row_errors("model.layers.3", a[:, :32], b[:, :32]) is not None
    assert row_errors("model.layers.3", a[:, :31], b[:, :31]) is None  # too narrow to say much
    assert row_errors("model.layers.3", a[:0], b[:0]) is None


def test_a_massive_column_hides_no_other_in_a_row() -> None:
    a = random(6, 40)
    a[:, 7] = 300
    b = a.copy()
    b[2, 8:] *= 1.1
    assert compare("model.layers.3", a, b, 0.03).is_match
    errors = row_errors("model.layers.3", a, b)
    assert errors is not None and 0.08 < errors[2] < 0.11 and errors[[0, 1, 3, 4, 5]].max() == 0


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("times", [1.0, 4.0, 7.9, 8.1, 20.0, 79.0, 1e6])
def test_a_column_is_massive_beyond_eight_times_the_median_column(times: float, sign: int) -> None:
    a = np.ones((6, 40))
    a[3, 7] = sign * times  # one such element is enough
    b = a.copy()
    b[3, 8:12] *= 1.5
    errors = row_errors("model.layers.3", a, b)
    length = np.sqrt(39 + times**2) if times <= 8 else np.sqrt(39)
    assert errors == pytest.approx([0, 0, 0, 1 / length, 0, 0])


def test_rows_are_the_same_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = random(7, 40), random(7, 40, seed=1)
    whole = row_errors("model.layers.3", a, b)
    monkeypatch.setattr(module, "CHUNK", 90)
    chunked = row_errors("model.layers.3", a, b)
    assert whole is not None and chunked is not None and np.array_equal(whole, chunked)
    assert row_errors("model.layers.3", a * 0, b) == pytest.approx(np.linalg.norm(b, axis=1))
