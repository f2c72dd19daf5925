"""Cross-entropy: what training makes small, and what the bits a byte of a text measure."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import DTypeLike
from tokenizers import Tokenizer

from minstep.config import Config
from minstep.model import ModelWeights, decoder, head
from minstep.mtp import mtp_forward
from minstep.tap import Array, Tap
from minstep.train.data import encode_documents
from minstep.train.documents import Document


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


def bits_per_byte(
    documents: Sequence[Document],
    tokenizer: Tokenizer,
    weights: ModelWeights,
    config: Config,
    length: int,
    dtype: DTypeLike = np.float32,
) -> float:
    """The mean cross-entropy of each byte of `documents`; a document has no other one as context.

    Each document is read in windows of `length` tokens, half of which overlap: but for the first
    window only the second half counts, so that every token but the first has half a window before
    it. The end of a document has to be predicted too. The figure is comparable between tokenizers.
    Raises InputError as encode_documents does.
    Source: strided perplexity, as in transformers' documentation; bits a byte as in the Pile,
        arXiv 2101.00027, section 3.1.
    Checked by: tests/train/test_bits_per_byte.py
    """
    nats, step = 0.0, max(1, length // 2)
    for document in documents:
        tokens = encode_documents([document], tokenizer)
        counted = 1  # bos is given
        while counted < len(tokens):
            start = max(0, counted - 1 - (length - 1 - step))
            window = tokens[start : start + length].tolist()
            logits = head(decoder(window[:-1], weights, config, dtype), weights, config)
            first = counted - start  # the first token of the window that counts
            nats += float(surprise(logits[first - 1 :], window[first:]).sum(dtype=np.float64))
            counted = start + len(window)
    return nats / math.log(2) / sum(document.nbytes for document in documents)
