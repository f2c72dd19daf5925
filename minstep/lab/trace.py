"""Record what every named point of a forward pass computed, and write it to a safetensors file."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import DTypeLike
from safetensors import SafetensorError
from safetensors.numpy import save_file

from minstep.config import Config
from minstep.files import InputError
from minstep.generate import check_prompt
from minstep.model import ModelWeights, decoder, head
from minstep.mtp import mtp_forward
from minstep.tap import Array, Tap

Trace = dict[str, Array]


class Recorder(Tap):
    """Keeps a copy of every tensor whose full name `wants` accepts, in the order they come."""

    def __init__(
        self, tensors: Trace, wants: Callable[[str], bool] = lambda name: True, scope: str = ""
    ) -> None:
        self.tensors = tensors
        self._wants = wants
        self._scope = scope

    def __call__(self, name: str, x: Array) -> Array:
        if self.wants(name):
            self.tensors[self._full(name)] = np.array(x)
        return x

    def wants(self, name: str) -> bool:
        return self._wants(self._full(name))

    def at(self, scope: str) -> Tap:
        return Recorder(self.tensors, self._wants, self._full(scope))

    def _full(self, name: str) -> str:
        return f"{self._scope}.{name}" if self._scope else name


def record(
    tokens: Sequence[int], weights: ModelWeights, config: Config, dtype: DTypeLike = np.float32
) -> Trace:
    """Run the main model over the sequence, then each MTP depth with the true next tokens.

    Returns every named tensor: names are the checkpoint's module paths. Attention probabilities
    [H, T, S] are kept for the first layer of each kind and the last, since they grow with T * T.
    Raises InputError for a bad prompt.
    """
    check_prompt(tokens, config)
    kinds = [spec.kind for spec in config.layers]
    shown = {kinds.index(kind) for kind in kinds} | {len(kinds) - 1}
    probs = {f"{config.layers[n].name}.self_attn.probs" for n in shown}
    trace: Trace = {}
    tap = Recorder(trace, lambda name: not name.endswith(".probs") or name in probs)
    hidden = decoder(tokens, weights, config, dtype, tap=tap)
    head(hidden, weights, config, tap)
    mtp_forward(tokens, hidden, weights, config, tap)
    return trace


def save_trace(trace: Trace, tokens: Sequence[int], path: Path) -> None:
    """Write the trace to `path`; the metadata holds the tokens and the names' order as JSON.

    safetensors sorts tensors by dtype and name, so the order of computation is kept beside them.
    Raises InputError when it cannot be written.
    """
    metadata = {"format": "minstep-trace", "tokens": json.dumps(list(tokens))}
    try:
        save_file(trace, path, metadata | {"order": json.dumps(list(trace))})
    except SafetensorError as error:  # how the package says that the disk is full
        raise InputError(f"{path}: cannot be written: {error}") from error
