"""Safetensors files: which tensors one holds and where each one lies, and how one is written.

A safetensors file is 8 bytes (little-endian length of the header), a JSON header that gives each
tensor's dtype, shape and [begin, end) offsets, then the tensors' bytes without gaps.
The safetensors package's NumPy reader knows no bfloat16, and hides where a tensor lies.
Source: github.com/huggingface/safetensors, "Format".
Checked by: tests/test_checkpoint.py, tests/test_bad_checkpoint.py
"""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from minstep.files import InputError, os_reason
from minstep.tap import Array

BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2}
BYTES |= {"U16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I8": 1, "U8": 1, "BOOL": 1}
CODES = {"float32": "F32", "float64": "F64", "int64": "I64"}  # of the dtypes that arrays have
LFS = b"version "  # how the text begins that a clone without Git LFS has in a file's place
MAX_HEADER = 100_000_000  # the format's own limit


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


def read_header(file: Path) -> dict[str, Tensor]:
    """The tensors of one safetensors file. Raises InputError unless every byte is accounted for."""
    try:
        size = file.stat().st_size
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            text = opened.read(min(length, MAX_HEADER))
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {os_reason(error)}") from error
    if length.to_bytes(8, "little") == LFS:
        raise InputError(f"{file}: is a Git LFS pointer, expected the file that it stands for")
    if size < 8 or length > min(size - 8, MAX_HEADER):
        message = f"its header length {length} does not fit a file of {size} bytes"
        raise InputError(f"{file}: is not a safetensors file, or not a whole one: {message}")
    try:
        header = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: header is malformed: {error}") from error
    if not isinstance(header, dict):
        raise InputError(f"{file}: header is not a JSON object, expected tensor names and places")
    header.pop("__metadata__", None)
    data, reached = 8 + length, 0
    spans = {name: _span(file, name, entry) for name, entry in header.items()}
    for name, (begin, end) in sorted(spans.items(), key=lambda item: item[1]):
        if begin != reached:
            message = f"starts at offset {begin}, expected {reached}, where the one before it ends"
            raise InputError(f"{file}: tensor {name} {message}")
        reached = end
        if data + end > size:
            message = f"ends at byte {data + end}, but the file has {size}: it is truncated"
            raise InputError(f"{file}: tensor {name} {message}")
    if data + reached != size:
        raise InputError(f"{file}: has {size} bytes, expected {data + reached} by its header")
    return {
        name: Tensor(file, entry["dtype"], tuple(entry["shape"]), data + spans[name][0])
        for name, entry in header.items()
    }


def _span(file: Path, name: str, entry: Any) -> tuple[int, int]:
    """A tensor's [begin, end) after its entry was checked: dtype known, shape and offsets agree."""
    where = f"{file}: tensor {name}"
    if not isinstance(entry, dict):
        raise InputError(f"{where} is described by {entry!r:.80}, expected an object")
    dtype: Any = entry.get("dtype")
    shape: Any = entry.get("shape")
    offsets: Any = entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in BYTES:
        raise InputError(f"{where} has dtype {dtype!r:.80}, expected one of {', '.join(BYTES)}")
    few = isinstance(shape, list) and len(shape) <= 8
    if not few or not all(type(n) is int and 0 <= n < 1 << 48 for n in shape):
        raise InputError(f"{where} has shape {shape!r:.80}, expected a list of at most 8 sizes")
    pair = isinstance(offsets, list) and len(offsets) == 2
    if not pair or not all(type(n) is int and n >= 0 for n in offsets):
        raise InputError(f"{where} has data_offsets {offsets!r:.80}, expected [begin, end]")
    expected = math.prod(shape) * BYTES[dtype]
    if offsets[1] - offsets[0] != expected:
        message = f"expected {expected} bytes for {dtype} {shape}"
        raise InputError(f"{where} has data_offsets {offsets}, {message}")
    return offsets[0], offsets[1]


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose keys must not repeat, so that no tensor is described twice."""
    unique = dict(pairs)
    if len(unique) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"name {next(n for n in names if names.count(n) > 1)} stands twice")
    return unique


def laid_out(
    tensors: dict[str, tuple[str, tuple[int, ...]]], metadata: dict[str, str]
) -> tuple[bytes, dict[str, int]]:
    """How a new file begins, and where in it each tensor lies, widest dtypes first.

    `tensors`: dtype code and shape by name. Returns all bytes before the first tensor, and the
    first byte of each tensor in the order of the file. So laid out, every tensor is aligned.
    """
    header: dict[str, Any] = {"__metadata__": metadata}
    reached = 0
    for name, (dtype, shape) in sorted(tensors.items(), key=lambda item: -BYTES[item[1][0]]):
        end = reached + math.prod(shape) * BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [reached, end]}
        reached = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    del header["__metadata__"]
    data = 8 + len(text)
    places = {name: data + entry["data_offsets"][0] for name, entry in header.items()}
    return len(text).to_bytes(8, "little") + text, places


class Data(NamedTuple):
    """A tensor to be written: its dtype code, its shape, and its bytes piece by piece."""

    dtype: str
    shape: tuple[int, ...]
    pieces: Iterable[Any]

    @classmethod
    def of(cls, x: Array) -> "Data":
        """An array of a dtype that activations have."""
        return cls(CODES[x.dtype.name], x.shape, [np.ascontiguousarray(x).data])


def write_tensors(file: Path, tensors: dict[str, Data], metadata: dict[str, str]) -> None:
    """Write a safetensors file, a piece at a time. Wider dtypes lie first: all are aligned.

    The package's own writer wants a whole file in memory. Raises OSError.
    """
    start, places = laid_out({name: x[:2] for name, x in tensors.items()}, metadata)
    with file.open("wb") as opened:
        opened.write(start)
        for name in places:
            opened.writelines(tensors[name].pieces)
