"""The model: a block, the decoder that stacks blocks, and the head that turns states to logits."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import DTypeLike

from minstep.attention import AttentionWeights, self_attention
from minstep.cache import FullCache, check_caches
from minstep.config import Config, LayerSpec, RopeSpec
from minstep.errors import InputError
from minstep.fast.pages import check
from minstep.linear import Weight, as_float, linear
from minstep.mlp import MLPWeights, swiglu
from minstep.moe import MoEWeights, moe
from minstep.norm import rms_norm
from minstep.rope import Rotation, rotation
from minstep.tap import Array, Tap, silent
from minstep.validation import (
    NotFinite,
    check_float,
    check_ids,
    check_states,
    integer_ids,
)


class BlockWeights(NamedTuple):
    """Tensors under `model.layers.N.`: either `mlp`, or `moe` and `share_expert`."""

    input_layernorm: Weight  # [D]
    self_attn: AttentionWeights
    post_attention_layernorm: Weight  # [D]
    mlp: MLPWeights | None
    moe: MoEWeights | None
    share_expert: MLPWeights | None


class MTPWeights(NamedTuple):
    """Tensors of one multi-token-prediction layer: a block, what feeds it, and its own head."""

    enorm: Weight  # [D]
    hnorm: Weight  # [D]
    eh_proj: Weight  # [D, 2*D]
    block: BlockWeights
    shared_head_norm: Weight  # [D], transformer.shared_head.norm
    shared_head_output: Weight  # [V, D], transformer.shared_head.output


class ModelWeights(NamedTuple):
    """Every tensor of a checkpoint in the place where it is used."""

    embed_tokens: Weight  # [V, D]
    layers: tuple[BlockWeights, ...]
    norm: Weight  # [D]
    lm_head: Weight  # [V, D]
    mtp: tuple[MTPWeights, ...]


def embed(tokens: Sequence[int], embed_tokens: Weight, dtype: DTypeLike) -> Array:
    """Rows of the embedding table: T token ids -> [T, D] in `dtype`. Nothing is scaled.

    Raises InputError for no ids at all, and for an id that is not in the vocabulary.
    """
    ids = check_ids(integer_ids(tokens), embed_tokens.shape[0])  # [T]
    check(embed_tokens)
    return as_float(embed_tokens[ids], dtype)  # [T, D]


def block(
    x: Array,
    weights: BlockWeights,
    spec: LayerSpec,
    table: Rotation,
    eps: float,
    cache: FullCache | None = None,
    tap: Tap = silent,
) -> Array:
    """One pre-norm layer: x + attention(norm x), then + MLP(norm x) or experts + shared expert.

    x [T, D]. Returns [T, D] in x's dtype.
    Source: Step3p5DecoderLayer in modeling_step3p5.py.
    Differs: routed experts and the shared expert read the same normed input, and the scaling factor
        is in the routed weights only.
    Checked by: tests/model/test_golden.py
    """
    normed = tap("input_layernorm", rms_norm(x, weights.input_layernorm, eps))
    x = x + self_attention(normed, weights.self_attn, spec, table, eps, cache, tap.at("self_attn"))
    normed = tap("post_attention_layernorm", rms_norm(x, weights.post_attention_layernorm, eps))
    if weights.mlp is not None:
        return x + tap("mlp", swiglu(normed, weights.mlp, spec.swiglu_limit_shared))
    assert weights.moe and spec.moe and weights.share_expert
    routed = tap("moe", moe(normed, weights.moe, spec.moe, spec.swiglu_limit, tap.at("moe")))
    shared = swiglu(normed, weights.share_expert, spec.swiglu_limit_shared)
    return x + (routed + tap("share_expert", shared))


def decoder(
    tokens: Sequence[int],
    weights: ModelWeights,
    config: Config,
    dtype: DTypeLike = np.float32,
    caches: Sequence[FullCache] | None = None,
    tap: Tap = silent,
) -> Array:
    """Embed the tokens and run every main layer: the states before the final norm.

    `tokens`: T ids. With caches, one per layer, the tokens continue what the caches hold; without,
    they are the whole sequence. Returns [T, D] in `dtype`, which every activation has. Raises
    InputError for what are no token ids, for another dtype than float32 and float64, for caches of
    other layers or of another dtype, and beyond the context.
    Source: Step3p5Model.forward in modeling_step3p5.py.
    Checked by: tests/model/test_golden.py
    """
    dtype = check_float(dtype)
    if caches is not None:
        check_caches(caches, config.layers, dtype)
    first = caches[0].end if caches else 0
    x = tap("model.embed_tokens", embed(tokens, weights.embed_tokens, dtype))  # [T, D]
    if first + len(x) > config.max_positions:
        end = f"{first + len(x)} positions"
        raise InputError(f"the text has {end}, expected at most {config.max_positions}")
    return run_layers(x, weights.layers, config.layers, first, config.rms_norm_eps, caches, tap)


def run_layers(
    x: Array,
    layers: Sequence[BlockWeights],
    specs: Sequence[LayerSpec],
    first: int,
    eps: float,
    caches: Sequence[FullCache] | None = None,
    tap: Tap = silent,
) -> Array:
    """Run layers that follow each other, each with its spec.

    x [T, D]: the states that enter the first of them, at positions first, first + 1, .... Returns
    those that leave the last, [T, D] in x's dtype. Caches as in decoder.
    """
    tables = rotations(specs, first, len(x), x.dtype)
    for n, (layer, spec) in enumerate(zip(layers, specs, strict=True)):
        cache = caches[n] if caches else None
        try:
            x = block(x, layer, spec, tables[spec.rope], eps, cache, tap.at(spec.name))  # [T, D]
        except NotFinite as error:
            raise error.inside(spec.name) from error
        x = tap(spec.name, x)
    return x


def head(x: Array, weights: ModelWeights, config: Config, tap: Tap = silent) -> Array:
    """Final norm and output projection: states [T, D] -> logits [T, V].

    Raises InputError for states of another width, or that are neither float32 nor float64.
    """
    check_states(x, config.hidden_size)
    normed = tap("model.norm", rms_norm(x, weights.norm, config.rms_norm_eps))
    return tap("lm_head", linear(normed, weights.lm_head))  # [T, V]


def rotations(
    specs: Sequence[LayerSpec], first: int, count: int, dtype: DTypeLike
) -> dict[RopeSpec, Rotation]:
    """The angle tables of positions first, ..., first + count - 1, one per kind of rotation."""
    positions = np.arange(first, first + count)  # [T]
    return {rope: rotation(positions, rope, dtype) for rope in {spec.rope for spec in specs}}
