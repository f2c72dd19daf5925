"""The table of decoding costs: what is predicted, from what, and what hangs on each constant."""

import numpy as np
import pytest

from minstep.config import load_config
from minstep.configs import find_config
from minstep.cost.count import cache_bytes, product_flops, score_flops, visible_pairs
from minstep.cost.models import OTHERS, Grouped, Latent, Served, from_config
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


def test_each_constant_matters_as_far_as_the_book_says() -> None:
    """At the edges of its range predictions fail: the agreement is no tautology."""
    rows, usual = sensitivity(CONFIG), Assumed()._asdict()
    assert list(rows) == list(RANGES)
    for name, near in rows.items():
        assert near[usual[name]] == 6, name
    counts = [count for near in rows.values() for count in near.values()]
    assert min(counts) == 4
    assert counts.count(6) >= 0.6 * len(counts)
    times = drawn_together(CONFIG, np.random.default_rng(0), 50)
    assert sum(times) == 50 and times[6] < 50


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
