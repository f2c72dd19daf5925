"""Attention: the window, chunks, groups, the gate, and blocks of a long text."""

import tracemalloc

import numpy as np
import pytest

from minstep import attention
from minstep.attention import AttentionWeights, attend, attend_in_blocks, self_attention, whole
from minstep.cache import FullCache, Past, WindowCache
from minstep.config import LayerSpec, RopeSpec
from minstep.rope import Rotation, rotation
from minstep.tap import Array, Tap
from tests.support.tiers import cases

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
    got = attend(q, whole(k, v), 0, window)
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
    new = FullCache(G, K, dtype)
    if window is not None:
        new = WindowCache(G, K, dtype, window, longest=chunk)
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


# In blocks: nothing here may depend on where a block ends.


def plain(q: Array, past: Past, first: int, window: int | None) -> Array:
    """Attention with all scores at once, by the definition, in float64."""
    count, heads, width = q.shape
    keys, values = (np.repeat(x.astype("f8"), heads // len(x), axis=0) for x in past[:2])
    scores = np.einsum("thk,hsk->hts", q.astype("f8"), keys) / np.sqrt(width)
    distance = np.arange(first, first + count)[:, None] - np.arange(
        past.start, past.start + keys.shape[1]
    )
    seen = (distance >= 0) & (distance < (window or np.inf))
    scores = np.where(seen, scores, -np.inf)
    powers = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.einsum("hts,hsk->thk", powers / powers.sum(axis=-1, keepdims=True), values)


def drawn_past(
    rng: np.random.Generator, count: int, keys: int, heads: int, groups: int, width: int, dtype: str
) -> tuple[Array, Past]:
    """Queries of the last `count` positions and what they look at, which begins anywhere."""
    q = (3 * rng.standard_normal((count, heads, width))).astype(dtype)
    k, v = rng.standard_normal((2, groups, keys, width)).astype(dtype)
    return q, Past(k, v, int(rng.integers(0, 1000)))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("seed", cases(range(4), range(4, 40)))
def test_blocks_give_what_all_scores_at_once_give(seed: int, dtype: str) -> None:
    rng = np.random.default_rng(seed)
    groups, shared, width = (int(rng.integers(*bounds)) for bounds in [(1, 3), (1, 4), (1, 17)])
    count, keys = int(rng.integers(1, 150)), int(rng.integers(2500, 4500))
    q, past = drawn_past(rng, count, keys, groups * shared, groups, width, dtype)
    first = past.start + keys - count
    for window in (None, int(rng.integers(1, 60)), int(rng.integers(60, keys + 100))):
        expected = plain(q, past, first, window)
        got = attend_in_blocks(q, past, first, window)
        assert got.dtype == dtype and got.shape == q.shape
        error = np.abs(got - expected).max() / np.abs(expected).max()
        assert error < (1e-13 if dtype == "float64" else 2e-6), f"window {window}: {error:.1e}"


@pytest.mark.parametrize("seed", range(60))
def test_where_blocks_end_changes_nothing(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(seed)
    groups, shared, count = (int(rng.integers(*bounds)) for bounds in [(1, 3), (1, 5), (1, 40)])
    keys = count + int(rng.integers(0, 60))
    q, past = drawn_past(rng, count, keys, groups * shared, groups, 5, "float64")
    first = past.start + keys - count
    monkeypatch.setattr(attention, "ROWS", int(rng.integers(1, 30)))
    monkeypatch.setattr(attention, "KEYS", int(rng.integers(1, 30)))
    monkeypatch.setattr(attention, "FEW", int(rng.integers(0, 40)))  # few rows or many
    for window in (None, 1, 2, int(rng.integers(3, 110))):
        expected = plain(q, past, first, window)
        got = attend_in_blocks(q, past, first, window)
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-13 * np.abs(expected).max())


def test_attention_goes_in_blocks_when_scores_are_many_and_nobody_asks_for_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Asks(Tap):
        def wants(self, name: str) -> bool:
            return name == "probs"

    calls = []
    real = attention.attend_in_blocks
    monkeypatch.setattr(attention, "attend_in_blocks", lambda *a: calls.append(a) or real(*a))
    q, past = drawn_past(np.random.default_rng(0), 10, 20, H, G, K, "f8")
    first = past.start + 10
    for large, expected in [(H * 10 * 20, 0), (H * 10 * 20 - 1, 1)]:
        monkeypatch.setattr(attention, "LARGE", large)
        got = attend(q, past, first, 7)
        np.testing.assert_allclose(got, plain(q, past, first, 7), rtol=1e-12, atol=1e-13)
        assert len(calls) == expected
    attend(q, past, first, 7, Asks())
    assert len(calls) == 1


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("window", [None, 3])
def test_huge_scores_in_blocks_neither_overflow_nor_give_nan(
    window: int | None, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "ROWS", 4)
    monkeypatch.setattr(attention, "KEYS", 3)
    rng = np.random.default_rng(0)
    q, past = drawn_past(rng, 20, 50, 4, 2, 4, dtype)
    first = past.start + 30
    for size in (1e3, 1e15, 1e18):  # scores up to 1e37 of float32's 3e38, of either sign
        loud = past._replace(keys=past.keys * past.keys.dtype.type(size))
        with np.errstate(all="raise", under="ignore"):
            got = attend_in_blocks(q * q.dtype.type(size), loud, first, window)
            expected = plain(q * q.dtype.type(size), loud, first, window)
        # Each query sees one key alone: the one that scores most.
        np.testing.assert_allclose(got, expected, rtol=1e-6)
        small = attend_in_blocks(
            -abs(q) * q.dtype.type(size), loud._replace(keys=abs(loud.keys)), first, window
        )
        assert np.isfinite(small).all()


def test_a_row_whose_first_blocks_are_invisible_takes_nothing_from_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # One block of queries, keys in blocks of 3, window 2: the last rows see the last block only,
    # the first rows see nothing in it. Values that nobody may see are not numbers.
    monkeypatch.setattr(attention, "ROWS", 1000)
    monkeypatch.setattr(attention, "KEYS", 3)
    q, past = drawn_past(np.random.default_rng(0), 12, 40, 2, 1, 4, "f8")
    first = past.start + 28
    with np.errstate(all="raise", under="ignore"):
        got = attend_in_blocks(q, past, first, 2)
    np.testing.assert_allclose(got, plain(q, past, first, 2), rtol=1e-12, atol=1e-13)
    unseen = past._replace(keys=past.keys.copy(), values=past.values.copy())
    unseen.keys[:, :27] = unseen.values[:, :27] = np.nan
    assert np.array_equal(attend_in_blocks(q, unseen, first, 2), got)


@pytest.mark.parametrize("window", [None, 600])
def test_memory_of_a_long_prefill_is_a_few_blocks(window: int | None) -> None:
    # 512 queries of 2 heads over 20,000 keys: 82 MB of scores in float32, never held.
    q, past = drawn_past(np.random.default_rng(0), 512, 20_000, 2, 1, 16, "float32")
    tracemalloc.start()
    attend(q, past, past.start + 20_000 - 512, window)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    block = 4 * attention.ROWS * attention.KEYS
    assert peak < 5 * block, f"{peak / 1e6:.1f} MB, a block is {block / 1e6:.1f} MB"
