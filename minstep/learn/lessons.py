"""The exercises, a chapter each: which functions are to be written, and the scenes that check them.

A scene runs functions of one chapter; scenes.py compares what the reader's make of it with the
package's own. The scenes stand in the order of the chapters, the table of exercises is last.
Checked by: tests/learn/test_exercise.py
"""

import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike

from minstep.attention import whole
from minstep.cache import Past
from minstep.config import FULL, SLIDING, Llama3Scaling, MoESpec, RopeSpec
from minstep.fast.bf16 import BF16Array, to_bf16
from minstep.fast.fp8 import FP8Array
from minstep.learn.scenes import Rng, Scene, Shown, drawn, floats, refused, shipped, watched
from minstep.mlp import MLPWeights
from minstep.model import rotations
from minstep.moe import Choice, MoEWeights
from minstep.parity.trace import Recorder, Trace
from minstep.parity.variants import Find
from minstep.rope import Rotation
from minstep.sampling import GREEDY, Sampling
from minstep.store.config_file import find_config, read_config
from minstep.store.random_checkpoint import Form, save_random
from minstep.tap import Array, Tap
from minstep.text.tokenizer import byte_level_tokenizer
from minstep.weights import Shape, assemble, block_weights, tensor_shapes

PLANT = 13  # the chapter where no function is missing, but a bug is planted
CONFIGS = ("tiny", "odd", "no_extras")
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


def each_layer_gets_what_the_config_says_of_it(find: Find, rng: Rng, dtype: DTypeLike) -> Shown:
    """Every shipped config, and tiny with keys that are absent, single, or of another kind."""
    parse = find("config").parse_config
    for name in ("tiny", "odd", "no_extras", "long", "step-3.5-flash"):
        yield name, parse(read_config(name)[0])
    raw = read_config("tiny")[0]
    other, inner = raw["attention_other_setting"], raw["rope_scaling"]
    for change in (
        {"rope_theta": 7000.0, "swiglu_limits": 2.0, "swiglu_limits_shared": None},
        {"attention_other_setting": None},
        {"attention_other_setting": other | {"attention_type": FULL, "num_attention_groups": 3}},
        {"yarn_only_types": [SLIDING]},
        {"yarn_only_types": [FULL, SLIDING]},
        {"rope_scaling": None},
        {"rope_scaling": {"rope_type": "default"}},
        {"rope_scaling": {**inner, "factor": 3.0, "low_freq_factor": 2.0}},
        {"moe_layers_enum": [3, 1], "use_moe_router_bias": False},
        {"use_moe": False, "moe_layers_enum": "", "use_head_wise_attn_gate": False},
    ):
        yield f"tiny with {change}", parse(raw | change)
    absent = {key: value for key, value in raw.items() if key != "yarn_only_types"}
    yield "tiny without yarn_only_types", parse(absent)


def settings_that_cannot_be_are_refused(find: Find, rng: Rng, dtype: DTypeLike) -> Shown:
    """With the name of the key."""
    raw, bad = read_config("tiny")[0], ["full"] * 11
    for key, value, named in (
        ("layer_types", bad, "layer_types[0]"),
        ("partial_rotary_factors", 1.5, "partial_rotary_factors[0]"),
        ("partial_rotary_factors", 0.2, "partial_rotary_factors[0]"),
        ("rope_theta", [5e6] * 3, "rope_theta"),
        ("num_attention_heads", 5, "num_attention_heads"),
        ("attention_other_setting", {"attention_type": "none"}, "attention_type"),
        ("rope_scaling", {"rope_type": "yarn"}, "rope_type"),
        ("yarn_only_types", ["all"], "yarn_only_types"),
    ):
        change = raw | {key: value}
        refusal = refused(find("config").parse_config, change, naming=named)
        yield f"tiny with {key} {value!r:.40}", refusal


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
            what = f"visible({first}, {count}, {start}, {keys}, {window})"
            yield what, find("attention").visible(first, count, start, keys, window)


def _past(rng: Rng, shape: Shape, dtype: DTypeLike, start: int) -> Past:
    """Random keys and values [G, S, K] from position `start` on."""
    return Past(floats(rng, shape, dtype), floats(rng, shape, dtype), start)


def query_heads_share_key_value_heads(find: Find, rng: Rng, dtype: DTypeLike) -> Shown:
    """Heads g*R to g*R + R - 1 read head g; keys may begin after position 0."""
    for tokens, heads, groups, width in HEADS:
        for start, before, window in ((0, 0, None), (0, 3, None), (4, 3, 4), (0, 0, 2)):
            q = floats(rng, (tokens, heads, width), dtype)
            past = _past(rng, (groups, before + tokens, width), dtype, start)
            what = f"attend, q {list(q.shape)}, {groups} groups, {before} before, window {window}"
            arguments = (q, past, start + before, window)
            yield from watched(what, find("attention").attend, *arguments)


def attention_of_each_kind_of_layer(find: Find, rng: Rng, dtype: DTypeLike) -> Shown:
    """Full and sliding layers, with and without a gate, at once and on from a cache."""
    for name in ("odd", "tiny"):
        config = shipped(name)
        for spec in config.layers[:2]:
            attention = find("attention").self_attention
            weights = block_weights(spec, config.hidden_size, drawn(rng)).self_attn
            x = floats(rng, (13, config.hidden_size), dtype)
            table = rotations([spec], 0, 13, dtype)[spec.rope]
            what = f"self_attention of {spec.kind}, {spec.heads} heads, {spec.groups} groups"
            yield from watched(what, attention, x, weights, spec, table, EPS)
            ungated = weights._replace(g_proj=None)
            yield f"{what}, no gate", attention(x, ungated, spec, table, EPS)
            (cache,) = find("cache").new_caches([spec], dtype, 0, 9)
            for a, b in ((0, 9), (9, 10), (10, 13)):
                part = Rotation(table.cos[a:b], table.sin[a:b])
                row = attention(x[a:b], weights, spec, part, EPS, cache)
                yield f"{what}, tokens {a} to {b - 1} with a cache", row


def attention_in_blocks_is_the_same(find: Find, rng: Rng, dtype: DTypeLike) -> Shown:
    """More queries and more keys than a block has, and a window that leaves blocks out."""
    for tokens, keys, window in ((5, 5, None), (600, 600, None), (3, 4200, None), (700, 2900, 90)):
        q = floats(rng, (tokens, 4, 6), dtype)
        past = _past(rng, (2, keys, 6), dtype, 10)
        what = f"attend_in_blocks, {tokens} queries, {keys} keys, window {window}"
        first = 10 + keys - tokens
        yield what, find("attention").attend_in_blocks(q, past, first, window)
    q = floats(rng, (1500, 2, 6), dtype)
    past = whole(q[:, :1], q[:, 1:])
    yield "attend, 1500 queries", find("attention").attend(q, past, 0, None)


def both_factors_are_held_within_the_limit(find: Find, rng: Rng, dtype: DTypeLike) -> Shown:
    """silu(gate) from above, up from both sides; and no limit at all."""
    for tokens, hidden, width in ((4, 6, 10), (1, 3, 1), (9, 16, 5)):
        shapes = ((width, hidden), (width, hidden), (hidden, width))
        weights = MLPWeights(*(floats(rng, shape, np.float32) for shape in shapes))
        for limit in (None, 0.05, 0.7, 3.0):
            x = 2 * floats(rng, (tokens, hidden), dtype)
            what = f"swiglu of {list(x.shape)}, width {width}, limit {limit}"
            yield what, find("mlp").swiglu(x, weights, limit)


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
            what = f"route, {top_k} of {experts}, {'no ' if bias is None else ''}bias"
            biased = weights._replace(router_bias=bias)
            yield from watched(what, find("moe").route, x, biased, spec)
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
        what = f"experts, {tokens} tokens, {top_k} of {experts}, limit {limit}"
        yield what, find("moe").experts(x, weights, choice, limit)


def a_block_of_each_kind(find: Find, rng: Rng, dtype: DTypeLike) -> Shown:
    """Dense and MoE, full and sliding, with the clamps that each has."""
    for name in ("odd", "tiny"):
        config = shipped(name)
        for spec in config.layers:
            weights = block_weights(spec, config.hidden_size, drawn(rng))
            x = floats(rng, (10, config.hidden_size), dtype)
            table = rotations([spec], 5, 10, dtype)[spec.rope]
            what = f"block {name} {spec.name}"
            yield from watched(what, find("model").block, x, weights, spec, table, EPS)


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


def caches_hold_what_a_query_can_see(find: Find, rng: Rng, dtype: DTypeLike) -> Shown:
    """Appends and roll-backs; of a window only what a query can see is compared."""
    cache = find("cache")
    for window, slack in ((None, 0), (4, 0), (4, 3), (1, 2), (30, 3)):
        name = "FullCache" if window is None else f"WindowCache {window} + {slack}"
        made = (
            cache.FullCache(2, 3, dtype)
            if window is None
            else cache.WindowCache(2, 3, dtype, window, slack, longest=6)
        )
        for n, (count, back) in enumerate(((6, 0), (1, 0), (4, 3), (4, 2), (1, 0), (6, 1)) * 3):
            past = made.append(*floats(rng, (2, count, 2, 3), dtype))
            seen = past.keys.shape[1] if window is None else window - 1 + count
            what = f"{name}, append {n}"
            yield f"{what}: keys", past.keys[:, -seen:]
            yield f"{what}: values", past.values[:, -seen:]
            yield f"{what}: end", (past.start + past.keys.shape[1], made.end)
            made.truncate(made.end - min(back, slack if window else back))
        if window is not None:
            most = 2 * 2 * 3 * (window - 1 + slack + 6) * np.dtype(dtype).itemsize
            yield f"{name}: is bounded", made.nbytes <= most


def what_was_dropped_cannot_come_back(find: Find, rng: Rng, dtype: DTypeLike) -> Shown:
    """Nor what was never there."""
    cache = find("cache")
    for name, made in (
        ("FullCache", cache.FullCache(1, 2, dtype)),
        ("WindowCache", cache.WindowCache(1, 2, dtype, 5, 2, longest=3)),
    ):
        for _ in range(12):
            made.append(*floats(rng, (2, 3, 1, 2), dtype))
        yield f"{name}: truncate to 37 of 36", refused(made.truncate, 37)
        yield f"{name}: truncate to 3 of 36", refused(made.truncate, 3)
        yield f"{name}: truncate to 34", refused(made.truncate, 34)
    barely = made.start + 1  # a query there would see only one position before it
    yield f"WindowCache: truncate to {barely}", refused(made.truncate, barely)


def each_depth_has_tensors_of_its_own(find: Find, rng: Rng, dtype: DTypeLike) -> Shown:
    """Which tensor of the checkpoint stands where, and of which shape it must be."""
    config = shipped("tiny")
    for spec in config.mtp_layers:
        for head in ((320, 64), "lm_head.weight"):
            made = find("weights").mtp_weights(spec, 64, lambda *asked: asked, head)
            yield f"mtp_weights of {spec.name}, head {head}", made
    yield "assemble", find("weights").assemble(config, lambda *asked: asked)


def a_depth_mixes_a_state_with_the_next_token(find: Find, rng: Rng, dtype: DTypeLike) -> Shown:
    """Each depth and its head alone, then all of them over a text."""
    mtp = find("mtp")
    for name in ("odd", "tiny"):
        config = shipped(name)
        weights, D = assemble(config, drawn(rng)), config.hidden_size
        for layer, spec in zip(weights.mtp, config.mtp_layers, strict=True):
            x, tokens = 3 * floats(rng, (9, D), dtype), rng.integers(200, size=9).tolist()
            table = rotations([spec], 0, 9, dtype)[spec.rope]
            given = (tokens, x, layer, weights.embed_tokens, spec, table, 1e-5)
            yield from watched(f"mtp_depth {name} {spec.name}", mtp.mtp_depth, *given)
            yield from watched(f"mtp_head {name} {spec.name}", mtp.mtp_head, x, layer, 1e-5)
        for count in (9, 3, 1):
            text = (tokens[:count], x[:count], weights, config)
            yield from watched(f"mtp_forward {name}, {count} tokens", mtp.mtp_forward, *text)


def drafts_leave_the_distribution_alone(find: Find, rng: Rng, dtype: DTypeLike) -> Shown:
    """The rule itself, drafts that are certainly kept or not, and how often tokens come."""
    sampling = find("sampling")
    for _ in range(20):
        q, p = (rng.dirichlet(np.full(6, 0.5)) for _ in range(2))
        draft = int(rng.integers(6))
        yield f"acceptance of {draft}, q {q}, p {p}", sampling.acceptance(draft, q, p)
    logits = floats(rng, (4, 6), np.float64)
    best = logits.argmax(axis=-1).tolist()
    for drafts in ([], best[:3], best[:1], [best[0], 5 - best[1]], [5 - best[0], 0, 0]):
        sure = [np.eye(6)[draft] for draft in drafts]
        kept = sampling.verify(drafts, sure, logits, [1, 2], GREEDY, np.random.default_rng(1))
        yield f"verify {drafts}, best {best}", tuple(map(int, kept))
    how, counts = Sampling(1.0), np.zeros(6)
    q, (p, *_) = rng.dirichlet(np.ones(6)), (sampling.distribution(x, [], how) for x in logits)
    for _ in range(2000):
        draft = int(rng.choice(6, p=q))
        kept, token = sampling.verify([draft], [q], logits[:2], [], how, rng)
        counts[draft if kept else token] += 1
    yield "verify, 2000 times: is distributed as p", float(np.abs(counts / 2000 - p).max()) < 0.05


def bfloat16_is_the_upper_half_of_float32(find: Find, rng: Rng, dtype: DTypeLike) -> Shown:
    """Ties go to even, both zeros stay, and every one of the bits comes back."""
    bits = rng.integers(1 << 32, size=(50, 20), dtype=np.uint32)
    bits[:20] &= 0xFFFF0000
    bits[:10] |= 0x8000  # exactly between two
    bits[(bits & 0x7F800000) == 0x7F800000] = 0x80000000  # no infinities
    bits[(bits & 0x7F800000) == 0x7F000000] = 0
    x = bits.view(np.float32)
    yield "to_bf16", find("fast.bf16").to_bf16(x)
    out = np.empty(x.shape, np.float32)
    find("fast.bf16").BF16Array(to_bf16(x)).into(out)
    yield "BF16Array.into, its bits", out.view(np.uint32)


def an_fp8_code_times_the_scale_of_its_block(find: Find, rng: Rng, dtype: DTypeLike) -> Shown:
    """All codes, blocks that are cut, large scales, slices of rows, stacks; a NaN is named."""
    fp8, codes = find("fast.fp8"), np.delete(np.arange(256, dtype=np.uint8), [0x7F, 0xFF])
    for rows, columns, largest in ((1, 254, 1.0), (3, 100, 1.0), (4, 7, 1000.0)):
        bits = np.stack([rng.permutation(codes) for _ in range(7)])
        blocks = (-(-7 // rows), -(-254 // columns))
        scales = (largest * rng.random(blocks)).astype(np.float32)
        stored = fp8.FP8Array(bits, scales, (rows, columns), "w")
        for what, part in (("whole", stored), ("rows 2 to 5", stored[2:6])):
            out = np.empty(part.shape, np.float32)
            part.into(out)
            yield f"FP8Array.into, blocks {rows} x {columns}, {what}", out
        stack = fp8.FP8Array(bits[None], scales[None], (rows, columns), "w")
        yield f"FP8Array.into, a stack, blocks {rows} x {columns}", np.asarray(stack)
    bits[5, 3] = 0xFF
    bad, out = fp8.FP8Array(bits, scales, (4, 7), "w"), np.empty((7, 254), np.float32)
    yield "FP8Array.into of a NaN", refused(bad.into, out, naming="w")


def weights_become_the_nearest_fp8_codes(find: Find, rng: Rng, dtype: DTypeLike) -> Shown:
    """Every block reaches the largest code; halfway between two, the even code is taken."""
    fp8, positive = find("fast.fp8"), np.arange(0x7F, dtype=np.uint8)
    values = np.asarray(FP8Array(positive[None], np.ones((1, 1), np.float32), (1, 127), ""))[0]
    for what, x in (("codes", values), ("middles", (values[1:] + values[:-1]) / 2)):
        x = np.concatenate((x, -x, [448, -448])).astype(np.float32)[None]
        yield f"to_fp8 of {what}", fp8.to_fp8(x, (1, x.size))
    for shape, block in (((6, 9), (4, 4)), ((2, 5, 5), (2, 3)), ((3, 3), (8, 8))):
        x = floats(rng, shape, np.float32)
        x[..., :2, :2] = 0
        yield f"to_fp8 of {list(shape)}, blocks {list(block)}", fp8.to_fp8(x, block)


def a_checkpoint_is_read_from_disk(find: Find, rng: Rng, dtype: DTypeLike) -> Shown:
    """bfloat16 and FP8, written by minstep itself."""
    raw, config, _ = read_config("odd")
    for stored in ("bfloat16", "fp8"):
        with tempfile.TemporaryDirectory() as folder:
            save_random(raw, config, np.random.default_rng(2), Path(folder) / "c", Form(stored))
            checkpoint = find("store.checkpoint").open_checkpoint(Path(folder) / "c")
            weights = checkpoint.weights()
            hidden = find("model").decoder([5, 17, 9], weights, checkpoint.config, dtype)
            yield f"decoder from a {stored} checkpoint", hidden
            del weights, checkpoint  # its memory map, before the folder goes


def shapes_fit_where_only_form_differs(find: Find, rng: Rng, dtype: DTypeLike) -> Shown:
    """Axes of size 1 in front, and heads that are merged."""
    x = floats(rng, (6, 4, 5), dtype)
    for given in (x, x[None], x[None, None], x.reshape(6, 20), x.reshape(24, 5), x[:, :, :4]):
        for shape in ((6, 4, 5), (1, 6, 4, 5), (6, 20), (120,)):
            yield f"fitted {given.shape} to {shape}", find("parity.compare").fitted(given, shape)
    yield "fitted (20,) to (1, 20)", find("parity.compare").fitted(x[0].reshape(20), (1, 20))


def pairs_of_tensors_are_compared(find: Find, rng: Rng, dtype: DTypeLike) -> Shown:
    """Equal, off by rounding, off in one place, zero, of other shapes, as sets of experts."""
    compare, x = find("parity.compare").compare, floats(rng, (6, 4, 5), dtype)
    one = x.copy()
    one[3, 1, 2] += 1
    pairs = {
        "equal": (x, x),
        "off by rounding": (x, x * (1 + 1e-4 * rng.random(x.shape)).astype(dtype)),
        "off in one place": (x, one),
        "against zeros": (x, np.zeros_like(x)),
        "zeros against": (np.zeros_like(x), x),
        "with a batch axis": (x, one[None]),
        "with merged heads": (x, one.reshape(6, 20)),
        "turned": (x, x.swapaxes(1, 2)),
        "shorter": (x, x[:5]),
        "large": (1e30 * x, 1e30 * one),
        "empty": (x[:0], x[:0]),
    }
    for what, (ours, theirs) in pairs.items():
        for tolerance, scale in ((1e-3, None), (0.5, None), (1e-3, 50.0)):
            yield (
                f"compare {what}, {tolerance}, {scale}",
                compare("", ours, theirs, tolerance, scale),
            )
    ids = np.array([[1, 4, 6], [0, 2, 3]])
    for theirs in (ids[:, ::-1], np.array([[6, 1, 5], [0, 2, 3]])):
        name = "model.layers.3.moe.ids"
        yield f"compare experts {theirs.tolist()}", compare(name, ids, theirs, 1e-3)


def rows_are_measured_by_their_own_length(find: Find, rng: Rng, dtype: DTypeLike) -> Shown:
    """Massive columns are left out, a row of zeros is no exception, and other tensors have none."""
    row_errors, x = find("parity.compare").row_errors, floats(rng, (5, 40), dtype)
    x[:, 7] *= 1000
    x[2] *= 1e-3
    x[4] = 0
    theirs = x + floats(rng, x.shape, dtype) * 1e-2
    for name in ("model.layers.0", "model.layers.3.moe", "model.layers.3.moe.gate", "lm_head"):
        yield f"row_errors of {name}", row_errors(name, x, theirs)
    yield "row_errors of narrow rows", row_errors("model.layers.0", x[:, :9], theirs[:, :9])


def surprise_is_minus_log_probability(find: Find, rng: Rng, dtype: DTypeLike) -> Shown:
    """Of small logits and of huge ones; and the mean of it."""
    loss, targets = find("train.loss"), [4, 0, 2]
    for size in (1, 30, 3000):
        logits = size * floats(rng, (3, 5), dtype)
        yield f"surprise, logits of {size}", loss.surprise(logits, targets)
        yield f"cross_entropy, logits of {size}", loss.cross_entropy(logits, targets)


def the_objective_weighs_the_depths(find: Find, rng: Rng, dtype: DTypeLike) -> Shown:
    """With three MTP depths, one and none; a text that is too short for them is refused."""
    objective = find("train.loss").objective
    for name in ("tiny", "odd", "no_extras"):
        config = shipped(name)
        weights, tokens = assemble(config, drawn(rng)), rng.integers(120, size=7).tolist()
        yield f"objective of {name}", objective(tokens, weights, config, 0.3, dtype, Tap())
        least = tokens[: len(weights.mtp) + 1]
        refusal = refused(objective, least, weights, config, 0.3, dtype, Tap())
        yield f"objective of {name}, {len(least)} tokens", refusal


def a_product_sends_its_gradient_back(find: Find, rng: Rng, dtype: DTypeLike) -> Shown:
    """Also where one side was repeated along the other's axes; vectors are refused."""
    matmul = find("train.tape").matmul
    for a, b in (
        ((3, 4), (4, 5)),
        ((2, 3, 4), (4, 5)),
        ((3, 4), (2, 4, 1)),
        ((2, 1, 3, 4), (6, 4, 5)),
    ):
        x, y = floats(rng, a, dtype), floats(rng, b, dtype)
        value, pulls = matmul(x, y)
        yield f"matmul {a} @ {b}", value
        for side, pull in zip("ab", pulls, strict=True):
            yield f"matmul {a} @ {b}: gradient of {side}", pull(floats(rng, value.shape, dtype))
    refusal = "no error"
    try:
        matmul(floats(rng, (4,), dtype), floats(rng, (4, 5), dtype))
    except TypeError:
        refusal = "TypeError"
    yield "matmul of a vector", refusal


def gradients_of_a_whole_model(find: Find, rng: Rng, dtype: DTypeLike) -> Shown:
    """The loss of a text goes back to every tensor."""
    tape, config = find("train.tape"), shipped("odd")
    names, get = tensor_shapes(config), drawn(rng)
    stored = {name: np.asarray(get(name, shape), dtype) for name, shape in names.items()}
    variables = {name: tape.Variable(x) for name, x in stored.items()}
    weights = assemble(config, lambda name, _: variables[name])
    tap = find("train.balance").Counter(config)  # it keeps attention from writing in place
    losses = find("train.loss").objective([5, 17, 9, 9, 3], weights, config, 0.3, dtype, tap)
    yield "loss", losses.total.value
    tape.backward(losses.total)
    gradients: dict[str, Array] = {}
    for name, variable in variables.items():
        if variable.gradient is not None:
            gradients[f"gradient of {name}"] = np.asarray(variable.gradient)
    yield "gradients", len(gradients)
    yield "backward", gradients


def singular_values_become_one(find: Find, rng: Rng, dtype: DTypeLike) -> Shown:
    """Wide, tall and stacked matrices, fewer steps, and zeros."""
    orthogonalised = find("train.optimizer").orthogonalised
    for shape in ((4, 7), (9, 3), (3, 5, 4), (6, 6)):
        x = floats(rng, shape, dtype)
        for steps in (1, 3, 6):
            yield f"orthogonalised {list(shape)}, {steps} steps", orthogonalised(x.copy(), steps)
    yield "orthogonalised zeros", orthogonalised(np.zeros((3, 4), dtype))


def biases_lift_experts_that_lack_tokens(find: Find, rng: Rng, dtype: DTypeLike) -> Shown:
    """In place; an expert that is exactly at its share stays, and a layer without bias is left."""
    layers = [f"model.layers.{n}.moe" for n in range(3)]
    counts = {layer: rng.integers(0, 9, size=6) for layer in layers}
    counts[layers[1]] = np.array([2, 2, 3, 1, 2, 2])
    biases = {f"{layer}.router_bias": floats(rng, (6,), np.float32) for layer in layers[:2]}
    find("train.balance").balance(biases, counts, 0.01)
    yield "balance", biases


def the_rate_warms_up_and_falls(find: Find, rng: Rng, dtype: DTypeLike) -> Shown:
    """Runs of several lengths, one step among them, and steps after the end."""
    rate_at = find("train.optimizer").rate_at
    for steps, warmup, floor in ((20, 5, 0.1), (20, 0, 0.0), (1, 1, 0.1), (3, 8, 0.2), (1, 0, 0.5)):
        for step in range(steps + 3):
            yield (
                f"rate_at({step}, {steps}, {warmup}, {floor})",
                rate_at(step, steps, warmup, floor),
            )


def parameters_are_counted_by_part(find: Find, rng: Rng, dtype: DTypeLike) -> Shown:
    """What a model has in all, by part, and what one token passes through."""
    for name in ("step-3.5-flash", "tiny", "odd", "no_extras"):
        report = find("store.inspect").inspect(find_config(name))
        counts = {part: count["parameters"] for part, count in report["parts"].items()}
        yield f"{name}: parts", sorted(counts.items())
        yield f"{name}: active", report["active_parameters_per_token"]


def filters_apply_in_their_order(find: Find, rng: Rng, dtype: DTypeLike) -> Shown:
    """Each alone and all at once, with equal logits among them."""
    distribution = find("sampling").distribution
    for how in (
        Sampling(),
        Sampling(1.0),
        Sampling(0.5, top_k=3),
        Sampling(2.0, top_p=0.7),
        Sampling(1.0, min_p=0.3),
        Sampling(1.0, repetition_penalty=1.7),
        Sampling(0.8, top_k=5, top_p=0.9, min_p=0.05, repetition_penalty=1.3),
    ):
        for size in (1, 4):
            logits = size * floats(rng, (9,), dtype)
            logits[5] = logits[2] = logits.max()
            yield f"distribution, {how}", distribution(logits, [2, 7, 7], how)


def draws_follow_the_probabilities(find: Find, rng: Rng, dtype: DTypeLike) -> Shown:
    """One thing that is certain, and how often each of several comes."""
    draw, counts = find("sampling").draw, np.zeros(5)
    for token in range(5):
        yield f"draw of a certain {token}", draw(np.eye(5)[token], rng)
    p = np.array([0.1, 0, 0.5, 0.15, 0.25])
    for _ in range(3000):
        counts[draw(p, rng)] += 1
    yield "draw, 3000 times: what has no chance", float(counts[1])
    yield "draw, 3000 times: is distributed as p", bool(np.abs(counts / 3000 - p).max() < 0.05)


def characters_come_whole_and_stops_do_not(find: Find, rng: Rng, dtype: DTypeLike) -> Shown:
    """Bytes of a character, broken ones, special tokens, and stops across tokens."""
    tokenizer = byte_level_tokenizer()
    text = "Héllo 日本 🙂 <|im_end|>stop it, ststop"
    for stops in ((), ("stop",), ("it", "stop it"), ("zz", "日"), ("st", "sto")):
        stream = find("text.tokenizer").StreamingText(tokenizer, stops)
        ids = tokenizer.encode(text).ids
        ids[3:3] = tokenizer.encode("é").ids[:1]  # the first half of a character
        for n, token in enumerate([0, *ids, 9999]):
            yield f"StreamingText {stops}, token {n}", stream.add(token)
            yield f"StreamingText {stops}, stopped at {n}", stream.stopped
        yield f"StreamingText {stops}, rest", stream.finish()
    for text, tag in (
        ("ab<th", "<think>"),
        ("<<", "<think>"),
        ("x", "x"),
        ("", "ab"),
        ("aaa", "aab"),
    ):
        yield f"unfinished({text!r}, {tag!r})", find("text.reply").unfinished(text, tag)


def a_message_is_the_same_however_it_is_cut(find: Find, rng: Rng, dtype: DTypeLike) -> Shown:
    """Thinking, content and a call, in pieces of one character, of five, and at once."""
    call = (
        "<tool_call>\n<function=look>\n<parameter=at>\nsky\n</parameter>\n</function>\n</tool_call>"
    )
    text = f"<think>\nso <thi\n</think>\nI look < up.\n{call}\n{call} done <tool_"
    for size in (1, 5, len(text)):
        stream = find("text.reply").ChatStream()
        for n in range(0, len(text), size):
            yield f"ChatStream, pieces of {size}, at {n}", stream.feed(text[n : n + size])
        yield f"ChatStream, pieces of {size}, rest", stream.finish()


def conversations_become_prompts(find: Find, rng: Rng, dtype: DTypeLike) -> Shown:
    """Thinking of earlier turns goes, but not after the last real question."""

    def message(role: str, content: str, **more: Any) -> dict[str, Any]:
        return {"role": role, "content": content, **more}

    call = {"type": "function", "function": {"name": "look", "arguments": {"at": "sky"}}}
    thought = "<think>\nhm\n</think>\nwell"
    disguised = "<tool_response>blue</tool_response>"
    talks = (
        [message("user", "hi")],
        [message("system", "be brief"), message("user", "hi"), message("assistant", thought)],
        [message("user", "a"), message("assistant", thought), message("user", "b")],
        [
            message("user", "a"),
            message("assistant", "x", reasoning_content="why", tool_calls=[call]),
        ]
        + [message("tool", "blue"), message("assistant", "y", reasoning_content="so")],
        [message("user", "a"), message("assistant", thought), message("user", disguised)],
        [message("assistant", "no question", reasoning_content="so")],
    )
    for n, messages in enumerate(talks):
        for prompts in (True, False):
            what = f"render, conversation {n}, {'with' if prompts else 'without'} a start"
            yield what, find("text.prompt").render(messages, None, prompts)


def every_tensor_of_whole_models(find: Find, rng: Rng, dtype: DTypeLike) -> Shown:
    """Each configuration, parsed, with random weights: a prompt through all layers and depths."""
    for name in CONFIGS:
        raw, real, _ = read_config(name)
        config = find("config").parse_config(raw)
        yield f"{name}: config", config
        weights = find("weights").assemble(config, drawn(rng))
        tokens = rng.integers(real.vocab_size, size=21).tolist()  # longer than any window
        trace: Trace = {}
        hidden = find("model").decoder(tokens, weights, config, dtype, tap=(tap := Recorder(trace)))
        logits = find("model").head(hidden, weights, config, tap)
        yield name, trace
        yield f"{name}: logits", logits
        trace.clear()
        drafts = find("mtp").mtp_forward(tokens, hidden, weights, config, tap)
        yield name, trace
        yield f"{name}: logits of the MTP depths", drafts


def decoding_with_caches_and_drafts(find: Find, rng: Rng, dtype: DTypeLike) -> Shown:
    """Greedy text in chunks and with drafts: which tokens come, and how many drafts are kept."""
    for name, count in (("drafts", 20), ("odd", 6)):
        config = find("config").parse_config(read_config(name)[0])
        weights = find("weights").assemble(config, drawn(rng))
        prompt = rng.integers(config.vocab_size, size=13).tolist()
        options = {"max_tokens": count, "dtype": dtype, "chunk": 4, "ignore_eos": True}
        steps = find("generate").steps(prompt, weights, config, rng, **options)
        for n, step in enumerate(steps):
            yield f"{name}: step {n}", step


# What ends nearly every exercise: whole models.
WHOLE: tuple[Scene, ...] = (every_tensor_of_whole_models, decoding_with_caches_and_drafts)


class Exercise(NamedTuple):
    """A chapter's title, the functions to write by module, methods with their class, its scenes."""

    title: str
    functions: dict[str, tuple[str, ...]]
    scenes: tuple[Scene, ...]


EXERCISES = {
    0: Exercise(
        "one token, in and out",
        {"model": ("embed", "head")},
        (
            token_ids_become_rows_of_the_table,
            ids_that_are_no_tokens_are_refused,
            states_become_logits,
            *WHOLE,
        ),
    ),
    1: Exercise(
        "the config and what is irregular",
        {"config": ("_layers", "_heads", "_scaling")},
        (
            each_layer_gets_what_the_config_says_of_it,
            settings_that_cannot_be_are_refused,
            *WHOLE,
        ),
    ),
    2: Exercise("the norm", {"norm": ("rms_norm",)}, (vectors_of_any_shape_are_normed, *WHOLE)),
    3: Exercise(
        "rotary position embedding",
        {"rope": ("inverse_frequencies", "rotation", "rotate")},
        (
            pairs_turn_at_their_frequencies,
            angles_grow_with_the_position,
            halves_of_a_head_are_rotated,
            *WHOLE,
        ),
    ),
    4: Exercise(
        "attention",
        {
            "activations": ("softmax",),
            "attention": ("self_attention", "visible", "attend", "attend_in_blocks"),
        },
        (
            softmax_and_sigmoid_bear_large_numbers,
            a_query_sees_itself_and_what_its_window_holds,
            query_heads_share_key_value_heads,
            attention_of_each_kind_of_layer,
            attention_in_blocks_is_the_same,
            *WHOLE,
        ),
    ),
    5: Exercise(
        "SwiGLU and its clamps",
        {"activations": ("sigmoid", "silu"), "mlp": ("swiglu",)},
        (
            softmax_and_sigmoid_bear_large_numbers,
            both_factors_are_held_within_the_limit,
            *WHOLE,
        ),
    ),
    6: Exercise(
        "router and experts",
        {"moe": ("route", "experts", "one_by_one", "at_once")},
        (the_router_chooses_and_weighs, the_chosen_experts_are_added_up, *WHOLE),
    ),
    7: Exercise(
        "block and decoder",
        {"model": ("block", "decoder", "run_layers")},
        (a_block_of_each_kind, layers_run_in_order_and_go_on_from_caches, *WHOLE),
    ),
    8: Exercise(
        "caches",
        {
            "cache": (
                "FullCache.append",
                "FullCache._make_room",
                "FullCache.truncate",
                "WindowCache.truncate",
            )
        },
        (
            caches_hold_what_a_query_can_see,
            what_was_dropped_cannot_come_back,
            layers_run_in_order_and_go_on_from_caches,
            *WHOLE[1:],
        ),
    ),
    9: Exercise(
        "drafts that change no text",
        {
            "weights": ("mtp_weights",),
            "mtp": ("mtp_depth", "mtp_head", "mtp_forward"),
            "sampling": ("acceptance", "verify"),
        },
        (
            each_depth_has_tensors_of_its_own,
            a_depth_mixes_a_state_with_the_next_token,
            drafts_leave_the_distribution_alone,
            *WHOLE,
        ),
    ),
    10: Exercise(
        "weights on disk",
        {
            "fast.bf16": ("BF16Array.into", "to_bf16"),
            "fast.fp8": ("FP8Array.into", "to_fp8", "_nearest"),
        },
        (
            bfloat16_is_the_upper_half_of_float32,
            an_fp8_code_times_the_scale_of_its_block,
            weights_become_the_nearest_fp8_codes,
            a_checkpoint_is_read_from_disk,
        ),
    ),
    11: Exercise(
        "comparing with another implementation",
        {"parity.compare": ("compare", "fitted", "row_errors")},
        (
            shapes_fit_where_only_form_differs,
            pairs_of_tensors_are_compared,
            rows_are_measured_by_their_own_length,
        ),
    ),
    12: Exercise(
        "training",
        {
            "train.loss": ("surprise", "objective"),
            "train.tape": ("matmul",),
            "train.optimizer": ("orthogonalised", "rate_at"),
            "train.balance": ("balance",),
        },
        (
            surprise_is_minus_log_probability,
            the_objective_weighs_the_depths,
            a_product_sends_its_gradient_back,
            gradients_of_a_whole_model,
            singular_values_become_one,
            biases_lift_experts_that_lack_tokens,
            the_rate_warms_up_and_falls,
        ),
    ),
    PLANT: Exercise("a planted bug", {}, WHOLE),
    14: Exercise(
        "what one token costs",
        {"store.inspect": ("_part", "_active")},
        (parameters_are_counted_by_part,),
    ),
    15: Exercise(
        "text, chat and sampling",
        {
            "sampling": ("distribution", "draw"),
            "text.reply": ("unfinished",),
            "text.tokenizer": ("StreamingText.add",),
            "text.prompt": ("_last_question", "_assistant"),
        },
        (
            filters_apply_in_their_order,
            draws_follow_the_probabilities,
            characters_come_whole_and_stops_do_not,
            a_message_is_the_same_however_it_is_cut,
            conversations_become_prompts,
            *WHOLE[1:],
        ),
    ),
}
