"""How well a model foretells a text, in bits a byte: the same figure for any tokenizer."""

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import DTypeLike
from tokenizers import Tokenizer

from minstep.config import Config
from minstep.model import ModelWeights, decoder, head
from minstep.train.data import encode_documents
from minstep.train.documents import Document
from minstep.train.loss import surprise


def bits_per_byte(
    documents: Sequence[Document],
    tokenizer: Tokenizer,
    weights: ModelWeights,
    config: Config,
    length: int,
    dtype: DTypeLike = np.float32,
    progress: Callable[[int], object] = lambda done: None,
) -> float:
    """The mean surprise at each byte of `documents`, which stand for themselves: no other context.

    Each document is read in windows of `length` tokens, half of which overlap: but for the first
    window only the second half counts, so that every token but the first has half a window before
    it. The end of a document has to be foretold too. `progress` is told of the tokens that are
    done. Raises InputError as encode_documents does.
    Source: strided perplexity, as in transformers' documentation; bits a byte as in the Pile,
        arXiv 2101.00027, section 3.1.
    Checked by: tests/train/test_evaluate.py
    """
    nats, done, step = 0.0, 0, max(1, length // 2)
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
        done += len(tokens)
        progress(done)
    return nats / math.log(2) / sum(document.nbytes for document in documents)
