"""Which experts another engine chose, or would have, and whether that is rounding.

The router itself is asked: a choice is possible where logits that are nudged towards it, by no more
than they may be off, make the router choose so; it is sure where none nudged away from it do not.
Checked by: tests/parity/test_router_ties.py, tests/parity/test_check_layer.py
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from minstep import moe
from minstep.config import MoESpec
from minstep.linear import as_float
from minstep.moe import MoEWeights
from minstep.tap import Array

TYPICAL = 1 / 3  # of the largest error allowed: what logits are off by, where nobody recorded them
ROUNDING = 1e-6  # of a float32 score between 0 and 2
FEW = 4  # rows of which most may be ties by chance
Ids = NDArray[np.integer[Any]]
Mask = NDArray[np.bool_]  # [T]
Choose = Callable[[Array, Array | float], Ids]


class Choice(NamedTuple):
    """What is known of the experts that another engine chose for T tokens.

    `ids` [T, A]: what to go on with. `tied`: they are others than ours, and only rounding parts the
    two. `unsure`: nobody recorded them, and they may be others. `lacks`: what would tell a tie from
    a wrong router, where it is missing; then `tied` are all rows with other experts.
    """

    ids: Ids
    tied: Mask
    unsure: Mask
    lacks: str = ""


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
