"""The log of a run: a line every few steps, which people read and programs can read back."""

import re
from pathlib import Path
from typing import NamedTuple

from minstep.errors import InputError
from minstep.store.files import read_file

MOST_LOG = 1 << 28  # bytes of a file: two million lines


class LogRow(NamedTuple):
    """A line of the log: what was seen since the line before, and where step `step` has led."""

    step: int  # steps taken
    losses: tuple[float, ...]  # nats a token of the main model and of each depth, means
    rate: float  # of the optimizer
    norm: float  # of the gradient before it was clipped, mean
    least: float  # load of the least used expert of any layer, 1 being the fair share
    most: float  # of the most used one
    held_out: float | None = None  # bits a byte of the held-out text, where it was measured


def header(depths: int) -> str:
    """The names of the columns."""
    names = ["main", *(f"mtp{k}" for k in range(1, depths + 1))]
    titles = "".join(f"{name:>8}" for name in names)
    return f"{'step':>7}{titles}{'rate':>10}{'norm':>8}{'least':>7}{'most':>7}{'held-out':>10}"


def line(row: LogRow) -> str:
    """A row under its header."""
    losses = "".join(f"{loss:8.4f}" for loss in row.losses)
    held_out = f"{row.held_out:10.4f}" if row.held_out is not None else f"{'-':>10}"
    loads = f"{row.least:7.2f}{row.most:7.2f}"
    return f"{row.step:7}{losses}{row.rate:10.2e}{row.norm:8.3f}{loads}{held_out}"


def read_log(file: Path) -> list[LogRow]:
    """The rows of a log, as precise as they are printed; lines of other form are notes.

    Raises InputError where the file cannot be read.
    Checked by: tests/train/test_log.py
    """
    content = read_file(file, MOST_LOG)
    try:
        lines = content.decode("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: cannot be read: it is not UTF-8") from error
    fields = (text.split() for text in lines)
    return [row for words in fields if (row := _row(words)) is not None]


def _row(words: list[str]) -> LogRow | None:
    """The row whose columns these are; None for the words of a note."""
    if len(words) < 7 or not re.fullmatch("[0-9]{1,18}", words[0]):
        return None
    try:
        losses = tuple(float(word) for word in words[1:-5])
        rate, norm, least, most = map(float, words[-5:-1])
        held_out = None if words[-1] == "-" else float(words[-1])
    except ValueError:
        return None
    return LogRow(int(words[0]), losses, rate, norm, least, most, held_out)
