"""RMSNorm with zero-centred weights."""

import numpy as np

from minstep.linear import Weight, as_float
from minstep.tap import Array


def rms_norm(x: Array, weight: Weight, eps: float) -> Array:
    """Scale each vector to unit root-mean-square, then by 1 + weight.

    x [..., N], float32 or float64, N the hidden or the head width; weight [N], stored zero-centred.
    Returns [..., N] in x's dtype. Beyond about 1e19 the square of a float32 is infinite, and what
    comes out is 0, as in the released code, which takes its mean of squares in float32 too.
    Source: Step3p5RMSNorm in modeling_step3p5.py; "zero-centered RMSNorm", report section 2.
    Differs: Llama multiplies by weight alone. A port that does so here scales every activation by
        about 0 instead of about 1: garbage from layer 0. Adding 1 at load time as well doubles it.
    Checked by: tests/model/test_norm.py
    """
    mean_square = np.square(x).sum(axis=-1, keepdims=True) / x.shape[-1]  # [..., 1]
    return x / np.sqrt(mean_square + eps) * (1 + as_float(weight, x.dtype))
