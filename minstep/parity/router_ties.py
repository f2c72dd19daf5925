"""Which experts another engine chose, or would have, and whether that is rounding.

The router itself is asked: a choice is possible where logits that are nudged towards it, by no more
than they may be off, make the router choose so; it is sure where none nudged away from it do not.
Checked by: tests/parity/test_router_ties.py, tests/parity/test_layer.py
"""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from minstep import moe
from minstep.activations import sigmoid
from minstep.config import MoESpec
from minstep.errors import InputError
from minstep.linear import as_float
from minstep.moe import MoEWeights
from minstep.parity.recording import Recording
from minstep.store.checkpoint import open_checkpoint
from minstep.tap import Array

TYPICAL = 1 / 3  # of the largest error allowed: what logits are off by, where nobody recorded them
ROUNDING = 1e-6  # of a float32 score between 0 and 2
FEW = 4  # rows of which most may be ties by chance
Ids = NDArray[np.integer[Any]]
Mask = NDArray[np.bool_]  # [T]
Choose = Callable[[Array, Array | float], Ids]
Routers = Callable[[int], Choose | None]


class Choice(NamedTuple):
    """What is known of the experts that another engine chose for T tokens.

    `ids` [T, A]: what to go on with. `tied`: they are others than ours, and only rounding parts the
    two. `unsure`: nobody recorded them, and they may be others. `is_blind`: the bias is not known.
    """

    ids: Ids
    tied: Mask
    unsure: Mask
    is_blind: bool = False


def chooser(weights: MoEWeights, spec: MoESpec, module: ModuleType = moe) -> Choose:
    """The router alone: logits [T, E] and what to add to biased scores [T, E] -> ids [T, A].

    `module`: minstep.moe or a variant of it. Of the weights only the bias is looked at.
    """
    bias = 0.0 if weights.router_bias is None else as_float(weights.router_bias, np.float64)
    one = np.eye(spec.experts)  # the logits times this are the logits

    def choose(logits: Array, added: Array | float) -> Ids:
        biases = np.broadcast_to(bias + added, logits.shape)
        alone = weights._replace(gate=one, router_bias=biases)
        return cast(Ids, module.route(logits.astype(np.float64), alone, spec).ids)

    return choose


def routers_of(folder: Path) -> Routers:
    """Each layer's router; None where it has none, or its bias is not in the folder."""
    try:
        checkpoint = open_checkpoint(folder)
    except InputError:  # a config alone
        return lambda n: None
    config = checkpoint.config
    specs = (*config.layers, *config.mtp_layers)

    def router(n: int) -> Choose | None:
        spec, bias = specs[n].moe, f"{specs[n].name}.moe.router_bias"
        if spec is None or (spec.has_bias and bias not in checkpoint.tensors):
            return None
        none: Any = np.empty(0)
        held = checkpoint.get(bias, (spec.experts,)) if spec.has_bias else None
        return chooser(MoEWeights(none, held, none, none, none), spec)

    return router


def choice(
    choose: Choose,
    ours: Ids,
    gate: Array,
    other: Array | None,
    theirs: Ids | None,
    tolerance: float,
) -> Choice:
    """Judge their experts [T, A] by their logits `other` [T, E], else by ours, `gate`.

    Without their logits `tolerance` says how far these may be from ours, and where most rows would
    be ties, none is. Without their experts they are what the router makes of their logits.
    """
    logits, score = gate if other is None else other, ROUNDING
    off: Array | float = _typical(gate, tolerance)
    if other is not None:
        off, score = roundoff(other) * np.abs(other), max(roundoff(other), ROUNDING)

    def nudged(ids: Ids, by: float, off: Array | float = off) -> Mask:
        """Whether the router chooses so where logits move towards that, or away from it."""
        towards = np.full(logits.shape, -by)
        np.put_along_axis(towards, ids, by, axis=-1)
        return cast(Mask, (choose(logits + towards * off, towards * score) == ids).all(axis=-1))

    none = np.zeros(len(ours), bool)
    if theirs is None:
        ids = ours if other is None else choose(other, 0.0)
        return Choice(ids, (ids != ours).any(axis=-1), ~nudged(ids, -1))
    theirs = np.sort(theirs, axis=-1)
    differs = (theirs != ours).any(axis=-1)
    tied = differs & nudged(theirs, 1)
    if other is None and too_many(tied & ~(exact := nudged(theirs, 1, 0.0))):
        tied &= exact
    return Choice(np.where(tied[:, None], theirs, ours), tied, none)


def choice_without_bias(
    ours: Ids,
    margin: Array | None,
    gate: Array | None,
    other: Array | None,
    theirs: Ids | None,
    tolerance: float,
) -> Choice:
    """The same where nothing says the router's bias, so that the router cannot be asked.

    `margin` [T]: the gap between the last chosen and the first rejected score of ours, if known.
    What our experts beat by `gate` tells how far two biases are apart, at least; with these their
    choice must be the best of their logits too.
    """
    none, gap = np.zeros(len(ours), bool), np.zeros(len(ours)) if margin is None else margin
    off: Array | float = 0.5 * tolerance if gate is None else _typical(gate, tolerance)
    if gate is not None and other is not None:
        off = np.abs(gate - other).max(axis=-1)  # [T]
    if theirs is None:
        return Choice(ours, none, gap <= off / 2 + ROUNDING, True)
    theirs = np.sort(theirs, axis=-1)
    differs = (theirs != ours).any(axis=-1)
    tied = differs & (gap <= off / 2 + ROUNDING) & (gate is not None or margin is not None)
    if gate is not None:
        logits = gate if other is None else other
        if other is not None:
            off = sum(roundoff(x) * np.abs(x).max(initial=0.0) for x in (gate, other))
        tied = differs & (_behind(gate, ours, gap, logits, theirs) <= off / 2 + ROUNDING)
    if other is None and too_many(tied & (gap > ROUNDING)):
        tied = none
    return Choice(np.where(tied[:, None], theirs, ours), tied, none, True)


def _behind(gate: Array, ours: Ids, gap: Array, other: Array, theirs: Ids) -> Array:
    """How far the worst of their experts scores behind the best left out, at least: [T].

    `gap` [T]: by how much each expert of ours scores before those left out, at least.
    """
    every = np.arange(gate.shape[-1])
    lead = np.full((len(every), len(every)), -np.inf)  # of the first expert's bias over the second
    for s, chosen, least in zip(sigmoid(gate.astype(np.float64)), ours, gap, strict=True):
        into, out = np.ix_(chosen, np.setdiff1d(every, chosen))
        lead[into, out] = np.maximum(lead[into, out], s[out] - s[into] + least)
    behind = np.full(len(theirs), -np.inf)
    for t, (s, chosen) in enumerate(zip(sigmoid(other.astype(np.float64)), theirs, strict=True)):
        out, into = np.ix_(np.setdiff1d(every, chosen), chosen)
        behind[t] = (s[out] - s[into] + lead[out, into]).max(initial=-np.inf)
    return behind


def recorded_choice(
    n: int, ours: Recording, theirs: Recording, tolerance: float, choose: Choose | None = None
) -> Choice | None:
    """What two recordings tell of the experts of layer n; None where ours has none.

    `choose`: the layer's router, where its bias is known.
    """
    at = f"model.layers.{n}.moe"
    ids, chosen = (r.if_any(f"{at}.ids", 2) for r in (ours, theirs))
    gate, other = (r.if_any(f"{at}.gate", 2) for r in (ours, theirs))
    margin, their_margin = (r.if_any(f"{at}.margin", 1) for r in (ours, theirs))
    if ids is None:
        return None
    if gate is None or (other is not None and other.shape[1] != gate.shape[1]):
        other = None  # without ours, theirs say nothing
    margin = their_margin if margin is None and gate is None else margin
    if chosen is not None and not are_experts(chosen, ids.shape[1], gate):
        return None
    T = min(len(x) for x in (ids, chosen, gate, other, margin) if x is not None)
    ids = np.sort(ids[:T], axis=-1)
    chosen, gate, other, margin = (x if x is None else x[:T] for x in (chosen, gate, other, margin))
    if choose is not None and gate is not None:
        return choice(choose, ids, gate, other, chosen, tolerance)
    return choice_without_bias(ids, margin, gate, other, chosen, tolerance)


def roundoff(x: Array) -> float:
    """Half the distance from 1.0 to the next number, in the shortest floats that hold all of x.

    What was computed in 16 bits and stored in 32 is still of 16 bits.
    """
    single = x.astype(np.float32)
    if not (single.view(np.uint32) & 0xFFFF).any():
        return 2.0**-8  # bfloat16
    with np.errstate(over="ignore"):
        is_half = bool((single.astype(np.float16) == x).all())
    return 2.0**-11 if is_half else 2.0**-24


def are_experts(ids: Array, count: int, gate: Array | None) -> bool:
    """Whether ids [T, count] are whole numbers, each of an expert that has logits [T, E]."""
    if ids.ndim != 2 or ids.dtype.kind not in "iu" or ids.shape[1] != count:
        return False
    return gate is None or bool(((ids >= 0) & (ids < gate.shape[1])).all())


def score_scale(gate: Array | None) -> float:
    """What errors of a margin are relative to, by the logits [T, E]: e of these move it by e/2."""
    return max(1.0, 0.0 if gate is None else float(np.abs(gate).max(initial=0.0))) / 2


def too_many(rows: Mask) -> bool:
    """Whether more rows are ties than can be chance."""
    return len(rows) >= FEW and 2 * int(rows.sum()) > len(rows)


def _typical(gate: Array, tolerance: float) -> float:
    """What logits may be off by where a tensor's largest error is `tolerance`."""
    return 2 * TYPICAL * tolerance * score_scale(gate)
