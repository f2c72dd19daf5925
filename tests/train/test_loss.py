"""The loss: cross-entropy by its definition, what each row predicts, and the depths' part."""

import math
from typing import Any

import numpy as np
import pytest

import minstep
from minstep.activations import softmax
from minstep.mtp import mtp_forward
from minstep.tap import Array, silent
from minstep.train.loss import Losses, cross_entropy, objective, surprise
from minstep.train.tape import Variable, backward
from minstep.weights import assemble
from tests.train.test_gradients import some, taped
from tests.train.test_tape import Model, check, model

CONFIGS = ("tiny", "odd", "no_extras", "drafts")


def defined(logits: Array, targets: list[int]) -> float:
    """Cross-entropy a row at a time, with nothing but Python's own numbers."""
    rows = [[float(x) for x in row] for row in logits]
    chosen = [
        math.exp(row[target]) / math.fsum(map(math.exp, row))
        for row, target in zip(rows, targets, strict=True)
    ]
    return -math.fsum(map(math.log, chosen)) / len(chosen)


def losses(its: Model, mtp_weight: float, tensors: dict[str, Any] | None = None) -> Losses:
    named = tensors or its.tensors
    weights = assemble(its.config, lambda name, shape: named[name])
    dtype = named["model.embed_tokens.weight"].dtype
    return objective(its.tokens, weights, its.config, mtp_weight, dtype, silent)


def every(parts: Losses) -> tuple[Any, ...]:
    return (parts.total, parts.main, *parts.depths)


def gradients(its: Model, mtp_weight: float) -> dict[str, Array | None]:
    """The gradient of the whole loss by each tensor."""
    tensors = {name: Variable(x) for name, x in its.tensors.items()}
    backward(losses(its, mtp_weight, tensors).total)
    return {name: x.gradient for name, x in tensors.items()}


def test_cross_entropy_of_numbers_known_by_hand() -> None:
    assert float(cross_entropy(np.zeros((3, 2)), [0, 1, 1])) == pytest.approx(math.log(2))
    assert float(cross_entropy(np.zeros((2, 320)), [5, 319])) == pytest.approx(math.log(320))
    odds = np.log([[3.0, 1.0], [1.0, 7.0]])
    by_hand = (math.log(4 / 3) + math.log(8 / 7)) / 2
    assert float(cross_entropy(odds, [0, 1])) == pytest.approx(by_hand, rel=1e-15)
    np.testing.assert_allclose(surprise(odds, [1, 0]), [math.log(4), math.log(8)], rtol=1e-15)


@pytest.mark.parametrize("dtype, tolerance", [("float64", 1e-14), ("float32", 1e-6)])
def test_cross_entropy_is_its_definition(dtype: str, tolerance: float) -> None:
    logits = 5 * some(9, 13).astype(dtype)
    targets = np.random.default_rng(0).integers(13, size=9).tolist()
    got = cross_entropy(logits, targets)
    assert got.dtype == dtype and got.shape == ()
    assert float(got) == pytest.approx(defined(logits, targets), rel=tolerance)
    each = [defined(logits[n : n + 1], targets[n : n + 1]) for n in range(9)]
    np.testing.assert_allclose(surprise(logits, targets), each, rtol=tolerance * 10)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_large_logits_neither_overflow_nor_give_nan(dtype: str) -> None:
    logits = np.array([[3e4, -3e4, 0], [-3e4, -3e4, -3e4]], dtype)
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        np.testing.assert_allclose(surprise(logits, [1, 2]), [6e4, math.log(3)], rtol=1e-6)
        assert surprise(logits, [0, 0])[0] == 0
        gradient = taped(cross_entropy, (logits, [1, 2]), np.ones((), dtype))[1][0]
    np.testing.assert_allclose(gradient, [[0.5, -0.5, 0], [1 / 6, 1 / 6, -1 / 3]], atol=1e-7)


def test_the_gradient_of_cross_entropy_is_softmax_less_what_came() -> None:
    logits, targets = 3 * some(7, 5), [0, 4, 4, 2, 1, 0, 3]
    gradient = taped(cross_entropy, (logits, targets), np.ones(()))[1][0]
    expected = (softmax(logits) - np.eye(5)[targets]) / 7
    np.testing.assert_allclose(gradient, expected, rtol=0, atol=1e-16)
    check(lambda x: surprise(x, targets), (logits,), directions=4, entries=8)


@pytest.mark.parametrize("name", CONFIGS)
def test_position_i_of_depth_k_predicts_token_i_and_k_and_1(name: str) -> None:
    its = model(name)
    weights = assemble(its.config, lambda tensor, shape: its.tensors[tensor])
    hidden = minstep.decoder(its.tokens, weights, its.config, np.float64)
    main = minstep.head(hidden, weights, its.config)
    logits = [main, *mtp_forward(its.tokens, hidden, weights, its.config)]
    T, M = len(its.tokens), len(its.config.mtp_layers)
    expected = [
        defined(logits[k][: T - 1 - k], [its.tokens[i + k + 1] for i in range(T - 1 - k)])
        for k in range(M + 1)
    ]
    got = losses(its, mtp_weight=0.3)
    assert len(got.depths) == M
    np.testing.assert_allclose([got.main, *got.depths], expected, rtol=1e-13)
    whole = expected[0] + (0.3 * sum(expected[1:]) / M if M else 0)
    assert float(got.total) == pytest.approx(whole, rel=1e-13)


def test_the_last_token_is_foretold_and_never_read() -> None:
    its = model("tiny")
    last = its.tokens[-1]
    assert its.tokens.count(last) == 1
    embedding = gradients(its, 0.3)["model.embed_tokens.weight"]
    assert not embedding[last].any()
    assert all(embedding[token].any() for token in its.tokens[:-1])
    assert sum(row.any() for row in embedding) == len({*its.tokens}) - 1


@pytest.mark.parametrize("weight", [0.1, 0.3])
def test_the_weight_of_the_depths_scales_their_part_and_theirs_alone(weight: float) -> None:
    its = model("tiny")
    without, got, twice = (losses(its, w) for w in (0, weight, 2 * weight))
    assert without.total == without.main == got.main and got.depths == twice.depths
    part = float(got.total - got.main)
    assert part == pytest.approx(weight * float(np.mean(got.depths)), rel=1e-12)
    assert float(twice.total - twice.main) == pytest.approx(2 * part, rel=1e-12)


def test_the_depths_teach_themselves_and_the_main_model() -> None:
    its = model("tiny")
    main, one, three = (gradients(its, weight) for weight in (0.0, 0.1, 0.3))
    own = tuple(f"{spec.name}." for spec in its.config.mtp_layers)
    for name, none in main.items():
        low, high = one[name], three[name]
        if none is None or low is None or high is None:
            assert name.endswith("router_bias") and none is low is high
            continue
        if name.startswith(own):
            assert not none.any() and low.any()
        size = np.abs(high).max()
        np.testing.assert_allclose(high - none, 3 * (low - none), rtol=0, atol=1e-13 * size)
        # What belongs to the main head alone learns nothing from the depths.
        learns = np.abs(low - none).max() > 1e-6 * size
        assert learns == (name not in ("lm_head.weight", "model.norm.weight")), name


@pytest.mark.parametrize("name", CONFIGS)
def test_a_text_that_leaves_a_depth_nothing_to_predict_is_refused(name: str) -> None:
    its, least = model(name), len(model(name).config.mtp_layers) + 2
    enough = losses(its._replace(tokens=its.tokens[:least]), 0.3)
    assert all(np.isfinite(x) for x in every(enough))
    assert len(enough.depths) == least - 2
    with pytest.raises(ValueError, match=f"{least - 1} tokens, expected at least {least}"):
        losses(its._replace(tokens=its.tokens[: least - 1]), 0.3)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_loss_on_the_tape_is_that_off_it_bit_for_bit(
    dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minstep.moe.FEW", 0)  # as on the tape, where experts run one by one
    its = model("drafts", dtype)
    off = losses(its, 0.3)
    on = losses(its, 0.3, {name: Variable(x) for name, x in its.tensors.items()})
    for one, other in zip(every(off), every(on), strict=True):
        assert one.dtype == other.dtype == dtype and one == other.value
    as_array = its._replace(tokens=np.array(its.tokens, np.int32))
    assert losses(as_array, 0.3).total == off.total
