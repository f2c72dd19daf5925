"""JSON read strictly: what Python's own reader lets pass by mistake is refused."""

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

from minstep.errors import InputError, shown
from minstep.store.files import read_file

MAX_JSON = 16_000_000  # bytes: an index of 100,000 tensors takes 10 MB
FINITE = "expected finite numbers"


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
    Checked by: tests/store/test_json_file.py
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


def json_text(value: Any, is_utf8: bool = True) -> str:
    """A value as JSON, with an escape such as `\\u001b` for what is not printable."""
    text = json.dumps(value, ensure_ascii=not is_utf8)
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in text)
