"""Mixture of experts: a sigmoid router with a selection bias, and the experts it chose."""

import itertools
import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from minstep.activations import sigmoid
from minstep.config import MoESpec
from minstep.linear import Weight, as_float, linear
from minstep.mlp import MLPWeights, swiglu
from minstep.pages import reads_disk, will_need
from minstep.parallel import LARGE, each
from minstep.tap import Array, Tap, silent


class MoEWeights(NamedTuple):
    """Tensors under `model.layers.N.moe.`; experts are stacked on the first axis."""

    gate: Weight  # [E, D], gate.weight: the router
    router_bias: Weight | None  # [E], no .weight; None where use_moe_router_bias is false
    gate_proj: Weight  # [E, F, D]
    up_proj: Weight  # [E, F, D]
    down_proj: Weight  # [E, D, F]


class Choice(NamedTuple):
    """The experts of each token in increasing order, and what their outputs are scaled by."""

    ids: NDArray[np.integer[Any]]  # [T, A]
    weights: Array  # [T, A]


def route(x: Array, weights: MoEWeights, spec: MoESpec, tap: Tap = silent) -> Choice:
    """Choose A of E experts for each token, and weigh them.

    x [T, D] float32 or float64, so the router never runs below float32. Ties go to the lower id.
    Source: the router of Step3p5MoEMLP in modeling_step3p5.py; loss-free balancing, report
        section 2.
    Differs: the bias decides who is chosen and never touches the weights, which are the raw
        sigmoid scores of the chosen, normalised over the chosen only, times scaling_factor. Softmax
        routers normalise over all experts first.
    Checked by: tests/test_moe.py
    """
    logits = tap("gate", linear(x, weights.gate))  # [T, E]
    scores = sigmoid(logits)
    biased = scores
    if weights.router_bias is not None:
        biased = scores + as_float(weights.router_bias, x.dtype)
    order = np.argsort(-biased, axis=-1, kind="stable")  # best first
    if tap.wants("margin") and spec.top_k < spec.experts:
        ranked = np.take_along_axis(biased, order, axis=-1)
        margin = ranked[:, spec.top_k - 1] - ranked[:, spec.top_k]  # [T]
        tap("margin", margin)
    ids = tap("ids", np.sort(order[:, : spec.top_k], axis=-1))  # [T, A]
    chosen = np.take_along_axis(scores, ids, axis=-1)  # [T, A]
    total = chosen.sum(axis=-1, keepdims=True) + 1e-20  # [T, 1]
    return Choice(ids, tap("weights", chosen / total * spec.scaling_factor))


def experts(x: Array, weights: MoEWeights, choice: Choice, limit: float | None) -> Array:
    """Sum the chosen experts' outputs, each scaled by its weight.

    x [T, D]. Returns [T, D] in x's dtype. Tokens are grouped by expert with one sort: each chosen
    expert runs once over its tokens, and an expert that nobody chose is never read.
    Source: Step3p5MoEMLP in modeling_step3p5.py.
    Checked by: tests/test_moe.py
    """
    flat = choice.ids.ravel()  # [T*A]
    by_expert = np.argsort(flat, kind="stable")  # [T*A], slots sorted by expert
    chosen, starts = np.unique(flat[by_expert], return_index=True)  # [used], [used]
    is_large = math.prod(weights.gate_proj.shape[1:]) >= LARGE

    def of(expert: int) -> MLPWeights:
        return MLPWeights(
            weights.gate_proj[expert], weights.up_proj[expert], weights.down_proj[expert]
        )  # [F, D], [F, D], [D, F]

    def output(expert: int, slots: Array) -> tuple[Array, Array]:
        tokens, places = np.divmod(slots, choice.ids.shape[1])  # [N], [N]
        scale = choice.weights[tokens, places][:, None]  # [N, 1]
        return tokens, swiglu(x[tokens], of(expert), limit) * scale  # [N], [N, D]

    if is_large and reads_disk(weights.gate_proj):
        for expert in chosen:
            will_need(*of(expert))  # all are on their way while the first one computes
    out = np.zeros_like(x)
    groups = zip(chosen, np.split(by_expert, starts[1:]), strict=True)
    for tokens, added in (each if is_large else itertools.starmap)(output, groups):
        out[tokens] += added
    return out


def moe(
    x: Array, weights: MoEWeights, spec: MoESpec, limit: float | None, tap: Tap = silent
) -> Array:
    """Route, then run the routed experts: [T, D] -> [T, D]. The shared expert stands beside it."""
    return experts(x, weights, route(x, weights, spec, tap), limit)
