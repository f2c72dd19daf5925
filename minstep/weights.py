"""Which hub tensor is which argument: the one table of names and shapes."""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import numpy as np

from minstep.attention import AttentionWeights
from minstep.config import Config, LayerSpec
from minstep.errors import InputError
from minstep.linear import Weight
from minstep.mlp import MLPWeights
from minstep.model import BlockWeights, ModelWeights, MTPWeights
from minstep.moe import MoEWeights

Shape = tuple[int, ...]
Get = Callable[[str, Shape], Weight]  # a tensor's hub name and the shape it must have
SCALES = "_scale_inv"  # what follows an FP8 weight's name in that of its scales


def assemble(config: Config, get: Get, own_mtp_heads: bool = True) -> ModelWeights:
    """Ask `get` for every tensor of the model, and put each in its place.

    With own_mtp_heads False, MTP layers use lm_head, as in the `-Base` checkpoint that has no
    other. Source: the tensor names of the released checkpoint (804 of them).
    """
    D, V = config.hidden_size, config.vocab_size
    embed_tokens = get("model.embed_tokens.weight", (V, D))
    layers = tuple(block_weights(spec, D, get) for spec in config.layers)
    norm = get("model.norm.weight", (D,))
    tied = config.tie_word_embeddings
    lm_head = embed_tokens if tied else get("lm_head.weight", (V, D))
    mtp = tuple(
        mtp_weights(spec, D, get, (V, D) if own_mtp_heads else lm_head)
        for spec in config.mtp_layers
    )
    return ModelWeights(embed_tokens, layers, norm, lm_head, mtp)


def mtp_weights(spec: LayerSpec, D: int, get: Get, head: Shape | Weight) -> MTPWeights:
    """The tensors of one MTP layer; `head` is the shape of its own, or the one it shares."""
    return MTPWeights(
        enorm=get(f"{spec.name}.enorm.weight", (D,)),
        hnorm=get(f"{spec.name}.hnorm.weight", (D,)),
        eh_proj=get(f"{spec.name}.eh_proj.weight", (D, 2 * D)),
        block=block_weights(spec, D, get),
        shared_head_norm=get(f"{spec.name}.transformer.shared_head.norm.weight", (D,)),
        shared_head_output=get(f"{spec.name}.transformer.shared_head.output.weight", head)
        if isinstance(head, tuple)
        else head,
    )


def block_weights(spec: LayerSpec, D: int, get: Get) -> BlockWeights:
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


class Expected(NamedTuple):
    """What a config says of a tensor: it stands in the place of one."""

    name: str
    shape: Shape


def check_weights(weights: ModelWeights, config: Config) -> None:
    """Raise InputError unless the weights have the layers and shapes of the config.

    MTP layers at the end may be missing. NumPy would stretch some wrong shapes without a word.
    """
    if not hasattr(weights, "mtp"):  # copies with a planted bug have a ModelWeights of their own
        raise InputError(f"weights are a {type(weights).__name__}, expected a model's weights")
    depths = len(weights.mtp)
    config = config._replace(mtp_layers=config.mtp_layers[:depths])
    expected = assemble(config, cast(Get, Expected))
    pairs: list[tuple[Any, Any]] = [(weights, expected)]
    while pairs:
        found, wanted = pairs.pop()
        if isinstance(wanted, Expected):
            shape = getattr(found, "shape", None)
            if shape != wanted.shape:
                has = "is missing" if shape is None else f"has shape {list(shape)}"
                shape = list(wanted.shape)
                raise InputError(f"tensor {wanted.name} {has}, expected {shape} by the config")
        elif isinstance(wanted, tuple) and isinstance(found, tuple) and len(found) == len(wanted):
            pairs += [*zip(found, wanted, strict=True)][::-1]  # the first tensor comes off first
        elif found is not wanted:
            raise InputError("the weights have other layers than the config, expected its own")


def blocks(shape: Shape, size: tuple[int, int]) -> Shape:
    """How many blocks of `size` a weight [..., O, I] has, the last ones cut: the scales' shape."""
    return (*shape[:-2], -(-shape[-2] // size[0]), -(-shape[-1] // size[1]))
