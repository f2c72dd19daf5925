"""The table of decoding costs: what is predicted, from what, and what hangs on each constant."""

from typing import Any

import numpy as np
import pytest

from minstep.cost.architectures import (
    NODE,
    OTHERS,
    Grouped,
    Latent,
    Served,
    from_config,
)
from minstep.cost.count import cache_bytes, product_flops, score_flops, visible_pairs
from minstep.cost.hardware import HARDWARE
from minstep.cost.serving import (
    GPU,
    RANGES,
    WITHIN,
    Assumed,
    cost,
    count_within,
    drawn_together,
    load,
    most_texts,
    predicted,
    published,
    sensitivity,
    served,
)
from minstep.store.config_file import find_config, load_config

CONFIG = load_config(find_config("step-3.5-flash"))
STEP = from_config(CONFIG)
MODELS = (STEP, *OTHERS)
ANNOUNCED = {  # parameters in billions, all and active; drafts are part of ours, not of these
    "MiMo-V2 Flash": (309, 15),
    "MiniMax M2.1": (230, 10),
    "DeepSeek V3.2": (671, 37),
    "GLM-4.7": (355, 32),
    "Kimi K2": (1026, 32),
}
each_model = pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)


def by_name(name: str) -> Served:
    return next(model for model in MODELS if model.name == name)


def test_every_prediction_is_within_35_percent_of_the_published_figure() -> None:
    found, told = predicted(CONFIG), published(CONFIG)
    assert list(told.values()) == [1.0, 1.2, 3.9, 6.0, 18.9, 18.9]
    for name in told:
        assert abs(found[name] / told[name] - 1) <= WITHIN, (name, found[name])
    assert count_within(CONFIG) == 6


def test_constants_are_those_of_their_sources() -> None:
    """arXiv 2507.19427: 8 bits. FlashMLA: 3000 of 3350 GB/s, 410 of 989 TFLOPS. vLLM: 0.9. DeepEP:
    155 + 273 us with EP 32, 77 + 114 us with EP 8."""
    across = (155 + 273) / (77 + 114)
    assert Assumed() == (131_072, 1, 1, 0.9, 0.41, 0.9, 0.77, 100e-6, across, False)
    assert GPU is HARDWARE["h800"] and NODE == 8


UNUSUAL = Assumed(1000, 2, 2, 0.5, 0.25, 0.6, 0.6, 3e-4, 3.0, False)


@each_model
@pytest.mark.parametrize("assumed", [Assumed(), UNUSUAL], ids=["usual", "unusual"])
def test_a_load_is_the_sum_by_hand_of_every_constant(model: Served, assumed: Assumed) -> None:
    """H800: 3.35 TB/s, 989.4 and 1979 TFLOPS, 80 GB; 8 share a node's weights, but not with MLA."""
    context, weight, cache, reads, multiplies, memory, _, layer, across, _ = assumed
    _, E, A, _, _ = model.moe
    texts, each, bandwidth = 3.5, model.drafts + 1, 3.35e12 * reads
    shared = model.shared * weight / (1 if model.name in ("DeepSeek V3.2", "Kimi K2") else 8)
    stored = E * model.one_expert * weight / model.gpus
    used = 1 - (1 - A / E) ** (texts * model.gpus * each)
    of_text = sum(part.read(context, cache) for part in model.attention)
    scores = sum(part.flops(context) for part in model.attention) / 989.4e12
    index = 61 + 1 if model.name == "DeepSeek V3.2" else 0  # layers with 64 heads of 128 numbers
    products = 2 * (model.shared + A * model.one_expert) + index * 64 * 128 * 2 * context
    found = load(model, texts, assumed)
    assert found.experts == pytest.approx(stored * used / bandwidth)
    assert found.others == pytest.approx(shared / bandwidth)
    assert found.caches == pytest.approx(texts * of_text / bandwidth)
    rate = products / 1979e12
    assert found.multiplying == pytest.approx(texts * each * (scores + rate) / multiplies)
    waiting = model.layers * layer * (across if model.gpus == 32 else 1)
    assert found.waiting == pytest.approx(waiting)
    parts = (found.experts, found.others, found.caches, found.multiplying, found.waiting)
    assert found.seconds == pytest.approx(sum(parts))
    kept = sum(part.cached(context, cache) for part in model.attention)
    room = max(0, memory * 80e9 - stored - shared) / kept
    assert most_texts(model, assumed) == pytest.approx(room)


@pytest.mark.parametrize("kept", [0.0, 0.5, 0.77, 1.0])
@pytest.mark.parametrize("overlaps", [False, True])
def test_a_pass_may_take_as_long_as_its_tokens_are_promised(kept: float, overlaps: bool) -> None:
    assumed = Assumed(kept=kept, overlaps=overlaps, layer=0.0)
    for model in MODELS:
        found = served(model, assumed)
        allowed = sum(kept**k for k in range(model.drafts + 1)) / model.speed
        reading = found.experts + found.others + found.caches
        time = max(reading, found.multiplying) if overlaps else reading + found.multiplying
        assert time <= allowed if found.is_full else time == pytest.approx(allowed), model.name


# Which way the cost of a token goes where a constant grows: 1 dearer, -1 cheaper.
WAYS = {"context": 1, "weight": 1, "cache": 1, "reads": -1, "multiplies": -1, "memory": -1}
WAYS |= {"kept": -1, "layer": 1, "across": 1, "overlaps": -1}


@pytest.mark.parametrize("name", Assumed._fields)
def test_each_constant_moves_the_cost_the_way_it_should(name: str) -> None:
    """And moves no model that it cannot concern."""
    usual = getattr(Assumed(), name)
    more = 2 if name in ("weight", "cache") else 1.02  # bytes, else a little
    larger = Assumed()._replace(**{name: True if usual is False else usual * more})
    changes = {model.name: cost(model, larger) / cost(model) - 1 for model in MODELS}
    moved = {model for model, change in changes.items() if abs(change) > 1e-9}
    assert all(changes[model] * WAYS[name] > 0 for model in moved), changes
    full = {model.name for model in MODELS if served(model).is_full}
    many = {model.name for model in MODELS if model.gpus > NODE}
    drafting = {model.name for model in MODELS if model.drafts}
    every = {model.name for model in MODELS} - full
    expected = {"context": every | full, "weight": every | full, "cache": every | full}
    expected |= {"memory": full, "across": many - full, "kept": drafting - full}
    assert moved == expected.get(name, every), changes


def test_each_constant_matters_as_far_as_the_book_says() -> None:
    """How many of six are near where a constant moves alone, as chapter 14 prints them."""
    said = {
        "cache": [6, 5],
        "reads": [4, 6, 6, 6],
        "multiplies": [6, 6, 5, 5],
        "memory": [6, 6, 6, 6],
        "kept": [4, 6, 6, 6],
        "layer": [4, 5, 6, 6, 6],
        "across": [5, 6, 6, 6],
        "overlaps": [6, 5],
    }
    rows, usual = sensitivity(CONFIG), Assumed()._asdict()
    assert {name: [*near.values()] for name, near in rows.items()} == said
    assert {name: tuple(near) for name, near in rows.items()} == RANGES
    for name, near in rows.items():
        assert near[usual[name]] == 6, name


def test_constants_are_drawn_together_from_their_ranges() -> None:
    times, rng = drawn_together(CONFIG, np.random.default_rng(0), 8), np.random.default_rng(0)
    counts = list[int]()
    for _ in range(8):
        drawn = {name: values[rng.integers(len(values))] for name, values in RANGES.items()}
        counts.append(count_within(CONFIG, Assumed()._replace(**drawn)))
    assert times == [counts.count(n) for n in range(7)] and len(set(counts)) > 1


# Typed from the models' configurations and arXiv 2602.10604, not from the code: D; V; (layers,
# query heads, KV heads or positions chosen, widths of keys and values, window); dense layers, their
# width; MoE layers, E, A, width, width shared; drafts, tokens a second, GPUs, published cost.
SHAPES: dict[str, Any] = {
    "MiMo-V2 Flash": (  # 48 layers, one dense; 3 MTP layers are sliding and dense
        *(4096, 152_576, [(9, 64, 4, 192, 128, None), (42, 64, 8, 192, 128, 128)]),
        *((4, 16_384), (47, 256, 8, 2048, 0), 3, 100, 8, 1.2),
    ),
    "MiniMax M2.1": (  # 62 layers, all MoE
        *(3072, 200_064, [(65, 48, 8, 128, 128, None)]),
        *((0, 0), (65, 256, 8, 1536, 0), 3, 100, 8, 3.9),
    ),
    "DeepSeek V3.2": (  # 61 layers, 3 dense; 1 MTP layer
        *(7168, 129_280, [(62, 128, 2048)]),
        *((3, 18_432), (59, 256, 8, 2048, 2048), 1, 33, 32, 6.0),
    ),
    "GLM-4.7": (  # 92 layers, 3 dense
        *(5120, 151_552, [(95, 96, 8, 128, 128, None)]),
        *((3, 12_288), (92, 160, 8, 1536, 1536), 3, 100, 8, 18.9),
    ),
    "Kimi K2": (  # 61 layers, 1 dense
        *(7168, 163_840, [(61, 64, None)]),
        *((1, 18_432), (60, 384, 8, 2048, 2048), 0, 33, 32, 18.9),
    ),
    "Step 3.5 Flash": (  # 45 layers, 3 dense; 3 MTP layers are sliding and dense, each with a head
        *(4096, 128_896, [(12, 64, 8, 128, 128, None), (36, 96, 8, 128, 128, 512)]),
        *((6, 11_264), (42, 288, 8, 1280, 1280), 3, 100, 8, 1.0),
    ),
}


@each_model
def test_shapes_are_those_of_the_configurations(model: Served) -> None:
    D, V, attention, dense, moe, drafts, speed, gpus, told = SHAPES[model.name]
    assert (model.hidden, model.vocab, model.dense, model.moe) == (D, V, dense, moe)
    assert (model.drafts, model.speed, model.gpus, model.published) == (drafts, speed, gpus, told)
    assert model.outputs == (4 if model is STEP else 1)
    for part, shape in zip(model.attention, attention, strict=True):
        assert part[: len(shape)] == shape
        if isinstance(part, Grouped):
            assert part.has_gate == (model is STEP)


@pytest.mark.parametrize("kind", ["grouped", "latent", "chosen"])
def test_a_layer_has_the_weights_of_its_matrices(kind: str) -> None:
    """MLA: ranks 1536 and 512, heads of 128 + 64; an index has 64 heads of 128."""
    D = 7168
    if kind == "grouped":
        q, k, v, o, gate = D * 96 * 128, D * 8 * 128, D * 8 * 128, 96 * 128 * D, D * 96
        assert Grouped(3, 96, 8, 128, 128).weights(D) == q + k + v + o
        assert Grouped(3, 96, 8, 128, 128, 512, True).weights(D) == q + k + v + o + gate
        return
    queries, latent = D * 1536 + 1536 * 64 * 192, D * 576 + 512 * 64 * 256
    index = 1536 * 64 * 128 + D * 128 + D * 64 if kind == "chosen" else 0
    model = Latent(5, 64, 2048 if kind == "chosen" else None)
    assert model.weights(D) == queries + latent + 64 * 128 * D + index


@each_model
def test_a_load_meets_the_promise_and_one_more_text_would_not(model: Served) -> None:
    found, assumed = served(model), Assumed()
    kept = sum(assumed.kept**k for k in range(model.drafts + 1))
    most = most_texts(model, assumed)
    if found.is_full:
        assert found.texts == most and found.seconds <= kept / model.speed
    else:
        assert found.texts < most
        assert found.seconds == pytest.approx(kept / model.speed)
        assert load(model, found.texts * 1.01, assumed).seconds > kept / model.speed
    assert cost(model) == pytest.approx(1 / (found.texts * model.speed))


def without_drafts(model: Served) -> Served:
    """The main layers alone, which is what makers count: draft layers are dense in MiMo only."""
    drafts, last = model.drafts, model.attention[-1]
    attention = (*model.attention[:-1], last._replace(layers=last.layers - drafts))
    dense, moe = model.dense, model.moe
    if model.name == "MiMo-V2 Flash":
        dense = (dense[0] - drafts, dense[1])
    else:
        moe = (moe[0] - drafts, *moe[1:])
    return model._replace(attention=attention, dense=dense, moe=moe, drafts=0)


def test_shapes_give_the_parameters_that_are_announced() -> None:
    for name, (total, active) in ANNOUNCED.items():
        model = without_drafts(by_name(name))
        _, experts, top_k, _, _ = model.moe
        assert model.layers == model.dense[0] + model.moe[0]
        all_of_it = model.shared + experts * model.one_expert
        assert all_of_it == pytest.approx(total * 1e9, rel=0.01), name
        of_token = model.shared + top_k * model.one_expert
        assert of_token == pytest.approx(active * 1e9, rel=0.05), name


def test_step_itself_is_what_its_configuration_says() -> None:
    """Weights, caches and FLOPs by the table's formulas are those that count.py has verified."""
    flops = sum(
        sum(product_flops(CONFIG, 1, depth=depth).values())
        for depth in range(len(CONFIG.mtp_layers) + 1)
    )
    inputs = 3 * 2 * CONFIG.hidden_size**2  # of drafts, which the table leaves out
    assert 2 * (STEP.shared + 8 * STEP.one_expert + inputs) == flops
    every = CONFIG.layers + CONFIG.mtp_layers
    caches = sum(part.cached(131_072, 2) for part in STEP.attention)
    assert caches == cache_bytes(every, 131_072)
    scores = sum(part.flops(131_072) for part in STEP.attention)
    assert scores == sum(score_flops(s, visible_pairs(s, 1, 131_071)) for s in every)
    assert STEP.layers == 48 and STEP.outputs == 4


def test_a_latent_costs_what_its_kernels_say() -> None:
    """FlashMLA's 8-bit cache has 656 bytes a position; 576 numbers a score, 512 a mix, per head."""
    kimi, deepseek = Latent(61, 64), Latent(61, 128, chosen=2048)
    assert kimi.cached(131_072, 1) == 61 * 656 * 131_072
    assert kimi.cached(131_072, 2) == 61 * 576 * 2 * 131_072
    assert kimi.flops(131_072) == 61 * 64 * 2 * (576 + 512) * 131_072
    assert deepseek.flops(131_072) == 61 * 128 * 2 * (576 + 512) * 2048
    assert deepseek.index_flops(131_072) == 61 * 64 * 128 * 2 * 131_072
    assert deepseek.read(131_072, 1) == 61 * (2048 * 656 + 131_072 * 132)
    assert deepseek.cached(131_072, 1) == 61 * 131_072 * (656 + 132)
    assert deepseek.read(1000, 1) == pytest.approx(61 * 1000 * (656 + 132))


def test_groups_fewer_than_gpus_are_kept_more_than_once() -> None:
    assert Grouped(9, 64, 4, 192, 128).cached(1000, 1) == 9 * 8 * 320 * 1000
    assert Grouped(9, 64, 8, 192, 128, 128).cached(1000, 1) == 9 * 8 * 320 * 128


def test_drafts_multiply_flops_and_not_bytes_of_caches() -> None:
    plain = STEP._replace(drafts=0)
    one, four = load(plain, 4.0, Assumed()), load(STEP, 4.0, Assumed())
    assert four.multiplying == pytest.approx(4 * one.multiplying)
    assert (four.caches, four.others) == (one.caches, one.others)
    assert one.experts < four.experts < 4 * one.experts


def test_nothing_but_shapes_and_deployment_tells_models_apart() -> None:
    """Two models of the same shapes, served alike, cost the same whatever they are called."""
    twin = by_name("Kimi K2")._replace(name="another", published=99.0)
    assert cost(twin) == cost(by_name("Kimi K2"))
    assert set(Served._fields) - {"name", "published"} == {
        *("hidden", "vocab", "attention", "dense", "moe", "speed", "drafts", "gpus", "outputs")
    }
    assert GPU.memory == 80e9


def test_a_promise_that_cannot_be_kept_costs_without_end() -> None:
    assert cost(STEP._replace(speed=10_000)) == float("inf")
    assert cost(STEP._replace(speed=1)) > 0
