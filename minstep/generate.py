"""Prefill a prompt in chunks, then decode a step at a time: draft, verify, keep what is right."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike

from minstep.cache import FullCache, new_caches
from minstep.config import Config
from minstep.errors import InputError
from minstep.model import ModelWeights, decoder, head
from minstep.mtp import Drafter
from minstep.sampling import GREEDY, Sampling, verify
from minstep.tap import Array
from minstep.validation import (
    check_float,
    check_generator,
    check_integer,
    check_prompt,
    is_finite,
)
from minstep.weights import check_weights

RESERVED = 1024  # positions reserved for new tokens; caches grow by doubling beyond them


class Step(NamedTuple):
    """What one forward pass of the main model added to the text."""

    tokens: list[int]  # at most 1 + accepted: cut at an end token and at the wanted length
    logits: Array  # [1+accepted, V], each row what the token there was chosen from
    drafts: list[int]  # what the MTP layers had proposed for this pass
    accepted: int  # how many of them the main model kept
    stop: str | None  # why the text ends here: "eos", "length" or "context"


def prefill(
    tokens: Sequence[int],
    weights: ModelWeights,
    config: Config,
    caches: Sequence[FullCache],
    drafter: Drafter,
    dtype: DTypeLike = np.float32,
    chunk: int | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> Array:
    """Run the prompt through the model, `chunk` tokens at a time: logits [1, V] after its end.

    Every split gives the same numbers up to rounding; chunks bound the memory that scores take.
    `progress` is called with the number of tokens done after each. Raises InputError as steps does.
    """
    tokens = check_prompt(tokens, config)
    size = len(tokens) if chunk is None else check_integer("chunk", chunk, 1)
    for start in range(0, len(tokens), size):
        part = tokens[start : start + size]
        x = decoder(part, weights, config, dtype, caches)  # [T, D]
        drafter.feed(tokens, x)
        progress(start + len(part))
    return head(x[-1:], weights, config)  # [1, V]


def steps(
    prompt: Sequence[int],
    weights: ModelWeights,
    config: Config,
    rng: np.random.Generator,
    max_tokens: int = 100,
    how: Sampling = GREEDY,
    dtype: DTypeLike = np.float32,
    chunk: int | None = None,
    ignore_eos: bool = False,
    num_draft_tokens: int | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> Iterator[Step]:
    """Continue the prompt a Step at a time, until an eos id (given out too) or a limit.

    Each step drafts `num_draft_tokens` tokens (None: one for each MTP layer), runs them through the
    main model at once, and keeps those it would have chosen. Greedy tokens are those without
    drafts, sampled ones have the same distribution. The same arguments and the same state of `rng`
    give the same steps. Raises InputError for a bad prompt, for weights of another config, for
    numbers that can mean nothing, and for logits, of the main model or of a draft, that are not
    finite.
    Source: report section 2 (MTP-3); speculative sampling, arXiv 2211.17192.
    Checked by: tests/model/test_generate.py, tests/model/test_drafts.py
    """
    prompt = check_prompt(prompt, config)
    check_weights(weights, config)
    max_tokens = check_integer("max_tokens", max_tokens, 0)
    dtype = check_float(dtype)
    check_generator(rng)
    if not hasattr(how, "temperature"):
        raise InputError(f"how is a {type(how).__name__}, expected a Sampling")
    if chunk is not None:
        chunk = check_integer("chunk", chunk, 1)
    if num_draft_tokens is not None:
        check_integer("num_draft_tokens", num_draft_tokens, 0, len(config.mtp_layers))
    tokens, limit = list(prompt), min(len(prompt) + max_tokens, config.max_positions)
    at_limit = "length" if limit == len(prompt) + max_tokens else "context"
    if len(tokens) == limit:
        yield Step([], np.empty((0, config.vocab_size), dtype), [], 0, at_limit)
        return
    M = min(len(weights.mtp), len(weights.mtp) if num_draft_tokens is None else num_draft_tokens)
    longest = max(min(chunk or 0, len(prompt)), M + 1)
    room = len(prompt) + min(max_tokens, RESERVED) + M
    caches = new_caches(config.layers, dtype, M, longest, room)
    drafter = Drafter(weights, config, M, dtype, longest)
    logits = prefill(prompt, weights, config, caches, drafter, dtype, chunk, progress)  # [1, V]
    hidden = drafter.states[:0]  # [0, D]; the prompt's states have been fed
    drafts, q = list[int](), list[Array]()
    ends = () if ignore_eos else config.eos_token_ids
    stop = None
    while not stop:
        if not is_finite(logits):
            after = f"after {len(tokens)} tokens"
            raise InputError(f"the logits {after} are not finite, expected weights without NaN")
        accepted, token = verify(drafts, q, logits, tokens, how, rng)
        for cache in caches:
            cache.truncate(len(tokens) + accepted)
        new = [*drafts[:accepted], token][: limit - len(tokens)]
        end = next((n for n, token in enumerate(new, start=1) if token in ends), None)
        if end is not None:
            new, stop = new[:end], "eos"
        elif len(tokens) + len(new) == limit:
            stop = at_limit
        tokens += new
        yield Step(new, logits[: accepted + 1], drafts, accepted, stop)
        if not stop:
            drafts, q = drafter.propose(tokens, hidden[: accepted + 1], how, rng)  # [V] float64
            hidden = decoder([tokens[-1], *drafts], weights, config, dtype, caches)  # [1+M, D]
            logits = head(hidden, weights, config)  # [1+M, V]


def generate(
    prompt: Sequence[int],
    weights: ModelWeights,
    config: Config,
    rng: np.random.Generator,
    max_tokens: int = 100,
    how: Sampling = GREEDY,
    **options: Any,
) -> Iterator[int]:
    """Yield new token ids: those of `steps`, which has the options and says why it ends."""
    for step in steps(prompt, weights, config, rng, max_tokens, how, **options):
        yield from step.tokens
