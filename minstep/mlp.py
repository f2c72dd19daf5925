"""Clamped SwiGLU: the dense MLP, the shared expert and every routed expert."""

from typing import NamedTuple

import numpy as np

from minstep.activations import silu
from minstep.linear import Weight, linear
from minstep.tap import Array
from minstep.validation import check_finite


class MLPWeights(NamedTuple):
    """Tensors under `model.layers.N.mlp.` or `.share_expert.`, each with `.weight` at the end.

    One matrix each; or a stack of them, for MLPs that run at once.
    """

    gate_proj: Weight  # [..., F, D]
    up_proj: Weight  # [..., F, D]
    down_proj: Weight  # [..., D, F]


def swiglu(x: Array, weights: MLPWeights, limit: float | None) -> Array:
    """down(silu(gate x) * up x), with both factors held within `limit`.

    x [..., D] float32 or float64; F is the width. Returns [..., D] in x's dtype. With a limit,
    silu(gate) is capped above only (below, SiLU never passes -0.28), and up on both sides.
    Source: Step3p5MLP in modeling_step3p5.py; clamping, report section 4 and figure 4.
    Differs: the cap is on silu(gate), not on gate before it. Routed experts take their limit from
        `swiglu_limits`, the shared expert and dense MLPs from `swiglu_limits_shared`. A wrong clamp
        shows only in layers 43 and 44, and only on outliers.
    Checked by: tests/model/test_mlp.py
    """
    gate = silu(linear(x, weights.gate_proj))  # [..., F]
    up = linear(x, weights.up_proj)  # [..., F]
    if limit is not None:
        check_finite("gate_proj", gate, "up_proj", up)  # a clamp would hide infinity
        gate = np.minimum(gate, limit)
        up = np.clip(up, -limit, limit)
    return linear(gate * up, weights.down_proj)  # [..., D]
