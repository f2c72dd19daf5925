"""Bits per byte of held-out text: a model's, and those of compressors and n-grams it has to beat.

None of the baselines knows anything but the training text. The n-grams, like a model, keep nothing
of the held-out text; gzip and xz adapt to it as they read.
"""

import gzip
import lzma
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike
from tokenizers import Tokenizer

from minstep.config import Config
from minstep.errors import InputError
from minstep.model import ModelWeights
from minstep.tap import Array
from minstep.train.data import Corpus
from minstep.train.loss import bits_per_byte

WINDOW = 512  # tokens that the model reads at once, as in training
ORDERS = 6, 12  # an ordinary one, and one after which longer contexts hardly help
LEAST = 0.05  # of a discount: what is never seen keeps some probability


def bits_report(
    corpus: Corpus,
    tokenizer: Tokenizer,
    weights: ModelWeights,
    config: Config,
    dtype: DTypeLike = np.float32,
    progress: Callable[[int], object] = lambda done: None,
) -> dict[str, Any]:
    """Sizes in bytes, and bits a byte of the corpus's held-out part: the model's and baselines'.

    Where a document's kind stands before a slash in its name, the model's figure is also given for
    each kind. `progress` is told of the bytes that are done. Raises InputError for a text that the
    tokenizer cannot take.
    Checked by: tests/explore/test_baselines.py
    """
    length = min(WINDOW, config.max_positions)
    bits, kinds, sizes = 0.0, dict[str, float](), dict[str, int]()
    for document in corpus.held_out:
        size, kind = document.nbytes, document.name.split("/")[0]
        own = size * bits_per_byte([document], tokenizer, weights, config, length, dtype)
        bits += own
        kinds[kind] = kinds.get(kind, 0.0) + own
        sizes[kind] = sizes.get(kind, 0) + size
        progress(sum(sizes.values()))
    train = "\n".join(document.text for document in corpus.train).encode()
    held_out = [document.text.encode() for document in corpus.held_out]
    return {
        "train_bytes": len(train),
        "held_out_bytes": sum(sizes.values()),
        "model": bits / sum(sizes.values()),
        "kinds": {kind: bits / sizes[kind] for kind, bits in kinds.items()},
        "baselines": baselines(train, held_out),
    }


def bits_table(report: dict[str, Any]) -> str:
    """The report as lines of text, the best last but for the model."""
    held_out, train = f"{report['held_out_bytes']:,}", f"{report['train_bytes']:,}"
    others = sorted(report["baselines"].items(), key=lambda item: -item[1])
    kinds = ", ".join(f"{kind} {bits:.3f}" for kind, bits in report["kinds"].items())
    rows = [*others, ("this model", report["model"])]
    lines = [
        f"bits a byte of {held_out} bytes held out, with {train} bytes to learn from",
        *(f"  {name:28}{bits:8.3f}" for name, bits in rows),
    ]
    return "\n".join([*lines, f"  of these: {kinds}"])


def baselines(train: bytes, held_out: Sequence[bytes]) -> dict[str, float]:
    """Bits per byte of the documents `held_out` by each baseline, after the text `train`.

    Raises InputError where either is empty.
    Checked by: tests/explore/test_baselines.py
    """
    found = {
        "gzip": gzip_bits(held_out),
        "gzip, training text before": gzip_bits(held_out, train),
        "xz": xz_bits(held_out),
        "xz, training text before": xz_bits(held_out, train),
    }
    return found | {f"{order}-gram": ngram_bits(train, held_out, order) for order in ORDERS}


def gzip_bits(held_out: Sequence[bytes], train: bytes = b"") -> float:
    """Bits per byte of gzip -9: what held-out text adds to the size of `train`, or its own size.

    gzip looks back 32 kB, so of `train` only the end counts. Another zlib may differ by a little.
    """
    return _added(lambda data: gzip.compress(data, 9, mtime=0), held_out, train)


def xz_bits(held_out: Sequence[bytes], train: bytes = b"") -> float:
    """The same by xz -9e, with a dictionary that all of `train` fits into."""

    def compressed(data: bytes) -> bytes:
        preset = {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME}
        room = max(1 << 16, len(train) + sum(map(len, held_out)))  # for less memory than 9's own
        return lzma.compress(data, filters=[{**preset, "dict_size": room}])

    return _added(compressed, held_out, train)


def _added(compressed: Callable[[bytes], bytes], held_out: Sequence[bytes], train: bytes) -> float:
    alone = len(compressed(train)) if train else 0
    added = len(compressed(train + b"".join(held_out))) - alone
    return 8 * added / _size(held_out)


def _size(held_out: Sequence[bytes]) -> int:
    size = sum(map(len, held_out))
    if size == 0:
        raise InputError("held-out text: is empty, expected at least one byte")
    return size


def ngram_bits(train: bytes, held_out: Sequence[bytes], order: int) -> float:
    """Bits per byte of an n-gram model that counted `train`; each document begins without context.

    Raises InputError where either text is empty.
    """
    size, model = _size(held_out), NGram(train, order)
    return -math.fsum(np.log2(model.probabilities(document)).sum() for document in held_out) / size


class _Level(NamedTuple):
    """The n-grams of one length: n of them, with one number for each shorter gram before a byte.

    `totals` and `backoff` have one more entry, for contexts that never occurred: all is left to
    the shorter context.
    """

    keys: Array  # [n] int64, sorted: 256 times the number of the context, plus the byte
    counts: Array  # [n] float64: less the discount
    totals: Array  # [contexts + 1] float64: counts after a context, before the discount
    backoff: Array  # [contexts + 1] float64: the discounts after a context


class NGram:
    """Probabilities of bytes after up to `order` - 1 bytes: modified Kneser-Ney, interpolated.

    From each count a discount is taken and spread as the shorter context says, down to 1/256 each.
    The longest n-grams count occurrences, shorter ones the different bytes seen before them.
    Source: Chen and Goodman 1999, An empirical study of smoothing techniques for language
    modeling, Computer Speech and Language 13, 359-394: modified Kneser-Ney, their discounts.
    Checked by: tests/explore/test_baselines.py
    """

    def __init__(self, train: bytes, order: int) -> None:
        """Count `train`. Raises InputError when it has fewer than `order` bytes."""
        if not 1 <= order <= len(train):
            raise InputError(f"training text: has {len(train)} bytes, expected {order} or more")
        text = np.frombuffer(train, np.uint8).astype(np.int64)  # [T]
        numbers = np.zeros(len(text) + 1, np.int64)  # which n-gram starts at a byte; first of none
        grams, counts = list[Array](), list[Array]()
        for length in range(1, order + 1):
            found = np.unique_all(numbers[:-1] * 256 + text[length - 1 :])
            if length > 1:  # of the shorter: how many bytes were seen before it
                counts[-1] = np.bincount(numbers[1:][found.indices], minlength=len(grams[-1]))
            grams.append(found.values)
            counts.append(found.counts)
            numbers = found.inverse_indices
        contexts = [1, *map(len, grams)]
        self._levels = [_level(*parts) for parts in zip(grams, counts, contexts, strict=False)]

    def probabilities(self, text: bytes) -> Array:
        """Of each byte of `text`, after those before it and nothing else: [T] float64."""
        read = np.frombuffer(text, np.uint8).astype(np.int64)  # [T]
        probs, numbers = np.full(len(read), 1 / 256), np.zeros(len(read) + 1, np.int64)
        for start, level in enumerate(self._levels[: len(read)]):
            contexts = numbers[:-1]  # -1, the last entry, where the context never occurred
            keys = contexts * 256 + read[start:]
            numbers = np.minimum(np.searchsorted(level.keys, keys), len(level.keys) - 1)
            is_known = level.keys[numbers] == keys
            counts = np.where(is_known, level.counts[numbers], 0)
            rest = level.backoff[contexts] * probs[start:]
            probs[start:] = (counts + rest) / level.totals[contexts]
            numbers = np.where(is_known, numbers, -1)
        return probs


def _level(keys: Array, counts: Array, contexts: int) -> _Level:
    discounts = _discounts(counts)[np.minimum(counts, 3)]
    totals = np.bincount(keys >> 8, counts, contexts + 1)
    backoff = np.bincount(keys >> 8, discounts, contexts + 1)
    backoff[totals == 0] = 1
    return _Level(keys, counts - discounts, np.maximum(totals, 1), backoff)


def _discounts(counts: Array) -> Array:
    """What to take from counts of 0, 1, 2, and 3 or more; a guess where too few are so small."""
    n = [int(np.sum(counts == count)) for count in (1, 2, 3, 4)]
    if 0 in n:
        return np.array([0, 0.5, 1, 1.5])
    share = n[0] / (n[0] + 2 * n[1])
    estimates = [k - (k + 1) * share * n[k] / n[k - 1] for k in (1, 2, 3)]
    return np.array([0, *(min(max(LEAST, d), k) for k, d in enumerate(estimates, start=1))])
