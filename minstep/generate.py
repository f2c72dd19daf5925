"""Prefill a prompt in chunks, then decode a token at a time."""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import DTypeLike

from minstep.cache import FullCache, new_caches
from minstep.config import Config
from minstep.files import InputError
from minstep.model import ModelWeights, decoder, head
from minstep.sampling import sample
from minstep.tap import Array


def check_prompt(tokens: Sequence[int], config: Config) -> None:
    """Raise InputError for an empty prompt, one over the context, or an id out of range."""
    if not tokens:
        raise InputError("the prompt is empty, expected at least one token")
    if len(tokens) > config.max_positions:
        raise InputError(
            f"the prompt has {len(tokens)} tokens, expected at most max_position_embeddings' "
            f"{config.max_positions}"
        )
    for position, token in enumerate(tokens):
        if not 0 <= token < config.vocab_size:
            raise InputError(
                f"token id {token} at position {position} is out of range, "
                f"expected 0 to {config.vocab_size - 1}"
            )


def prefill(
    tokens: Sequence[int],
    weights: ModelWeights,
    config: Config,
    caches: Sequence[FullCache],
    dtype: DTypeLike = np.float32,
    chunk: int | None = None,
) -> Array:
    """Run the prompt through the model, `chunk` tokens at a time: logits [V] after its last token.

    Every split gives the same numbers up to rounding; chunks bound the memory that scores take.
    """
    size = chunk or len(tokens)
    for start in range(0, len(tokens), size):
        x = decoder(tokens[start : start + size], weights, config, dtype, caches)  # [T, D]
    return head(x[-1:], weights, config)[0]  # [V]


def generate(
    prompt: Sequence[int],
    weights: ModelWeights,
    config: Config,
    rng: np.random.Generator,
    max_tokens: int = 100,
    temperature: float = 0.0,
    dtype: DTypeLike = np.float32,
    chunk: int | None = None,
    ignore_eos: bool = False,
) -> Iterator[int]:
    """Yield new token ids until an eos id (yielded too), max_tokens, or the end of the context.

    Raises InputError for a bad prompt. The same arguments and the same state of `rng` give the
    same tokens; at temperature 0 `rng` is not used.
    """
    check_prompt(prompt, config)
    caches = new_caches(config.layers, dtype, slack=len(config.mtp_layers))
    count = min(max_tokens, config.max_positions - len(prompt))
    if count < 1:
        return
    logits = prefill(prompt, weights, config, caches, dtype, chunk)  # [V]
    for n in range(count):
        token = sample(logits, temperature, rng)
        yield token
        if n + 1 == count or (token in config.eos_token_ids and not ignore_eos):
            return
        x = decoder([token], weights, config, dtype, caches)  # [1, D]
        logits = head(x, weights, config)[0]  # [V]
