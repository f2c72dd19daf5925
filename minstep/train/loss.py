"""What training makes small: the surprise at each next token, for the main model and its drafts."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import DTypeLike

from minstep.config import Config
from minstep.model import ModelWeights, decoder, head
from minstep.mtp import mtp_forward
from minstep.tap import Array, Tap


class Losses(NamedTuple):
    """`total` is what is made small; `main` and each of `depths` are its parts, in nats a token."""

    total: Array  # []
    main: Array  # []
    depths: tuple[Array, ...]


def cross_entropy(logits: Array, targets: Sequence[int]) -> Array:
    """The mean of -log softmax(logits)[target], in nats: [N, V] and N ids -> [] in logits' dtype.

    Source: the cross-entropy of any language model; the largest logit is taken off, so that exp
        does not overflow.
    Checked by: tests/train/test_loss.py
    """
    return surprise(logits, targets).mean()


def surprise(logits: Array, targets: Sequence[int]) -> Array:
    """-log softmax(logits)[target] of each row, in nats: [N, V] and N ids -> [N]."""
    shifted = logits - logits.max(axis=-1, keepdims=True)  # [N, V]
    total = np.exp(shifted).sum(axis=-1)  # [N]
    chosen = np.take_along_axis(shifted, np.asarray(targets)[:, None], axis=-1)  # [N, 1]
    return np.log(total) - chosen[:, 0]


def objective(
    tokens: Sequence[int],
    weights: ModelWeights,
    config: Config,
    mtp_weight: float,
    dtype: DTypeLike,
    tap: Tap,
) -> Losses:
    """The loss of one sequence: the main model's, and mtp_weight times the mean of the depths'.

    `tokens`: T ids. Position i of depth k predicts token i + k + 1, the main model being depth 0,
    so depth k has T - 1 - k rows. Every depth sees true tokens, and sends its gradient on into the
    depths before it and into the main model.
    Source: report sections 3 and 4.1 (weight 0.3, later 0.1); DeepSeek-V3, arXiv 2412.19437,
        section 2.2, for the mean over depths. No auxiliary loss: see balance.py.
    Checked by: tests/train/test_loss.py
    """
    least = len(weights.mtp) + 2
    if len(tokens) < least:
        raise ValueError(
            f"{len(tokens)} tokens, expected at least {least} for a loss of each depth"
        )
    hidden = decoder(tokens, weights, config, dtype, tap=tap)  # [T, D]
    main = cross_entropy(head(hidden, weights, config)[:-1], tokens[1:])
    drafts = mtp_forward(tokens, hidden, weights, config, tap)
    depths = tuple(
        cross_entropy(logits[:-1], tokens[k + 1 :]) for k, logits in enumerate(drafts, start=1)
    )
    share = mtp_weight / len(depths) if depths else 0.0
    return Losses(sum((depth * share for depth in depths), main), main, depths)
