"""What another engine computed: a safetensors file, read a tensor at a time by our names.

Our tensors are made of those that the engine wrote: fused, summed or unscaled ones. Metadata may
say what they are from: `tokens`, a JSON list of the prompt's ids, and `dtype`, what the engine
computed in.
Checked by: tests/parity/test_engine_tensors.py
"""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray

from minstep.config import Config
from minstep.errors import InputError, shown
from minstep.fast.bf16 import BF16Array
from minstep.fast.pages import DONTNEED, Map, Pages
from minstep.keys import MAX_INTEGER
from minstep.parity.names import (
    HEADS,
    axes,
    in_model_order,
    is_known,
    is_weight,
    is_wrapper,
    model_order,
    mtp_layers,
    places,
    sums_experts,
)
from minstep.store.header import map_file, open_header
from minstep.store.json_file import strict_json
from minstep.store.stages import split
from minstep.tap import Array
from minstep.validation import NotFinite, flaw

STORED = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "BOOL": "?"}
STORED |= {f"{kind.upper()}{n * 8}": f"<{kind}{n}" for kind in "iu" for n in (1, 2, 4, 8)}
MOST_EXPERTS = 4096  # of a layer, far above any model: where nothing says how many there are
FLOATS = ("bfloat16", "float16", "float32", "float64")  # the least precise first

PER_EXPERT = ("moe.gate_proj", "moe.up_proj", "moe.down_proj")  # one expert's, or those of all

PROJECTIONS = ("q_proj", "k_proj", "v_proj")  # in the order in which they are fused
Shapes = Mapping[str, tuple[int, ...]]
Stored = NDArray[np.generic] | BF16Array


class Term(NamedTuple):
    """A stored tensor, or entries `start` to `stop` along `axis` of it, times `scale`."""

    source: str
    scale: float = 1.0
    start: int = 0
    stop: int | None = None
    axis: int = -1


Form = tuple[Term, ...]  # one of our tensors is the sum of its terms
Widths = Mapping[int, int]  # layer -> columns of its keys, and of its values


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
        self.forms = _stored_forms(path, {name: x.shape for name, x in stored.items()})
        self.engine_dtype = engine_dtype or _least_precise(stored.values())
        self.rows = len(tokens) if tokens else self._rows()
        self._layer_rows: dict[int, int] | None = None
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
            with np.errstate(over="ignore"):
                x = self._finite(self.source(name), x + y)
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

    def check_file(self) -> None:
        """Raise InputError where the file has become shorter since it was opened."""
        if self._mapped is not None:
            self._mapped.check()

    def _check_shape(self, what: str, one: tuple[int, ...], other: tuple[int, ...]) -> None:
        if one != other:
            message = f"has parts of shape {list(one)} and {list(other)}, expected the same"
            raise InputError(f"{self.path}: tensor {shown(what)} {message}")

    def floats(self, name: str, dtype: DTypeLike) -> Array:
        """The tensor in `dtype`. Raises InputError as `array` does, and for what does not fit."""
        with np.errstate(over="ignore"):
            x = self.array(name).astype(dtype)
        if what := flaw(x):
            message = f"{what} as {np.dtype(dtype)}, expected numbers that it can hold"
            raise InputError(f"{self.path}: tensor {shown(self.source(name))} {message}")
        return x

    def _finite(self, source: str, x: Array) -> Array:
        if what := flaw(x):
            raise NotFinite(f"{self.path}: tensor {shown(source)}", what)
        return x

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
        self.check_file()
        stored = self._part(name, term)
        is_short = isinstance(stored, BF16Array) or stored.dtype == np.float16
        x = np.array(stored, dtype=np.float32 if is_short else None)
        if self._mapped is not None and DONTNEED is not None:
            self._mapped.madvise(DONTNEED)  # only the copy stays in memory
        self._finite(term.source, x)
        if name.endswith(".moe.ids") and x.dtype.kind == "u":
            x = x.astype(np.int64)
        if term.scale == 1:
            return x
        with np.errstate(over="ignore"):
            return self._finite(term.source, x * x.dtype.type(term.scale))

    def _rows_of(self, name: str) -> int:
        """How many positions a tensor's layer has: as others of it say, else as the prompt has."""
        if self._layer_rows is None:
            self._layer_rows = {}
            for sibling, (term, *_) in self.forms.items():
                (layer, part), shape = split(sibling), self.stored[term.source].shape
                if layer is not None and part and axes(sibling) == 2 and len(shape) > 1:
                    self._layer_rows.setdefault(layer, int(shape[-2]))
        layer = split(name)[0]
        return self._layer_rows.get(-1 if layer is None else layer, self.rows or 1)

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
    header = open_header(path)
    mapped = map_file(path, Pages(), header)
    stored: dict[str, Stored] = {}
    for name, tensor in header.tensors.items():
        if tensor.dtype not in STORED:
            expected = ", ".join(STORED)
            message = f"has dtype {tensor.dtype}, expected one of {expected}"
            raise InputError(f"{path}: tensor {shown(name)} {message}")
        count = math.prod(tensor.shape)
        flat = np.frombuffer(mapped, STORED[tensor.dtype], count, tensor.offset)
        shaped = flat.reshape(tensor.shape)
        stored[name] = BF16Array(shaped) if tensor.dtype == "BF16" else shaped
    tokens, engine = _tokens(path, header.metadata), _engine(path, header.metadata)
    return Recording(path, stored, tokens, engine, mapped, header.metadata)


def check_forms(
    recordings: Sequence[Recording],
    config: Config | None = None,
    layers: Collection[int] | None = None,
) -> None:
    """Raise InputError for a tensor that cannot be what its name says; sizes are not looked at.

    A tensor of ours has as many axes as the model's, none of size 0, and holds floats. What may be
    absent: batch axes of size 1 in front, the axis of heads, and in a recording of one token that
    of positions. Expert ids are integers of any dtype: in each row different ones, of experts that
    there are, by the config, else by the logits in any of the recordings, which are of one model.
    `layers`: look at these, at what they take as input, and at what is outside the layers alone.
    Names that are not ours may hold anything.
    Checked by: tests/parity/test_hostile_recordings.py
    """
    experts = _experts(recordings, config)
    for recording in recordings:
        for name, (term, *_) in recording.forms.items():
            layer, part = split(name)
            is_input = layer is not None and part == "" and layer + 1 in (layers or ())
            if layers is None or layer is None or layer in layers or is_input:
                stored, where = recording.stored[term.source], shown(term.source)
                wrong = _wrong(recording, name, stored, experts.get(layer or 0, MOST_EXPERTS))
                if wrong:
                    raise InputError(f"{recording.path}: tensor {where} {wrong}")


def _experts(recordings: Iterable[Recording], config: Config | None) -> dict[int, int]:
    """How many experts each layer has, as far as anything tells."""
    specs = enumerate((*config.layers, *config.mtp_layers)) if config else ()
    found = {n: spec.moe.experts for n, spec in specs if spec.moe}
    known = {*found}
    for recording in recordings:
        for name, (term, *_) in recording.forms.items():
            layer, part = split(name)
            shape = recording.stored[term.source].shape
            is_gate = part == "moe.gate" and shape and math.prod(shape[:-2]) == 1
            if layer is not None and layer not in known and is_gate:
                found[layer] = max(found.get(layer, 0), shape[-1])
    return found


def _wrong(recording: Recording, name: str, stored: Stored, experts: int) -> str | None:
    """What is wrong with the form of a tensor, and what was expected; None where nothing is."""
    if not is_known(name):
        return None
    expected = axes(name)  # None for a weight
    shape, dtype, part = stored.shape, _dtype(stored), split(name)[1]
    is_ids = part == "moe.ids"
    of_experts = f"expected 0 to {experts - 1}, ids of experts as integers"
    if is_ids and not dtype.startswith(("int", "uint")):
        return f"has dtype {dtype}, {of_experts}"
    if not is_ids and dtype not in FLOATS:
        return f"has dtype {dtype}, expected floats"
    if 0 in shape:
        return f"has shape {list(shape)}, expected no axis of size 0"
    if expected is None:
        good = 1 <= len(shape) <= 3
        return None if good else f"has shape {list(shape)}, expected 1 to 3 axes of a weight"
    if part not in PER_EXPERT:
        count = len(shape)
        while count > expected and shape[-count] == 1:
            count -= 1
        allowed = {expected, 2} if name.endswith(HEADS) else {expected}
        if expected == 2 and len(recording.tokens or ()) == 1:
            allowed.add(1)
        if count not in allowed:
            return f"has shape {list(shape)}, expected {expected} axes"
    if part == "moe.gate" and shape[-1] > MOST_EXPERTS:
        return f"has shape {list(shape)}, expected logits of at most {MOST_EXPERTS} experts"
    if is_ids:
        recording.check_file()
        x = np.asarray(stored)
        if x.min() < 0 or x.max() >= experts:
            return f"holds {x.min()} to {x.max()}, {of_experts}"
        ordered = np.sort(x, axis=-1)
        if (ordered[..., 1:] == ordered[..., :-1]).any():
            return f"has an expert twice in a row, {of_experts}"
    return None


def _dtype(x: Stored) -> str:
    return "bfloat16" if isinstance(x, BF16Array) else x.dtype.name


def _least_precise(arrays: Iterable[Stored]) -> str:
    """The engine's dtype where metadata does not say it: of all floats, the least precise."""
    found = {_dtype(x) for x in arrays}
    return next((dtype for dtype in FLOATS if dtype in found), "float32")


def _tokens(path: Path, metadata: dict[str, str]) -> list[int] | None:
    """The prompt, where the metadata has it."""
    text = metadata.get("tokens")
    if text is None:
        return None
    try:
        tokens = strict_json(text)
    except (ValueError, RecursionError):
        tokens = None
    is_list = isinstance(tokens, list)
    if not is_list or not all(type(t) is int and 0 <= t <= MAX_INTEGER for t in tokens):
        raise InputError(f"{path}: metadata tokens is {text!r:.80}, expected a JSON list of ids")
    return tokens


def _engine(path: Path, metadata: dict[str, str]) -> str | None:
    """The dtype the engine computed in, where the metadata has it."""
    dtype = metadata.get("dtype")
    if dtype is None or dtype.removeprefix("torch.") in FLOATS:
        return dtype and dtype.removeprefix("torch.")
    expected = ", ".join(FLOATS)
    raise InputError(f"{path}: metadata dtype is {dtype!r:.80}, expected one of {expected}")


def _stored_forms(path: Path | str, shapes: Shapes) -> dict[str, Form]:
    """Our names of a file's tensors. Raises InputError where two of them have the same one.

    `shapes` are by the file's names. Of a module and its last part, which are equal, the part is
    taken. The halves of a fused gate and up projection are two tensors of ours.
    """
    forms: dict[str, Form] = {}
    moe_is_sum = sums_experts(shapes)
    for source in sorted(shapes, key=is_wrapper):
        for name, part, of in places(source, moe_is_sum):
            if name in forms and is_wrapper(source):
                continue
            if name in forms:
                both = f"{shown(forms[name][0].source)} and {shown(source)}"
                message = f"are both {shown(name)}, expected one of them"
                raise InputError(f"{path}: tensors {both} {message}")
            term, axis = Term(source), outputs(name)
            if of > 1 and len(shapes[source]) >= -axis:
                size, rest = divmod(shapes[source][axis], of)
                if rest:
                    message = f"has shape {list(shapes[source])}, expected {of} equal parts"
                    raise InputError(f"{path}: tensor {shown(source)} {message}")
                term = Term(source, start=part * size, stop=(part + 1) * size, axis=axis)
            forms[name] = (term,)
    return forms


def derived(
    name: str, forms: Mapping[str, Form], factor: float | None, widths: Widths
) -> Form | None:
    """How `name` is made of tensors that `forms` has; None where it cannot be.

    `factor`: what the routed experts are scaled by, if known.
    """
    layer, part = split(name)
    if name in forms or layer is None:
        return forms.get(name)
    unscaled = forms.get(f"{name}.unscaled")
    if part in ("moe", "moe.weights") and unscaled and factor:
        return tuple(term._replace(scale=factor) for term in unscaled)
    if part == "mlp":
        routed = derived(f"model.layers.{layer}.moe", forms, factor, widths)
        shared = forms.get(f"model.layers.{layer}.share_expert")
        return routed + shared if routed and shared else None
    proj = part.removeprefix("self_attn.").removesuffix(".weight")
    if proj in PROJECTIONS and layer in widths:
        fused, k = forms.get(name.replace(proj, "qkv_proj")), widths[layer]
        n = PROJECTIONS.index(proj)
        start, stop = (0, -2 * k, -k)[n], (-2 * k, -k, None)[n]  # it may have other query heads
        return fused and (fused[0]._replace(start=start, stop=stop, axis=outputs(name)),)
    return None


def outputs(name: str) -> int:
    """The axis of a projection's outputs: of a weight [..., O, I], or of what it computed."""
    return -2 if name.endswith(".weight") else -1


def config_widths(config: Config) -> Widths:
    """The widths of every layer by the config."""
    specs = enumerate((*config.layers, *config.mtp_layers))
    return {n: spec.groups * spec.head_dim for n, spec in specs}


def sibling_widths(fused: Shapes, whole: Shapes) -> Widths:
    """The widths of layers whose projection is fused in one recording and has parts in another.

    Shapes are by our names.
    """
    widths: dict[int, int] = {}
    for name, shape in fused.items():
        layer, part = split(name)
        if layer is None or not part.startswith("self_attn.qkv_proj") or len(shape) < 2:
            continue
        axis = outputs(name)
        parts = {proj: whole.get(name.replace("qkv_proj", proj), ()) for proj in PROJECTIONS}
        sizes = {proj: found[axis] for proj, found in parts.items() if len(found) > 1}
        if "q_proj" in sizes:
            widths[layer] = (shape[axis] - sizes["q_proj"]) // 2
        elif sizes:
            widths[layer] = min(sizes.values())
    return widths


def align(one: Recording, other: Recording, config: Config | None = None) -> list[str]:
    """Our names of what can be compared, in the model's order.

    A tensor is, where one recording holds it and the other at least what it is made of: both learn
    how. Sizes and the routed scaling factor are the config's, else those of the other recording.
    """
    shapes, factor = (one.shapes(), other.shapes()), _factor(one, other, config)
    for r, (own, wanted) in ((one, shapes), (other, shapes[::-1])):
        widths = config_widths(config) if config else sibling_widths(own, wanted)
        forms = {name: derived(name, r.forms, factor, widths) for name in wanted}
        r.forms |= {name: form for name, form in forms.items() if form}
    common = one.forms.keys() & other.forms.keys() & (shapes[0].keys() | shapes[1].keys())
    mtp = mtp_layers((*one.forms, *other.forms), config)
    return sorted(common, key=lambda name: model_order(name, mtp))


def _factor(one: Recording, other: Recording, config: Config | None) -> float | None:
    """The routed scaling factor: the config's, else what the weights of a token's experts sum to.

    Nothing is read unless one of the two has what is not scaled yet.
    """
    for spec in config.layers if config else ():
        if spec.moe:
            return spec.moe.scaling_factor
    if not any(name.endswith(".unscaled") for name in (*one.forms, *other.forms)):
        return None
    for r in (one, other):
        for name in r.forms:
            if split(name)[1] == "moe.weights" and (x := r.if_any(name, 2)) is not None:
                return float(x.sum(axis=-1, dtype=np.float64).mean())
    return None
