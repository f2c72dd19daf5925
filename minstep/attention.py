"""Grouped-query attention with QK-norm, rotation, a sliding window and a gate per head."""

from typing import NamedTuple

import numpy as np

from minstep.activations import sigmoid, softmax
from minstep.cache import FullCache, Past
from minstep.config import LayerSpec
from minstep.fast.threads import each, fetch, scratch
from minstep.linear import Weight, linear
from minstep.norm import rms_norm
from minstep.rope import Rotation, rotate
from minstep.tap import Array, Tap, silent
from minstep.validation import check_finite

ROWS, KEYS = 512, 2048  # of a block: 4 MB of scores in float32, which stay in cache
LARGE = 1 << 17  # more scores are held at once only for a tap that wants them
FEW = 32  # rows of queries that are fewer than their keys can be read for


class AttentionWeights(NamedTuple):
    """Tensors under `model.layers.N.self_attn.`, each with `.weight` at the end."""

    q_proj: Weight  # [H*K, D]
    k_proj: Weight  # [G*K, D]
    v_proj: Weight  # [G*K, D]
    o_proj: Weight  # [D, H*K]
    q_norm: Weight  # [K]
    k_norm: Weight  # [K]
    g_proj: Weight | None  # [H, D]; None where use_head_wise_attn_gate is false


def self_attention(
    x: Array,
    weights: AttentionWeights,
    spec: LayerSpec,
    table: Rotation,
    eps: float,
    cache: FullCache | None = None,
    tap: Tap = silent,
) -> Array:
    """Attend from each token to itself and the visible positions before it.

    x [T, D], already normed; table: the angles of its T positions. With a cache, x continues it
    and is added to it; without one, x is the whole sequence. Returns [T, D] in x's dtype.
    Source: Step3p5Attention in modeling_step3p5.py; report section 2 and appendix A.
    Differs: sliding layers have more query heads than full ones (96 and 64). QK-norm comes before
        the rotation. The gate is a sigmoid of the layer's normed input, one number per head, and
        scales the head's output before o_proj, not after it.
    Checked by: tests/model/test_attention.py
    """
    T, H, G, K = len(x), spec.heads, spec.groups, spec.head_dim
    q = tap("q_proj", linear(x, weights.q_proj)).reshape(T, H, K)  # [T, H, K]
    k = tap("k_proj", linear(x, weights.k_proj)).reshape(T, G, K)  # [T, G, K]
    v = tap("v_proj", linear(x, weights.v_proj)).reshape(T, G, K)  # [T, G, K]
    q = tap("q_norm", rms_norm(q, weights.q_norm, eps))
    k = tap("k_norm", rms_norm(k, weights.k_norm, eps))
    q = tap("q_rope", rotate(q, table))
    k = tap("k_rope", rotate(k, table))
    past = whole(k, v) if cache is None else cache.append(k, v)  # [G, S, K]
    heads = attend(q, past, past.start + past.keys.shape[1] - T, spec.window, tap)
    if weights.g_proj is not None:
        logits = tap("g_proj", linear(x, weights.g_proj))  # [T, H]
        check_finite("self_attn.g_proj", logits)
        gate = sigmoid(logits)
        heads = heads * gate[:, :, None]
    return tap("o_proj", linear(heads.reshape(T, H * K), weights.o_proj))  # [T, D]


def whole(k: Array, v: Array) -> Past:
    """Keys and values [T, G, K] of a sequence from position 0, as attention reads them."""
    return Past(k.swapaxes(0, 1), v.swapaxes(0, 1), 0)  # [G, T, K]


def visible(first: int, count: int, start: int, keys: int, window: int | None) -> Array:
    """Which keys, at start, start + 1, ..., each query, at first, first + 1, ..., may see.

    Returns bool [count, keys]. A window of W is the query itself and the W - 1 positions before it.
    """
    query = np.arange(first, first + count)[:, None]  # [count, 1]
    key = np.arange(start, start + keys)  # [keys]
    mask = key <= query  # [count, keys]
    return mask if window is None else mask & (query - key < window)


def attend(q: Array, past: Past, first: int, window: int | None, tap: Tap = silent) -> Array:
    """Softmax attention of grouped heads, scaled by K ** -0.5.

    q [T, H, K] at positions first, first + 1, .... Query heads g*R .. g*R + R - 1 read key-value
    head g, which is never repeated. Each query sees itself at least; the C last keys are those that
    any of them sees. Returns [T, H, K].
    """
    T, H, K = q.shape
    G, S, _ = past.keys.shape
    R = H // G
    if H * T * S > LARGE and not tap.wants("probs"):
        return attend_in_blocks(q, past, first, window)
    unseen = 0 if window is None else max(0, first - window + 1 - past.start)
    C = S - unseen
    keys, values = past.keys[:, unseen:], past.values[:, unseen:]  # [G, C, K], [G, C, K]
    grouped = q.reshape(T, G, R, K).transpose(1, 2, 0, 3).reshape(G, R * T, K)  # [G, R*T, K]
    scores = grouped * K**-0.5 @ keys.swapaxes(1, 2)  # [G, R*T, C]
    scores = scores.reshape(G, R, T, C)  # [G, R, T, C]
    if T > 1:  # a single query sees all that is left
        mask = visible(first, T, past.start + unseen, C, window)  # [T, C]
        scores = np.where(mask, scores, -np.inf)  # [G, R, T, C]
    probs = tap("probs", softmax(scores).reshape(H, T, C))  # [H, T, C]
    mixed = probs.reshape(G, R * T, C) @ values  # [G, R*T, K]
    return mixed.reshape(H, T, K).swapaxes(0, 1)  # [T, H, K]


def products(query: Array, keys: Array) -> Array:
    """query @ keys.T in memory that the thread's next call reuses: [N, K] and [C, K] -> [N, C].

    A few rows take as long as their keys take to come from memory. The library under NumPy is
    faster with the long factor first; and it reads in strips what `fetch` reads at the full rate of
    memory.
    """
    N, C = len(query), len(keys)
    if N > FEW:
        return np.matmul(query, keys.T, out=scratch((N, C), query.dtype))  # [N, C]
    fetch(keys)
    turned, scores = scratch((2, N * C), query.dtype)  # [N*C], [N*C]
    turned, scores = turned.reshape(C, N), scores.reshape(N, C)  # [C, N], [N, C]
    np.matmul(keys, np.ascontiguousarray(query.T), out=turned)
    np.copyto(scores, turned.T)
    return scores


def attend_in_blocks(q: Array, past: Past, first: int, window: int | None) -> Array:
    """The same attention where the scores [H, T, S] would be too large to hold at once.

    q [T, H, K]. One block of queries and keys at a time: each row keeps the largest score so far,
    and with it the sum and the mix of values seen so far; when a larger score comes, both shrink by
    exp(old - new). Keys that no query of a block can see are not visited. Threads share out the
    key-value heads. Returns [T, H, K].
    Source: online softmax, arXiv 1805.02867; blocks as in FlashAttention, arXiv 2205.14135.
    Checked by: tests/model/test_attention.py
    """
    T, H, K = q.shape
    G, S, _ = past.keys.shape
    R = H // G
    out = np.empty_like(q)
    step = max(1, ROWS // R)

    def mix(a: int, b: int, g: int) -> None:
        low = 0 if window is None else max(0, first + a - window + 1 - past.start)
        heads = slice(g * R, (g + 1) * R)
        query = q[a:b, heads].swapaxes(0, 1).reshape(-1, K) * K**-0.5  # [R*B, K]
        peak = np.full((len(query), 1), np.finfo(q.dtype).min / 2, q.dtype)  # [R*B, 1]
        total, mixed = np.zeros_like(peak), np.zeros_like(query)
        for c in range(low, first + b - past.start, KEYS):
            d = min(c + KEYS, first + b - past.start)
            scores = products(query, past.keys[g, c:d])  # [R*B, C]
            start, end = past.start + c, past.start + d
            if end > first + a + 1 or (window and first + b - start > window):
                mask = visible(first + a, b - a, start, d - c, window)  # [B, C]
                scores[~np.tile(mask, (R, 1))] = -np.inf
            higher = np.maximum(peak, scores.max(axis=-1, keepdims=True))
            scores -= higher
            np.exp(scores, out=scores)
            shrink = np.exp(peak - higher)
            if len(query) <= FEW:
                fetch(past.values[g, c:d])
            total = total * shrink + scores.sum(axis=-1, keepdims=True)
            mixed = mixed * shrink + scores @ past.values[g, c:d]
            peak = higher
        out[a:b, heads] = (mixed / total).reshape(R, b - a, K).swapaxes(0, 1)

    for _ in each(mix, ((a, min(a + step, T), g) for a in range(0, T, step) for g in range(G))):
        pass
    return out
