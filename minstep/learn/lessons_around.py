"""What the exercises around the layers run: config, caches, drafts, files, cost (1, 8 to 10, 14).

Each function is a scene: minstep/learn/scenes.py says what becomes of it.
Checked by: tests/learn/test_exercise.py
"""

import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import DTypeLike

from minstep.config import FULL, SLIDING
from minstep.fast.bf16 import to_bf16
from minstep.fast.fp8 import FP8Array
from minstep.learn.scenes import Rng, Shown, drawn, floats, refused, shipped, watched
from minstep.model import rotations
from minstep.parity.variants import Find
from minstep.sampling import GREEDY, Sampling
from minstep.store.config_file import find_config, read_config
from minstep.store.random_checkpoint import Form, save_random
from minstep.weights import assemble


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
        said = refused(find("config").parse_config, change, naming=named)
        yield f"tiny with {key} {value!r:.40}", said


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
            said = f"{name}, append {n}"
            yield f"{said}: keys", past.keys[:, -seen:]
            yield f"{said}: values", past.values[:, -seen:]
            yield f"{said}: end", (past.start + past.keys.shape[1], made.end)
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


def each_depth_has_tensors_of_its_own(find: Find, rng: Rng, dtype: DTypeLike) -> Shown:
    """Which tensor of the checkpoint stands where, and of which shape it must be."""
    config = shipped("tiny")
    for spec in config.mtp_layers:
        for head in ((320, 64), "lm_head.weight"):
            made = find("weights").mtp_weights(spec, 64, lambda *asked: asked, head)
            yield f"mtp_weights of {spec.name}, head {head}", made
    yield "assemble", find("weights").assemble(config, lambda *asked: asked)


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
        for said, part in (("whole", stored), ("rows 2 to 5", stored[2:6])):
            out = np.empty(part.shape, np.float32)
            part.into(out)
            yield f"FP8Array.into, blocks {rows} x {columns}, {said}", out
        stack = fp8.FP8Array(bits[None], scales[None], (rows, columns), "w")
        yield f"FP8Array.into, a stack, blocks {rows} x {columns}", np.asarray(stack)
    bits[5, 3] = 0xFF
    bad, out = fp8.FP8Array(bits, scales, (4, 7), "w"), np.empty((7, 254), np.float32)
    yield "FP8Array.into of a NaN", refused(bad.into, out, naming="w")


def weights_become_the_nearest_fp8_codes(find: Find, rng: Rng, dtype: DTypeLike) -> Shown:
    """Every block reaches the largest code; halfway between two, the even code is taken."""
    fp8, positive = find("fast.fp8"), np.arange(0x7F, dtype=np.uint8)
    values = np.asarray(FP8Array(positive[None], np.ones((1, 1), np.float32), (1, 127), ""))[0]
    for said, x in (("codes", values), ("middles", (values[1:] + values[:-1]) / 2)):
        x = np.concatenate((x, -x, [448, -448])).astype(np.float32)[None]
        yield f"to_fp8 of {said}", fp8.to_fp8(x, (1, x.size))
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


def parameters_are_counted_by_part(find: Find, rng: Rng, dtype: DTypeLike) -> Shown:
    """What a model has in all, by part, and what one token passes through."""
    for name in ("step-3.5-flash", "tiny", "odd", "no_extras"):
        report = find("store.inspect").inspect(find_config(name))
        counts = {part: count["parameters"] for part, count in report["parts"].items()}
        yield f"{name}: parts", sorted(counts.items())
        yield f"{name}: active", report["active_parameters_per_token"]
