"""What a person sees: answers as they come, a bar while a prompt is read, a line of figures."""

import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

from minstep.errors import LONGEST_MESSAGE, InputError, printable, shown
from minstep.store.files import os_reason
from minstep.store.json_file import json_text
from minstep.text.continuation import Pass
from minstep.text.reply import Event

BAR = 24  # cells
PATIENCE = 1.0  # seconds before a bar appears
PROMPT = "> "
LONGEST_TEXT = 1 << 24  # characters of stdin: 64 for each token of the longest context
DIM, PLAIN, ERASE = "\x1b[2m", "\x1b[0m", "\r\x1b[K"
# A model may say an escape sequence: a terminal shows a picture for each control character, and for
# what would turn the direction of a line or end it.
PICTURES = {n: 0x2400 + n for n in range(32) if chr(n) not in "\n\t"} | {0x7F: 0x2421}
TURNS = (0x61C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
PICTURES |= dict.fromkeys((*range(0x80, 0xA0), *TURNS, 0x2028, 0x2029), 0x2426)


class Progress:
    """A bar for work that takes longer than a moment; nothing at all where stderr is no terminal.

    Call it with how much is done: at `total` the line is empty again. Where the work ends before
    that, `erase` empties it, and so does the end of a `with`. `label` and `total` may change on the
    way. Amounts are shown in `unit` of `scale` each.
    """

    def __init__(self, label: str, total: int, unit: str, scale: float = 1) -> None:
        self.label, self.total, self._unit, self._scale = label, total, unit, scale
        self._started = time.perf_counter()
        self._shown = False

    def __call__(self, done: int) -> None:
        elapsed = time.perf_counter() - self._started
        if not sys.stderr.isatty() or (elapsed < PATIENCE and not self._shown):
            return
        rate = done / elapsed
        left = (self.total - done) / rate if rate else 0
        cells = BAR * done // self.total
        bar = "█" * cells + "░" * (BAR - cells)
        shown = [f"{n / self._scale:,.{int(self._scale > 1)}f}" for n in (done, self.total, rate)]
        per = f" {self._unit}/s" if self._scale > 1 else "/s"
        counts = f"{shown[0]}/{shown[1]} {self._unit}, {shown[2]}{per}, {_clock(left)} left"
        line = f"{printable(self.label)} {bar} {counts}" if done < self.total else ""
        print(f"\r{line}\x1b[K", end="", file=sys.stderr, flush=True)
        self._shown = done < self.total

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.erase()

    def erase(self) -> None:
        """Take the bar off the line."""
        if self._shown:
            print(ERASE, end="", file=sys.stderr, flush=True)
            self._shown = False


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"


def summary(stats: dict[str, Any]) -> str:
    """One line of figures from Continuation.stats."""
    prompt = f"prompt {stats['prompt_tokens']:,} tokens at {stats['prompt_tps']:,}/s"
    new = f"{stats['new_tokens']:,} new at {stats['generation_tps']:,} tokens/s"
    drafts = ""
    if stats["acceptance"]:
        shares = ", ".join(f"{share:.0%}" for share in stats["acceptance"])
        drafts = f"; drafts kept {shares}, {stats['tokens_per_forward']} tokens per forward pass"
    memory = stats["peak_memory_bytes"]
    peak = f"; peak memory {memory / 1e6:,.0f} MB" if memory else ""
    return f"{prompt}; {new}{drafts}{peak}; stop: {stats['stop']}"


def drafts_line(each: Pass, tokens: Sequence[int], word: Callable[[int], str] = str) -> str:
    """One forward pass: the new tokens before it, its drafts, kept ones in [], and what it gave.

    `tokens`: all new ones; `word`: how one is shown.
    """
    marks = [f"[{word(n)}]" if k < each.kept else word(n) for k, n in enumerate(each.drafts)]
    given = map(word, tokens[each.before : each.before + each.new])
    return " ".join([f"{each.before:>6} ", *(marks or ["no drafts"]), "->", *given])


class Display:
    """An answer on stdout as it comes: thinking dimmed or hidden, each tool call a line of JSON.

    Where it cannot be dimmed, thinking stands between its tags. Without a terminal there is nothing
    in the output that the model did not say, but those tags and the ends of lines.
    Checked by: tests/cli/test_terminal.py
    """

    def __init__(self, hide_thinking: bool = False) -> None:
        self._out, self._hides = sys.stdout, hide_thinking
        self._dims = _can_dim(self._out)
        self._kind = ""  # the kind of the last event
        self._in_line = False  # whether the last line is not ended

    def prompt(self, text: str) -> None:
        """Print what an answer will go on with, where it can be told from the answer: dimmed."""
        if self._dims:
            self._put(f"{DIM}{harmless(text, self._out)}{PLAIN}")

    def put(self, text: str) -> None:
        """Print text as the model gave it, with no event around it."""
        self._put(harmless(text, self._out))

    def show(self, event: Event) -> None:
        """Print a piece of the answer."""
        if event.kind != self._kind:
            self._leave()
            self._kind = event.kind
            self._enter()
        if event.kind == "tool_call":
            self._end_line()
            self._say(json_text(event.payload._asdict()) + "\n")
        elif event.kind == "content" or not self._hides:
            self._say(event.payload)

    def end(self) -> None:
        """The answer is over, whole or not: end its line and its style."""
        self._leave()
        self._kind = ""
        self._end_line()

    def _enter(self) -> None:
        """What stands before a piece of another kind."""
        if self._kind == "thinking" and self._hides:
            self._put(f"{DIM}thinking…{PLAIN}" if self._dims else "")
        elif self._kind == "thinking":
            self._put(DIM if self._dims else "<think>\n")

    def _leave(self) -> None:
        """What stands behind the last piece of a kind."""
        if self._kind == "thinking" and self._hides:
            self._put(ERASE if self._dims else "")
        elif self._kind == "thinking":
            self._put(PLAIN if self._dims else "")
            self._end_line()
            self._put("\n" if self._dims else "</think>\n")

    def _end_line(self) -> None:
        if self._in_line:
            self._put("\n")
            self._in_line = False

    def _say(self, text: str) -> None:
        """Print the model's own words."""
        self.put(text)
        self._in_line = not text.endswith("\n")

    def _put(self, text: str) -> None:
        print(text, end="", file=self._out, flush=True)


def harmless(text: str, stream: TextIO) -> str:
    """What a model said, fit for `stream`: a terminal is shown control characters as pictures.

    A file or another program gets the text as it is.
    """
    return text.translate(PICTURES) if stream.isatty() else text


def print_text(*lines: str) -> None:
    """Print lines of a report on stdout, at once: what is not printable is escaped, whoever reads
    them, for names in them come from files.
    """
    print(printable("\n".join(lines), kept="\n"), flush=True)


def print_json(report: Any) -> None:
    """Print one JSON object on stdout: letters of any alphabet as they are, where stdout is UTF-8,
    and escapes for what is not printable.
    """
    print(json_text(report, (sys.stdout.encoding or "").lower() in ("utf-8", "utf8")))


def note(text: str, is_dim: bool = False) -> None:
    """A line to the user that is no part of the answer, on stderr, made printable."""
    text, is_dim = printable(text, kept="\n"), is_dim and _can_dim(sys.stderr)
    print(f"{DIM}{text}{PLAIN}" if is_dim else text, file=sys.stderr, flush=True)


def wrote(path: Path, then: str = "") -> None:
    """Tell the user of a file, or a folder of files, that was written, and what to do `then`."""
    files = [file for file in (path, *path.rglob("*")) if file.is_file()]
    size, units = float(sum(file.stat().st_size for file in files)), ["bytes", "KB", "MB", "GB"]
    while size >= 1000 and units[1:]:
        size, _ = size / 1000, units.pop(0)
    digits = 1 if units[0] in ("MB", "GB") else 0
    note(f"wrote {shown(str(path), LONGEST_MESSAGE)} ({size:,.{digits}f} {units[0]}){then}")


def _can_dim(stream: TextIO) -> bool:
    return stream.isatty() and not os.environ.get("NO_COLOR")


def read_line() -> str:
    """The user's next line, asked for where stdin is a terminal.

    Raises EOFError when stdin ends, and InputError where it cannot be read or a line has no end.
    """
    if sys.stdin.isatty() and sys.stdout.isatty():
        return input(PROMPT)  # with history and line editing where readline has been imported
    if sys.stdin.isatty():
        print(PROMPT, end="", file=sys.stderr, flush=True)
    try:
        line = sys.stdin.readline(LONGEST_TEXT + 1)
    except OSError as error:
        raise InputError(f"stdin: {os_reason(error)}") from error
    if len(line) > LONGEST_TEXT:
        message = f"more than {LONGEST_TEXT:,} characters, expected at most that many"
        raise InputError(f"stdin: a line has {message}")
    if not line:
        raise EOFError
    return line
