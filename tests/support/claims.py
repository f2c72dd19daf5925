"""Numbers in the documentation, and what each of them rests on.

A number in prose stands in a block of its own page that the tests make again. Without a unit it may
be a value of the released config.json. Any other rests on something that is named beside it:

    a web address or an arXiv number in the same sentence;
    a chapter or file that the sentence links to, and that has the number itself;
    a footnote of the sentence, which names one of these or a measurement;
    a measurement in its paragraph, or in the one right above its list, table or block:
        measured on 2026-11-30 on MACHINE by `COMMAND`

So does a number in an equation, and in a block that nobody runs. Only whole numbers up to SMALL
without a unit need nothing: counts that a reader sees at a glance.
"""

import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

TOP = Path(__file__).parents[2]
RELEASED = TOP / "tiny_configs" / "step-3.5-flash" / "config.json"
SMALL = 20
UNITS = (
    r"%|x|×|[num]?s|µs|h|[kKMGT]?B|[KMGT]iB|[kMGTP]?FLOP(?:s|S|/s)?|[kMG]?Hz|W|[kKMGT]|times|"
    r"percent|bytes?|(?:milli|micro)?seconds?|minutes?|hours?|days?|weeks?|thousand|million|"
    r"billion|trillion|dollars?|cents?|(?:tokens|steps|passes)(?:/s| a second)"
)
NUMBER = re.compile(
    r"(?<![\w.,/#])(?<![^\W\d]-)(?P<money>[$€])?"
    r"(?P<number>(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:e-?\d+|\^-?\d+|[⁻⁰¹²³⁴-⁹]+)?)"
    rf"(?P<unit>[ -]?(?:{UNITS})(?!\w))?"
)
NAME = re.compile(r"\b(?:Step 3\.5|Llama \d|(?:Python|NumPy|torch|transformers) \d\.[\d.]+)\b")
MEASURED = re.compile(r"\b[Mm]easured\son\s\d{4}-\d\d-\d\d\son\s[^`]+\sby\s`[^`]+`")
WEB = re.compile(r"https?://|\barXiv \d{4}\.\d{5}\b")
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")
NOTE = re.compile(r"\[\^(\w+)\]")
ITEM = re.compile(r"^ *(?:[-*]|\d+\.) ", re.M)
END = re.compile(r"(?<=[.!?])((?:\[\^\w+\])?)\s+(?=[^a-z\s])")
MADE = re.compile(r"<!-- (?:quote|run|run-held-out) ")
COMMANDS = ("sh", "python")  # but for comments, what they have in numbers are arguments


class Piece(NamedTuple):
    """A paragraph, a list, a table or a block of a page, and the paragraph right above it."""

    text: str
    above: str
    language: str | None  # of a block
    is_made: bool  # again by the tests

    def is_measured(self) -> bool:
        """Whether when, where and by which command is said for all of it."""
        leans = self.language is not None or self.text.startswith("|") or ITEM.match(self.text)
        return bool(MEASURED.search(f"{self.above}\n\n{self.text}" if leans else self.text))


def pieces(text: str) -> Iterator[Piece]:
    """What a page consists of, in its order."""
    lines: list[str] = []
    above, language, is_made = "", None, False
    for line in [*text.splitlines(), ""]:
        words = line.strip()
        is_fence, is_comment = words.startswith("```"), words.startswith("<!--")
        if not is_fence and (language is not None or (words and not is_comment)):
            lines.append(words if language is None else line)
            continue
        if lines:
            piece = "\n".join(lines)
            is_doctest = language == "python" and piece.lstrip().startswith(">>> ")
            yield Piece(piece, above, language, is_made or is_doctest)
            above, lines = piece if language is None else "", []
        if is_fence:
            language = words[3:] if language is None else None
        elif is_comment:
            is_made = bool(MADE.match(words))


def plain(number: str) -> str:
    """A number without the commas between thousands and zeros at the end."""
    number = number.replace(",", "")
    is_decimal = re.fullmatch(r"\d+\.\d+", number)
    return number.rstrip("0").rstrip(".") if is_decimal else number


def numbers(text: str) -> set[str]:
    """All numbers in a text."""
    return {plain(found["number"]) for found in NUMBER.finditer(text)}


def claimed(text: str) -> set[str]:
    """The numbers in a text that are no counts at a glance, and with no unit none of the config."""
    text = re.sub(r"https?://\S+|arXiv [\d.]+|\d{4}-\d\d-\d\d", "", LINK.sub("]", text))
    text = NAME.sub("", text)
    is_free = released() | {str(n) for n in range(SMALL + 1)}
    found = ((plain(n["number"]), n["money"] or n["unit"]) for n in NUMBER.finditer(text))
    return {n for n, unit in found if unit or n not in is_free}


@cache
def released() -> set[str]:
    """The values of the released config, and how long its lists are."""
    found: set[str] = set()

    def visit(value: Any) -> None:
        if isinstance(value, dict | list):
            found.add(str(len(value)) if isinstance(value, list) else "0")
            for inner in value.values() if isinstance(value, dict) else value:
                visit(inner)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found.add(plain(repr(value)))
            found.add(plain(f"{value:f}"))

    visit(json.loads(RELEASED.read_text(encoding="utf-8")))
    return found


@cache
def shown(file: Path) -> set[str]:
    """The numbers that a page computes, quotes or measured in blocks; of other files, all."""
    text = file.read_text(encoding="utf-8")
    if file.suffix != ".md":
        return numbers(text)
    blocks = (piece for piece in pieces(text) if piece.language is not None)
    sure = (piece for piece in blocks if piece.is_made or piece.is_measured())
    return set().union(*(numbers(piece.text) for piece in sure))


def sentences(piece: Piece) -> Iterator[str]:
    """The sentences of a paragraph, of each item of a list, the rows of a table, or a block: of
    code its comments, of a console what it printed.
    """
    if piece.language in COMMANDS:
        yield from re.findall(r"(?:^|\s)#\s.*", piece.text)
        return
    if piece.language == "console":
        yield "\n".join(line for line in piece.text.splitlines() if not line.startswith("$ "))
        return
    if piece.language is not None:
        yield piece.text
        return
    starts = "|" if piece.text.startswith("|") else ITEM.pattern
    for item in re.split(
        rf"\n(?={re.escape('|')})" if starts == "|" else rf"\n(?={ITEM.pattern[1:]})", piece.text
    ):
        yield from re.sub(END, r"\1\n\n", item).split("\n\n")


def rests_on(sentence: str, folder: Path) -> set[str] | None:
    """The numbers of what a sentence links to in the project; None where it leads out of it."""
    if WEB.search(sentence):
        return None
    found: set[str] = set()
    for target in LINK.findall(sentence):
        file = folder / target
        if file.is_file() and file.suffix != ".svg":
            found |= shown(file)
    return found


def unfounded(text: str, known: set[str], folder: Path) -> list[str]:
    """Each number of a page that rests on nothing, with its sentence."""
    notes = dict(re.findall(r"^\[\^(\w+)\]: (.+?)(?=\n\[\^|\n\n|\Z)", text, re.M | re.S))
    found = []
    for piece in pieces(text):
        if piece.is_made or piece.is_measured():
            continue
        for sentence in sentences(piece):
            whole = sentence + "".join(notes.get(name, "") for name in NOTE.findall(sentence))
            missing = claimed(sentence) - known
            if missing and not MEASURED.search(whole):
                linked = rests_on(whole, folder)
                missing = set() if linked is None else missing - linked
                found += [
                    f"{number} in: {' '.join(sentence.split())}" for number in sorted(missing)
                ]
    return found
