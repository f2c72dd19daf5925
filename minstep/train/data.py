"""The corpus: which documents are held out, and the token windows that each step trains on."""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from minstep.errors import InputError
from minstep.text.tokenizer import FRONT, encode
from minstep.train.documents import (
    Document,
    file_documents,
    paragraphs,
    python_documents,
    unquoted,
    words,
)

HELD_OUT = 0.05  # the share of names that are held out
SALT = "59:"  # leaves the topics that the docs prompt with to be trained on; chosen by name alone
QUOTED = 40  # characters from which on a paragraph that stands twice is a quotation


class Corpus(NamedTuple):
    """Documents to train on, and those that no training sees."""

    train: list[Document]
    held_out: list[Document]


def read_corpus(files: Sequence[Path] = ()) -> Corpus:
    """The text of `files`, or that inside Python where there are none, split.

    Topics to train on stand twice, the second time without quotes around code: prompts have none.
    Raises InputError as file_documents, python_documents and split do.
    """
    if files:
        return hold_out(file_documents(files))
    train, held_out = hold_out(python_documents())
    topics = [document for document in train if document.name.startswith("topic/")]
    return Corpus(
        [*train, *(Document(each.name, unquoted(each.text)) for each in topics)], held_out
    )


def hold_out(documents: Sequence[Document]) -> Corpus:
    """Hold out about one document in twenty, by a hash of its name and nothing else.

    So the same documents are held out whatever their order and whatever else there is. Where that
    leaves a side empty, the last twentieth is held out. Documents quote each other: a paragraph of
    40 or more characters that a held-out one has, whatever its spaces, is taken out of the others.
    Raises InputError for fewer than two documents, and where nothing is left to train on.
    Checked by: tests/train/test_data.py
    """
    held_out = [document for document in documents if _is_held_out(document.name)]
    if not 0 < len(held_out) < len(documents):
        held_out = list(documents[-max(1, round(HELD_OUT * len(documents))) :])
    names = {document.name for document in held_out}
    quoted = {known for each in held_out for known in _long_paragraphs(each.text)}
    others = (document for document in documents if document.name not in names)
    train = [kept for document in others if (kept := _without(document, quoted)).text.strip()]
    if not train:
        size = sum(len(document.text) for document in documents)
        raise InputError(
            f"the text is too short to hold a part out: {size} characters in {len(documents)} "
            "sections, expected at least two that differ (a section has about 4,000)"
        )
    return Corpus(train, held_out)


def encode_documents(documents: Sequence[Document], tokenizer: Tokenizer) -> NDArray[np.int32]:
    """The token ids [N] int32 of all documents in a row, each between a bos and an eos.

    Raises InputError where the tokenizer has no such tokens or cannot take a text.
    Checked by: tests/train/test_data.py
    """
    bos, eos = (tokenizer.token_to_id(token) for token in FRONT[:2])
    if bos is None or eos is None:
        raise InputError(f"the tokenizer has no {FRONT[0]} and {FRONT[1]}, which part documents")
    ids = [
        token
        for document in documents
        for token in (bos, *encode(tokenizer, document.text, is_rendered=True), eos)
    ]
    return np.array(ids, np.int32)


def sequences(
    stream: NDArray[np.int32], step: int, count: int, length: int, seed: int
) -> NDArray[np.int32]:
    """The windows [count, length] int32 of `stream` [N] that training step `step` sees, from 0.

    An epoch cuts the stream, closed to a ring, into N // length windows that do not overlap, from a
    place and in an order drawn anew each time: of the tokens only the N % length between the last
    window and the first are not seen. It depends on the arguments alone, so that a run which is
    resumed sees what it would have seen. A step may reach into the next epoch.
    Raises InputError where the stream is shorter than a window.
    Checked by: tests/train/test_data.py
    """
    N = len(stream)
    windows = N // length
    if not windows:
        raise InputError(f"the text has {N} tokens, expected at least the {length} of a sequence")
    starts = list[int]()
    while len(starts) < count:
        epoch, done = divmod(step * count + len(starts), windows)
        rng = np.random.default_rng((seed, epoch))
        phase, order = rng.integers(N), rng.permutation(windows)
        starts += [phase + length * n for n in order[done : done + count - len(starts)]]
    return stream[(np.array(starts)[:, None] + np.arange(length)) % N]  # [count, length]


def _is_held_out(name: str) -> bool:
    coded = f"{SALT}{name}".encode(errors="surrogateescape")  # a file's name may be no text
    digest = hashlib.sha256(coded).digest()  # Python's own hash is not fixed
    return int.from_bytes(digest[:4]) < HELD_OUT * 2**32


def _long_paragraphs(text: str) -> Iterator[str]:
    yield from (known for part in paragraphs(text) if len(known := words(part)) >= QUOTED)


def _without(document: Document, quoted: set[str]) -> Document:
    """The document without the paragraphs that are quoted."""
    parts = paragraphs(document.text)
    kept = [part for part in parts if words(part) not in quoted]
    return document if len(kept) == len(parts) else Document(document.name, "\n\n".join(kept))
