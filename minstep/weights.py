"""Which hub tensor is which argument: the one table of names and shapes, and random weights."""

import itertools
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minstep.attention import AttentionWeights
from minstep.bf16 import BF16Array, to_bf16
from minstep.config import Config, LayerSpec
from minstep.files import MADE_BY, InputError, atomic_folder
from minstep.linear import Weight
from minstep.mlp import MLPWeights
from minstep.model import BlockWeights, ModelWeights, MTPWeights
from minstep.moe import MoEWeights

Shape = tuple[int, ...]
Get = Callable[[str, Shape], Weight]  # a tensor's hub name and the shape it must have
Drawn = Iterator[tuple[str, NDArray[np.float32]]]


def assemble(config: Config, get: Get, own_mtp_heads: bool = True) -> ModelWeights:
    """Ask `get` for every tensor of the model, and put each in its place.

    With own_mtp_heads False, MTP layers use lm_head, as in the `-Base` checkpoint that has no
    other. Source: the tensor names of the released checkpoint (804 of them).
    """
    D, V = config.hidden_size, config.vocab_size
    embed_tokens = get("model.embed_tokens.weight", (V, D))
    layers = tuple(_block(spec, D, get) for spec in config.layers)
    norm = get("model.norm.weight", (D,))
    tied = config.tie_word_embeddings
    lm_head = embed_tokens if tied else get("lm_head.weight", (V, D))
    mtp = tuple(
        MTPWeights(
            enorm=get(f"{spec.name}.enorm.weight", (D,)),
            hnorm=get(f"{spec.name}.hnorm.weight", (D,)),
            eh_proj=get(f"{spec.name}.eh_proj.weight", (D, 2 * D)),
            block=_block(spec, D, get),
            shared_head_norm=get(f"{spec.name}.transformer.shared_head.norm.weight", (D,)),
            shared_head_output=get(f"{spec.name}.transformer.shared_head.output.weight", (V, D))
            if own_mtp_heads
            else lm_head,
        )
        for spec in config.mtp_layers
    )
    return ModelWeights(embed_tokens, layers, norm, lm_head, mtp)


def _block(spec: LayerSpec, D: int, get: Get) -> BlockWeights:
    """The tensors of one layer."""
    H, G, K = spec.heads, spec.groups, spec.head_dim
    attn = f"{spec.name}.self_attn"
    return BlockWeights(
        input_layernorm=get(f"{spec.name}.input_layernorm.weight", (D,)),
        self_attn=AttentionWeights(
            q_proj=get(f"{attn}.q_proj.weight", (H * K, D)),
            k_proj=get(f"{attn}.k_proj.weight", (G * K, D)),
            v_proj=get(f"{attn}.v_proj.weight", (G * K, D)),
            o_proj=get(f"{attn}.o_proj.weight", (D, H * K)),
            q_norm=get(f"{attn}.q_norm.weight", (K,)),
            k_norm=get(f"{attn}.k_norm.weight", (K,)),
            g_proj=get(f"{attn}.g_proj.weight", (H, D)) if spec.has_gate else None,
        ),
        post_attention_layernorm=get(f"{spec.name}.post_attention_layernorm.weight", (D,)),
        mlp=None if spec.moe else _mlp(f"{spec.name}.mlp", spec.mlp_width, D, get),
        moe=_moe(spec, D, get),
        share_expert=_mlp(f"{spec.name}.share_expert", spec.moe.shared_width, D, get)
        if spec.moe
        else None,
    )


def _mlp(name: str, width: int, D: int, get: Get) -> MLPWeights:
    """The tensors of a dense MLP or a shared expert."""
    return MLPWeights(
        gate_proj=get(f"{name}.gate_proj.weight", (width, D)),
        up_proj=get(f"{name}.up_proj.weight", (width, D)),
        down_proj=get(f"{name}.down_proj.weight", (D, width)),
    )


def _moe(spec: LayerSpec, D: int, get: Get) -> MoEWeights | None:
    """The router and the stacked experts of one layer."""
    if spec.moe is None:
        return None
    E, F, name = spec.moe.experts, spec.moe.width, f"{spec.name}.moe"
    return MoEWeights(
        gate=get(f"{name}.gate.weight", (E, D)),
        router_bias=get(f"{name}.router_bias", (E,)) if spec.moe.has_bias else None,
        gate_proj=get(f"{name}.gate_proj.weight", (E, F, D)),
        up_proj=get(f"{name}.up_proj.weight", (E, F, D)),
        down_proj=get(f"{name}.down_proj.weight", (E, D, F)),
    )


def tensor_shapes(config: Config, own_mtp_heads: bool = True) -> dict[str, Shape]:
    """The hub name and shape of every tensor, in the model's order."""
    shapes: dict[str, Shape] = {}

    def note(name: str, shape: Shape) -> Weight:
        shapes[name] = shape
        return np.empty(0)

    assemble(config, note, own_mtp_heads)
    return shapes


def random_tensors(config: Config, rng: np.random.Generator) -> Drawn:
    """Draw every tensor in order, float32 rounded to bfloat16: both kinds of file hold the same.

    Projections have variance 1 / inputs, which keeps activations near unit size; norms scatter
    around 0 and router biases are large enough to change who is chosen. Router biases stay
    float32, as on the hub.
    """
    for name, shape in tensor_shapes(config).items():
        small = len(shape) == 1  # norms and router biases
        scale = 0.1 if small else 1 if name == "model.embed_tokens.weight" else shape[-1] ** -0.5
        drawn = rng.standard_normal(shape, np.float32) * np.float32(scale)
        exact = name.endswith("router_bias")
        yield name, drawn if exact else np.asarray(BF16Array(to_bf16(drawn)))


def random_weights(config: Config, rng: np.random.Generator) -> ModelWeights:
    """A model of random float32 weights in memory: the numbers save_random would write."""
    tensors = dict(random_tensors(config, rng))
    return assemble(config, lambda name, _: tensors[name])


def save_random(
    config_json: dict[str, Any],
    config: Config,
    rng: np.random.Generator,
    out: Path,
    dtype: str = "float32",
    shards: int = 1,
    tokenizer: Path | None = None,
) -> None:
    """Write a random checkpoint in hub layout: config.json, safetensors, an index when sharded.

    `dtype`: float32 or bfloat16. Memory is that of one tensor. The folder appears whole or not at
    all. Raises InputError when `out` cannot be written or there are more shards than tensors.
    """
    shapes = tensor_shapes(config)
    if not 1 <= shards <= len(shapes):
        raise InputError(f"--shards {shards}: expected 1 to {len(shapes)}, the number of tensors")
    names = list(shapes)
    ends = _shard_ends([math.prod(shape) for shape in shapes.values()], shards)
    drawn = random_tensors(config, rng)
    weight_map: dict[str, str] = {}
    total = 0
    with atomic_folder(out) as folder:
        for n, (start, end) in enumerate(zip([0, *ends], ends, strict=False), start=1):
            tag = f"-{n:05}-of-{shards:05}" if shards > 1 else ""
            file = f"model{tag}.safetensors"
            held = {name: shapes[name] for name in names[start:end]}
            total += _write_shard(folder / file, held, dtype, drawn)
            weight_map |= dict.fromkeys(held, file)
        if shards > 1:
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            _write_json(folder / "model.safetensors.index.json", index)
        _write_json(folder / "config.json", config_json | {"torch_dtype": dtype})
        if tokenizer is not None:
            (folder / "tokenizer.json").write_bytes(tokenizer.read_bytes())


def _shard_ends(sizes: list[int], shards: int) -> list[int]:
    """Where each shard ends: about equal sizes, at least one tensor in each."""
    reached = np.cumsum(sizes)
    ends: list[int] = []
    for n in range(1, shards):
        wanted = int(np.searchsorted(reached, reached[-1] * n / shards)) + 1
        first = ends[-1] + 1 if ends else 1
        ends.append(min(max(wanted, first), len(sizes) - (shards - n)))
    return [*ends, len(sizes)]


def _write_shard(file: Path, shapes: dict[str, Shape], dtype: str, drawn: Drawn) -> int:
    """Write one safetensors file, a tensor at a time; returns the bytes of its tensors.

    The package's own writer wants a whole shard in memory. Wider dtypes lie first, as it puts them,
    so that every tensor is aligned. router_bias stays float32.
    """
    wide = {name: dtype == "float32" or name.endswith("router_bias") for name in shapes}
    header: dict[str, Any] = {"__metadata__": {"format": "pt", "made_by": MADE_BY}}
    reached = 0
    for name in sorted(shapes, key=lambda name: not wide[name]):
        end = reached + math.prod(shapes[name]) * (4 if wide[name] else 2)
        code = "F32" if wide[name] else "BF16"
        span = [reached, end]
        header[name] = {"dtype": code, "shape": list(shapes[name]), "data_offsets": span}
        reached = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as opened:
        opened.write(len(text).to_bytes(8, "little") + text)
        for name, x in itertools.islice(drawn, len(shapes)):
            opened.seek(8 + len(text) + header[name]["data_offsets"][0])
            opened.write((x if wide[name] else to_bf16(x)).tobytes())
    return reached


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
