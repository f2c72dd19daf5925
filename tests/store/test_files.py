"""Files and the one kind of error: what a message may hold, and what may be opened at all."""

import os
from pathlib import Path

import pytest

from minstep.errors import LONGEST_MESSAGE, InputError, shown
from minstep.store.files import open_file, read_file


@pytest.mark.parametrize("bad", ["\x1b[2J", "\x9b2J", "\u202e", "\u2066", "\ud800", "\u2028", "\0"])
def test_shown_escapes_what_a_terminal_or_a_reader_would_act_on(bad: str) -> None:
    text = shown(f"name{bad}end")
    assert text.isprintable() and text.startswith("name\\") and text.endswith("end")
    assert str(InputError(f"a {bad} b")).isprintable()


def test_shown_keeps_plain_text_and_both_ends_of_long_text() -> None:
    assert shown("model.layers.0 über 字 🙂") == "model.layers.0 über 字 🙂"
    text = shown("a" * 500 + "b" * 500)
    assert len(text) == 120 and text[0] == "a" and text[-1] == "b" and "…" in text


def test_a_message_is_bounded_and_one_line() -> None:
    message = str(InputError("x\n y" * 10_000))
    assert len(message) <= LONGEST_MESSAGE and "\n" not in message


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path, expected in (
        (pipe, "a pipe or a device"),
        (Path("/dev/zero"), "a pipe or a device"),
        (tmp_path, "a folder"),
        (tmp_path / "none", "No such file"),
        (Path("a\0b"), "null"),
    ):
        with pytest.raises(InputError, match=expected):
            open_file(path)


def test_reading_is_bounded(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"12345")
    assert read_file(file, 5) == b"12345"
    with pytest.raises(InputError, match="larger than 4 bytes"):
        read_file(file, 4)
