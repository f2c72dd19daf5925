"""Hub-layout checkpoints, memory-mapped: opening reads headers, and a tensor is read when used.

Some of the shards may be missing: what lies in them is refused once it is asked for.
Source: the layout that huggingface_hub writes, "model.safetensors.index.json".
Checked by: tests/store/test_checkpoint.py, tests/store/test_bad_checkpoint.py
"""

import math
import os
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from minstep.config import Config
from minstep.errors import InputError, shown
from minstep.fast.bf16 import BF16Array
from minstep.fast.fp8 import FP8Array
from minstep.fast.pages import SMALL, Map, Pages
from minstep.linear import Weight, as_float
from minstep.model import ModelWeights
from minstep.store.config_file import load_config, shipped_folder
from minstep.store.header import Header, Tensor, map_file, open_header
from minstep.store.json_file import read_json
from minstep.store.layouts import halves, hub_name
from minstep.weights import SCALES, Shape, assemble, blocks, tensor_shapes

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
HUB_DTYPES = {"float32": "F32", "bfloat16": "BF16"}
NUMPY = {"F32": "<f4", "BF16": "<u2", "F8_E4M3": "u1"}  # how the bits are viewed


class Checkpoint(NamedTuple):
    """An opened checkpoint: config, the place of each tensor by hub name, and the maps.

    `absent`: the tensors that are not there, and the file of each; `damaged`: what is wrong with
    those of the files that are there but cannot be used.
    """

    path: Path
    config: Config
    tensors: dict[str, Tensor]
    maps: dict[Path, Map]
    absent: dict[str, Path]
    damaged: dict[Path, str]

    def get(self, name: str, shape: Shape) -> Weight:
        """The tensor to compute with: as `stored`, but of at most SMALL elements a float32 copy.

        Converting a small one would cost more than each product with it, and so would looking
        whether its file is still whole. Raises as `stored` does.
        """
        weight = self.stored(name, shape)
        if math.prod(shape) > SMALL:
            return weight
        copied = np.array(weight, np.float32)
        copied.flags.writeable = False
        return copied

    def stored(self, name: str, shape: Shape) -> Weight:
        """The tensor as a read-only view of its map: float32 or stored array; nothing is read.

        Raises InputError when it is missing, or its shape or dtype is not what the config says.
        The router's gate and bias may be float32 or bfloat16 in any checkpoint: both are seen.
        """
        tensor = self._checked(name, shape, self._dtypes(name))
        stored = self._stored(tensor)
        if tensor.dtype == "F32":
            return stored
        if tensor.dtype == "BF16":
            return BF16Array(stored)
        assert self.config.quantization
        rows, columns, _ = self.config.quantization
        counts = blocks(shape, (rows, columns))
        scales = self._checked(f"{name}{SCALES}", counts, {"F32", "BF16"})
        single = self._stored(scales)
        if scales.dtype == "BF16":
            single = as_float(BF16Array(single), np.float32)
        return FP8Array(stored, single, (rows, columns), f"{tensor.file}: tensor {name}")

    def _checked(self, name: str, shape: Shape, dtypes: set[str]) -> Tensor:
        """Where a tensor of this shape and one of these dtypes lies."""
        tensor = self.tensors.get(name)
        if name in self.absent:
            file = self.absent[name]
            if file in self.damaged:
                raise InputError(self.damaged[file])
            message = f"is missing, expected the shard that {INDEX} names for {name}"
            if file == self.path:
                message = f"holds no {name}: transformers wrote the model without its head"
            raise InputError(f"{file}: {message}")
        if tensor is None:
            raise InputError(f"{self.path}: tensor {name} is missing, expected shape {list(shape)}")
        where = f"{tensor.file}: tensor {name}"
        if tensor.shape != shape:
            found = list(tensor.shape)
            raise InputError(f"{where} has shape {found}, expected {list(shape)} by the config")
        if tensor.dtype not in dtypes:
            expected = " or ".join(sorted(dtypes))
            raise InputError(f"{where} has dtype {tensor.dtype}, expected {expected} by the config")
        return tensor

    def _dtypes(self, name: str) -> set[str]:
        """The dtypes that the config allows for a tensor."""
        both = set(HUB_DTYPES.values())
        dtype, quantization = self.config.torch_dtype, self.config.quantization
        is_router = name.endswith((".moe.gate.weight", ".moe.router_bias"))
        allowed = both if is_router or dtype is None else {HUB_DTYPES[dtype]}
        return allowed | ({"F8_E4M3"} if quantization and quantization.covers(name) else set())

    def _stored(self, tensor: Tensor) -> Any:
        """A view of a tensor's bits; of a tensor in two halves, of its own rows of each expert.

        Raises InputError where its file has become shorter since it was opened.
        """
        self.maps[tensor.file].check()
        shape, half = tensor.shape, tensor.half
        if half is not None:
            shape = (shape[0], 2 * shape[1], *shape[2:])
        bits = np.frombuffer(
            self.maps[tensor.file], NUMPY[tensor.dtype], math.prod(shape), tensor.offset
        ).reshape(shape)
        if half is None:
            return bits
        rows = tensor.shape[1]
        return bits[:, half * rows : (half + 1) * rows]

    def owns(self, file: Path) -> bool:
        """Whether to write `file` would replace one of this checkpoint's, through links too."""
        beside = {self.path / name for name in (INDEX, SINGLE, "config.json", "tokenizer.json")}
        files = {tensor.file for tensor in self.tensors.values()} | {*self.absent.values()} | beside
        return os.path.realpath(file) in {os.path.realpath(each) for each in files}

    def weights(self, depths: int | None = None) -> ModelWeights:
        """Every tensor that the config asks for, in its place; of large ones nothing is read.

        `depths`: the first so many MTP layers only, where the others are not wanted.
        A checkpoint in which no MTP layer has a head of its own, as `-Base`, uses lm_head for all
        of them, with a warning. One that lacks the MTP layers its config counts has none, with a
        warning. Raises InputError as `get` does.
        """
        own = self.has_own_heads()
        config = self.config._replace(mtp_layers=self.config.mtp_layers[:depths])
        for name in (n for n in tensor_shapes(config, own) if n in self.absent):
            self._checked(name, (), set())  # a missing shard explains more than a missing tensor
        weights = assemble(config, self.get, own)
        if len(load_config(self.path).mtp_layers) > len(self.config.mtp_layers):
            warnings.warn("no tensor is of an MTP layer: there are no drafts", stacklevel=2)
        if not own and weights.mtp:
            warnings.warn("no MTP layer has shared_head.output: lm_head is used", stacklevel=2)
        return weights

    def has_own_heads(self) -> bool:
        """Whether MTP layers have output matrices of their own; yes where there is no MTP layer."""
        names = [f"{s.name}.transformer.shared_head.output.weight" for s in self.config.mtp_layers]
        return not names or any(name in self.tensors or name in self.absent for name in names)


def open_checkpoint(path: Path | str) -> Checkpoint:
    """Open the hub-layout folder at `path`: config, index and headers are read and checked.

    Shards that the index names may be missing or damaged: what lies in them is refused when it is
    asked for. What transformers wrote is given the hub's names.
    Where the config counts MTP layers, but no tensor is of any, the model is opened without them.
    Raises InputError, naming the file and what was expected, for whatever is malformed, and where
    there are no weights at all.
    """
    path = Path(path)
    if not os.path.isdir(path):
        raise InputError(f"{path}: is not a folder, expected a checkpoint in hub layout")
    config = load_config(path)
    files: dict[Path, Header] = {}
    damaged: dict[Path, str] = {}
    found: dict[str, Tensor | Path] = {}  # where a tensor lies, or the file that is not there
    if (path / INDEX).exists():
        for name, shard in _weight_map(path / INDEX).items():
            file = path / shard
            if file not in files and file not in damaged and os.path.exists(file):
                try:
                    files[file] = open_header(file)
                except InputError as error:
                    damaged[file] = str(error)
            if file in files and name not in files[file].tensors:
                raise InputError(f"{file}: tensor {shown(name)} is missing, expected by {INDEX}")
            found[name] = files[file].tensors[name] if file in files else file
    elif (path / SINGLE).exists():
        files[path / SINGLE] = open_header(path / SINGLE)
        found |= files[path / SINGLE].tensors
    elif path.resolve().parent == shipped_folder():
        made = f"minstep make-tiny {path.name} --out DIR makes some"
        raise InputError(f"{path.name}: is a configuration that holds no weights; {made}")
    else:
        raise InputError(f"{path}: holds no weights, expected {SINGLE} or {INDEX}")
    has_no_head = {"embed_tokens.weight", "language_model.embed_tokens.weight"} & found.keys()
    found = _hub_named(found, path)
    tensors = {name: place for name, place in found.items() if isinstance(place, Tensor)}
    absent = {name: place for name, place in found.items() if isinstance(place, Path)}
    if has_no_head and "lm_head.weight" not in found and not config.tie_word_embeddings:
        absent["lm_head.weight"] = path
    mtp = tuple(f"{spec.name}." for spec in config.mtp_layers)
    if mtp and not any(name.startswith(mtp) for name in found):
        config = config._replace(mtp_layers=())
    pages = Pages()
    maps = {file: map_file(file, pages, header) for file, header in files.items()}
    return Checkpoint(path, config, tensors, maps, absent, damaged)


def _hub_named(found: dict[str, Tensor | Path], path: Path) -> dict[str, Tensor | Path]:
    """The same places under the hub's names; a tensor that holds two becomes both its halves."""
    named: dict[str, Tensor | Path] = {}
    for name, place in found.items():
        pair = halves(name)
        for half, hub in enumerate(pair or (hub_name(name),)):
            if hub in named:
                both = f"{shown(name)} is {shown(hub)}"
                raise InputError(f"{path}: tensor {both}, which is there twice")
            named[hub] = place
            if pair and isinstance(place, Tensor):
                if len(place.shape) != 3 or place.shape[1] % 2:
                    message = f"has shape {list(place.shape)}, expected [experts, 2 * width, size]"
                    raise InputError(f"{place.file}: tensor {shown(name)} {message}")
                E, rows, D = place.shape
                named[hub] = place._replace(shape=(E, rows // 2, D), half=half)
    return named


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> shard file name, as the index says. Shards are never found by a pattern."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index}: weight_map is missing, expected tensor names and their files")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or shard in ("", "..") or shard != Path(shard).name:
            message = f"is {shown(repr(shard))}, expected the name of a file beside the index"
            raise InputError(f"{index}: weight_map: {shown(name)} {message}")
    return weight_map
