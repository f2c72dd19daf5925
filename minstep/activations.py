"""sigmoid, SiLU and softmax, written so that no input overflows."""

import numpy as np

from minstep.tap import Array


def sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x)), any shape, in x's dtype.

    Only exp of negative numbers is taken, so large |x| neither overflows nor loses the tail.
    """
    decay = np.exp(-np.abs(x))
    return np.where(x >= 0, 1, decay) / (1 + decay)


def silu(x: Array) -> Array:
    """x * sigmoid(x), any shape, in x's dtype."""
    return x * sigmoid(x)


def softmax(x: Array) -> Array:
    """exp(x) / sum(exp(x)) over the last axis, in x's dtype; -inf gets exactly 0.

    Each row needs one finite entry.
    """
    powers = np.exp(x - x.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)
