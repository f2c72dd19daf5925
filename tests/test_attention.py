"""Attention: the window, chunks, groups and the gate."""

import numpy as np
import pytest

from minstep.attention import AttentionWeights, attend, self_attention, visible, whole
from minstep.cache import FullCache, WindowCache
from minstep.config import LayerSpec, RopeSpec
from minstep.rope import Rotation, rotation
from minstep.tap import Array

D, H, G, K, T = 16, 6, 2, 4, 23
SPEC = LayerSpec(
    name="model.layers.0",
    kind="sliding_attention",
    heads=H,
    groups=G,
    head_dim=K,
    window=5,
    rope=RopeSpec(1e4, 4, None),
    has_gate=True,
    mlp_width=0,
    moe=None,
    swiglu_limit=None,
    swiglu_limit_shared=None,
)


def drawn(dtype: str = "float64") -> tuple[Array, AttentionWeights]:
    rng = np.random.default_rng(0)
    shapes = [(H * K, D), (G * K, D), (G * K, D), (D, H * K), (K,), (K,), (H, D)]
    weights = [rng.standard_normal(shape).astype(dtype) for shape in shapes]
    return rng.standard_normal((T, D)).astype(dtype), AttentionWeights(*weights)


def angles(first: int, count: int, dtype: str = "float64") -> Rotation:
    return rotation(np.arange(first, first + count), SPEC.rope, dtype)


@pytest.mark.parametrize("window", [1, 2, 5, 22, 23, 100])
def test_a_window_is_full_attention_with_a_mask(window: int) -> None:
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((T, n, K)) for n in (H, G, G))
    past = whole(k, v)
    got = attend(q, past, visible(0, T, past, window))
    for t in range(T):
        seen = slice(max(0, t - window + 1), t + 1)
        for h in range(H):
            scores = k[seen, h // (H // G)] @ q[t, h] / np.sqrt(K)
            powers = np.exp(scores - scores.max())
            expected = powers @ v[seen, h // (H // G)] / powers.sum()
            np.testing.assert_allclose(got[t, h], expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 22])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_any_split_into_chunks_gives_the_same_output(
    chunk: int, window: int | None, dtype: str
) -> None:
    x, weights = drawn(dtype)
    spec = SPEC._replace(window=window)
    expected = self_attention(x, weights, spec, angles(0, T, dtype), 1e-5)
    new = FullCache(G, K, dtype) if window is None else WindowCache(G, K, dtype, window)
    parts = [
        self_attention(part, weights, spec, angles(start, len(part), dtype), 1e-5, new)
        for start in range(0, T, chunk)
        for part in [x[start : start + chunk]]
    ]
    tolerance = 1e-12 if dtype == "float64" else 1e-5
    np.testing.assert_allclose(np.concatenate(parts), expected, rtol=0, atol=tolerance * 10)
    assert expected.dtype == dtype and parts[0].dtype == dtype


def test_a_window_cache_gives_what_a_full_cache_gives() -> None:
    x, weights = drawn()
    outputs = []
    for cache in (FullCache(G, K, "f8"), WindowCache(G, K, "f8", 5, slack=3)):
        steps = [
            self_attention(x[t : t + 1], weights, SPEC, angles(t, 1), 1e-5, cache) for t in range(T)
        ]
        outputs.append(np.concatenate(steps))
    np.testing.assert_allclose(*outputs, rtol=1e-12, atol=1e-13)


def test_rejected_positions_leave_no_mark_after_a_roll_back() -> None:
    x, weights = drawn()
    cache = WindowCache(G, K, "f8", 5, slack=3)
    self_attention(x[:15], weights, SPEC, angles(0, 15), 1e-5, cache)
    self_attention(x[20:23] * 3, weights, SPEC, angles(15, 3), 1e-5, cache)
    cache.truncate(15)
    got = self_attention(x[15:], weights, SPEC, angles(15, T - 15), 1e-5, cache)
    expected = self_attention(x, weights, SPEC, angles(0, T), 1e-5)[15:]
    np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-13)


def test_a_later_token_changes_nothing_before_it() -> None:
    x, weights = drawn()
    before = self_attention(x, weights, SPEC, angles(0, T), 1e-5)
    x[-1] += 1
    after = self_attention(x, weights, SPEC, angles(0, T), 1e-5)
    assert np.array_equal(before[:-1], after[:-1]) and not np.allclose(before[-1], after[-1])


def test_a_gate_of_zero_weight_halves_every_head() -> None:
    x, weights = drawn()
    gated = weights._replace(g_proj=np.zeros((H, D)))
    halved = self_attention(x, gated, SPEC, angles(0, T), 1e-5)
    without = self_attention(x, weights._replace(g_proj=None), SPEC, angles(0, T), 1e-5)
    np.testing.assert_allclose(halved, without / 2, rtol=1e-12, atol=1e-14)


def test_huge_scores_neither_overflow_nor_give_nan() -> None:
    x, weights = drawn("float32")
    loud = weights._replace(q_norm=np.full(K, 1e4, "f4"), k_norm=np.full(K, 1e4, "f4"))
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        assert np.isfinite(self_attention(x, loud, SPEC, angles(0, T, "f4"), 1e-5)).all()
