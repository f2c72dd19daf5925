"""Documents, what is held out of them, and the windows of an epoch."""

import hashlib
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models

from minstep.errors import InputError
from minstep.text.tokenizer import byte_level_tokenizer, encode
from minstep.train.bpe import train_tokenizer
from minstep.train.data import (
    Corpus,
    Document,
    encode_documents,
    file_documents,
    hold_out,
    python_documents,
    read_corpus,
    sequences,
    unquoted,
)

PROMPTED = ("with", "compound", "try", "for", "function", "if", "while", "class", "import")
IN_A_NEW_PROCESS = """
import hashlib, sys
from minstep.train.data import python_documents, hold_out
documents = python_documents()
unwanted = {"this", "antigravity", "readline", "tkinter", "_tkinter", "idlelib", "turtle"}
assert not unwanted & {*sys.modules}, unwanted & {*sys.modules}
print(hashlib.sha256(repr((documents, hold_out(documents))).encode()).hexdigest())
"""


@pytest.fixture(scope="module")
def corpus(documents: list[Document]) -> Corpus:
    return hold_out(documents)


def size(documents: list[Document]) -> int:
    return sum(len(document.text.encode()) for document in documents)


def flat_paragraphs(text: str) -> Iterator[str]:
    """Told line by line, unlike in the code that is tested."""
    lines: list[str] = []
    for line in [*text.split("\n"), ""]:
        lines += line.split()
        if not line.strip():
            yield " ".join(lines)
            lines = []


def shingles(text: str) -> list[tuple[str, ...]]:
    parts = text.split()
    return [tuple(parts[n : n + 8]) for n in range(len(parts) - 7)]


def lines(count: int, seed: int = 0) -> str:
    rng = np.random.default_rng(seed)
    return "\n".join(
        " ".join(f"{n:x}" for n in rng.integers(1 << 20, size=8)) for _ in range(count)
    )


# The documentation of Python


def test_the_documents_hold_topics_and_modules_each_under_a_name_of_its_own(
    documents: list[Document],
) -> None:
    names = [document.name for document in documents]
    assert len(names) == len({*names})
    assert {"topic/with", "module/json.decoder", "module/math"} <= {*names}
    assert not [name for name in names if re.search(r"\b(tests?|idle_test|numpy|pytest)\b", name)]
    assert size(documents) > 2_000_000
    for document in documents:
        assert document.text.strip("\n") == document.text != ""
        assert not re.search(r"\t|[ \r]$", document.text, re.M), document.name


def test_a_docstring_stands_below_its_signature(documents: list[Document]) -> None:
    texts = dict(documents)
    heap = "Module heapq\n************\n\nHeap queue algorithm"
    assert texts["module/heapq"].startswith(heap)
    push = "def heappush(heap, item)\n\nPush item onto heap, maintaining the heap invariant."
    assert push in texts["module/heapq"]
    assert "class JSONDecoder(object)\n\nSimple JSON" in texts["module/json.decoder"]
    assert "def JSONDecoder.decode(self, s, " in texts["module/json.decoder"]
    assert "async def " in texts["module/asyncio.streams"]
    assert "def acos(x, /)\n\nReturn the arc cosine" in texts["module/math"]
    assert "def str.split(sep=None, maxsplit=-1)\n\n" in texts["module/builtins"]
    assert "OSError.errno\n\nPOSIX exception code" in texts["module/builtins"]


def test_a_docstring_that_stands_in_several_modules_is_given_once(
    documents: list[Document],
) -> None:
    docstring = "Push item onto heap, maintaining the heap invariant."
    assert [d.name for d in documents if docstring in d.text] == ["module/heapq"]
    modules = [d.text for d in documents if d.name.startswith("module/")]
    known = [part for text in modules for part in flat_paragraphs(text) if len(part) >= 40]
    twice = sum(len(part) * (n - 1) for part, n in Counter(known).items())
    assert twice < 0.06 * sum(map(len, known))  # single paragraphs of docstrings that differ


def test_another_process_finds_the_same_and_imports_no_module_that_does_something(
    documents: list[Document], corpus: Corpus
) -> None:
    environment = {**os.environ, "PYTHONHASHSEED": "1"}
    command = [sys.executable, "-c", IN_A_NEW_PROCESS]
    ran = subprocess.run(command, env=environment, capture_output=True, check=True, text=True)
    assert ran.stdout.strip() == hashlib.sha256(repr((documents, corpus)).encode()).hexdigest()


def test_a_bare_python_gives_what_it_has(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    (tmp_path / "abc.py").write_text('"""Of\tabstract classes."""')
    (tmp_path / "ast.py").write_text("def broken(")
    (tmp_path / "mine.py").write_text('"""Not of the library."""')
    (tmp_path / "json" / "tests").mkdir(parents=True)
    (tmp_path / "json" / "tests" / "__init__.py").write_text('"""A test."""')
    (tmp_path / "json" / "__init__.py").write_text("async def f(*a, b=1): 'Do it.  '")
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(sys, "builtin_module_names", ("xxsubtype",))
    assert python_documents() == [
        Document("module/abc", "Module abc\n**********\n\nOf      abstract classes."),
        Document("module/json", "Module json\n***********\n\nasync def f(*a, b=1)\n\nDo it."),
    ]
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path / "absent"))
    with pytest.raises(InputError, match="no documentation inside it, expected --text"):
        python_documents()


# The user's files


def test_a_file_is_cut_at_blank_lines_and_nothing_of_it_is_lost(tmp_path: Path) -> None:
    text = "".join(f"{lines(5, n)}\n\n" for n in range(300))
    file = tmp_path / "notes.txt"
    file.write_text(text, encoding="utf-8")
    sections = file_documents([file, file])
    assert "".join(section.text for section in sections) == 2 * text
    half = sections[: len(sections) // 2]
    assert [d.name for d in half] == [f"file/{file.as_posix()}#{n + 1}" for n in range(len(half))]
    assert all(4096 <= len(section.text) < 4500 for section in half[:-1])
    assert all(section.text.endswith("\n\n") for section in half)


@pytest.mark.parametrize("text", [lines(2000), "é" * 50_000], ids=["lines", "a line"])
def test_a_file_without_blank_lines_is_cut_all_the_same(tmp_path: Path, text: str) -> None:
    file = tmp_path / "notes.txt"
    file.write_text(text, encoding="utf-8")
    sections = file_documents([file])
    assert "".join(section.text for section in sections) == text
    assert len(sections) > 10 and all(len(section.text) <= 8192 for section in sections)
    assert "\n" not in text or all(section.text[-1] == "\n" for section in sections[:-1])


def test_a_mark_of_utf8_and_ends_of_lines_are_no_text(tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_bytes(b"\xef\xbb\xbfone\r\n\ttwo  \r\n")
    assert file_documents([file]) == [Document(f"file/{file.as_posix()}#1", "one\n\ttwo  \n")]


def test_a_file_that_is_no_text_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "empty.txt").write_bytes(b" \n")
    for name, expected in {
        "latin.txt": "byte 0xe9 at 3 is not UTF-8",
        "empty.txt": "is empty, expected text",
        "absent.txt": "cannot be read: No such file",
        ".": "cannot be read: it is a folder",
    }.items():
        with pytest.raises(InputError, match=expected) as refused:
            file_documents([tmp_path / name])
        assert str(refused.value).startswith(str(tmp_path / name))


# What is held out


def test_what_the_prompts_of_the_docs_ask_for_is_trained_on(corpus: Corpus) -> None:
    assert {f"topic/{name}" for name in PROMPTED} <= {document.name for document in corpus.train}


def test_topics_and_modules_are_held_out_to_the_size_that_a_measurement_needs(
    documents: list[Document], corpus: Corpus
) -> None:
    assert 60_000 < size(corpus.held_out) < 120_000
    kinds = Counter(document.name.split("/")[0] for document in corpus.held_out)
    assert kinds["topic"] >= 5 and kinds["module"] >= 15
    assert {*corpus.held_out} <= {*documents}  # whole, as they were


def test_topics_stand_twice_the_second_time_without_quotes_around_code(
    corpus: Corpus, read_once: None
) -> None:
    once, corpus = corpus, read_corpus()
    assert corpus.held_out == once.held_out and corpus.train[: len(once.train)] == once.train
    topics = Counter(d.name for d in corpus.train if d.name.startswith("topic/"))
    assert set(topics.values()) == {2}
    first, second = (d.text for d in corpus.train if d.name == "topic/with")
    assert first.startswith('The "with" statement\n') and 'with_stmt          ::= "with"' in first
    assert second.startswith("The with statement\n") and 'with_stmt          ::= "with"' in second


def test_only_quotes_around_one_word_outside_indented_code_are_taken_off() -> None:
    text = 'The "for" and "async for" loops, "a", ""\n   for_stmt ::= "for"\n* the "if"'
    assert unquoted(text) == (
        'The for and "async for" loops, a, ""\n   for_stmt ::= "for"\n* the if'
    )


def test_no_paragraph_of_the_held_out_part_is_trained_on(corpus: Corpus) -> None:
    trained = {part for document in corpus.train for part in flat_paragraphs(document.text)}
    held_out = {part for document in corpus.held_out for part in flat_paragraphs(document.text)}
    assert len(held_out) > 500
    assert not [part for part in trained & held_out if len(part) >= 40]


def test_few_runs_of_eight_words_are_in_both_parts(corpus: Corpus) -> None:
    trained = {run for document in corpus.train for run in shingles(document.text)}
    held_out = [run for document in corpus.held_out for run in shingles(document.text)]
    assert sum(run in trained for run in held_out) < 0.03 * len(held_out)


def test_little_else_is_taken_out_of_the_training_part(
    documents: list[Document], corpus: Corpus
) -> None:
    assert size(documents) - size(corpus.train) - size(corpus.held_out) < 10_000
    texts = dict(documents)
    unchanged = sum(texts[name] == text for name, text in corpus.train)
    assert unchanged > 0.95 * len(corpus.train)


def test_the_name_alone_decides(documents: list[Document], corpus: Corpus) -> None:
    backwards = hold_out(documents[::-1])
    assert backwards.held_out == corpus.held_out[::-1] and backwards.train == corpus.train[::-1]
    names = {document.name for document in corpus.held_out}
    other = [Document(document.name, f"Of {document.name}.") for document in documents[::2]]
    assert {d.name for d in hold_out(other).held_out} == {d.name for d in other} & names


def test_a_quotation_is_taken_out_whatever_its_layout_and_a_short_one_is_not() -> None:
    long, short = "It says so in forty characters or more, I see.", "It says so."
    quoting = f"Before.\n \n   It says so in\n   {long[14:]}\n\n{short}\n\nAfter."
    documents = [Document("topic/compound", quoting), Document("topic/pass", f"{short}\n\n{long}")]
    corpus = hold_out(documents)
    assert corpus.held_out == documents[1:]
    assert corpus.train == [Document("topic/compound", f"Before.\n\n{short}\n\nAfter.")]


def test_where_no_name_is_held_out_the_last_twentieth_is() -> None:
    documents = [Document("topic/with", lines(9, n)) for n in range(39)]
    corpus = hold_out([*documents, Document("topic/try", "a"), Document("topic/for", "b")])
    assert [document.name for document in corpus.held_out] == ["topic/try", "topic/for"]
    assert corpus.train == documents


@pytest.mark.parametrize("texts", [[], ["a" * 50], ["a" * 50, "a" * 50]])
def test_too_little_text_is_refused(texts: list[str]) -> None:
    documents = [Document(f"topic/{name}", text) for name, text in zip("ab", texts, strict=False)]
    with pytest.raises(InputError, match=f"in {len(texts)} sections, expected at least two"):
        hold_out(documents)


# Tokens and windows


def test_each_document_stands_between_bos_and_eos() -> None:
    documents = [Document("a", "Zwölf Boxkämpfer"), Document("b", "x\n\n  y ")]
    trained = train_tokenizer([lines(200)], 300)
    for tokenizer in (byte_level_tokenizer(), trained):
        stream = encode_documents(documents, tokenizer)
        assert stream.dtype == np.int32 and stream.ndim == 1
        bos, eos = np.flatnonzero(stream == 0), np.flatnonzero(stream == 1)
        assert bos.tolist() == [0, eos[0] + 1] and eos[1] == len(stream) - 1
        for document, start, end in zip(documents, bos, eos, strict=True):
            tokens = stream[start + 1 : end].tolist()
            assert tokens == encode(tokenizer, document.text, is_rendered=True)
            assert tokenizer.decode(tokens) == document.text


def test_a_tokenizer_without_bos_is_refused() -> None:
    with pytest.raises(InputError, match="has no <.begin"):
        encode_documents([Document("a", "b")], Tokenizer(models.BPE()))


@pytest.mark.parametrize("N", [100, 103, 109])
def test_an_epoch_shows_every_token_once(N: int) -> None:
    stream = np.arange(N, dtype=np.int32)
    seen = [sequences(stream, step, 2, 10, seed=3) for step in range(25)]  # five epochs of 10
    assert all(part.dtype == np.int32 and part.shape == (2, 10) for part in seen)
    epochs = np.concatenate(seen).reshape(5, 10, 10)
    assert ((epochs - epochs[..., :1]) % N == np.arange(10)).all()  # each window is contiguous
    for epoch in epochs:
        assert len(np.unique(epoch)) == 100
    orders = {((epoch[:, 0] - epoch[0, 0]) % N).tobytes() for epoch in epochs}
    assert len(orders) == 5  # another in each
    places = {np.sort(epoch[:, 0]).tobytes() for epoch in epochs}
    assert len(places) > 2  # the cuts lie elsewhere


def test_a_step_is_the_same_however_one_comes_to_it_and_may_reach_into_the_next_epoch() -> None:
    stream = np.arange(47, dtype=np.int32) * 7
    one_by_one = np.concatenate([sequences(stream, step, 1, 5, seed=1) for step in range(60)])
    for step in reversed(range(20)):
        windows = sequences(stream, step, 3, 5, seed=1)
        np.testing.assert_array_equal(windows, one_by_one[3 * step : 3 * step + 3])
    np.testing.assert_array_equal(sequences(stream, 0, 60, 5, seed=1), one_by_one)
    assert not np.array_equal(sequences(stream, 0, 60, 5, seed=2), one_by_one)


def test_a_text_shorter_than_a_window_is_refused() -> None:
    stream = np.zeros(9, np.int32)
    assert sequences(stream, 4, 2, 9, seed=0).shape == (2, 9)
    with pytest.raises(InputError, match="has 9 tokens, expected at least the 10 of a sequence"):
        sequences(stream, 0, 1, 10, seed=0)
