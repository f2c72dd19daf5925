"""Which experts another engine chose or would have chosen, and what rounding explains."""

from typing import Any

import numpy as np
import pytest

from minstep.config import MoESpec
from minstep.fast.bf16 import BF16Array, to_bf16
from minstep.moe import MoEWeights, route
from minstep.parity.diff import routers_of
from minstep.parity.router_ties import (
    Choice,
    Choose,
    choice,
    chooser,
    roundoff,
    score_scale,
)
from tests.conftest import GOLDEN

T, E, A = 64, 16, 4
SPEC = MoESpec(experts=E, top_k=A, width=1, shared_width=1, scaling_factor=1.0, has_bias=True)


def case(seed: int = 0) -> tuple[MoEWeights, Any, Any, Any]:
    """A router's weights, logits [T, E], and the experts and margins that it gives them."""
    rng = np.random.default_rng(seed)
    gate, bias = rng.standard_normal((T, E)) * 2, rng.standard_normal(E).astype(np.float32) * 0.3
    none: Any = np.empty(0)
    weights = MoEWeights(none, bias, none, none, none)
    scores = np.sort(1 / (1 + np.exp(-gate)) + bias, axis=-1)
    ids = chooser(weights, SPEC)(gate, 0.0)
    return weights, gate, ids, scores[:, -A] - scores[:, -A - 1]


def chosen(weights: MoEWeights, gate: Any) -> Any:
    return chooser(weights, SPEC)(gate, 0.0)


def rounded(gate: Any, dtype: str) -> Any:
    """Logits as 16 bits have them, in float32."""
    if dtype == "bfloat16":
        return np.asarray(BF16Array(to_bf16(gate.astype(np.float32))), np.float32)
    return gate.astype(dtype).astype(np.float32)


def test_the_router_alone_chooses_as_the_model_does() -> None:
    rng = np.random.default_rng(0)
    weights, *_ = case()
    x, matrix = rng.standard_normal((T, 8)), rng.standard_normal((E, 8))
    for bias in (weights.router_bias, None):
        whole = weights._replace(gate=matrix, router_bias=bias)
        assert np.array_equal(chosen(whole, x @ matrix.T), route(x, whole, SPEC).ids)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("error", [0.0, 1e-3, 0.05])
def test_what_their_own_logits_give_is_right_however_far_those_are_from_ours(
    dtype: str, error: float
) -> None:
    weights, gate, ids, margin = case()
    inner = gate + error * np.random.default_rng(1).uniform(-1, 1, gate.shape)
    theirs, other = chosen(weights, inner), rounded(inner, dtype)
    found = choice(chooser(weights, SPEC), ids, gate, other, theirs, 1e-9)
    assert np.array_equal(found.ids, theirs)
    assert np.array_equal(found.tied, (ids != theirs).any(axis=-1)) and not found.unsure.any()
    assert found.tied.any() == (error == 0.05)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_what_their_own_logits_do_not_give_is_wrong(dtype: str) -> None:
    weights, gate, ids, margin = case()
    other = rounded(gate, dtype)
    for bug in (None, -np.asarray(weights.router_bias)):
        theirs = chosen(weights._replace(router_bias=bug), gate)
        wrong = (theirs != ids).any(axis=-1)
        assert wrong.sum() > T / 2
        found = choice(chooser(weights, SPEC), ids, gate, other, theirs, 0.03)
        assert found.tied.sum() < T / 8  # whatever the rest of the tensors may be off by
        assert np.array_equal(found.ids[~found.tied], ids[~found.tied])


def swapped(ids: Any, gate: Any, weights: MoEWeights, place: int) -> Any:
    """The experts where the one at `place` behind the cut replaces the last chosen."""
    scores = 1 / (1 + np.exp(-gate)) + np.asarray(weights.router_bias)
    order = np.argsort(-scores, axis=-1)
    return np.sort(np.concatenate((order[:, : A - 1], order[:, A + place : A + place + 1]), -1))


def test_without_their_logits_each_expert_swapped_is_within_a_typical_error_of_the_cut() -> None:
    weights, gate, ids, margin = case()
    tolerance = 0.03
    off = tolerance / 3 * np.abs(gate).max()  # a third of the largest error is a typical one

    def judge(theirs: Any) -> Choice:
        return choice(chooser(weights, SPEC), ids, gate, None, theirs, tolerance)

    close, far = swapped(ids, gate, weights, 0), swapped(ids, gate, weights, 10)
    few = np.arange(T) % 3 == 0
    assert not judge(np.where(few[:, None], far, ids)).tied.any()
    tied = judge(np.where(few[:, None], close, ids)).tied
    assert 0 < tied.sum() < few.sum()
    scores = 1 / (1 + np.exp(-gate))
    order = np.argsort(-(scores + weights.router_bias), axis=-1)[:, A - 1 : A + 1]
    cut = np.take_along_axis(scores, order, axis=-1)  # [T, 2]: the last chosen, the first rejected
    reach = off * (cut * (1 - cut)).sum(axis=-1)  # how far both may move, by sigmoid's slope
    assert tied[few & (margin < 0.9 * reach)].all() and not tied[margin > 1.1 * reach + 1e-6].any()


def test_where_most_rows_would_be_ties_none_is() -> None:
    weights, gate, ids, margin = case()
    close = np.argsort(margin)[:8]
    theirs = swapped(ids, gate, weights, 0)[close]
    gate, ids, margin = gate[close], ids[close], margin[close]
    assert not choice(chooser(weights, SPEC), ids, gate, None, theirs, 0.2).tied.any()
    three = choice(chooser(weights, SPEC), ids[:3], gate[:3], None, theirs[:3], 0.2)
    assert three.tied.all()  # of so few, all may be


def test_exact_ties_may_all_fall_otherwise() -> None:
    weights, gate, *_ = case()
    gate[:, E // 2 :] = gate[:, : E // 2]
    bias = np.tile(np.asarray(weights.router_bias)[: E // 2], 2)
    weights = weights._replace(router_bias=bias)
    odd = SPEC._replace(top_k=3)
    choose = chooser(weights, odd)
    ids, mirrored = choose(gate, 0.0), np.sort((choose(gate, 0.0) + E // 2) % E)
    assert (ids != mirrored).any(axis=-1).all()
    for other in (None, gate.astype(np.float32)):
        found = choice(choose, ids, gate, other, mirrored, 2e-5)
        assert found.tied.all() and np.array_equal(found.ids, mirrored)


def test_without_their_experts_these_are_what_their_logits_give() -> None:
    weights, gate, ids, margin = case()
    other = (gate + 0.05 * np.random.default_rng(1).uniform(-1, 1, gate.shape)).astype(np.float32)
    found = choice(chooser(weights, SPEC), ids, gate, other, None, 0.03)
    assert np.array_equal(found.ids, chosen(weights, other)) and found.tied.any()
    assert not found.unsure.any()
    off = 0.03 / 3 * np.abs(gate).max()
    nothing = choice(chooser(weights, SPEC), ids, gate, None, None, 0.03)
    assert np.array_equal(nothing.ids, ids) and not nothing.tied.any()
    assert nothing.unsure[margin < 1e-3].all() and not nothing.unsure[margin > off / 2 + 1e-5].any()


def test_the_precision_of_logits_is_seen_whatever_they_are_stored_as() -> None:
    x = np.random.default_rng(0).standard_normal(100).astype(np.float32)
    assert roundoff(rounded(x, "bfloat16")) == roundoff(np.zeros(3)) == 2.0**-8
    assert roundoff(rounded(x, "float16").astype(np.float64)) == 2.0**-11
    assert roundoff(x) == roundoff(x.astype(np.float64) / 3) == 2.0**-24
    assert roundoff(np.array([70000.5, 1], np.float32)) == 2.0**-24
    assert score_scale(np.array([[8.0, -2.0]])) == 4 and score_scale(None) == 0.5


def test_a_checkpoint_gives_its_routers(tmp_path: Any) -> None:
    routers = routers_of(GOLDEN / "tiny" / "bf16")
    assert [routers(n) is None for n in range(11)] == [True] * 2 + [False] * 6 + [True] * 3
    choose: Choose | None = routers(3)
    assert choose is not None and choose(np.zeros((2, E)), 0.0).shape == (2, A)
    (tmp_path / "config.json").write_bytes((GOLDEN / "tiny/bf16/config.json").read_bytes())
    assert routers_of(tmp_path)(3) is None  # no weights
