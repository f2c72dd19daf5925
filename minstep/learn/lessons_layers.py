"""What the exercises on one layer and on the decoder run (chapters 0 and 2 to 7).

Each function is a scene: minstep/learn/scenes.py says what becomes of it.
Checked by: tests/learn/test_exercise.py
"""

import numpy as np
from numpy.typing import DTypeLike

from minstep.attention import whole
from minstep.cache import Past
from minstep.config import Llama3Scaling, MoESpec, RopeSpec
from minstep.fast.bf16 import BF16Array, to_bf16
from minstep.learn.scenes import Rng, Shown, drawn, floats, refused, shipped, watched
from minstep.mlp import MLPWeights
from minstep.model import rotations
from minstep.moe import Choice, MoEWeights
from minstep.parity.variants import Find
from minstep.rope import Rotation
from minstep.weights import Shape, assemble, block_weights

EPS = 1e-5
SCALING = Llama3Scaling(8.0, 1.0, 4.0, 2048)
# T, H, G and K of attention; one query head for each key-value head, one token, odd sizes.
HEADS = ((1, 4, 2, 8), (5, 6, 2, 12), (7, 3, 3, 4), (11, 10, 1, 6))


def token_ids_become_rows_of_the_table(find: Find, rng: Rng, dtype: DTypeLike) -> Shown:
    """Any float type of table, ids that repeat, the last one."""
    embed = find("model").embed
    table = floats(rng, (11, 6), np.float32)
    for stored in (table, table.astype(np.float64), BF16Array(to_bf16(table))):
        yield f"embed from {type(stored).__name__}", embed([3, 10, 0, 3], stored, dtype)


def ids_that_are_no_tokens_are_refused(find: Find, rng: Rng, dtype: DTypeLike) -> Shown:
    """NumPy would take a negative id from the end of the table."""
    for ids in ([], [-1], [3, 11], [1.5], [1 << 70]):
        table = floats(rng, (11, 6), dtype)
        yield f"embed of {ids}", refused(find("model").embed, ids, table, dtype)


def states_become_logits(find: Find, rng: Rng, dtype: DTypeLike) -> Shown:
    """The final norm comes first, with its own weight."""
    for name in ("tiny", "odd"):
        config = shipped(name)
        x = 3 * floats(rng, (4, config.hidden_size), dtype)
        yield from watched(name, find("model").head, x, assemble(config, drawn(rng)), config)


def vectors_of_any_shape_are_normed(find: Find, rng: Rng, dtype: DTypeLike) -> Shown:
    """Rows, heads, zeros and very small numbers, with weights of any float type."""
    rms_norm = find("norm").rms_norm
    for shape in ((7,), (1, 3), (5, 64), (4, 6, 12), (2, 3, 1, 5)):
        weight = floats(rng, shape[-1:], np.float32)
        for stored in (weight, weight.astype(np.float64), BF16Array(to_bf16(weight))):
            x = 3 + floats(rng, shape, dtype)
            yield f"rms_norm of {list(shape)}", rms_norm(x, stored, EPS)
    for size in (0.0, 1e-6, 1e4):
        x = np.full((2, 4), size, dtype)
        yield f"rms_norm of {size:g}", rms_norm(x, np.zeros(4, dtype), EPS)


def pairs_turn_at_their_frequencies(find: Find, rng: Rng, dtype: DTypeLike) -> Shown:
    """Fast ones stay, slow ones are scaled, and between the two they are mixed."""
    for theta, width in ((10000.0, 16), (5e6, 64), (500.0, 2), (10000.0, 6)):
        for scaling in (None, SCALING, SCALING._replace(low_freq_factor=0.5, factor=2.0)):
            spec = RopeSpec(theta, width, scaling)
            yield f"{spec}", find("rope").inverse_frequencies(spec, dtype)


def angles_grow_with_the_position(find: Find, rng: Rng, dtype: DTypeLike) -> Shown:
    """Float32 is not asked at large positions, where the angle itself is inexact."""
    positions = np.array([0, 1, 2, 7, 50]) * (1 if dtype == np.float32 else 5000)
    for spec in (RopeSpec(10000.0, 12, None), RopeSpec(5e6, 8, SCALING)):
        yield f"rotation of {spec}", find("rope").rotation(positions, spec, dtype)


def halves_of_a_head_are_rotated(find: Find, rng: Rng, dtype: DTypeLike) -> Shown:
    """The whole head, or a part of it and the rest passes."""
    for tokens, heads, width, pairs in ((5, 3, 8, 4), (1, 1, 2, 1), (7, 6, 12, 3), (2, 10, 16, 4)):
        angles = floats(rng, (tokens, pairs), dtype)
        table = Rotation(np.cos(angles), np.sin(angles))
        x = floats(rng, (tokens, heads, width), dtype)
        yield f"rotate {list(x.shape)} by {pairs} pairs", find("rope").rotate(x, table)


def softmax_and_sigmoid_bear_large_numbers(find: Find, rng: Rng, dtype: DTypeLike) -> Shown:
    """Nothing overflows, and what is -inf gets 0."""
    x = floats(rng, (3, 5), dtype) * np.array([[1], [40], [2000]], dtype)
    x[2, :2] = 5000, -5000
    masked = np.where(rng.random((3, 5)) < 0.4, -np.inf, x).astype(dtype)
    masked[:, 0] = 1
    for name, given in (("softmax", x), ("softmax", masked), ("sigmoid", x), ("silu", x)):
        with np.errstate(over="raise", invalid="raise", divide="raise"):
            y = getattr(find("activations"), name)(given)
        yield f"{name}{' with -inf' if given is masked else ''}", y


def a_query_sees_itself_and_what_its_window_holds(find: Find, rng: Rng, dtype: DTypeLike) -> Shown:
    """With keys from before, and windows from 1 to more than there is."""
    for first, count, start, keys in ((0, 6, 0, 6), (4, 1, 0, 5), (9, 3, 2, 10), (0, 1, 0, 1)):
        for window in (None, 1, 2, 3, 100):
            said = f"visible({first}, {count}, {start}, {keys}, {window})"
            yield said, find("attention").visible(first, count, start, keys, window)


def _past(rng: Rng, shape: Shape, dtype: DTypeLike, start: int) -> Past:
    """Random keys and values [G, S, K] from position `start` on."""
    return Past(floats(rng, shape, dtype), floats(rng, shape, dtype), start)


def query_heads_share_key_value_heads(find: Find, rng: Rng, dtype: DTypeLike) -> Shown:
    """Heads g*R to g*R + R - 1 read head g; keys may begin after position 0."""
    for tokens, heads, groups, width in HEADS:
        for start, before, window in ((0, 0, None), (0, 3, None), (4, 3, 4), (0, 0, 2)):
            q = floats(rng, (tokens, heads, width), dtype)
            past = _past(rng, (groups, before + tokens, width), dtype, start)
            said = f"attend, q {list(q.shape)}, {groups} groups, {before} before, window {window}"
            arguments = (q, past, start + before, window)
            yield from watched(said, find("attention").attend, *arguments)


def attention_in_blocks_is_the_same(find: Find, rng: Rng, dtype: DTypeLike) -> Shown:
    """More queries and more keys than a block has, and a window that leaves blocks out."""
    for tokens, keys, window in ((5, 5, None), (600, 600, None), (3, 4200, None), (700, 2900, 90)):
        q = floats(rng, (tokens, 4, 6), dtype)
        past = _past(rng, (2, keys, 6), dtype, 10)
        said = f"attend_in_blocks, {tokens} queries, {keys} keys, window {window}"
        first = 10 + keys - tokens
        yield said, find("attention").attend_in_blocks(q, past, first, window)
    q = floats(rng, (1500, 2, 6), dtype)
    past = whole(q[:, :1], q[:, 1:])
    yield "attend, 1500 queries", find("attention").attend(q, past, 0, None)


def attention_of_each_kind_of_layer(find: Find, rng: Rng, dtype: DTypeLike) -> Shown:
    """Full and sliding layers, with and without a gate, at once and on from a cache."""
    for name in ("odd", "tiny"):
        config = shipped(name)
        for spec in config.layers[:2]:
            attention = find("attention").self_attention
            weights = block_weights(spec, config.hidden_size, drawn(rng)).self_attn
            x = floats(rng, (13, config.hidden_size), dtype)
            table = rotations([spec], 0, 13, dtype)[spec.rope]
            said = f"self_attention of {spec.kind}, {spec.heads} heads, {spec.groups} groups"
            yield from watched(said, attention, x, weights, spec, table, EPS)
            ungated = weights._replace(g_proj=None)
            yield f"{said}, no gate", attention(x, ungated, spec, table, EPS)
            (cache,) = find("cache").new_caches([spec], dtype, 0, 9)
            for a, b in ((0, 9), (9, 10), (10, 13)):
                part = Rotation(table.cos[a:b], table.sin[a:b])
                row = attention(x[a:b], weights, spec, part, EPS, cache)
                yield f"{said}, tokens {a} to {b - 1} with a cache", row


def both_factors_are_held_within_the_limit(find: Find, rng: Rng, dtype: DTypeLike) -> Shown:
    """silu(gate) from above, up from both sides; and no limit at all."""
    for tokens, hidden, width in ((4, 6, 10), (1, 3, 1), (9, 16, 5)):
        shapes = ((width, hidden), (width, hidden), (hidden, width))
        weights = MLPWeights(*(floats(rng, shape, np.float32) for shape in shapes))
        for limit in (None, 0.05, 0.7, 3.0):
            x = 2 * floats(rng, (tokens, hidden), dtype)
            said = f"swiglu of {list(x.shape)}, width {width}, limit {limit}"
            yield said, find("mlp").swiglu(x, weights, limit)


def _moe(rng: Rng, experts: int, hidden: int, width: int) -> MoEWeights:
    """Random weights of a router and its experts."""
    up, down = (experts, width, hidden), (experts, hidden, width)
    shapes = ((experts, hidden), (experts,), up, up, down)
    return MoEWeights(*(floats(rng, shape, np.float32) for shape in shapes))


def the_router_chooses_and_weighs(find: Find, rng: Rng, dtype: DTypeLike) -> Shown:
    """With a bias and without, all experts chosen, one chosen, and experts that are equal."""
    for tokens, experts, top_k in ((6, 7, 3), (1, 4, 1), (5, 3, 3), (9, 16, 4)):
        weights, x = _moe(rng, experts, 8, 2), floats(rng, (tokens, 8), dtype)
        spec = MoESpec(experts, top_k, 2, 3, 2.5, True)
        for bias in (weights.router_bias, None):
            said = f"route, {top_k} of {experts}, {'no ' if bias is None else ''}bias"
            its = weights._replace(router_bias=bias)
            yield from watched(said, find("moe").route, x, its, spec)
        equal = weights._replace(gate=np.ones((experts, 8), np.float32), router_bias=None)
        yield "route, all experts equal", find("moe").route(x, equal, spec)


def the_chosen_experts_are_added_up(find: Find, rng: Rng, dtype: DTypeLike) -> Shown:
    """An expert that nobody chose is never read: here it is not even a number."""
    for tokens, experts, top_k, limit in ((6, 7, 3, None), (1, 5, 2, 0.5), (12, 4, 1, 2.0)):
        weights, x = _moe(rng, experts, 6, 4), floats(rng, (tokens, 6), dtype)
        ids = np.sort([rng.permutation(experts - 1)[:top_k] for _ in range(tokens)], axis=-1)
        for stack in weights[2:]:
            np.asarray(stack)[experts - 1] = np.nan
        choice = Choice(ids, rng.random(ids.shape).astype(dtype))
        said = f"experts, {tokens} tokens, {top_k} of {experts}, limit {limit}"
        yield said, find("moe").experts(x, weights, choice, limit)


def a_block_of_each_kind(find: Find, rng: Rng, dtype: DTypeLike) -> Shown:
    """Dense and MoE, full and sliding, with the clamps that each has."""
    for name in ("odd", "tiny"):
        config = shipped(name)
        for spec in config.layers:
            weights = block_weights(spec, config.hidden_size, drawn(rng))
            x = floats(rng, (10, config.hidden_size), dtype)
            table = rotations([spec], 5, 10, dtype)[spec.rope]
            said = f"block {name} {spec.name}"
            yield from watched(said, find("model").block, x, weights, spec, table, EPS)


def layers_run_in_order_and_go_on_from_caches(find: Find, rng: Rng, dtype: DTypeLike) -> Shown:
    """A text at once, and the same text in three parts; some layers alone."""
    model, config = find("model"), shipped("odd")
    weights, tokens = assemble(config, drawn(rng)), rng.integers(200, size=17).tolist()
    yield from watched("decoder", model.decoder, tokens, weights, config, dtype)
    caches = find("cache").new_caches(config.layers, dtype, 0, 9)
    for a, b in ((0, 9), (9, 10), (10, 17)):
        x = model.decoder(tokens[a:b], weights, config, dtype, caches)
        yield f"decoder, tokens {a} to {b - 1} with caches", x
    x, part = floats(rng, (6, config.hidden_size), dtype), slice(1, 3)
    arguments = (x, weights.layers[part], config.layers[part], 30, EPS)
    yield from watched("run_layers 1 to 2 from position 30", model.run_layers, *arguments)
