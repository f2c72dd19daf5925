"""From logits to a token: the largest, or a draw at a temperature."""

import numpy as np

from minstep.activations import softmax
from minstep.tap import Array


def sample(logits: Array, temperature: float, rng: np.random.Generator) -> int:
    """The next token from logits [V].

    Temperature 0 is greedy: the largest logit, the lowest id among equals. Otherwise a draw from
    softmax(logits / temperature), summed in float64.
    """
    if temperature == 0:
        return int(np.argmax(logits))
    scaled = logits.astype(np.float64)
    probs = softmax((scaled - scaled.max()) / temperature)
    # The last edge is 1 whatever the rounding of the sum, so the draw always falls below it.
    edges = np.cumsum(probs)
    return int(np.searchsorted(edges / edges[-1], rng.random(), side="right"))
