"""The formulas of what a pass costs, held to what the model's code multiplies and reads."""

import json
from collections import Counter
from typing import Any

import numpy as np
import pytest

from minstep.cache import FullCache, new_caches
from minstep.config import Config, parse_config
from minstep.cost.count import (
    FORMS,
    SCORES,
    WeightBytes,
    cache_bytes,
    computed_pairs,
    decoding_pass,
    experts_read,
    matrices,
    product_flops,
    score_flops,
    stored_bytes,
    visible_pairs,
    weight_bytes,
)
from minstep.model import decoder, head
from minstep.mtp import mtp_forward
from minstep.parity.trace import Recorder
from minstep.store.config_file import find_config, load_config
from minstep.store.inspect import inspect
from minstep.store.stages import PARTS
from tests.support.counting import NOTHING, Tally, counted_model
from tests.support.tiers import cases

FLOAT32 = WeightBytes(4, 4)
NAMES = ("tiny", "odd", "no_extras")
RELEASED = find_config("step-3.5-flash") / "config.json"


def drawn(seed: int) -> Config:
    """A configuration of random sizes: layers of both kinds, experts or none, drafts or none."""
    rng = np.random.default_rng(seed)
    raw = json.loads((find_config("odd") / "config.json").read_text(encoding="utf-8"))

    def among(*choices: Any) -> Any:
        return choices[rng.integers(len(choices))]

    raw |= {
        "hidden_size": among(12, 20, 40),
        "vocab_size": among(61, 97),
        "intermediate_size": among(24, 52),
        "head_dim": among(8, 12),
        "sliding_window": among(2, 5, 9),
        "partial_rotary_factors": [1.0] * len(raw["partial_rotary_factors"]),
        "moe_intermediate_size": among(6, 14),
        "share_expert_dim": among(6, 10),
        "use_moe": among(True, True, False),
        "use_moe_router_bias": among(True, False),
        "use_head_wise_attn_gate": among(True, False),
        "tie_word_embeddings": among(True, False),
    }
    if not raw["use_moe"]:
        raw["moe_layers_enum"] = ""
    groups = among(1, 2)
    other = {"num_attention_heads": groups * among(3, 5), "num_attention_groups": groups}
    raw["attention_other_setting"] = {"attention_type": "sliding_attention"} | other
    return parse_config(raw)


CONFIGS = [load_config(find_config(name)) for name in NAMES] + [drawn(seed) for seed in range(6)]
IDS = [*NAMES, *(f"drawn-{seed}" for seed in range(6))]
some_config = pytest.mark.parametrize("config", CONFIGS, ids=IDS)


def by_part(tally: Tally, config: Config, depth: int = 0) -> dict[str, int]:
    """Counted FLOPs by the parts of the formulas; those of no weight are SCORES."""
    found: Counter[str] = Counter()
    for name, flops in tally.flops.items():
        part = SCORES
        if name != NOTHING:
            (tensor,) = (t for t in matrices(config) if t.name == name and t.is_product)
            if tensor.depth != depth:
                continue
            part = tensor.part
        found[part] += flops
    return dict(found)


def read_bytes(tally: Tally) -> int:
    return sum(4 * tally.elements(name) for name in tally.read)


def chosen_tap() -> Recorder:
    return Recorder({}, lambda name: name.endswith(".ids"))


def mean_chosen(tap: Recorder, config: Config) -> float | None:
    """How many experts a layer's tokens chose, in the mean over MoE layers; None without any."""
    counts = [
        len(np.unique(tap.tensors[f"{spec.name}.moe.ids"])) for spec in config.layers if spec.moe
    ]
    return sum(counts) / len(counts) if counts else None


def prompt(config: Config, length: int, seed: int = 0) -> list[int]:
    """Tokens that are all different, so that each has a row of the embedding of its own."""
    return np.random.default_rng(seed).permutation(config.vocab_size)[:length].tolist()


@pytest.fixture(autouse=True)
def experts_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies of small experts have lost the names under which products are counted."""
    monkeypatch.setattr("minstep.moe.FEW", 0)


def test_experts_at_once_multiply_as_much(monkeypatch: pytest.MonkeyPatch) -> None:
    config, totals = CONFIGS[0], set[int]()
    for few in (0, 1 << 18):
        monkeypatch.setattr("minstep.moe.FEW", few)
        weights, tally = counted_model(config)
        decoder(prompt(config, 3), weights, config)
        totals.add(sum(tally.flops.values()))
    assert len(totals) == 1


@some_config
def test_a_pass_over_a_prompt_multiplies_and_reads_what_the_formulas_say(config: Config) -> None:
    weights, tally = counted_model(config)
    T, tap = 23, chosen_tap()
    hidden = decoder(prompt(config, T), weights, config, tap=tap)
    head(hidden[-2:], weights, config)
    counted = by_part(tally, config)
    scores = counted.pop(SCORES)
    assert counted == product_flops(config, T, logits=2)
    # A mask hides what was multiplied all the same: the code may compute up to all pairs held.
    layers = config.layers
    assert scores <= sum(score_flops(spec, computed_pairs(spec, T, 0)) for spec in layers)
    assert scores >= sum(score_flops(spec, visible_pairs(spec, T, 0)) for spec in layers)
    bytes_ = sum(weight_bytes(config, FLOAT32, T, read=mean_chosen(tap, config)).values())
    assert read_bytes(tally) == pytest.approx(bytes_, abs=1e-3)


@some_config
@pytest.mark.parametrize("before", cases([0, 30], [1, 4]))
def test_one_token_multiplies_and_reads_what_the_formulas_say(config: Config, before: int) -> None:
    weights, tally = counted_model(config)
    tokens = prompt(config, before + 1)
    caches = new_caches(config.layers, np.float32, slack=3, longest=8)
    for start in range(0, before, 8):
        decoder(tokens[start : min(start + 8, before)], weights, config, caches=caches)
    tally.flops.clear()
    for mask in tally.read.values():
        mask[...] = False
    tap = chosen_tap()
    head(decoder(tokens[before:], weights, config, caches=caches, tap=tap), weights, config)
    counted = by_part(tally, config)
    pairs = [score_flops(spec, visible_pairs(spec, 1, before)) for spec in config.layers]
    assert counted.pop(SCORES) == sum(pairs)
    assert counted == product_flops(config, 1)
    chosen = mean_chosen(tap, config)
    assert chosen is None or chosen == next(s.moe.top_k for s in config.layers if s.moe)
    assert read_bytes(tally) == sum(weight_bytes(config, FLOAT32, 1).values())
    cost = decoding_pass(config, FLOAT32, before + 1)
    assert cost.flops == sum(product_flops(config, 1).values()) + sum(pairs)
    assert cost.weights == read_bytes(tally)


@some_config
def test_drafts_are_verified_in_one_pass_at_the_end_of_a_text(config: Config) -> None:
    weights, tally = counted_model(config)
    before, new = 20, 4
    tokens = prompt(config, before + new)
    caches = new_caches(config.layers, np.float32, slack=3, longest=before)
    decoder(tokens[:before], weights, config, caches=caches)
    tally.flops.clear()
    decoder(tokens[before:], weights, config, caches=caches)
    counted = by_part(tally, config)
    scores, layers = counted.pop(SCORES), config.layers
    assert scores <= sum(score_flops(s, computed_pairs(s, new, before)) for s in layers)
    assert scores >= sum(score_flops(s, visible_pairs(s, new, before)) for s in layers)
    assert counted == {
        part: flops for part, flops in product_flops(config, new).items() if part != "output matrix"
    }


@some_config
def test_each_mtp_depth_multiplies_and_reads_what_the_formulas_say(config: Config) -> None:
    weights, tally = counted_model(config)
    T, tap = 11, chosen_tap()
    tokens = prompt(config, T)
    hidden = decoder(tokens, weights, config, tap=tap)
    head(hidden, weights, config)
    main = tally.flops[NOTHING]
    mtp_forward(tokens, hidden, weights, config)
    scores = 0
    for k, spec in enumerate(config.mtp_layers, start=1):
        assert {p: f for p, f in by_part(tally, config, k).items() if p != SCORES} == product_flops(
            config, T - k, depth=k
        )
        scores += score_flops(spec, computed_pairs(spec, T - k, 0))
    assert tally.flops[NOTHING] - main <= scores
    read = sum(weight_bytes(config, FLOAT32, T, read=mean_chosen(tap, config)).values())
    for k in range(1, len(config.mtp_layers) + 1):
        read += sum(weight_bytes(config, FLOAT32, T, depth=k).values())
    assert read_bytes(tally) == pytest.approx(read, abs=1e-3)


@some_config
def test_caches_hold_the_positions_that_are_counted(config: Config) -> None:
    weights, _ = counted_model(config)
    length = 14
    caches = new_caches(config.layers, np.float32, slack=0, longest=1)
    for n, token in enumerate(prompt(config, length), start=1):
        decoder([token], weights, config, caches=caches)
        assert sum(held(cache) for cache in caches) == cache_bytes(config.layers, n, size=4)


def held(cache: FullCache) -> int:
    """Bytes of the positions in a cache, without what is only reserved."""
    used = cache.end - cache.start
    return cache.keys[:, :used].nbytes + cache.values[:, :used].nbytes


def test_pairs_are_those_of_the_mask_itself() -> None:
    spec = load_config(RELEASED).layers[1]._replace(window=5)
    for window in (None, 1, 5, 30):
        for before in (0, 3, 4, 5, 40):
            for tokens in (1, 2, 7):
                one = spec._replace(window=window)
                seen = sum(min(before + i + 1, window or before + i + 1) for i in range(tokens))
                assert visible_pairs(one, tokens, before) == seen
                assert computed_pairs(one, tokens, before) >= seen


def test_counting_is_not_blind() -> None:
    """What a formula would have to miss is counted: a product more, an expert more."""
    config = load_config(find_config("tiny"))
    weights, tally = counted_model(config)
    hidden = decoder([5, 17, 9], weights, config)
    before, read = dict(tally.flops), read_bytes(tally)
    hidden @ weights.lm_head.T
    assert tally.flops["lm_head.weight"] == before.get("lm_head.weight", 0) + 2 * 3 * 320 * 64
    assert read_bytes(tally) == read + 4 * 320 * 64
    moe, name = weights.layers[4].moe, "model.layers.4.moe.up_proj.weight"
    assert moe
    unread = [e for e in range(16) if not tally.read[name][e].any()][0]
    moe.up_proj[[unread]]
    assert tally.read[name][unread].all() and not tally.read[name].all()


def test_products_are_counted_however_they_are_written() -> None:
    config = load_config(find_config("tiny"))
    weights, tally = counted_model(config)
    w, x = weights.lm_head, np.ones((3, 64), np.float32)
    ways = (
        lambda: x @ w.T,
        lambda: np.matmul(x[:, None], w.T),
        lambda: np.dot(x, w.T),
        lambda: np.einsum("td,vd->tv", x, w),
        lambda: np.matmul(x, w.T, out=np.empty((3, 320), np.float32)),
    )
    for n, way in enumerate(ways, start=1):
        way()
        assert tally.flops == {"lm_head.weight": n * 2 * 3 * 64 * 320}


def test_expected_experts_are_the_mean_of_random_choices() -> None:
    moe = load_config(RELEASED).layers[3].moe
    assert moe
    rng = np.random.default_rng(0)
    for tokens in (1, 4, 64):
        rounds = [
            len({e for _ in range(tokens) for e in rng.choice(moe.experts, moe.top_k, False)})
            for _ in range(300)
        ]
        assert experts_read(moe, tokens) == pytest.approx(np.mean(rounds), rel=0.01)


def test_parts_add_up_to_what_inspect_and_the_files_say() -> None:
    config, found = load_config(RELEASED), inspect(RELEASED)
    assert sum(tensor.size for tensor in matrices(config)) == found["total_parameters"]
    assert {tensor.part for tensor in matrices(config)} == {*PARTS.values(), "norms"}
    used = sum(product_flops(config, 1, logits=0).values()) // 2
    outside = found["active_parameters_per_token"] - used  # norms and router biases
    assert outside == found["parts"]["norms"]["parameters"] + 45 * 256 + 42 * 288
    # norms and biases are not counted apart: float32 biases make the bf16 files larger by 24 kB
    assert stored_bytes(config, FORMS["bf16"]) == found["bytes"] - 2 * 42 * 288
    assert stored_bytes(config, FORMS["fp8"]) == pytest.approx(208.6e9, rel=1e-3)  # the -FP8 files
    assert stored_bytes(config, FORMS["int4"]) == pytest.approx(112e9, rel=0.01)


def test_caches_of_the_released_model_take_what_its_authors_chapter_says() -> None:
    config = load_config(RELEASED)
    assert cache_bytes(config.layers, 131_072) == 6_442_450_944 + 69_206_016
    assert cache_bytes(config.mtp_layers, 131_072) == 6_291_456
