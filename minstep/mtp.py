"""Multi-token prediction: small layers after the main stack, each guessing one token further."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import DTypeLike

from minstep.cache import FullCache, new_caches
from minstep.config import Config, LayerSpec
from minstep.errors import InputError
from minstep.linear import Weight, linear
from minstep.model import ModelWeights, MTPWeights, block, embed, rotations
from minstep.norm import rms_norm
from minstep.rope import Rotation
from minstep.sampling import Sampling, distribution, draw
from minstep.tap import Array, Tap, silent
from minstep.validation import NotFinite, check_finite, check_ids, check_states, integer_ids


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
    Differs: SGLang hands MiMo's depths the main model's state, Step's the depth before's.
        `lm_head` in place of the depth's own head leaves drafts that are rejected; normed states
        cost depths from the second on, as much as the norms' weights have learned.
    Checked by: tests/model/test_golden.py
    """
    embedding = rms_norm(embed(next_tokens, embed_tokens, hidden.dtype), weights.enorm, eps)
    state = rms_norm(hidden, weights.hnorm, eps)
    pair = np.concatenate((embedding, state), axis=-1)  # [T, 2*D]
    x = tap("eh_proj", linear(pair, weights.eh_proj))  # [T, D]
    try:
        return block(x, weights.block, spec, table, eps, cache, tap)
    except NotFinite as error:
        raise error.inside(spec.name) from error


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
    Raises InputError for what are no token ids, and for states that are not theirs.
    """
    check_states(hidden, config.hidden_size)
    check_ids(integer_ids(tokens), config.vocab_size)
    logits, T = [], len(tokens)
    if T - len(hidden) not in (0, 1):  # nothing comes after the last state
        raise InputError(f"there are {T} tokens for {len(hidden)} hidden states, expected as many")
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


class Drafter:
    """Drafts the next tokens while decoding: the first `count` depths, each with its own cache.

    Depth k at position i needs token t_(i+k), so the last rows of each depth are computed from
    drafts. Once more tokens are known they are rolled back and computed again from true ones.
    `longest` is the longest text fed at once.
    Source: as mtp_depth; the rows to compute again, from when their tokens are known.
    Differs: an engine that keeps rows of rejected drafts loses acceptance, never correctness.
    Checked by: tests/model/test_drafts.py
    """

    def __init__(
        self, weights: ModelWeights, config: Config, count: int, dtype: DTypeLike, longest: int
    ) -> None:
        self.weights, self.config, self.count = weights, config, count
        specs = config.mtp_layers[:count]
        self.caches = new_caches(specs, dtype, slack=count, longest=max(longest, 2 * count))
        self.first = 0  # the first position where some depth lacks a true token
        self.states = np.empty((0, config.hidden_size), dtype)  # h^0 [rows, D] from there on

    def feed(self, tokens: Sequence[int], hidden: Array) -> None:
        """Take h^0 [T, D] of the next T positions of `tokens`, the text from its beginning.

        Raises InputError where they, or the states of a depth, are not finite.
        """
        check_finite(self.config.layers[-1].name, hidden)
        self.states = np.concatenate((self.states, hidden))  # [rows, D]
        known = max(0, min(len(self.states), len(tokens) - self.count - self.first))
        x = self.states[:known]  # [known, D]
        for k in range(1, self.count + 1 if known else 1):
            x = self._depth(k, tokens[self.first + k : self.first + k + known], x)
        self._settle(known)

    def propose(
        self, tokens: Sequence[int], hidden: Array, how: Sampling, rng: np.random.Generator
    ) -> tuple[list[int], list[Array]]:
        """Draft a token with each depth in turn, and say from what distribution [V] each was drawn.

        `tokens` is the text so far; hidden [T, D] is h^0 of its positions that were not fed yet, up
        to the one before the last. Near the end of the context there are fewer drafts. Raises
        InputError where states or logits are not finite: any token could come of them.
        """
        if not self.count:
            return [], []
        check_finite(self.config.layers[-1].name, hidden)
        self.states = np.concatenate((self.states, hidden))  # [rows, D]
        text, drafts, q = list(tokens), list[int](), list[Array]()
        x = self.states
        for k in range(1, min(self.count, self.config.max_positions - len(tokens)) + 1):
            x = self._depth(k, text[self.first + k :], x)  # its last token is the draft before
            logits = mtp_head(x[-1:], self.weights.mtp[k - 1], self.config.rms_norm_eps)[0]  # [V]
            name = f"{self.config.mtp_layers[k - 1].name}.transformer.shared_head.output"
            check_finite(name, logits)
            q.append(distribution(logits, text, how))
            drafts.append(draw(q[-1], rng))
            text.append(drafts[-1])
        self._settle(len(tokens) - self.count - self.first)
        return drafts, q

    def _depth(self, k: int, next_tokens: Sequence[int], x: Array) -> Array:
        """Depth k from position `first` on: h^(k-1) [rows, D] -> h^k [rows, D]."""
        spec, cache = self.config.mtp_layers[k - 1], self.caches[k - 1]
        cache.truncate(self.first)
        table = rotations([spec], self.first, len(x), x.dtype)[spec.rope]  # [rows, P]
        layer, embed_tokens = self.weights.mtp[k - 1], self.weights.embed_tokens
        eps = self.config.rms_norm_eps
        x = mtp_depth(next_tokens, x, layer, embed_tokens, spec, table, eps, cache)  # [rows, D]
        check_finite(spec.name, x)  # before the next depth meets it
        return x

    def _settle(self, rows: int) -> None:
        """The first rows came from true tokens at every depth: they stay as they are."""
        rows = max(0, rows)
        self.states = self.states[rows:]  # [left, D]
        self.first += rows
