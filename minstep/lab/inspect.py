"""What a config or a checkpoint holds: layers, shapes, dtypes, bytes and parameters by part."""

import math
import re
from pathlib import Path
from typing import Any

from minstep.checkpoint import HUB_DTYPES, open_checkpoint
from minstep.config import Config, load_config
from minstep.header import BYTES
from minstep.weights import tensor_shapes


def inspect(path: Path) -> dict[str, Any]:
    """Describe the folder or config.json at `path`; only headers are read.

    `total_parameters` counts every tensor, `active_parameters_per_token` what one token passes
    through in the main layers and the final norm: A of E experts, without embedding, output
    matrix and MTP, which is how the report counts its 11B. Without weight files, dtypes and bytes
    are what the config's torch_dtype gives. Raises InputError as open_checkpoint does.
    """
    config = load_config(path)
    shapes = tensor_shapes(config)
    stored = HUB_DTYPES.get(config.torch_dtype or "", "BF16")
    dtypes = {n: "F32" if n.endswith("router_bias") else stored for n in shapes}
    has_weights = path.is_dir() and any(path.glob("*.safetensors*"))
    if has_weights:
        checkpoint = open_checkpoint(path)
        checkpoint.weights()  # every shape and dtype is checked
        shapes = {n: s for n, s in shapes.items() if n in checkpoint.tensors}
        dtypes = {n: checkpoint.tensors[n].dtype for n in shapes}
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    parts: dict[str, dict[str, int]] = {}
    for name, size in sizes.items():
        part = parts.setdefault(_part(name, config), {"tensors": 0, "parameters": 0, "bytes": 0})
        part["tensors"] += 1
        part["parameters"] += size
        part["bytes"] += size * BYTES[dtypes[name]]
    total = sum(sizes.values())
    mtp = sum(size for name, size in sizes.items() if _layer(name) >= len(config.layers))
    return {
        "path": str(path),
        "has_weights": has_weights,
        "total_parameters": total,
        "parameters_without_mtp": total - mtp,
        "active_parameters_per_token": _active(sizes, config),
        "bytes": sum(part["bytes"] for part in parts.values()),
        "parts": parts,
        "layers": [spec._asdict() for spec in config.layers + config.mtp_layers],
        "tensors": {n: {"shape": list(s), "dtype": dtypes[n]} for n, s in shapes.items()},
    }


def _layer(name: str) -> int:
    """The layer a tensor belongs to; -1 outside the layers."""
    match = re.match(r"model\.layers\.(\d+)\.", name)
    return int(match[1]) if match else -1


def _part(name: str, config: Config) -> str:
    """The part of the model that a tensor is counted in."""
    if _layer(name) >= len(config.layers):
        return "MTP layers"
    if ".moe." in name:
        return "router" if name.endswith(("moe.gate.weight", "router_bias")) else "routed experts"
    for piece in ("self_attn", "share_expert", "mlp", "embed_tokens", "lm_head"):
        if piece in name:
            return piece
    return "norms"


def _active(sizes: dict[str, int], config: Config) -> int:
    """Parameters that one token is multiplied with, without embedding, head and MTP."""
    active = 0
    for name, size in sizes.items():
        part = _part(name, config)
        if part == "routed experts":
            moe = config.layers[_layer(name)].moe
            assert moe
            active += size // moe.experts * moe.top_k
        elif part not in ("MTP layers", "embed_tokens", "lm_head"):
            active += size
    return active


def table(report: dict[str, Any]) -> str:
    """The report as text for a terminal: parts, then a line for each layer."""
    lines = [report["path"], "", f"{'part':16}{'tensors':>8}{'parameters':>18}{'bytes':>18}"]
    for name, part in report["parts"].items():
        counts = f"{part['tensors']:>8}{part['parameters']:>18,}{part['bytes']:>18,}"
        lines.append(f"{name:16}{counts}")
    lines.append(f"{'all':16}{'':8}{report['total_parameters']:>18,}{report['bytes']:>18,}")
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
    lines += [f"  {n} {t['dtype']} {t['shape']}" for n, t in report["tensors"].items()]
    return "\n".join(lines)
