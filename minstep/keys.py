"""Checked reading of a JSON object: every refusal is one line that names the file and the key."""

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

from minstep.store.files import InputError, read_file, shown

MAX_JSON = 16_000_000  # bytes: an index of 100,000 tensors takes 10 MB
FINITE = "expected finite numbers"
MAX_INTEGER = 2**31 - 1  # far above any size of a model, far below what overflows
LEAST, MOST = 1e-30, 1e30  # what float32 holds, with room to multiply and divide


def read_json(file: Path, kind: type = dict) -> Any:
    """The JSON object, or with `kind` list the JSON array, in `file`.

    Raises InputError for a file that is missing, broken, of more than MAX_JSON bytes, or holds
    anything else, and as strict_json does.
    """
    content = read_file(file, MAX_JSON)
    try:
        raw = strict_json(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: is not valid JSON: {error}") from error
    if not isinstance(raw, kind):
        expected = "object" if kind is dict else "array"
        raise InputError(f"{file}: holds a {type(raw).__name__}, expected a JSON {expected}")
    return raw


def strict_json(text: str) -> Any:
    """The value of JSON text. Raises ValueError, or RecursionError where it is nested too deeply.

    Refused is what Python's own reader takes: NaN and Infinity, numbers too large for a float,
    half a character such as \\ud800, and a key that stands twice in an object.
    Differs: transformers takes the last of two equal keys. Here it is open which one was meant.
    Checked by: tests/model/test_keys.py
    """
    odd: list[str] = []

    def number(digits: str) -> float:
        value = float(digits)
        if not math.isfinite(value):
            odd.append(digits)
        return value

    def pairs(found: list[tuple[str, Any]]) -> dict[str, Any]:
        for key, value in found if odd else ():
            if not _is_finite(value):
                raise ValueError(f"{shown(key)} is {odd[0]:.80}, {FINITE}")
        return unique(found)

    value = json.loads(text, object_pairs_hook=pairs, parse_constant=number, parse_float=number)
    if odd:
        raise ValueError(f"it holds {odd[0]:.80}, {FINITE}")
    if "\\u" in text:  # the only way to half a character
        json.dumps(value, ensure_ascii=False).encode()
    return value


def _is_finite(value: Any) -> bool:
    """Whether a JSON value holds finite numbers alone; of objects within it this is known."""
    if isinstance(value, list):
        return all(map(_is_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object from its keys and values. Raises ValueError where a key stands twice."""
    found = dict(pairs)
    if len(found) != len(pairs):
        counts = Counter(key for key, _ in pairs)
        raise ValueError(f"key {shown(counts.most_common(1)[0][0])} stands twice")
    return found


class Keys:
    """A JSON object with its place, read key by key; each method may raise InputError."""

    def __init__(self, raw: dict[str, Any], source: str) -> None:
        self.raw = raw
        self.source = source

    def require(self, key: str, holds: bool, expected: str, value: Any = ...) -> None:
        """Refuse `key` unless `holds`, saying its value and what was expected."""
        if not holds:
            if value is ...:
                value = self.raw.get(key, ...)
            found = "is missing" if value is ... else f"is {_short(value)}"
            raise InputError(f"{self.source}: {key} {found}, {expected}")

    def get(self, key: str) -> Any:
        """The value of a key that must be there."""
        self.require(key, key in self.raw, "expected a value")
        return self.raw[key]

    def inner(self, key: str) -> "Keys":
        """The object under `key`, whose refusals name `key` too."""
        self.require(key, isinstance(self.get(key), dict), "expected an object")
        return Keys(self.raw[key], f"{self.source}: {key}")

    def integer(self, key: str, minimum: int = 1, maximum: int = MAX_INTEGER) -> int:
        """An integer from `minimum` to `maximum`."""
        value = self.get(key)
        good = type(value) is int and value >= minimum
        self.require(key, good, f"expected an integer of at least {minimum}")
        self.require(key, value <= maximum, f"expected at most {maximum}")
        return int(value)

    def number(self, key: str, least: float = LEAST, most: float = MOST) -> float:
        """A number from `least` to `most`."""
        return self.positive(key, self.get(key), least, most)

    def positive(self, key: str, value: Any, least: float = LEAST, most: float = MOST) -> float:
        """`value`, found at `key`, as a number from `least` to `most`."""
        good = type(value) in (int, float) and value > 0
        self.require(key, good, "expected a number above 0", value)
        self.require(key, least <= value <= most, f"expected {least:g} to {most:g}", value)
        return float(value)

    def boolean(self, key: str) -> bool:
        """True or false."""
        value = self.get(key)
        self.require(key, isinstance(value, bool), "expected true or false")
        return bool(value)

    def limit(self, key: str, value: Any) -> float | None:
        """A clamp found at `key`: 0 and null mean none."""
        none = value is None or (value == 0 and not isinstance(value, bool))
        return None if none else self.positive(key, value)

    def per_layer(self, key: str, count: int, layout: str) -> list[Any]:
        """A list with one entry per layer; a scalar stands for the same entry everywhere.

        `layout` says in words what `count` is made of.
        """
        value = self.get(key)
        if not isinstance(value, list):
            self.require(key, not isinstance(value, (str, dict)), f"expected a list of {layout}")
            return [value] * count
        if len(value) != count:
            raise InputError(f"{self.source}: {key} has {len(value)} entries, expected {layout}")
        return value


def _short(value: Any) -> str:
    """The value as JSON, cut to stay on one line."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else text[:77] + "..."
