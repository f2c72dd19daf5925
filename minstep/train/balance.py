"""Loss-free balancing: experts are counted, and the router's bias lifts those with too few tokens.

No auxiliary loss pulls at the router. Its bias decides who is chosen, never how much the chosen
weigh, so it has no gradient, and the rule here is all that moves it.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from minstep.config import Config
from minstep.tap import Array, ScopedTap

Counts = dict[str, NDArray[np.int64]]  # tokens of each expert [E], by MoE layer: model.layers.N.moe


class Counter(ScopedTap):
    """Counts the tokens that the router gives to each expert of each MoE layer, from its `ids`.

    Raises KeyError for a layer that the config has not. Sequences run at once have one each.
    Checked by: tests/train/test_balance.py
    """

    def __init__(self, config: Config) -> None:
        self.counts: Counts = {
            f"{spec.name}.moe": np.zeros(spec.moe.experts, np.int64)
            for spec in (*config.layers, *config.mtp_layers)
            if spec.moe
        }

    def __call__(self, name: str, x: Array) -> Array:
        if name == "ids":  # [T, A]
            counts = self.counts[self._scope]
            counts += np.bincount(x.ravel(), minlength=len(counts))
        return x

    def wants(self, name: str) -> bool:
        """True for `probs`: attention in blocks writes into arrays; no gradient can follow that."""
        return name == "probs"


def balance(biases: Mapping[str, Array], counts: Counts, rate: float) -> None:
    """Move each router bias by `rate`, in place: up where an expert got fewer than its fair share.

    `biases`: tensors by hub name, of which those named model.layers.N.moe.router_bias [E], float32,
    move; a layer without one is left alone. `counts` are those of all sequences of a step. The rule
    sees only which side of the mean an expert is on; one that is exactly there stays.
    Source: arXiv 2408.15664, algorithm 1; report section 2, at rate 0.001.
    Differs: Switch and Mixtral add an auxiliary loss, whose gradient disturbs that of the text.
    Checked by: tests/train/test_balance.py
    """
    for layer, loads in counts.items():
        bias = biases.get(f"{layer}.router_bias")
        if bias is not None:
            missing = loads.sum() - loads * len(loads)  # E times what it lacks, a whole number
            bias += rate * np.sign(missing).astype(bias.dtype)
