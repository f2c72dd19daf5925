"""Recordings for tests: a trace as other engines would have written it."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from minstep.fast.bf16 import BF16Array, to_bf16
from minstep.parity.trace import Trace

INTEGERS = [f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)]
CODES = {"float64": "F64", "float32": "F32", "float16": "F16", "bool": "BOOL"}
CODES |= {name: f"{name[0].upper()}{name.strip('uint')}" for name in INTEGERS}


def save(trace: dict[str, Any], path: Path, **metadata: Any) -> Path:
    """Write arrays, or BF16Arrays, as a safetensors file, in their order; lists become JSON."""
    header: dict[str, Any] = {
        "__metadata__": {
            key: value if isinstance(value, str) else json.dumps(value)
            for key, value in metadata.items()
        }
    }
    data = b""
    for name, x in trace.items():
        bits = x.bits if isinstance(x, BF16Array) else x
        code = "BF16" if isinstance(x, BF16Array) else CODES[str(x.dtype)]
        end = len(data) + bits.nbytes
        header[name] = {"dtype": code, "shape": list(x.shape), "data_offsets": [len(data), end]}
        data += np.ascontiguousarray(bits).tobytes()
    text = json.dumps(header).encode()
    path.unlink(missing_ok=True)  # a file that is cut to be written again waits for the disk
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def rounded(x: Any, dtype: str) -> Any:
    """Floats in a 16-bit dtype; whole numbers as they are."""
    if x.dtype.kind != "f":
        return x
    return BF16Array(to_bf16(x)) if dtype == "bfloat16" else x.astype(dtype)


def layers_of(trace: Trace, part: str) -> list[str]:
    """The names of the layers that have a tensor `part`."""
    return [name.removesuffix(f".{part}") for name in trace if name.endswith(f".{part}")]


def as_transformers(trace: Trace, factor: float, rng: np.random.Generator) -> Trace:
    """What hooks on every module of transformers' native model see, outputs numbered.

    It has no MTP layers, and no taps between modules. Chosen experts are in no order.
    """
    mtp = tuple(f"{name}." for name in layers_of(trace, "eh_proj"))
    theirs = {name: x for name, x in trace.items() if not f"{name}.".startswith(mtp)}
    for at in layers_of(theirs, "moe"):
        order = rng.permuted(np.indices(theirs[f"{at}.moe.ids"].shape)[1], axis=-1)
        ids, weights = theirs.pop(f"{at}.moe.ids"), theirs.pop(f"{at}.moe.weights")
        theirs[f"{at}.mlp.gate.0"] = theirs.pop(f"{at}.moe.gate")
        theirs[f"{at}.mlp.gate.1"] = np.take_along_axis(weights, order, -1) / np.float32(factor)
        theirs[f"{at}.mlp.gate.2"] = np.take_along_axis(ids, order, -1)
        routed, shared = theirs.pop(f"{at}.moe"), theirs.pop(f"{at}.share_expert")
        theirs[f"{at}.mlp.experts"] = routed / np.float32(factor)
        theirs[f"{at}.mlp.shared_experts"] = shared
        theirs[f"{at}.mlp"] = routed + shared
    for at in layers_of(theirs, "self_attn.o_proj"):
        theirs[f"{at}.self_attn.0"] = theirs[f"{at}.self_attn.o_proj"]
    absent = ("_rope", ".margin", ".probs")
    return {
        name.replace("model.", "model.language_model.", 1): x[None]
        for name, x in theirs.items()
        if not name.endswith(absent)
    }


def as_vllm(trace: Trace) -> Trace:
    """What hooks on every module of vLLM's model see: fused projections, heads flattened."""
    theirs = {n: x for n, x in trace.items() if not n.endswith((".ids", ".weights", ".margin"))}
    for at in layers_of(trace, "self_attn.q_proj"):
        parts = [theirs.pop(f"{at}.self_attn.{proj}_proj") for proj in "qkv"]
        theirs[f"{at}.self_attn.qkv_proj"] = np.concatenate(parts, axis=-1)
        for name in ("q_norm", "k_norm", "q_rope", "k_rope"):
            x = theirs[f"{at}.self_attn.{name}"]
            theirs[f"{at}.self_attn.{name}"] = x.reshape(len(x), -1)
    for at in layers_of(trace, "moe"):
        theirs[f"{at}.moe.share_expert"] = theirs.pop(f"{at}.share_expert")
        theirs[f"{at}.moe"] = trace[f"{at}.moe"] + trace[f"{at}.share_expert"]
    for at in layers_of(trace, "eh_proj"):
        head = f"{at}.transformer.shared_head"
        theirs[f"{at}.shared_head"] = theirs.pop(f"{head}.norm")
        theirs[f"{at}.shared_head.head"] = theirs.pop(f"{head}.output")
        for name in [n for n in theirs if n.startswith(f"{at}.")]:
            if not name.endswith(("eh_proj", "shared_head", "shared_head.head")):
                theirs[name.replace(at, f"{at}.mtp_block", 1)] = theirs.pop(name)
    return {name: x for name, x in theirs.items() if not name.endswith(".probs")}
