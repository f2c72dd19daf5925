"""Multi-token prediction: small layers after the main stack, each guessing one token further."""

from collections.abc import Sequence

import numpy as np

from minstep.cache import FullCache
from minstep.config import Config, LayerSpec
from minstep.linear import Weight, linear
from minstep.model import ModelWeights, MTPWeights, block, embed, rotations
from minstep.norm import rms_norm
from minstep.rope import Rotation
from minstep.tap import Array, Tap, silent


def mtp_depth(
    next_tokens: Sequence[int],
    hidden: Array,
    weights: MTPWeights,
    embed_tokens: Weight,
    spec: LayerSpec,
    table: Rotation,
    eps: float,
    cache: FullCache | None = None,
    tap: Tap = silent,
) -> Array:
    """One depth: mix each state with the embedding of the token it should have led to.

    Position i of depth k takes h^(k-1)_i, hidden [T, D], and token t_(i+k), next_tokens [T].
    Returns h^k [T, D] before the depth's own head norm: what the next depth is fed. For
    k = 1 hidden is the last main layer's output before `model.norm`.
    Source: the order [enorm(embedding), hnorm(state)] and the chaining of raw states are those of
        vLLM's step3p5_mtp, SGLang's Step3p5MTP and llama.cpp; the released transformers code
        ignores these layers.
    Differs: DeepSeek and MiMo feed every depth the main model's state, Step the depth before's.
        Normed states, or `lm_head` in place of the depth's own head, leave drafts that are mostly
        rejected.
    Checked by: tests/test_golden.py
    """
    embedding = rms_norm(embed(next_tokens, embed_tokens, hidden.dtype), weights.enorm, eps)
    state = rms_norm(hidden, weights.hnorm, eps)
    pair = np.concatenate((embedding, state), axis=-1)  # [T, 2*D]
    x = tap("eh_proj", linear(pair, weights.eh_proj))  # [T, D]
    return block(x, weights.block, spec, table, eps, cache, tap)


def mtp_head(x: Array, weights: MTPWeights, eps: float, tap: Tap = silent) -> Array:
    """A depth's own norm and output matrix: states [T, D] -> logits [T, V] for t_(i+k+1)."""
    tap = tap.at("transformer.shared_head")
    normed = tap("norm", rms_norm(x, weights.shared_head_norm, eps))
    return tap("output", linear(normed, weights.shared_head_output))  # [T, V]


def mtp_forward(
    tokens: Sequence[int], hidden: Array, weights: ModelWeights, config: Config, tap: Tap = silent
) -> list[Array]:
    """All depths over a sequence with its true next tokens (teacher forcing).

    `tokens`: T ids; hidden [T, D] from decoder(). Depth k runs over positions 0 .. T-1-k; depths
    that have no position left are skipped. Returns, for each depth k that ran, logits [T-k, V].
    """
    logits = []
    T = len(tokens)
    tables = rotations(config.mtp_layers, 0, T, hidden.dtype)
    for k, (layer, spec) in enumerate(zip(weights.mtp, config.mtp_layers, strict=True), start=1):
        if T <= k:
            break
        cos, sin = tables[spec.rope]  # [T, P]
        table = Rotation(cos[: T - k], sin[: T - k])  # [T-k, P]
        hidden = mtp_depth(
            tokens[k:],
            hidden[: T - k],
            layer,
            weights.embed_tokens,
            spec,
            table,
            config.rms_norm_eps,
            tap=tap.at(spec.name),
        )  # [T-k, D]
        hidden = tap(spec.name, hidden)
        logits.append(mtp_head(hidden, layer, config.rms_norm_eps, tap.at(spec.name)))
    return logits
