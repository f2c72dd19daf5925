"""From logits to a token: which tokens remain, with what probability, and what drafts are worth."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from minstep.activations import softmax
from minstep.tap import Array


class Sampling(NamedTuple):
    """How a token is chosen. The defaults are greedy, and every filter is off."""

    temperature: float = 0.0  # 0 is greedy: the largest logit
    top_k: int = 0  # keep this many tokens; 0 keeps all
    top_p: float = 1.0  # keep the fewest tokens that together reach this probability
    min_p: float = 0.0  # keep tokens at least this share of the likeliest one's probability
    repetition_penalty: float = 1.0  # above 1, tokens that stand in the text become unlikely


GREEDY = Sampling()


def distribution(logits: Array, seen: Sequence[int], how: Sampling) -> Array:
    """The probability of each token to be the next: logits [V] -> [V] float64, with sum 1.

    `seen` is the text so far. Penalty, temperature, top-k, top-p and min-p apply in this order,
    each to what the one before left; of equals the lowest ids stay. Greedy is all on one token.
    Source: the logits processors of transformers, in its order.
    Differs: llama.cpp applies the temperature last, so its top-p means another set of tokens.
    Checked by: tests/test_sampling.py
    """
    logits = logits.astype(np.float64)
    if how.repetition_penalty != 1:
        ids = np.unique(np.asarray(seen, dtype=np.intp))  # [used]
        old, penalty = logits[ids], how.repetition_penalty  # [used]
        logits[ids] = np.where(old > 0, old / penalty, old * penalty)
    probs = np.zeros_like(logits)
    if how.temperature == 0:
        probs[np.argmax(logits)] = 1
        return probs
    if how.top_k == 0 and how.top_p == 1 and how.min_p == 0:
        return softmax((logits - logits.max()) / how.temperature)
    order = np.argsort(-logits, kind="stable")[: how.top_k or None]  # [kept], likeliest first
    kept = softmax((logits[order] - logits[order[0]]) / how.temperature)
    if how.top_p < 1:  # a token stays while those before it have not reached top_p
        before = np.cumsum(kept) - kept
        kept = kept[before < how.top_p]  # [fewer]
    kept = kept[kept >= how.min_p * kept[0]]  # [fewest]
    probs[order[: len(kept)]] = kept / kept.sum()
    return probs


def draw(probs: Array, rng: np.random.Generator) -> int:
    """A token from probabilities [V], by one random number."""
    edges = np.cumsum(probs)
    # The last edge is 1 whatever the rounding of the sum, so the number always falls below it.
    return int(np.searchsorted(edges / edges[-1], rng.random(), side="right"))


def acceptance(draft: int, q: Array, p: Array) -> tuple[float, Array]:
    """How likely a draft is kept, and the distribution of the token that replaces it if not.

    The draft was drawn from q [V]; the main model wants p [V]. Kept with min(1, p / q), replaced
    from the positive part of p - q: whatever q is, the token that results is distributed as p.
    Source: speculative sampling, arXiv 2211.17192, theorem in its appendix A.1; arXiv 2302.01318.
    Checked by: tests/test_drafts.py
    """
    chance = min(1.0, float(p[draft] / q[draft]))
    rest = np.maximum(p - q, 0)
    total = rest.sum()
    return chance, rest / total if total > 0 else p  # p = q: a draft is never refused


def verify(
    drafts: Sequence[int],
    q: Sequence[Array],
    logits: Array,
    text: Sequence[int],
    how: Sampling,
    rng: np.random.Generator,
) -> tuple[int, int]:
    """How many drafts are kept, and the token that comes after them.

    Draft j was drawn from q[j] [V]; logits [1+M, V] are the main model's after `text` and j drafts.
    The first draft that is not kept is replaced; when all are, one more token is drawn.
    Checked by: tests/test_drafts.py
    """
    for j, draft in enumerate(drafts):
        chance, rest = acceptance(draft, q[j], distribution(logits[j], [*text, *drafts[:j]], how))
        if rng.random() >= chance:
            return j, draw(rest, rng)
    return len(drafts), draw(distribution(logits[len(drafts)], [*text, *drafts], how), rng)


def log_probabilities(logits: Array) -> Array:
    """log softmax of logits [V], float64: of the model itself, before any filter."""
    shifted = logits.astype(np.float64) - logits.max()
    return shifted - np.log(np.exp(shifted).sum())
