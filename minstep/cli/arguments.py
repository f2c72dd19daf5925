"""Commands of the parser, and what the text of an argument stands for: `type`s of argparse's."""

import argparse
import math
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from minstep.cli.terminal import LONGEST_TEXT
from minstep.errors import InputError
from minstep.store.config_file import find_config
from minstep.store.files import os_reason

MODEL = "checkpoint in hub layout, or a shipped name (trained, the small model shipped here)"
FLOATS: dict[str, Any] = {"choices": ("float32", "float64"), "default": "float32"}


def add_command(
    parsers: Any, name: str, run: Callable[..., int | None], text: str, example: str
) -> Any:
    """A parser for the command `name`, which `run` runs, with an example in its help."""
    epilog = f"example: minstep {example}"
    added = parsers.add_parser(name, help=text, description=text, epilog=epilog, allow_abbrev=False)
    added.set_defaults(run=run)
    return added


def add_model(add: Any, text: str = MODEL) -> None:
    """The flag that names a model."""
    add.add_argument("--model", type=model_folder, metavar="DIR", help=text)


def add_prompt(add: Any, default: str | None = None) -> Any:
    """The flags that give a prompt, one of which is needed where there is no default.

    Returns their group, for other ways to give one.
    """
    prompt = add.add_mutually_exclusive_group(required=default is None)
    named = f' ("{default}")' if default else ""
    text = f"the prompt as text{named}; - reads it from stdin"
    prompt.add_argument("--prompt", type=given_or_read, default=default, metavar="TEXT", help=text)
    text = "the prompt as token ids, such as 5,17,9; - reads them from stdin"
    prompt.add_argument("--tokens", type=token_ids, metavar="IDS", help=text)
    return prompt


def given_or_read(text: str) -> str:
    """The text itself, or for a dash all of stdin."""
    if text != "-":
        return text
    if sys.stdin is None:
        raise argparse.ArgumentTypeError("stdin is closed")
    try:
        found = sys.stdin.read(LONGEST_TEXT + 1)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"stdin is not text: {error}") from error
    except OSError as error:
        raise argparse.ArgumentTypeError(f"stdin: {os_reason(error)}") from error
    if len(found) > LONGEST_TEXT:
        message = f"stdin has more than {LONGEST_TEXT:,} characters, expected at most that many"
        raise argparse.ArgumentTypeError(message)
    return found


def token_ids(text: str) -> list[int]:
    """Token ids joined by commas, or for a dash those on stdin."""
    text = given_or_read(text)
    parts = [part.strip() for part in text.split(",")] if text.strip() else []
    if not all(re.fullmatch("-?[0-9]{1,4000}", part) for part in parts):
        message = f"{text!r:.80} is not a list of token ids, expected such as 5,17,9"
        raise argparse.ArgumentTypeError(message)
    return [int(part) for part in parts]


def layer_ranges(text: str) -> list[range]:
    """Layer numbers and ranges of them, joined by commas: 0-17,45."""
    ranges = []
    for part in text.split(","):
        found = re.fullmatch("([0-9]{1,6})(?:-([0-9]{1,6}))?", part.strip())
        if found is None or int(found[2] or found[1]) < int(found[1]):
            message = f"{text!r:.80} is not a list of layers, expected such as 0-17,45"
            raise argparse.ArgumentTypeError(message)
        ranges.append(range(int(found[1]), int(found[2] or found[1]) + 1))
    return ranges


def at_least(minimum: int, digits: int = 18) -> Callable[[str], int]:
    """A whole number that is not smaller than `minimum` and has at most so many digits."""

    def whole_number(text: str) -> int:
        if not re.fullmatch(f"[0-9]{{1,{digits}}}", text.strip()) or int(text) < minimum:
            message = f"a whole number of at least {minimum} with at most {digits} digits"
            raise argparse.ArgumentTypeError(f"{text!r:.80}: expected {message}")
        return int(text)

    return whole_number


def seed(text: str) -> int:
    """A number that NumPy's generators begin with, which may be far beyond 64 bits."""
    return at_least(0, 100)(text)


def number(expected: str, holds: Callable[[float], bool]) -> Callable[[str], float]:
    """A finite number for which `holds` is true; `expected` says so in words."""

    def parsed(text: str) -> float:
        is_number = re.fullmatch(
            r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?", text.strip(), re.I
        )
        value = float(text) if is_number else math.nan
        if not (holds(value) and math.isfinite(value)):
            raise argparse.ArgumentTypeError(f"{text!r:.80}: expected a number {expected}")
        return value

    return parsed


def model_folder(text: str) -> Path:
    """The folder of a checkpoint: a path, or where nothing is there a name that is shipped."""
    try:
        return find_config(not_empty(text))
    except (InputError, OSError):  # refused where it is opened, which says more
        return Path(text)


def path(text: str) -> Path:
    """A path that is not empty."""
    try:
        os.fsencode(not_empty(text))
    except ValueError as error:  # half a character
        raise argparse.ArgumentTypeError(f"{text!r:.80}: {error}") from error
    if "\0" in text:
        raise argparse.ArgumentTypeError(f"{text!r:.80}: holds a zero byte")
    return Path(text)


def not_empty(text: str) -> str:
    """Any text but the empty one."""
    if not text:
        raise argparse.ArgumentTypeError("'': expected a text that is not empty")
    return text
