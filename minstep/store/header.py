"""Safetensors files: which tensors one holds, and where each one lies.

A safetensors file is 8 bytes (little-endian length of the header), a JSON header that gives each
tensor's dtype, shape and [begin, end) offsets, then the tensors' bytes without gaps.
The safetensors package's NumPy reader knows no bfloat16, and hides where a tensor lies.
Source: github.com/huggingface/safetensors, "Format".
Checked by: tests/store/test_header.py, test_checkpoint.py and test_bad_checkpoint.py beside it
"""

import json
import math
import mmap
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from minstep.errors import InputError, shown
from minstep.fast.pages import Map, Pages
from minstep.store.files import open_file, os_reason
from minstep.store.json_file import unique

BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2}
BYTES |= {"U16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I8": 1, "U8": 1, "BOOL": 1}
KEYS = {"dtype", "shape", "data_offsets"}  # of a tensor's entry
LFS = b"version "  # how the text begins that a clone without Git LFS has in a file's place
MAX_HEADER = 100_000_000  # bytes, the format's own limit
MOST_TENSORS = 1 << 18  # in one file, and texts of its metadata: memory is bounded
LONGEST_ENTRY = 20_000  # characters that describe one tensor: far more than eight sizes take
MOST_ELEMENTS = 1 << 60  # NumPy counts the bytes of eight in 64 bits, and leaves out no size of 0
SPACE = "[ \\t\\n\\r]*"
START, COLON, MARK = (re.compile(SPACE + text + SPACE) for text in ("", ":", "([,}])"))
Identity = tuple[int, int, int, int]  # device, inode, bytes, time of the last change


class Tensor(NamedTuple):
    """Where a tensor lies: its file, dtype code, shape, and first byte in the file.

    `half` 0 or 1: the rows of each expert are the first or second half of those in the file.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    half: int | None = None

    @property
    def nbytes(self) -> int:
        """Bytes it takes in the file."""
        return math.prod(self.shape) * BYTES[self.dtype]


class Header(NamedTuple):
    """What one safetensors file says of itself, and which file that was, for `map_file`."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    identity: Identity


def read_header(file: Path) -> dict[str, Tensor]:
    """The tensors of one safetensors file. Raises InputError as open_header does."""
    return open_header(file).tensors


def open_header(file: Path) -> Header:
    """Read the header of one safetensors file, and nothing else of it.

    Raises InputError unless every byte is accounted for. Time and memory are bounded by the bytes
    of the header: tensors are read one by one, and the first that is malformed ends the reading.
    Differs: the safetensors package takes what is refused here: spaces before the header, a name
        that stands twice, an entry with a key of its own or as an array, more than 8 sizes or
        LONGEST_ENTRY characters, MOST_TENSORS tensors, sizes that NumPy cannot hold beside a size
        of 0, and dtypes that BYTES lacks: F4, F6 and FNUZ floats, and complex numbers.
    Checked by: tests/store/test_header.py
    """
    with open_file(file) as opened:
        try:
            status = os.fstat(opened.fileno())
            length = int.from_bytes(first := opened.read(8), "little")
            is_good = len(first) == 8 and length <= min(status.st_size - 8, MAX_HEADER)
            text = opened.read(length) if is_good else b""
        except OSError as error:
            raise InputError(f"{file}: cannot be read: {os_reason(error)}") from error
    size = status.st_size
    if first == LFS:
        raise InputError(f"{file}: is a Git LFS pointer, expected the file that it stands for")
    if not is_good or len(text) < length:
        message = f"its header length {length} does not fit a file of {size} bytes"
        raise InputError(f"{file}: is not a safetensors file, or not a whole one: {message}")
    try:
        entries, metadata = _parse(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: header is malformed: {error}") from error
    data, reached = 8 + length, 0
    spans = {name: _span(file, name, entry) for name, entry in entries.items()}
    for name, (begin, end) in sorted(spans.items(), key=lambda item: item[1]):
        if begin != reached:
            message = f"starts at offset {begin}, expected {reached}, where the one before it ends"
            raise InputError(f"{file}: tensor {shown(name)} {message}")
        reached = end
        if data + end > size:
            message = f"ends at byte {data + end}, but the file has {size}: it is truncated"
            raise InputError(f"{file}: tensor {shown(name)} {message}")
    if data + reached != size:
        raise InputError(f"{file}: has {size} bytes, expected {data + reached} by its header")
    tensors = {
        name: Tensor(file, entry["dtype"], tuple(entry["shape"]), data + spans[name][0])
        for name, entry in entries.items()
    }
    return Header(tensors, metadata, identity(status))


def identity(status: os.stat_result) -> Identity:
    """What tells a file from another one that has come to its place, and from itself changed."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def map_file(file: Path, pages: Pages, header: Header | None = None) -> Map:
    """The whole file, mapped read-only as one of `pages`: they are read when touched.

    Raises InputError where it cannot be, and where it is not the file that had this header.
    """
    with open_file(file) as opened:
        status = os.fstat(opened.fileno())
        if header is not None and identity(status) != header.identity:
            raise InputError(f"{file}: was changed while it was opened, expected it to stay")
        try:
            mapped = Map(opened.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:  # an empty file is a ValueError
            raise InputError(f"{file}: cannot be mapped: {os_reason(error)}") from error
    pages.add(mapped, file)
    return mapped


def _parse(text: str) -> tuple[dict[str, Any], dict[str, str]]:
    """The entries of a header by name, and its metadata. Raises ValueError for malformed JSON."""

    def value(name: str, at: int) -> tuple[Any, int]:
        if name != "__metadata__":
            return _entry(text, name, at)
        if text.startswith("null", at):
            return {}, at + 4
        if not text.startswith("{", at):
            raise ValueError("__metadata__ is no object, expected texts by name")
        return _object(text, at, text_value)

    def text_value(name: str, at: int) -> tuple[str, int]:
        if not text.startswith('"', at):
            raise ValueError(f"__metadata__: {shown(name)} is no text, expected one")
        return _string(text, at)

    if not text.startswith("{"):
        raise ValueError("it is not a JSON object, expected { and then tensor names and places")
    entries, end = _object(text, 0, value)
    if _after(START, text, end) != len(text):
        raise ValueError(f"something follows its end at character {end}, expected nothing")
    return entries, entries.pop("__metadata__", {})


def _object(
    text: str, at: int, value: Callable[[str, int], tuple[Any, int]]
) -> tuple[dict[str, Any], int]:
    """The JSON object that begins at `at`, and where it ends. Its keys must not repeat.

    `value`: what reads the value of a key at a place, and returns it and where it ends.
    """
    found: dict[str, Any] = {}
    at = _after(START, text, at + 1)
    if text.startswith("}", at):
        return found, at + 1
    mark = ","
    while mark == ",":
        if not text.startswith('"', at):
            raise ValueError(f"expected a name in quotes at character {at}")
        name, at = _string(text, at)
        if name in found:
            raise ValueError(f"name {shown(name)} stands twice")
        if len(found) == MOST_TENSORS:
            raise ValueError(f"more than {MOST_TENSORS} names, expected at most so many")
        found[name], at = value(name, _after(COLON, text, at))
        at, before = _after(MARK, text, at), at
        mark = text[before:at].strip()
    return found, at


def _entry(text: str, name: str, at: int) -> tuple[Any, int]:
    """The JSON value at `at`, which describes one tensor: nothing beyond LONGEST_ENTRY is read."""
    end = text.find("}", at, at + LONGEST_ENTRY) + 1  # it holds no other object
    piece = text[at : end or at + LONGEST_ENTRY]
    try:
        entry, length = DECODER.raw_decode(piece)
    except (ValueError, RecursionError) as error:
        is_long = len(piece) == LONGEST_ENTRY
        reason = f"or has more than {LONGEST_ENTRY} characters" if is_long else f"({error})"
        raise ValueError(f"what describes tensor {shown(name)} is no JSON {reason}") from error
    return entry, at + length


def _string(text: str, at: int) -> tuple[str, int]:
    """The JSON text that begins at `at`, and where it ends."""
    string, end = DECODER.raw_decode(text, at)
    string.encode()  # half a character, such as \ud800, is no text
    return string, end


def _after(pattern: re.Pattern[str], text: str, at: int) -> int:
    """Where what must stand at `at` ends, with the spaces around it."""
    found = pattern.match(text, at)
    if found is None:
        raise ValueError(f"character {at} is {text[at : at + 1]!r}, expected another one")
    return found.end()


def _whole(digits: str) -> float:
    """An integer as JSON has it; the format takes -0 for a float."""
    return int(digits) if digits != "-0" else -0.0


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


DECODER = json.JSONDecoder(object_pairs_hook=unique, parse_constant=_no_constant, parse_int=_whole)


def _span(file: Path, name: str, entry: Any) -> tuple[int, int]:
    """A tensor's [begin, end) after its entry was checked: dtype known, shape and offsets agree."""
    where = f"{file}: tensor {shown(name)}"
    if not isinstance(entry, dict):
        raise InputError(f"{where} is described by {entry!r:.80}, expected an object")
    if not entry.keys() <= KEYS:
        unknown = shown(next(key for key in entry if key not in KEYS))
        raise InputError(f"{where} has {unknown}, expected dtype, shape and data_offsets alone")
    dtype: Any = entry.get("dtype")
    shape: Any = entry.get("shape")
    offsets: Any = entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in BYTES:
        raise InputError(f"{where} has dtype {dtype!r:.80}, expected one of {', '.join(BYTES)}")
    few = isinstance(shape, list) and len(shape) <= 8
    if not few or not all(type(n) is int and 0 <= n < 1 << 48 for n in shape):
        raise InputError(f"{where} has shape {shape!r:.80}, expected a list of at most 8 sizes")
    if math.prod(n for n in shape if n) >= MOST_ELEMENTS:
        raise InputError(f"{where} has shape {shape}, expected sizes that 64 bits can count")
    pair = isinstance(offsets, list) and len(offsets) == 2
    if not pair or not all(type(n) is int and n >= 0 for n in offsets):
        raise InputError(f"{where} has data_offsets {offsets!r:.80}, expected [begin, end]")
    expected = math.prod(shape) * BYTES[dtype]
    if offsets[1] - offsets[0] != expected:
        message = f"expected {expected} bytes for {dtype} {shape}"
        raise InputError(f"{where} has data_offsets {offsets!r:.80}, {message}")
    return offsets[0], offsets[1]
