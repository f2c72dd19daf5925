"""What a config or a checkpoint holds: layers, shapes, dtypes, bytes and parameters by part."""

import math
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

from minstep.config import Config
from minstep.errors import shown
from minstep.store.checkpoint import HUB_DTYPES, Checkpoint, open_checkpoint
from minstep.store.config_file import load_config
from minstep.store.header import BYTES
from minstep.store.stages import layer_number, part_of
from minstep.weights import SCALES, Shape, blocks, tensor_shapes

MODULES = {  # the module that a part is, where it is one
    "attention": "self_attn",
    "shared experts": "share_expert",
    "dense MLPs": "mlp",
    "embedding": "embed_tokens",
    "output matrix": "lm_head",
}


def inspect(path: Path) -> dict[str, Any]:
    """Describe the folder or config.json at `path`; only headers are read.

    `total_parameters` counts every tensor, `active_parameters_per_token` what one token passes
    through in the main layers and the final norm: A of E experts, without embedding, output
    matrix and MTP, which is how the report counts its 11B. Of tensors that are not there, dtypes
    and bytes are what the config gives; `missing` counts those in files that the index names.
    Raises InputError as open_checkpoint does.
    """
    has_weights = os.path.isdir(path) and any(path.glob("*.safetensors*"))
    config, absent, tensors = load_config(path), dict[str, Path](), expected(load_config(path))
    damaged: list[str] = []
    if has_weights:
        checkpoint = open_checkpoint(path)
        config, absent = checkpoint.config, checkpoint.absent
        tensors, damaged = checked(checkpoint), list(checkpoint.damaged.values())
    sizes = {n: 0 if n.endswith(SCALES) else math.prod(t.shape) for n, t in tensors.items()}
    parts: dict[str, dict[str, int]] = {}
    for name, size in sizes.items():
        part = parts.setdefault(_part(name, config), {"tensors": 0, "parameters": 0, "bytes": 0})
        _count(part, size, tensors[name])
    missing: dict[str, Any] = {"tensors": 0, "parameters": 0, "bytes": 0}
    for name in [name for name in tensors if name in absent]:
        _count(missing, sizes[name], tensors[name])
    missing["files"] = sorted({file.name for file in absent.values() if file != path})
    total = sum(sizes.values())
    mtp = sum(size for name, size in sizes.items() if layer_number(name) >= len(config.layers))
    return {
        "path": str(path),
        "has_weights": has_weights,
        "total_parameters": total,
        "parameters_without_mtp": total - mtp,
        "active_parameters_per_token": _active(sizes, config),
        "bytes": sum(part["bytes"] for part in parts.values()),
        "parts": parts,
        "missing": missing,
        "damaged": damaged,
        "layers": [spec._asdict() for spec in config.layers + config.mtp_layers],
        "tensors": {n: {"shape": list(t.shape), "dtype": t.dtype} for n, t in tensors.items()},
    }


class Stored(NamedTuple):
    """A tensor as a file holds it, or is expected to: dtype code and shape."""

    dtype: str
    shape: Shape

    @property
    def nbytes(self) -> int:
        """Bytes it takes in a file."""
        return math.prod(self.shape) * BYTES[self.dtype]


def expected(
    config: Config, own_mtp_heads: bool = True, indexed: Collection[str] | None = None
) -> dict[str, Stored]:
    """Every tensor of a checkpoint with this config, FP8 scales too, in the model's order.

    Where the config leaves the dtype open, it is what the released checkpoints have. `indexed`,
    if given, are the tensors that an index names: a weight without scales among them is not FP8.
    """
    tensors: dict[str, Stored] = {}
    plain, quantization = HUB_DTYPES.get(config.torch_dtype or "", "BF16"), config.quantization
    for name, shape in tensor_shapes(config, own_mtp_heads).items():
        tensors[name] = Stored("F32" if name.endswith("router_bias") else plain, shape)
        scales = f"{name}{SCALES}"
        if quantization and quantization.covers(name) and (indexed is None or scales in indexed):
            tensors[name] = Stored("F8_E4M3", shape)
            tensors[scales] = Stored("F32", blocks(shape, quantization[:2]))
    return tensors


def checked(checkpoint: Checkpoint) -> dict[str, Stored]:
    """Every tensor of the model as it is in its file; where that is missing, as expected.

    Raises InputError for a tensor that does not fit the config, and for one that no file has.
    """
    config, own, absent = checkpoint.config, checkpoint.has_own_heads(), checkpoint.absent
    if not absent:
        checkpoint.weights()
    for name, shape in tensor_shapes(config, own).items():
        if not absent.keys() & {name, f"{name}{SCALES}"}:
            checkpoint.stored(name, shape)
    found = {n: Stored(t.dtype, t.shape) for n, t in checkpoint.tensors.items()}
    return {n: found.get(n, t) for n, t in expected(config, own, {*found, *absent}).items()}


def _count(part: dict[str, int], parameters: int, tensor: Stored) -> None:
    part["tensors"] += 1
    part["parameters"] += parameters
    part["bytes"] += tensor.nbytes


def _part(name: str, config: Config) -> str:
    """The part of the model that a tensor is counted in."""
    if layer_number(name) >= len(config.layers):
        return "MTP layers"
    if name.endswith(SCALES):
        return "FP8 scales"
    part = part_of(name)
    return MODULES.get(part, part)


def _active(sizes: dict[str, int], config: Config) -> int:
    """Parameters that one token is multiplied with, without embedding, head and MTP."""
    active = 0
    for name, size in sizes.items():
        part = _part(name, config)
        if part == "routed experts":
            moe = config.layers[layer_number(name)].moe
            assert moe
            active += size // moe.experts * moe.top_k
        elif part not in ("MTP layers", "embed_tokens", "lm_head"):
            active += size
    return active


def table(report: dict[str, Any]) -> str:
    """The report as text for a terminal: parts, then a line for each layer."""
    lines = [shown(report["path"]), "", f"{'part':16}{'tensors':>8}{'parameters':>18}{'bytes':>18}"]
    for name, part in report["parts"].items():
        counts = f"{part['tensors']:>8}{part['parameters']:>18,}{part['bytes']:>18,}"
        lines.append(f"{name:16}{counts}")
    lines.append(f"{'all':16}{'':8}{report['total_parameters']:>18,}{report['bytes']:>18,}")
    if report["missing"]["tensors"]:
        gone = report["missing"]
        counts = f"{gone['tensors']:>8}{gone['parameters']:>18,}{gone['bytes']:>18,}"
        lines.append(f"{'missing':16}{counts}  in files that are not there, by the config")
    lines += [f"damaged: {why}" for why in report["damaged"]]
    lines.append(f"{'without MTP':24}{report['parameters_without_mtp']:>18,}")
    lines.append(f"{'active per token':24}{report['active_parameters_per_token']:>18,}")
    heads = "layer                  kind               heads kv  K   window theta     rotary scaled"
    lines += ["", f"{heads}  MLP"]
    for layer in report["layers"]:
        rope, moe = layer["rope"], layer["moe"]
        mlp = f"{moe.top_k} of {moe.experts} x {moe.width}" if moe else str(layer["mlp_width"])
        mlp += f" + {moe.shared_width}" if moe else ""
        limits = [layer["swiglu_limit"] if moe else None, layer["swiglu_limit_shared"]]
        clamp = f", clamps {limits}" if any(limits) else ""
        lines.append(
            f"{layer['name']:23}{layer['kind']:19}{layer['heads']:<6}{layer['groups']:<4}"
            f"{layer['head_dim']:<4}{layer['window'] or '-':<7}{rope.theta:<10g}"
            f"{rope.rotary_dim:<7}{'yes' if rope.scaling else 'no':<8}{mlp}{clamp}"
        )
    lines += ["", "tensor shapes and dtypes"]
    lines += [f"  {shown(n)} {t['dtype']} {t['shape']}" for n, t in report["tensors"].items()]
    return "\n".join(lines)
