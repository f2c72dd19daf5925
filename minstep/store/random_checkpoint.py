"""Write a random checkpoint in hub layout, some rows at a time, in float32, bfloat16 or FP8."""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from minstep.config import Config, Quantization, parse_quantization
from minstep.errors import InputError
from minstep.fast.bf16 import to_bf16
from minstep.fast.fp8 import to_fp8
from minstep.store.files import read_file
from minstep.store.header import BYTES
from minstep.store.output import MADE_BY, atomic_folder, laid_out
from minstep.weights import SCALES, Shape, blocks, random_rows, tensor_shapes

# As the released FP8 checkpoint has it, but for the list of what stays bfloat16.
FP8: dict[str, Any] = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
FP8 |= {"weight_block_size": [128, 128]}
MOST_TOKENIZER = 1 << 28  # bytes
AT_ONCE = 1 << 26  # elements drawn at a time: 256 MB of float32
NEVER = np.float32(-2)  # a bias with which no sigmoid score is among the best


class Form(NamedTuple):
    """How a checkpoint is written.

    `dtype`: float32, bfloat16, or fp8: routed experts in 8 bits with the blocks of the config's own
    quantization_config or 128 x 128, the rest bfloat16, as in the released FP8 checkpoint.
    `holds`: which tensors are drawn; the others are holes in the file, which read as zeros and take
    no disk. `experts`: only the first so many are drawn, and no router chooses the others.
    """

    dtype: str = "float32"
    shards: int = 1
    holds: Callable[[str], bool] = lambda name: True
    experts: int | None = None

    def rows(self, name: str, shape: Shape) -> int:
        """How many rows of a tensor are drawn."""
        rows = shape[0] if self.holds(name) else 0
        return rows if self.experts is None or len(shape) < 3 else min(rows, self.experts)


def save_random(
    config_json: dict[str, Any],
    config: Config,
    rng: np.random.Generator,
    out: Path,
    form: Form = Form(),  # noqa: B008  (it never changes)
    tokenizer: Path | None = None,
) -> None:
    """Write a random checkpoint in hub layout: config.json, safetensors, an index when sharded.

    The folder appears whole or not at all. Raises InputError when `out` cannot be written or there
    are more shards than tensors.
    """
    kept = {key: value for key, value in config_json.items() if key != "quantization_config"}
    kept["torch_dtype"] = "float32" if form.dtype == "float32" else "bfloat16"
    if form.dtype == "fp8":
        default = FP8 | {"modules_to_not_convert": _unconverted(config)}
        kept["quantization_config"] = config_json.get("quantization_config") or default
    quantization = parse_quantization(kept, "config.json")
    shapes, shards = tensor_shapes(config), form.shards
    if not 1 <= shards <= len(shapes):
        raise InputError(f"--shards {shards}: expected 1 to {len(shapes)}, the number of tensors")
    names = list(shapes)
    ends = _shard_ends([math.prod(shape) for shape in shapes.values()], shards)
    weight_map: dict[str, str] = {}
    total = 0
    with atomic_folder(out) as folder:
        for n, (start, end) in enumerate(zip([0, *ends], ends, strict=False), start=1):
            tag = f"-{n:05}-of-{shards:05}" if shards > 1 else ""
            file = f"model{tag}.safetensors"
            of_shard = {name: shapes[name] for name in names[start:end]}
            written = _write_shard(folder / file, of_shard, form, quantization, rng)
            total += sum(written.values())
            weight_map |= dict.fromkeys(written, file)
        if shards > 1:
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            _write_json(folder / "model.safetensors.index.json", index)
        _write_json(folder / "config.json", kept)
        if tokenizer is not None:
            (folder / "tokenizer.json").write_bytes(read_file(tokenizer, MOST_TOKENIZER))


def needed_space(config: Config, form: Form) -> int:
    """The most bytes of disk that save_random takes, without the headers."""
    shapes = tensor_shapes(config).items()
    drawn = sum(form.rows(name, shape) * math.prod(shape[1:]) for name, shape in shapes)
    return drawn * (4 if form.dtype == "float32" else 2)


def _shard_ends(sizes: list[int], shards: int) -> list[int]:
    """Where each shard ends: about equal sizes, at least one tensor in each."""
    reached = np.cumsum(sizes)
    ends: list[int] = []
    for n in range(1, shards):
        wanted = int(np.searchsorted(reached, reached[-1] * n / shards)) + 1
        first = ends[-1] + 1 if ends else 1
        ends.append(min(max(wanted, first), len(sizes) - (shards - n)))
    return [*ends, len(sizes)]


def _unconverted(config: Config) -> list[str]:
    """The modules that stay bfloat16 beside FP8 experts."""
    names = []
    for spec in config.layers + config.mtp_layers:
        parts = ("self_attn", "moe.gate", "share_expert") if spec.moe else ("self_attn", "mlp")
        names += [f"{spec.name}.{part}" for part in parts]
    return [*names, *(f"{spec.name}.eh_proj" for spec in config.mtp_layers)]


def _write_shard(
    file: Path,
    shapes: dict[str, Shape],
    form: Form,
    quantization: Quantization | None,
    rng: np.random.Generator,
) -> dict[str, int]:
    """Write one safetensors file, some rows at a time; returns the bytes of each tensor.

    The package's own writer wants a whole shard in memory. router_bias stays float32.
    """
    stored: dict[str, tuple[str, Shape]] = {}  # dtype code, shape
    for name, shape in shapes.items():
        is_wide = form.dtype == "float32" or name.endswith("router_bias")
        stored[name] = ("F32" if is_wide else "BF16", shape)
        if quantization and quantization.covers(name):
            stored[name] = ("F8_E4M3", shape)
            stored[f"{name}{SCALES}"] = ("F32", blocks(shape, quantization[:2]))
    start, places = laid_out(stored, {"format": "pt", "made_by": MADE_BY})
    sizes = {name: math.prod(shape) * BYTES[dtype] for name, (dtype, shape) in stored.items()}
    with file.open("wb") as opened:
        opened.write(start)
        opened.truncate(len(start) + sum(sizes.values()))
        for name, shape in shapes.items():
            block = quantization[:2] if quantization and f"{name}{SCALES}" in stored else None
            for drawn in _drawn(name, shape, form, block, rng):
                x: NDArray[Any] = drawn
                if block:
                    x, scales = to_fp8(drawn, block)
                    places[f"{name}{SCALES}"] = _put(opened, places[f"{name}{SCALES}"], scales)
                elif stored[name][0] == "BF16":
                    x = to_bf16(drawn)
                places[name] = _put(opened, places[name], x)
    return sizes


def _drawn(
    name: str,
    shape: Shape,
    form: Form,
    block: tuple[int, int] | None,
    rng: np.random.Generator,
) -> Iterator[NDArray[np.float32]]:
    """The rows of a tensor that are not holes, AT_ONCE at most and whole blocks at a time."""
    end = form.rows(name, shape)
    step = max(1, AT_ONCE // math.prod(shape[1:]))
    if block and len(shape) == 2:
        step = max(block[0], step - step % block[0])
    for start in range(0, end, step):
        x = random_rows(name, shape, min(step, end - start), rng)
        if name.endswith("router_bias") and form.experts is not None:
            x[form.experts :] = NEVER
        yield x


def _put(opened: BinaryIO, place: int, x: NDArray[Any]) -> int:
    """Write an array at a place in a file; returns where it ends."""
    opened.seek(place)
    opened.write(x.tobytes())
    return place + x.nbytes


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
