"""Hub-layout checkpoints, memory-mapped: opening reads headers, and a tensor is read when used.

A safetensors file is 8 bytes (little-endian length of the header), a JSON header that gives each
tensor's dtype, shape and [begin, end) offsets, then the tensors' bytes without gaps.
The safetensors package's NumPy reader knows no bfloat16, and hides where a tensor lies.
Source: github.com/huggingface/safetensors, "Format".
Checked by: tests/test_checkpoint.py, tests/test_bad_checkpoint.py
"""

import json
import math
import mmap
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from minstep.bf16 import BF16Array
from minstep.config import Config, load_config
from minstep.files import InputError, os_reason
from minstep.keys import read_json
from minstep.linear import Weight
from minstep.model import ModelWeights
from minstep.weights import Shape, assemble

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
HUB_DTYPES = {"float32": "F32", "bfloat16": "BF16"}
BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2}
BYTES |= {"U16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I8": 1, "U8": 1, "BOOL": 1}
MAX_HEADER = 100_000_000  # the format's own limit


class Tensor(NamedTuple):
    """Where a tensor lies: its file, dtype code, shape, and first byte in the file."""

    file: Path
    dtype: str
    shape: Shape
    offset: int

    @property
    def nbytes(self) -> int:
        """Bytes it takes in the file."""
        return math.prod(self.shape) * BYTES[self.dtype]


class Checkpoint(NamedTuple):
    """An opened checkpoint: config, the place of each tensor by hub name, and the maps."""

    path: Path
    config: Config
    tensors: dict[str, Tensor]
    maps: dict[Path, mmap.mmap]

    def get(self, name: str, shape: Shape) -> Weight:
        """The tensor as a read-only view of its map: float32 array or BF16Array; nothing is read.

        Raises InputError when it is missing, or its shape or dtype is not what the config says.
        The router's gate and bias may be float32 or bfloat16 in any checkpoint: both are seen.
        """
        tensor = self.tensors.get(name)
        if tensor is None:
            raise InputError(f"{self.path}: tensor {name} is missing, expected shape {list(shape)}")
        where = f"{tensor.file}: tensor {name}"
        if tensor.shape != shape:
            found = list(tensor.shape)
            raise InputError(f"{where} has shape {found}, expected {list(shape)} by the config")
        allowed = (
            {HUB_DTYPES[self.config.torch_dtype]} if self.config.torch_dtype else {"F32", "BF16"}
        )
        if name.endswith((".moe.gate.weight", ".moe.router_bias")):
            allowed |= {"F32", "BF16"}
        if tensor.dtype not in allowed:
            expected = " or ".join(sorted(allowed))
            raise InputError(f"{where} has dtype {tensor.dtype}, expected {expected} by the config")
        dtype = "<u2" if tensor.dtype == "BF16" else "<f4"
        flat = np.frombuffer(self.maps[tensor.file], dtype, math.prod(shape), tensor.offset)
        stored = flat.reshape(shape)
        return BF16Array(stored) if tensor.dtype == "BF16" else stored

    def weights(self) -> ModelWeights:
        """Every tensor that the config asks for, in its place; still nothing is read.

        A checkpoint in which no MTP layer has a head of its own, as `-Base`, uses lm_head for all
        of them, with a warning. Raises InputError as `get` does.
        """
        heads = [f"{s.name}.transformer.shared_head.output.weight" for s in self.config.mtp_layers]
        own = not heads or any(name in self.tensors for name in heads)
        weights = assemble(self.config, self.get, own)
        if not own:
            warnings.warn("no MTP layer has shared_head.output: lm_head is used", stacklevel=2)
        return weights


def open_checkpoint(path: Path | str) -> Checkpoint:
    """Open the hub-layout folder at `path`: config, index and headers are read and checked.

    Raises InputError, naming the file and what was expected, for whatever is missing or malformed.
    """
    path = Path(path)
    if not path.is_dir():
        raise InputError(f"{path}: is not a folder, expected a checkpoint in hub layout")
    config = load_config(path)
    files: dict[Path, dict[str, Tensor]] = {}
    if (path / INDEX).exists():
        tensors = {}
        for name, shard in _weight_map(path / INDEX).items():
            file = path / shard
            if file not in files:
                if not file.is_file():
                    raise InputError(f"{file}: is missing, expected the shard that {INDEX} names")
                files[file] = read_header(file)
            if name not in files[file]:
                raise InputError(f"{file}: tensor {name} is missing, expected by {INDEX}")
            tensors[name] = files[file][name]
    elif (path / SINGLE).exists():
        tensors = files[path / SINGLE] = read_header(path / SINGLE)
    else:
        raise InputError(f"{path}: holds no weights, expected {SINGLE} or {INDEX}")
    return Checkpoint(path, config, tensors, {file: _map(file) for file in files})


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> shard file name, as the index says. Shards are never found by a pattern."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index}: weight_map is missing, expected tensor names and their files")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or shard in ("", "..") or shard != Path(shard).name:
            message = f"is {shard!r}, expected the name of a file beside the index"
            raise InputError(f"{index}: weight_map: {name} {message}")
    return weight_map


def read_header(file: Path) -> dict[str, Tensor]:
    """The tensors of one safetensors file. Raises InputError unless every byte is accounted for."""
    try:
        size = file.stat().st_size
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            text = opened.read(min(length, MAX_HEADER))
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {os_reason(error)}") from error
    if size < 8 or length > min(size - 8, MAX_HEADER):
        message = f"header length {length} does not fit a file of {size} bytes"
        raise InputError(f"{file}: {message}, expected a whole safetensors file")
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


def _map(file: Path) -> mmap.mmap:
    """The whole file, mapped read-only; pages are read when touched."""
    with file.open("rb") as opened:
        return mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
