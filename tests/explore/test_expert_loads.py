"""The router lab: what it counts is what the router chose, and the bias is all that is left out."""

import numpy as np
import pytest

import minstep
from minstep.errors import InputError
from minstep.explore.expert_loads import (
    Liking,
    _spread,
    evenness,
    expert_counts,
    layer_table,
    likings,
    routed,
    router_report,
    router_table,
    without_bias,
)
from minstep.model import ModelWeights
from minstep.moe import Choice
from minstep.parity.trace import record
from minstep.store.config_file import find_config, load_config, shipped_folder
from minstep.tap import Array
from minstep.text.tokenizer import load_tokenizer
from minstep.train.data import encode_documents, hold_out
from minstep.train.documents import Document

CONFIG = load_config(find_config("tiny"))
WEIGHTS = minstep.random_weights(CONFIG, np.random.default_rng(0))
WINDOWS = [[5, 17, 9, 250, 31, 8, 77], [100, 3, 9, 9, 64]]
TOKENS = [token for window in WINDOWS for token in window]
TRAINED = shipped_folder() / "trained"


def with_bias(bias: Array) -> ModelWeights:
    """The random weights with this bias [E] in each router."""
    layers = (
        layer._replace(moe=layer.moe._replace(router_bias=bias)) if layer.moe else layer
        for layer in WEIGHTS.layers
    )
    return WEIGHTS._replace(layers=tuple(layers))


def reported(weights: ModelWeights) -> dict:
    on, off = (routed(WINDOWS, each, CONFIG) for each in (weights, without_bias(weights)))
    return router_report(TOKENS, on, off, weights, CONFIG, str)


def test_choices_are_those_of_the_trace_window_by_window() -> None:
    done: list[int] = []
    chosen = routed(WINDOWS, WEIGHTS, CONFIG, progress=done.append)
    assert done == [7, 12]
    assert list(chosen) == [f"model.layers.{n}" for n in range(2, 8)]
    traces = [record(window, WEIGHTS, CONFIG) for window in WINDOWS]
    for name, choice in chosen.items():
        for which in ("ids", "weights"):
            expected = np.concatenate([trace[f"{name}.moe.{which}"] for trace in traces])
            assert np.array_equal(getattr(choice, which), expected)


def test_without_bias_is_a_bias_of_zero_and_nothing_else_changes() -> None:
    zeros = with_bias(np.zeros(16, np.float32))
    for one, other in zip(without_bias(WEIGHTS).layers, WEIGHTS.layers, strict=True):
        assert one.self_attn is other.self_attn and one.mlp is other.mlp
    off, zero, on = (routed(WINDOWS, w, CONFIG) for w in (without_bias(WEIGHTS), zeros, WEIGHTS))
    for name in on:
        assert np.array_equal(off[name].ids, zero[name].ids)
        assert np.array_equal(off[name].weights, zero[name].weights)
    assert any(not np.array_equal(off[name].ids, on[name].ids) for name in on)


def test_loads_are_multiples_of_the_fair_share() -> None:
    bias = np.zeros(16, np.float32)
    bias[3], bias[5] = 10, -10  # one that everybody chooses, one that nobody does
    for layer in reported(with_bias(bias))["layers"]:
        on, off = layer["on"], layer["off"]
        assert on["load"][3] == on["most"] == 4.0  # 1 of the 4 chosen, where 1 of 16 is fair
        assert on["load"][5] == on["least"] == 0.0 and layer["weight"][5] is None
        assert on["low"] == sum(load < 0.1 for load in on["load"]) >= 1
        for spread in (on, off):
            assert np.mean(spread["load"]) == pytest.approx(1, abs=1e-3)
        assert on["evenness"] < off["evenness"]
        assert layer["bias"][3] == 10.0 and layer["experts"] == 16 and layer["active"] == 4
        shares = np.array(layer["weight"], float), np.array(on["load"])
        # Weights of a token sum to the scaling factor, 3, so per choice they are 3 / 4 on average.
        assert np.nansum(shares[0] * shares[1]) / 16 == pytest.approx(0.75, abs=1e-3)


@pytest.mark.parametrize(
    ("counts", "expected"), [([3, 3, 3, 3], 1), ([9, 0, 0, 0], 0), ([5, 5, 0, 0], 0.5), ([7], 1)]
)
def test_evenness_is_one_where_all_get_the_same_and_zero_where_one_gets_all(
    counts: list[int], expected: float
) -> None:
    assert evenness(np.array(counts)) == pytest.approx(expected)


def chosen(*ids: list[int]) -> Choice:
    return Choice(np.array(ids), np.ones((len(ids), len(ids[0]))))


def test_likings_are_tokens_that_an_expert_gets_more_often_than_chance() -> None:
    text = [7, 7, 7, 7, 2, 2, 2, 2]
    choice = chosen([0, 1], [0, 1], [0, 1], [1, 2], [1, 2], [1, 2], [0, 1], [1, 2])
    assert expert_counts(choice, 4).tolist() == [4, 8, 4, 0]
    liked = likings(choice, text, 4, least=1)
    # Expert 0 got 3 of the four 7s among its 4 tokens; 7s are half of the text.
    assert liked[0] == [Liking(7, 3, 0.75, 1.5)]
    assert liked[1] == [], "it gets everything, so it likes nothing"
    assert liked[2] == [Liking(2, 3, 0.75, 1.5)]
    assert liked[3] == []
    assert likings(choice, text, 4, least=4) == [[], [], [], []]


def test_a_token_that_an_expert_got_fewer_than_eight_times_says_nothing() -> None:
    for times in (1, 7, 8, 20):
        text = [3] * times + [4] * times
        choice = chosen(*([0] for _ in range(times)), *([1] for _ in range(times)))
        found = [[liking.token for liking in each] for each in likings(choice, text, 2)]
        assert found == ([[3], [4]] if times >= 8 else [[], []])


@pytest.mark.parametrize(("share", "low"), [(0.0, 1), (0.099, 1), (0.1, 0), (0.101, 0), (1.0, 0)])
def test_an_expert_is_low_below_a_tenth_of_its_fair_share(share: float, low: int) -> None:
    counts = np.array([round(1000 * share), round(2000 - 1000 * share)])
    assert _spread(counts)["low"] == low and _spread(counts)["load"][0] == share


def test_likings_come_by_lift_then_by_how_often_then_by_id() -> None:
    text = [1, 2, 2, 3, 4, 4, 9]
    choice = chosen(*([0] for _ in text[:-2]), [1], [1])
    order = [liking.token for liking in likings(choice, text, 2, least=1)[0]]
    assert order == [2, 1, 3]  # all of these it gets always; of 4 only every other
    best = likings(choice, text, 2, most=2, least=1)[0]
    assert [liking.token for liking in best] == [2, 1]


def test_tables_fit_a_hundred_columns() -> None:
    report = reported(WEIGHTS)
    report["layers"][0]["likings"][4] = [
        {"token": 1, "times": 30, "share": 0.5, "lift": 40.0, "text": "a long token \n"}
    ] * 9
    lines = router_table(report).splitlines()
    assert "12 held-out tokens" in lines[0]
    assert any("expert 4" in line and r"'a long token \n' 50%" in line for line in lines)
    for number, layer in enumerate(report["layers"]):
        shown = layer_table(layer).splitlines()
        assert len(shown) == 2 + 16 and f"model.layers.{number + 2}," in shown[0]
        lines += shown
    assert all(len(line) <= 100 for line in lines)


def test_a_router_without_bias_has_none_to_show() -> None:
    bare = without_bias(WEIGHTS)
    report = reported(bare)
    for layer in report["layers"]:
        assert layer["bias"] is None and layer["on"] == layer["off"]
        assert "-  " in layer_table(layer)


def test_a_model_without_experts_is_an_input_error() -> None:
    dense = CONFIG._replace(layers=tuple(spec._replace(moe=None) for spec in CONFIG.layers))
    with pytest.raises(InputError, match="no MoE layers"):
        routed(WINDOWS, WEIGHTS, dense)


@pytest.mark.skipif(not any(TRAINED.glob("*.safetensors")), reason="no trained model is shipped")
def test_the_shipped_model_has_no_dead_experts(documents: list[Document]) -> None:
    checkpoint, tokenizer = minstep.open_checkpoint(TRAINED), load_tokenizer(TRAINED)
    assert tokenizer
    stream = encode_documents(hold_out(documents).held_out, tokenizer).tolist()
    windows = [stream[start : start + 512] for start in range(0, min(len(stream), 16384), 512)]
    chosen = routed(windows, checkpoint.weights(0), checkpoint.config)
    for spec in checkpoint.config.layers:
        if spec.moe:
            counts = expert_counts(chosen[spec.name], spec.moe.experts)
            assert counts.min() >= 0.1 * counts.mean(), spec.name
