"""Router and experts: who is chosen, with what weight, and what is read."""

from typing import Any

import numpy as np
import pytest

from minstep import moe as module
from minstep.activations import sigmoid
from minstep.config import MoESpec
from minstep.mlp import MLPWeights, swiglu
from minstep.moe import Choice, MoEWeights, experts, moe, route
from minstep.tap import Array, Tap

T, D, E, A, F = 11, 8, 7, 3, 5
SPEC = MoESpec(E, A, F, 4, scaling_factor=2.5, has_bias=True)


def drawn(dtype: str = "float64") -> tuple[Array, MoEWeights]:
    rng = np.random.default_rng(0)
    shapes = [(E, D), (E,), (E, F, D), (E, F, D), (E, D, F)]
    weights = [rng.standard_normal(shape).astype(dtype) for shape in shapes]
    return rng.standard_normal((T, D)).astype(dtype), MoEWeights(*weights)


def test_router_weights_sum_to_the_scaling_factor() -> None:
    x, weights = drawn()
    choice = route(x, weights, SPEC)
    np.testing.assert_allclose(choice.weights.sum(axis=-1), 2.5, rtol=1e-14)
    assert (choice.weights > 0).all()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("score", [0.0, 1e-25, 1e-20, 1e-18])
def test_scores_that_vanish_are_divided_by_their_sum_and_1e_20(score: float, dtype: str) -> None:
    x, weights = drawn(dtype)
    logit = np.log(score) if score else -1e4
    x, gate = np.ones_like(x), np.full((E, D), logit / D, dtype)
    with np.errstate(all="raise", under="ignore"):
        choice = route(x, weights._replace(gate=gate), SPEC)
        output = moe(x, weights._replace(gate=gate), SPEC, 0.7)
    expected = 2.5 * score / (A * score + 1e-20)
    np.testing.assert_allclose(choice.weights, expected, rtol=1e-4 if dtype == "float32" else 1e-12)
    assert np.isfinite(output).all() and output.any() == (score > 0)


def test_the_bias_chooses_and_never_weighs() -> None:
    x, weights = drawn()
    scores = sigmoid(x @ weights.gate.T)
    choice = route(x, weights, SPEC)
    for t in range(T):
        best = np.argsort(scores[t] + weights.router_bias)[-A:]
        assert choice.ids[t].tolist() == sorted(best.tolist())
        chosen = scores[t, choice.ids[t]]
        np.testing.assert_allclose(choice.weights[t], 2.5 * chosen / chosen.sum(), rtol=1e-14)
    assert not np.array_equal(route(x, weights._replace(router_bias=None), SPEC).ids, choice.ids)


def test_a_tie_goes_to_the_lower_ids() -> None:
    x, weights = drawn()
    equal = weights._replace(gate=np.zeros((E, D)), router_bias=np.zeros(E))
    assert route(x, equal, SPEC).ids.tolist() == [[0, 1, 2]] * T


def test_the_margin_is_measured_for_a_tap_that_wants_it_and_for_no_other() -> None:
    class Margin(Tap):
        def __init__(self, wanted: str) -> None:
            self.wanted, self.seen = wanted, dict[str, Array]()

        def __call__(self, name: str, x: Array) -> Array:
            self.seen[name] = x
            return x

        def wants(self, name: str) -> bool:
            return name == self.wanted

    x, weights = drawn()
    biased = np.sort(sigmoid(x @ weights.gate.T) + weights.router_bias)
    tap, other = Margin("margin"), Margin("ids")
    route(x, weights, SPEC, tap)
    np.testing.assert_allclose(tap.seen["margin"], biased[:, -A] - biased[:, -A - 1], rtol=1e-12)
    route(x, weights, SPEC, other)
    assert "margin" not in other.seen and "ids" in other.seen


def test_every_expert_may_be_active() -> None:
    x, weights = drawn()
    choice = route(x, weights, SPEC._replace(top_k=E))
    assert choice.ids.tolist() == [list(range(E))] * T


def test_experts_are_the_weighted_sum_of_their_outputs() -> None:
    x, weights = drawn()
    choice = route(x, weights, SPEC)
    expected = np.zeros_like(x)
    for t in range(T):
        for expert, weight in zip(choice.ids[t], choice.weights[t], strict=True):
            own = MLPWeights(*(w[expert] for w in weights[2:]))
            expected[t] += weight * swiglu(x[t : t + 1], own, 0.7)[0]
    np.testing.assert_allclose(experts(x, weights, choice, 0.7), expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("few", [0, 1 << 30])
def test_experts_one_by_one_and_at_once_are_that_sum(
    few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weights = drawn()
    choice, calls = route(x, weights, SPEC), list[str]()
    monkeypatch.setattr(module, "FEW", few)
    for name in ("one_by_one", "at_once"):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, n=name, f=real: calls.append(n) or f(*a))
    got = experts(x, weights, choice, 0.7)
    assert calls == (["at_once"] if few else ["one_by_one"])
    expected = np.zeros_like(x)
    for expert in range(E):
        share = np.where(choice.ids == expert, choice.weights, 0).sum(axis=1, keepdims=True)
        expected += share * swiglu(x, MLPWeights(*(w[expert] for w in weights[2:])), 0.7)
    np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-13)


def test_experts_of_another_dtype_are_never_copied_as_they_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x, weights = drawn()
    monkeypatch.setattr(module, "at_once", None)
    choice = route(x.astype(np.float32), weights, SPEC)
    assert experts(x.astype(np.float32), weights, choice, 0.7).dtype == np.float32


def test_permuting_the_experts_changes_nothing() -> None:
    x, weights = drawn()
    order = np.random.default_rng(1).permutation(E)
    permuted = MoEWeights(*(w[order] for w in weights))
    expected = moe(x, weights, SPEC, 0.7)
    np.testing.assert_allclose(moe(x, permuted, SPEC, 0.7), expected, rtol=1e-12, atol=1e-13)


def test_a_token_does_not_depend_on_its_neighbours() -> None:
    x, weights = drawn()
    expected = moe(x, weights, SPEC, None)
    alone = np.concatenate([moe(x[t : t + 1], weights, SPEC, None) for t in range(T)])
    np.testing.assert_allclose(alone, expected, rtol=1e-12, atol=1e-13)


def test_an_expert_that_nobody_chose_is_never_read() -> None:
    class Stack:
        """Experts that may be indexed one at a time, and remember which were."""

        def __init__(self, stored: Array) -> None:
            self.stored, self.shape, self.read = stored, stored.shape, list[int]()

        def __getitem__(self, expert: Any) -> Array:
            self.read.append(int(expert))
            return self.stored[expert]

    x, weights = drawn()
    stacks = [Stack(w) for w in weights[2:]]
    choice = Choice(np.array([[1, 4]] * T), np.ones((T, 2)))
    experts(x, MoEWeights(weights.gate, None, *stacks), choice, None)  # type: ignore[arg-type]
    assert [stack.read for stack in stacks] == [[1, 4]] * 3


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_dtype_stays(dtype: str) -> None:
    x, weights = drawn("float32")
    choice = route(x.astype(dtype), weights, SPEC)
    assert choice.weights.dtype == dtype
    assert moe(x.astype(dtype), weights, SPEC, 0.7).dtype == dtype
