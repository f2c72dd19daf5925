"""Bits a byte of a model beside the baselines."""

import numpy as np

import minstep
from minstep.explore.bits import bits_report, bits_table
from minstep.text.tokenizer import byte_level_tokenizer
from minstep.train.data import Corpus, Document


def test_the_report_weighs_documents_by_their_bytes_and_names_each_kind() -> None:
    config = minstep.load_config(minstep.find_config("tiny"))
    weights = minstep.random_weights(config, np.random.default_rng(0))
    weights = weights._replace(lm_head=np.zeros_like(weights.lm_head))
    held_out = [Document("topic/a", "abc" * 9), Document("module/b", "é" * 30)]
    corpus = Corpus([Document("topic/c", "abcabcabd" * 50)], held_out)
    seen: list[int] = []
    tokenizer = byte_level_tokenizer()
    report = bits_report(corpus, tokenizer, weights, config, progress=seen.append)
    each = np.log2(config.vocab_size)  # of any token, and the end is one more
    assert np.isclose(report["kinds"]["topic"], each * 28 / 27)
    assert np.isclose(report["kinds"]["module"], each * 61 / 60)
    assert np.isclose(report["model"], each * (28 + 61) / 87)
    assert seen == [27, 87] and report["held_out_bytes"] == 87
    table = bits_table(report)
    assert "this model" in table and "xz" in table and "87 bytes held out" in table
