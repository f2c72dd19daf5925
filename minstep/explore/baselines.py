"""What a language model must beat on held-out text: compressors and n-grams, in bits per byte.

None of them knows anything but the training text. The n-grams, like a model, keep nothing of the
held-out text; gzip and xz adapt to it as they read.
"""

import gzip
import lzma
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from minstep.errors import InputError
from minstep.tap import Array

ORDERS = 6, 12  # an ordinary one, and one after which longer contexts hardly help
LEAST = 0.05  # of a discount: what is never seen keeps some probability


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
