"""From logits to a token: which tokens remain, with what probability, and what drafts are worth."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from minstep.activations import softmax
from minstep.errors import InputError
from minstep.tap import Array
from minstep.validation import Limits, check_ids, check_integer, check_number, integer_ids

LIMITS: dict[str, Limits] = {  # of Sampling's numbers, and of the flags of the same names
    "temperature": ("of at least 0", lambda x: x >= 0),
    "top_p": ("above 0 and at most 1", lambda x: 0 < x <= 1),
    "min_p": ("from 0 to 1", lambda x: 0 <= x <= 1),
    "repetition_penalty": ("from 0.01 to 100", lambda x: 0.01 <= x <= 100),
}


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen. The defaults are greedy, and every filter is off.

    Raises InputError for a number outside LIMITS, and for a top_k that is no whole number.
    """

    temperature: float = 0.0  # 0 is greedy: the largest logit
    top_k: int = 0  # keep this many tokens; 0 keeps all
    top_p: float = 1.0  # keep the fewest tokens that together reach this probability
    min_p: float = 0.0  # keep tokens at least this share of the likeliest one's probability
    repetition_penalty: float = 1.0  # above 1, tokens that stand in the text become unlikely

    def __post_init__(self) -> None:
        check_integer("top_k", self.top_k, 0)
        for name, limits in LIMITS.items():
            check_number(name, getattr(self, name), limits)


GREEDY = Sampling()


def distribution(logits: Array, seen: Sequence[int], how: Sampling) -> Array:
    """The probability of each token to be the next: logits [V] -> [V] float64, with sum 1.

    `seen` is the text so far. Penalty, temperature, top-k, top-p and min-p apply in this order,
    each to what the one before left; of equals the lowest ids stay. Greedy is all on one token.
    A logit of -inf is a token that may not come. Raises InputError for NaN, +inf, and logits that
    are all -inf, and for an id in `seen` that has no logit.
    Source: the logits processors of transformers, in its order.
    Differs: llama.cpp applies the temperature last, so its top-p means another set of tokens.
    Checked by: tests/model/test_sampling.py
    """
    _check_logits(logits)
    logits = logits.astype(np.float64)
    if how.repetition_penalty != 1 and len(seen):
        ids = np.unique(check_ids(integer_ids(seen), len(logits)))  # [used]
        old, penalty = logits[ids], how.repetition_penalty  # [used]
        with np.errstate(over="ignore"):  # +inf is refused below, and -inf may not come
            logits[ids] = np.where(old > 0, old / penalty, old * penalty)
    probs, best = np.zeros_like(logits), _largest(logits)
    if how.temperature == 0:
        probs[best] = 1
        return probs
    with np.errstate(over="ignore"):  # -inf, where the temperature is small enough, is right
        scaled = (logits - logits[best]) / how.temperature  # [V]
    if how.top_k == 0 and how.top_p == 1 and how.min_p == 0:
        return softmax(scaled)
    order = np.argsort(-logits, kind="stable")[: how.top_k or None]  # [kept], likeliest first
    kept = softmax(scaled[order])
    if how.top_p < 1:  # a token stays while those before it have not reached top_p
        before = np.cumsum(kept) - kept
        kept = kept[before < how.top_p]  # [fewer]
    kept = kept[kept >= how.min_p * kept[0]]  # [fewest]
    probs[order[: len(kept)]] = kept / kept.sum()
    return probs


def draw(probs: Array, rng: np.random.Generator) -> int:
    """A token from probabilities [V], by one random number.

    Raises InputError unless they are finite, none is below 0, and one is above.
    """
    edges = np.cumsum(probs)
    if not (edges.size and 0 < edges[-1] < math.inf and probs.min() >= 0):
        raise InputError("probabilities are not finite, below 0 or all 0, expected some above 0")
    # The last edge is 1 whatever the rounding of the sum, so the number always falls below it.
    return int(np.searchsorted(edges / edges[-1], rng.random(), side="right"))


def acceptance(draft: int, q: Array, p: Array) -> tuple[float, Array]:
    """How likely a draft is kept, and the distribution of the token that replaces it if not.

    The draft was drawn from q [V]; the main model wants p [V]. Kept with min(1, p / q), replaced
    from the positive part of p - q: whatever q is, the token that results is distributed as p.
    Raises InputError for q or p that are not finite, and for a draft that q never gives.
    Source: speculative sampling, arXiv 2211.17192, theorem in its appendix A.1; arXiv 2302.01318.
    Checked by: tests/model/test_drafts.py
    """
    if not (p.shape == q.shape and 0 <= draft < len(q)):
        sizes = f"with {list(q.shape)} and {list(p.shape)} probabilities"
        raise InputError(f"draft {draft} {sizes}, expected one of as many in both")
    if not (q[draft] > 0 and math.isfinite(np.vdot(p, q))):  # min(1, NaN) would be 1
        what = f"of {float(q[draft])} to draft {draft}, or others that are not finite"
        raise InputError(f"probabilities {what}, expected finite ones and a draft drawn from them")
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
    The first draft that is not kept is replaced; when all are, one more token is drawn. Raises
    InputError as `acceptance` and `distribution` do, and for too few rows.
    Checked by: tests/model/test_drafts.py
    """
    if not len(drafts) == len(q) < len(logits):
        counts = f"{len(drafts)} drafts, {len(q)} distributions, {len(logits)} rows of logits"
        raise InputError(f"{counts}, expected as many, and a row of logits more")
    for j, draft in enumerate(drafts):
        chance, rest = acceptance(draft, q[j], distribution(logits[j], [*text, *drafts[:j]], how))
        if rng.random() >= chance:
            return j, draw(rest, rng)
    return len(drafts), draw(distribution(logits[len(drafts)], [*text, *drafts], how), rng)


def log_probabilities(logits: Array) -> Array:
    """log softmax of logits [V], float64: of the model itself, before any filter.

    Raises InputError as `distribution` does.
    """
    _check_logits(logits)
    with np.errstate(over="ignore"):  # the log of 0 is -inf
        shifted = logits.astype(np.float64) - logits[_largest(logits)]
    return shifted - np.log(np.exp(shifted).sum())


def _check_logits(logits: Array) -> None:
    """Raise InputError unless logits are numbers in one row: [V]."""
    is_row = isinstance(logits, np.ndarray) and logits.ndim == 1 and logits.size > 0
    if not is_row or logits.dtype.kind not in "fiu":
        found = list(logits.shape) if isinstance(logits, np.ndarray) else type(logits).__name__
        raise InputError(f"logits are {found}, expected an array of numbers [V]")


def _largest(logits: Array) -> int:
    """The id of the largest of logits [V], the lowest of equals; it must be finite."""
    best = int(np.argmax(logits))  # the first NaN, where there is one
    if not math.isfinite(logits[best]):
        found = f"logit {best} is {logits[best]}"
        raise InputError(f"{found}, expected finite logits, or -inf for what may not come")
    return best
