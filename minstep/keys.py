"""Checked reading of a JSON object: every refusal is one line that names the file and the key."""

import json
from typing import Any

from minstep.errors import InputError

MAX_INTEGER = 2**31 - 1  # far above any size of a model, far below what overflows
LEAST, MOST = 1e-30, 1e30  # what float32 holds, with room to multiply and divide


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
