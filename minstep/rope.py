"""Rotary position embedding: which angles a layer uses, and the rotation itself.

Each layer kind has its own base theta and its own share of rotated dimensions; only the kinds
named in `yarn_only_types` have their frequencies scaled.
"""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import DTypeLike

from minstep.config import RopeSpec
from minstep.tap import Array


class Rotation(NamedTuple):
    """Cosines and sines of every position's angles, each [T, P]."""

    cos: Array
    sin: Array


def inverse_frequencies(spec: RopeSpec, dtype: DTypeLike) -> Array:
    """Radians per position of each rotated pair, fastest first: [P] in `dtype`.

    Source: "default" and "llama3" rope types of the released configuration; Llama 3.1's
        frequency scaling: wavelengths that fit high_freq_factor times or more into the original
        length stay, those that fit low_freq_factor times or less are slowed by `factor`, and in
        between the two are mixed linearly in the number of turns.
    Differs: the exponent runs over rotary_dim, not head_dim: with partial rotation the two differ.
        The config calls the kinds that scale `yarn_only_types`, but the formula is not YaRN.
    Checked by: tests/model/test_rope.py
    """
    pairs = np.arange(0, spec.rotary_dim, 2, dtype=dtype) / spec.rotary_dim  # [P]
    inv_freq = 1 / np.power(spec.theta, pairs, dtype=dtype)
    if spec.scaling is None:
        return inv_freq
    factor, low, high, original = spec.scaling
    turns = original * inv_freq / (2 * math.pi)  # over the original length
    keep = np.clip((turns - low) / (high - low), 0, 1)  # 1: as it is, 0: slowed by factor
    return keep * inv_freq + (1 - keep) * inv_freq / factor


def rotation(positions: Array, spec: RopeSpec, dtype: DTypeLike) -> Rotation:
    """The angles of `positions` [T] under `spec`: cos and sin [T, P] in `dtype`.

    With float32 the angle itself is a float32 product, as in the released code: at position
    262,143 it is off by up to 0.015 rad. Use float64 to see what the model meant.
    """
    angles = np.outer(positions.astype(dtype), inverse_frequencies(spec, dtype))  # [T, P]
    return Rotation(np.cos(angles), np.sin(angles))


def rotate(x: Array, table: Rotation) -> Array:
    """Turn the first 2P dimensions of each head by its position's angles; the rest pass.

    x [T, N, K], N query or key heads; table [T, P]. Returns [T, N, K] in x's dtype. Pair i is
    dimensions (i, i + P).
    Source: rotate_half and apply_rotary_pos_emb in modeling_step3p5.py.
    Differs: GPT-J and GGUF's "normal" layout pair (2i, 2i + 1). Weights are stored for halves, so
        interleaving scrambles every head although short texts may still look fluent.
    Checked by: tests/model/test_rope.py
    """
    pairs = table.cos.shape[-1]
    cos, sin = table.cos[:, None, :], table.sin[:, None, :]  # [T, 1, P]
    first, second = x[..., :pairs], x[..., pairs : 2 * pairs]  # [T, N, P]
    turned = (first * cos - second * sin, second * cos + first * sin)
    return np.concatenate((*turned, x[..., 2 * pairs :]), axis=-1)  # [T, N, K]
