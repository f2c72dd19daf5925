"""Mixture of experts: a sigmoid router with a selection bias, and the experts it chose."""

import itertools
import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from minstep.activations import sigmoid
from minstep.config import MoESpec
from minstep.errors import InputError
from minstep.fast.pages import check, reads_disk, will_need
from minstep.fast.threads import LARGE, each, scratch
from minstep.linear import Weight, as_float, linear
from minstep.mlp import MLPWeights, swiglu
from minstep.tap import Array, Tap, silent
from minstep.validation import check_finite

FEW = 1 << 18  # weight elements of a copy of every chosen expert's matrix: 1 MB of float32


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
    Raises InputError for logits or a bias that are not finite: any choice could come of them.
    Source: the router of Step3p5MoEMLP in modeling_step3p5.py; loss-free balancing, report
        section 2.
    Differs: the bias decides who is chosen and never touches the weights, which are the raw
        sigmoid scores of the chosen, normalised over the chosen only, times scaling_factor. Softmax
        routers normalise over all experts first.
    Checked by: tests/model/test_moe.py
    """
    logits = tap("gate", linear(x, weights.gate))  # [T, E]
    scores = sigmoid(logits)
    biased = scores
    if weights.router_bias is not None:
        biased = scores + as_float(weights.router_bias, x.dtype)
    check_finite("moe.gate", logits, "moe.router_bias on scores", biased)
    order = np.argsort(-biased, axis=-1, kind="stable")  # best first
    if tap.wants("margin") and spec.top_k < spec.experts:
        ranked = np.take_along_axis(biased, order, axis=-1)
        margin = ranked[:, spec.top_k - 1] - ranked[:, spec.top_k]  # [T]
        tap("margin", margin)
    ids = tap("ids", np.sort(order[:, : spec.top_k], axis=-1))  # [T, A]
    chosen = scores[np.arange(len(x))[:, None], ids]  # [T, A]
    total = chosen.sum(axis=-1, keepdims=True) + 1e-20  # [T, 1]
    return Choice(ids, tap("weights", chosen / total * spec.scaling_factor))


def experts(x: Array, weights: MoEWeights, choice: Choice, limit: float | None) -> Array:
    """Sum the chosen experts' outputs, each scaled by its weight.

    x [T, D]. Returns [T, D] in x's dtype. One choice of one token is a slot: there are T*A. Raises
    InputError for the id of an expert that there is not.
    Source: Step3p5MoEMLP in modeling_step3p5.py.
    Checked by: tests/model/test_moe.py
    """
    T, A = choice.ids.shape
    flat, E = choice.ids.ravel(), weights.gate_proj.shape[0]  # [T*A]
    used = flat.tolist()
    if min(used) < 0 or max(used) >= E:
        raise InputError(f"experts {min(used)} to {max(used)} are chosen, expected 0 to {E - 1}")
    slots = x[np.repeat(np.arange(T), A)]  # [T*A, D]
    stacks, size = weights[2:], math.prod(weights.gate_proj.shape[1:])
    for stack in stacks:
        check(stack)
    are_ready = all(isinstance(w, np.ndarray) and w.dtype == x.dtype for w in stacks)
    run = at_once if are_ready and T * A * size <= FEW else one_by_one
    outputs = run(slots, weights, flat, limit).reshape(T, A, -1)  # [T, A, D]
    return (outputs * choice.weights[:, :, None]).sum(axis=1)  # [T, D]


def one_by_one(slots: Array, weights: MoEWeights, ids: NDArray[Any], limit: float | None) -> Array:
    """The output of each slot's expert: each chosen expert runs once, over all of its slots.

    slots [N, D], ids [N]. Returns [N, D]. One sort brings an expert's slots together; an expert
    that nobody chose is never read. Large ones are shared out to threads.
    """
    by_expert = np.argsort(ids, kind="stable")  # [N]
    chosen, starts = np.unique(ids[by_expert], return_index=True)  # [used], [used]
    grouped = slots[by_expert]  # [N, D]
    rows = len(ids) // len(chosen)
    is_large = math.prod(weights.gate_proj.shape[1:]) * (1 + rows // 16) >= LARGE  # as in linear

    def of(expert: int) -> MLPWeights:
        return MLPWeights(
            weights.gate_proj[expert], weights.up_proj[expert], weights.down_proj[expert]
        )  # [F, D], [F, D], [D, F]

    def output(expert: int, start: int, end: int) -> Array:
        return swiglu(grouped[start:end], of(expert), limit)  # [rows, D]

    if is_large and reads_disk(weights.gate_proj):
        for expert in chosen:
            will_need(*of(expert))  # all are on their way while the first one computes
    groups = zip(chosen, starts, [*starts[1:], len(ids)], strict=True)
    outputs = (each if is_large else itertools.starmap)(output, groups)
    return np.concatenate(list(outputs))[np.argsort(by_expert)]  # [N, D]; as slots were


def at_once(slots: Array, weights: MoEWeights, ids: NDArray[Any], limit: float | None) -> Array:
    """The same outputs from a copy of its expert's matrices for each slot, multiplied in one call.

    slots [N, D], ids [N]. Returns [N, D]. Where experts are small, calls cost more than bytes.
    The copies go to memory that is there already: to clear fresh pages would take longer still.
    """
    copies = scratch((3, len(ids), *weights.gate_proj.shape[1:]), slots.dtype)  # [3, N, F, D]
    down = copies[2].reshape(-1, *weights.down_proj.shape[1:])  # [N, D, F]
    own = MLPWeights(copies[0], copies[1], down)  # [N, F, D], [N, F, D], [N, D, F]
    for n in range(3):
        np.take(np.asarray(weights[2 + n]), ids, axis=0, out=np.asarray(own[n]), mode="clip")
    return swiglu(slots[:, None], own, limit)[:, 0]  # [N, D]


def moe(
    x: Array, weights: MoEWeights, spec: MoESpec, limit: float | None, tap: Tap = silent
) -> Array:
    """Route, then run the routed experts: [T, D] -> [T, D]. The shared expert stands beside it."""
    return experts(x, weights, route(x, weights, spec, tap), limit)
