"""Bits a byte over windows: every token counts once, and has at least half a window before it."""

import numpy as np
import pytest

import minstep
from minstep.model import decoder, head
from minstep.text.tokenizer import byte_level_tokenizer
from minstep.train.data import Document, encode_documents
from minstep.train.loss import bits_per_byte, surprise
from tests.support.tiers import cases

TOKENIZER = byte_level_tokenizer()
CONFIG = minstep.load_config(minstep.find_config("tiny"))
WEIGHTS = minstep.random_weights(CONFIG, np.random.default_rng(0))


@pytest.mark.parametrize("length", cases([2, 7, 16, 64], [3, 4, 17]))
@pytest.mark.parametrize("size", cases([1, 15, 50], [2, 13, 16]))
def test_every_token_counts_once_for_any_window(length: int, size: int) -> None:
    blind = WEIGHTS._replace(lm_head=np.zeros_like(WEIGHTS.lm_head))
    documents = [Document("a", "x" * size), Document("b", "yz" * size)]
    bits = bits_per_byte(documents, TOKENIZER, blind, CONFIG, length)
    assert np.isclose(bits, np.log2(CONFIG.vocab_size) * (3 * size + 2) / (3 * size))


@pytest.mark.parametrize("length", [5, 8, 40])
def test_a_token_is_predicted_from_its_window_alone(length: int) -> None:
    text = "The quick brown fox jumps"
    tokens = encode_documents([Document("a", text)], TOKENIZER).tolist()
    nats, counted, step = 0.0, 1, length // 2
    while counted < len(tokens):
        start = max(0, counted - length + step)
        for n in range(counted, min(start + length, len(tokens))):
            states = decoder(tokens[start:n], WEIGHTS, CONFIG, np.float64)
            logits = head(states, WEIGHTS, CONFIG)[-1:]
            nats += float(surprise(logits, tokens[n : n + 1])[0])
        counted = min(start + length, len(tokens))
    bits = bits_per_byte([Document("a", text)], TOKENIZER, WEIGHTS, CONFIG, length, np.float64)
    assert np.isclose(bits, nats / np.log(2) / len(text), rtol=1e-10)
