"""Recordings: safetensors files of what an engine computed, read a tensor at a time by our names.

Any safetensors file is one. Metadata may say what it is from: `tokens`, a JSON list of the prompt's
ids, and `dtype`, what the engine computed in.
Checked by: tests/test_recording.py
"""

import json
import math
from collections.abc import Iterable, Mapping
from copy import copy
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minstep.bf16 import BF16Array
from minstep.files import InputError
from minstep.header import read_header
from minstep.lab.forms import Term, stored_forms
from minstep.lab.names import HEADS, axes, in_model_order, is_weight, mtp_layers, split
from minstep.pages import DONTNEED, Map, Pages
from minstep.tap import Array
from minstep.validation import NotFinite, flaw

STORED = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "BOOL": "?"}
STORED |= {f"{kind.upper()}{n * 8}": f"<{kind}{n}" for kind in "iu" for n in (1, 2, 4, 8)}
FLOATS = ("bfloat16", "float16", "float32", "float64")  # the least precise first

Stored = NDArray[np.generic] | BF16Array


class Recording:
    """What one engine computed over one prompt, by our names; `array` reads one tensor.

    `stored` are its tensors by the names that it gives them, `forms` says how each of ours is made
    of those, `engine_dtype` is what the engine computed in, and `rows` how many positions T the
    prompt has, where anything tells.
    """

    def __init__(
        self,
        path: Path | str,
        stored: Mapping[str, Stored],
        tokens: list[int] | None = None,
        engine_dtype: str | None = None,
        mapped: Map | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self.path, self.stored, self.tokens, self._mapped = path, stored, tokens, mapped
        self.metadata = metadata or {}
        self.forms = stored_forms(path, {name: x.shape for name, x in stored.items()})
        self.engine_dtype = engine_dtype or _least_precise(stored.values())
        self.rows = len(tokens) if tokens else self._rows()
        self._end: int | None = None  # positions that are looked at, None for all
        self._depths: Mapping[int, int] = {}

    @property
    def names(self) -> list[str]:
        """Our names of everything it can give, in the model's order."""
        return in_model_order(self.forms)

    def source(self, name: str) -> str:
        """What the file calls the tensor; joined by + where it is a sum."""
        return " + ".join(term.source for term in self.forms[name])

    def dtype(self, name: str) -> str:
        """The dtype the tensor is stored in, such as float32 or bfloat16."""
        return _dtype(self.stored[self.forms[name][0].source])

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape `array` will have; nothing is read."""
        return self._part(name, self.forms[name][0]).shape

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of everything it can give."""
        return {name: self.shape(name) for name in self.forms}

    def beginning(self, end: int, depths: Mapping[int, int]) -> "Recording":
        """What it would be of the first `end` tokens alone: no position sees a later one.

        `depths`: of each MTP layer by number. Depth k knows k tokens ahead, so that it has k
        positions less. What has no such positions is left out.
        """
        other = copy(self)
        other.rows, other._end, other._depths = end, end, depths
        other.tokens = self.tokens and self.tokens[:end]
        other.forms = {
            name: form
            for name, form in self.forms.items()
            if is_weight(name) or (axes(name) and end > depths.get(split(name)[0] or 0, 0))
        }
        if "lm_head" in self.forms and self.shape("lm_head")[:1] != (self.rows,):
            other.forms.pop("lm_head", None)  # logits of the last token alone
        return other

    def array(self, name: str) -> Array:
        """A copy of the tensor: 16-bit floats as float32, other dtypes as they are.

        Leading axes of size 1 that our own form lacks are left out. Experts, and with them their
        weights, come in increasing order of id. Raises InputError where a value is not finite, and
        where a tensor's parts do not fit.
        """
        x, *more = (self._read(name, term) for term in self.forms[name])
        for y in more:
            self._check_shape(name, x.shape, y.shape)
            x = x + y
        layer, part = split(name)
        ids = f"model.layers.{layer}.moe.ids"
        if part in ("moe.ids", "moe.weights", "moe.weights.unscaled") and ids in self.forms:
            order = np.argsort(self._part(ids, self.forms[ids][0]), axis=-1, kind="stable")
            self._check_shape(f"{ids} and {name}", order.shape, x.shape)
            x = np.take_along_axis(x, order, axis=-1)
        return x

    def if_any(self, name: str, axes: int | None = None) -> Array | None:
        """The tensor; None where it is not there, is not finite, or has not so many axes."""
        if name not in self.forms or axes not in (None, len(self.shape(name))):
            return None
        try:
            return self.array(name)
        except NotFinite:
            return None

    def _check_shape(self, what: str, one: tuple[int, ...], other: tuple[int, ...]) -> None:
        if one != other:
            message = f"has parts of shape {list(one)} and {list(other)}, expected the same"
            raise InputError(f"{self.path}: tensor {what} {message}")

    def _part(self, name: str, term: Term) -> Stored:
        """What a term takes of a stored tensor, without batch axes; nothing is read."""
        x = self.stored[term.source]
        if (term.start, term.stop) != (0, None) and len(x.shape) >= -term.axis:
            kept: list[Any] = [slice(None)] * len(x.shape)
            kept[term.axis] = slice(term.start, term.stop)
            x = x[tuple(kept)]
        expected, batch = axes(name), 0
        while expected is not None and len(x.shape) - batch > expected and x.shape[batch] == 1:
            batch += 1
        if name.endswith(HEADS) and len(x.shape) == 3 and x.shape[0] == 1 < self._rows_of(name):
            batch = 1  # its heads are flattened: [1, T, heads * K]
        x = x[(0,) * batch] if batch else x
        if self._end is None or expected is None or not x.shape:
            return x
        seen = slice(self._end - self._depths.get(split(name)[0] or 0, 0))
        return x[:, seen, seen] if name.endswith(".probs") and len(x.shape) == 3 else x[seen]

    def _read(self, name: str, term: Term) -> Array:
        """A copy of what a term takes, scaled."""
        if self._mapped is not None:
            self._mapped.check()
        stored = self._part(name, term)
        is_short = isinstance(stored, BF16Array) or stored.dtype == np.float16
        x = np.array(stored, dtype=np.float32 if is_short else None)
        if self._mapped is not None and DONTNEED is not None:
            self._mapped.madvise(DONTNEED)  # only the copy stays in memory
        if what := flaw(x):
            raise NotFinite(f"{self.path}: tensor {term.source}", what)
        return x if term.scale == 1 else x * x.dtype.type(term.scale)

    def _rows_of(self, name: str) -> int:
        """How many positions a tensor's layer has: as others of it say, else as the prompt has."""
        at = name.partition(".self_attn")[0]
        for sibling, (term, *_) in self.forms.items():
            shape = self.stored[term.source].shape
            if sibling.startswith(f"{at}.") and axes(sibling) == 2 and len(shape) > 1:
                return int(shape[-2])
        return self.rows or 1

    def _rows(self) -> int | None:
        """T as the activations of the main layers have it, if there are any."""
        mtp = mtp_layers(self.forms)
        for name, (term, *_) in self.forms.items():
            shape = self.stored[term.source].shape
            if axes(name) == 2 and split(name)[0] not in mtp and name != "lm_head":
                return int(shape[max(0, len(shape) - 2)]) if shape else None
        return None


def open_recording(path: Path) -> Recording:
    """Open a safetensors file; only its header is read.

    Raises InputError for a file that is not whole, for metadata that is malformed, for a dtype that
    no recording has, and for two tensors that are the same one of ours.
    """
    tensors = read_header(path)
    metadata = _metadata(path)
    mapped = Pages().map(path)
    stored: dict[str, Stored] = {}
    for name, tensor in tensors.items():
        if tensor.dtype not in STORED:
            expected = ", ".join(STORED)
            message = f"has dtype {tensor.dtype}, expected one of {expected}"
            raise InputError(f"{path}: tensor {name} {message}")
        count = math.prod(tensor.shape)
        flat = np.frombuffer(mapped, STORED[tensor.dtype], count, tensor.offset)
        shaped = flat.reshape(tensor.shape)
        stored[name] = BF16Array(shaped) if tensor.dtype == "BF16" else shaped
    tokens, engine = _tokens(path, metadata), _engine(path, metadata)
    return Recording(path, stored, tokens, engine, mapped, metadata)


def _dtype(x: Stored) -> str:
    return "bfloat16" if isinstance(x, BF16Array) else str(x.dtype)


def _least_precise(arrays: Iterable[Stored]) -> str:
    """The engine's dtype where metadata does not say it: of all floats, the least precise."""
    found = {_dtype(x) for x in arrays}
    return next((dtype for dtype in FLOATS if dtype in found), "float32")


def _metadata(path: Path) -> dict[str, str]:
    """The file's metadata, of which read_header has seen only that it is JSON."""
    with path.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        metadata = json.loads(opened.read(length)).get("__metadata__") or {}
    if not isinstance(metadata, dict) or not all(type(v) is str for v in metadata.values()):
        raise InputError(f"{path}: __metadata__ holds what is not text, expected texts by name")
    return metadata


def _tokens(path: Path, metadata: dict[str, str]) -> list[int] | None:
    """The prompt, where the metadata has it."""
    text = metadata.get("tokens")
    if text is None:
        return None
    try:
        tokens = json.loads(text)
    except (ValueError, RecursionError):
        tokens = None
    if not isinstance(tokens, list) or not all(type(t) is int and t >= 0 for t in tokens):
        raise InputError(f"{path}: metadata tokens is {text!r:.80}, expected a JSON list of ids")
    return tokens


def _engine(path: Path, metadata: dict[str, str]) -> str | None:
    """The dtype the engine computed in, where the metadata has it."""
    dtype = metadata.get("dtype")
    if dtype is None or dtype.removeprefix("torch.") in FLOATS:
        return dtype and dtype.removeprefix("torch.")
    expected = ", ".join(FLOATS)
    raise InputError(f"{path}: metadata dtype is {dtype!r:.80}, expected one of {expected}")
