"""The baselines: exact probabilities, nothing learned from the held-out text, sizes that are so."""

import gzip
import itertools
import lzma
import time
from collections import Counter
from collections.abc import Mapping

import numpy as np
import pytest

import minstep
from minstep.errors import InputError
from minstep.explore.baselines import (
    NGram,
    _discounts,
    baselines,
    bits_report,
    bits_table,
    gzip_bits,
    ngram_bits,
    xz_bits,
)
from minstep.text.tokenizer import byte_level_tokenizer
from minstep.train.data import Corpus, Document
from tests.support.tiers import cases

WORDS = "the with statement is used to wrap execution of a block object method value".split()


def prose(seed: int, words: int) -> bytes:
    """Words in a random order, the first ones more often."""
    rng = np.random.default_rng(seed)
    chosen = rng.integers(0, len(WORDS), words) * rng.random(words)
    return " ".join(WORDS[int(n)] for n in chosen).encode()


def plain(train: bytes, order: int) -> list[Mapping[bytes, int]]:
    """Counts of n-grams of 1 to `order` bytes as the paper defines them."""

    def grams(n: int) -> list[bytes]:
        return [train[i : i + n] for i in range(len(train) - n + 1)]

    counts = [Counter(longer[1:] for longer in set(grams(n + 1))) for n in range(1, order)]
    return [*counts, Counter(grams(order))]


def plain_probability(counts: list[Mapping[bytes, int]], context: bytes, byte: int) -> float:
    """Interpolated modified Kneser-Ney by its formula, for one byte."""
    if not counts:
        return 1 / 256
    *shorter, own = counts
    seen = {gram: count for gram, count in own.items() if gram[:-1] == context}
    lower = plain_probability(shorter, context[1:], byte)
    if not seen:
        return lower
    discounts = _discounts(np.array(list(own.values())))
    taken = sum(discounts[min(count, 3)] for count in seen.values())
    count = seen.get(context + bytes([byte]), 0)
    return (count - discounts[min(count, 3)] + taken * lower) / sum(seen.values())


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_probabilities_are_those_of_the_formula(order: int) -> None:
    train, text = prose(1, 120), prose(2, 30) + b"\x00 quite new \xff"
    counts, found = plain(train, order), NGram(train, order).probabilities(text)
    for i, byte in enumerate(text):
        context = text[max(0, i - order + 1) : i]
        expected = plain_probability(counts[: len(context) + 1], context, byte)
        assert found[i] == pytest.approx(expected, rel=1e-12), (i, context)


@pytest.mark.parametrize("order", cases([1, 6], [3, 12]))
def test_probabilities_of_all_bytes_sum_to_one_in_any_context(order: int) -> None:
    rng, train = np.random.default_rng(0), prose(1, 3000)
    model, other = NGram(train, order), prose(3, 200)
    starts = rng.integers(0, len(other) - 20, 20)
    contexts = [other[i : i + n] for n, i in enumerate(starts)]
    contexts += [rng.bytes(n) for n in range(1, 20, 4)] + [train[-order:], train[:order]]
    for context in contexts:
        probs = [model.probabilities(context + bytes([byte]))[-1] for byte in range(256)]
        assert min(probs) > 0
        assert sum(probs) == pytest.approx(1, abs=1e-12), context


def test_a_probability_depends_on_nothing_that_comes_after() -> None:
    model, text = NGram(prose(1, 500), 5), prose(2, 50)
    whole = model.probabilities(text)
    for end in (0, 1, 2, 7, 100):
        assert (model.probabilities(text[:end]) == whole[:end]).all()
    assert (model.probabilities(text) == whole).all()  # nor on what was read before
    assert (model.probabilities(b"x" + text)[5:] == whole[4:]).all()  # nor on more than 4 bytes


def test_bits_are_those_of_known_sources() -> None:
    rng = np.random.default_rng(0)
    train, fair = (bytes(rng.integers(97, 101, size).astype(np.uint8)) for size in (60_000, 8_000))
    assert ngram_bits(train, [fair], 2) == pytest.approx(2, abs=0.01)  # one of four letters
    assert 2 < ngram_bits(train, [fair], 8) < 2.2  # what fits to chance is paid for
    assert ngram_bits(b"abcd" * 5_000, [b"abcd" * 100], 4) < 0.1
    assert ngram_bits(train, [b"\x00\xff" * 50], 4) > 8  # never seen, but possible


def test_bits_are_per_byte_of_all_documents() -> None:
    train, long, short = prose(1, 2000), prose(2, 300), prose(3, 40)
    each = [ngram_bits(train, [text], 4) * len(text) for text in (long, short)]
    both = ngram_bits(train, [long, b"", short], 4)
    assert both == pytest.approx(sum(each) / (len(long) + len(short)), rel=1e-12)


def test_kneser_ney_gains_with_the_order_where_text_has_words() -> None:
    train, held_out = prose(1, 4000), [prose(2, 800)]
    bits = [ngram_bits(train, held_out, order) for order in (1, 2, 3, 4)]
    assert all(b < a - 0.1 for a, b in itertools.pairwise(bits)), bits


@pytest.mark.parametrize("train", [b"a", b"aaaaaaaa", bytes(range(256)), b"abababababab"])
def test_texts_too_small_for_estimates_give_probabilities_all_the_same(train: bytes) -> None:
    model = NGram(train, min(3, len(train)))
    for context in (b"", b"a", b"ab", b"zz"):
        probs = [model.probabilities(context + bytes([byte]))[-1] for byte in range(256)]
        assert min(probs) > 0 and sum(probs) == pytest.approx(1, abs=1e-12)


def test_discounts_are_the_papers() -> None:
    counts = np.repeat([1, 2, 3, 4, 9], [8, 3, 2, 1, 5])
    share = 8 / (8 + 2 * 3)
    expected = [0, 1 - 2 * share * 3 / 8, 2 - 3 * share * 2 / 3, 3 - 4 * share * 1 / 2]
    assert _discounts(counts) == pytest.approx(expected)


def test_a_discount_is_from_a_twentieth_to_the_count_that_it_is_taken_from() -> None:
    rng = np.random.default_rng(0)
    least = np.full(4, np.inf)
    for _ in range(300):
        n = rng.integers(1, 10 ** rng.integers(1, 4, 4))  # how many counts are 1, 2, 3 and 4
        share = n[0] / (n[0] + 2 * n[1])
        estimates = [k - (k + 1) * share * n[k] / n[k - 1] for k in (1, 2, 3)]
        found = _discounts(np.repeat([1, 2, 3, 4], n))
        assert found == pytest.approx([0, *np.clip(estimates, 0.05, [1, 2, 3])])
        least = np.minimum(least, found)
    assert least.tolist() == [0, 0.05, 0.05, 0.05]


def test_compressed_sizes_are_those_of_the_formats() -> None:
    train, held_out = prose(1, 3000), [prose(2, 500), prose(3, 300)]
    text = b"".join(held_out)
    assert gzip.decompress(gzip.compress(text, 9, mtime=0)) == text
    assert gzip_bits(held_out) == 8 * len(gzip.compress(text, 9, mtime=0)) / len(text)
    added = len(gzip.compress(train + text, 9, mtime=0)) - len(gzip.compress(train, 9, mtime=0))
    assert gzip_bits(held_out, train) == 8 * added / len(text)
    usual = 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / len(text)
    assert xz_bits(held_out) == usual
    assert xz_bits(held_out, train) < usual


def test_xz_remembers_all_of_the_training_text_and_gzip_its_end() -> None:
    rng = np.random.default_rng(0)
    held_out, noise = rng.bytes(20_000), rng.bytes(300_000)
    assert xz_bits([held_out], held_out + noise) < 0.5
    assert gzip_bits([held_out], held_out + noise) > 7.9
    assert gzip_bits([held_out], noise + held_out) < 0.5


def test_the_table_of_baselines() -> None:
    train, held_out = prose(1, 4000), [prose(2, 800)]
    found = baselines(train, held_out)
    assert list(found)[:2] == ["gzip", "gzip, training text before"]
    assert found["6-gram"] == ngram_bits(train, held_out, 6)
    assert found["12-gram"] == ngram_bits(train, held_out, 12)
    assert all(0 < bits < 8 for bits in found.values())


def test_empty_texts_are_input_errors() -> None:
    for held_out in ([], [b""]):
        with pytest.raises(InputError, match="held-out text: is empty"):
            baselines(b"some text", held_out)
        with pytest.raises(InputError, match="held-out text: is empty"):
            ngram_bits(b"some text", held_out, 2)
    with pytest.raises(InputError, match="training text: has 3 bytes, expected 6 or more"):
        ngram_bits(b"abc", [b"text"], 6)


@pytest.mark.thorough
def test_two_megabytes_take_seconds() -> None:
    train, held_out = prose(1, 450_000)[:2_000_000], [prose(2, 10_000)] * 2
    assert len(train) == 2_000_000
    started = time.perf_counter()
    ngram_bits(train, held_out, 12)
    assert time.perf_counter() - started < 40


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
