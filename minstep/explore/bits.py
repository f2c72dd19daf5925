"""What a model is worth on held-out text, in bits a byte, beside compressors and n-grams."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import DTypeLike
from tokenizers import Tokenizer

from minstep.config import Config
from minstep.explore.baselines import baselines
from minstep.model import ModelWeights
from minstep.train.data import Corpus
from minstep.train.loss import bits_per_byte

WINDOW = 512  # tokens, as in training


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
    Checked by: tests/explore/test_bits.py
    """
    length = min(WINDOW, config.max_positions)
    bits, kinds, sizes = 0.0, dict[str, float](), dict[str, int]()
    for document in corpus.held_out:
        size, kind = document.nbytes, document.name.split("/")[0]
        its = size * bits_per_byte([document], tokenizer, weights, config, length, dtype)
        bits += its
        kinds[kind] = kinds.get(kind, 0.0) + its
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
