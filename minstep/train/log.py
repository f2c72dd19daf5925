"""The log of a run: a line every few steps, which people read and programs can read back."""

from pathlib import Path
from typing import NamedTuple

from minstep.files import InputError, os_reason


class Row(NamedTuple):
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


def line(row: Row) -> str:
    """A row under its header."""
    losses = "".join(f"{loss:8.4f}" for loss in row.losses)
    held_out = f"{row.held_out:10.4f}" if row.held_out is not None else f"{'-':>10}"
    loads = f"{row.least:7.2f}{row.most:7.2f}"
    return f"{row.step:7}{losses}{row.rate:10.2e}{row.norm:8.3f}{loads}{held_out}"


def read_log(file: Path) -> list[Row]:
    """The rows of a log, as precise as they are printed; lines of other form are notes.

    Raises InputError where the file cannot be read.
    Checked by: tests/test_log.py
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = os_reason(error) if isinstance(error, OSError) else "it is not UTF-8"
        raise InputError(f"{file}: cannot be read: {reason}") from error
    fields = (text.split() for text in lines)
    return [_row(words) for words in fields if len(words) > 6 and words[0].isdigit()]


def _row(words: list[str]) -> Row:
    """The row whose columns these are."""
    losses = tuple(float(word) for word in words[1:-5])
    rate, norm, least, most = map(float, words[-5:-1])
    held_out = None if words[-1] == "-" else float(words[-1])
    return Row(int(words[0]), losses, rate, norm, least, most, held_out)
