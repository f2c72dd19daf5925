"""Record what every named point of a forward pass computed, and write it to a safetensors file."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import DTypeLike

from minstep.config import Config
from minstep.errors import InputError
from minstep.model import ModelWeights, decoder, head, run_layers
from minstep.mtp import mtp_forward
from minstep.store.output import Data, write_tensors
from minstep.store.stages import HEAD
from minstep.tap import Array, ScopedTap, Tap
from minstep.validation import check_prompt, flaw

Trace = dict[str, Array]
MOST_PROBS = 1 << 26  # attention probabilities kept of every layer: 256 MB in float32


class Recorder(ScopedTap):
    """Keeps every tensor whose full name `wants` accepts, in the order they come.

    It is kept itself, not a copy: no component writes into what it has shown. `then` is told of
    every tensor, kept or not, after it was kept. Raises InputError for one to keep as `finite`.
    """

    def __init__(
        self,
        tensors: Trace,
        wants: Callable[[str], bool] = lambda name: True,
        then: Callable[[str, Array], None] = lambda name, x: None,
    ) -> None:
        self.tensors, self._wants, self._then = tensors, wants, then

    def __call__(self, name: str, x: Array) -> Array:
        if self.wants(name):
            self.tensors[self._full(name)] = finite(self._full(name), x)
        self._then(self._full(name), x)
        return x

    def wants(self, name: str) -> bool:
        return self._wants(self._full(name))


def finite(name: str, x: Array) -> Array:
    """The tensor x itself, of any shape. Raises InputError, with its place, for what is not finite.

    Checked by: tests/parity/test_record.py
    """
    if what := flaw(x):
        message = "expected finite numbers: a weight here or before it is not, or is too large"
        raise InputError(f"{name} {what}, {message}")
    return x


def walk(
    tokens: Sequence[int],
    weights: ModelWeights,
    config: Config,
    dtype: DTypeLike,
    tap: Tap,
    first: int = 0,
    state: Array | None = None,
    end: int | None = None,
) -> None:
    """Run the stages first, ..., end - 1 as `stages` lists them; what they compute goes to `tap`.

    `state`: [T, D] after the stage before `first`. The head runs if `tap` wants any of it. MTP
    depths see the true next tokens. Weights of other stages are not looked at.
    Checked by: tests/model/test_golden.py, tests/parity/test_record.py
    """
    L, M = len(config.layers), len(config.mtp_layers)
    end = L + M + 2 if end is None else end
    main = slice(max(first - 1, 0), max(end - 1, 0))
    layers, specs = weights.layers[main], config.layers[main]
    if state is None:
        its_config = config._replace(layers=specs)
        state = decoder(tokens, weights._replace(layers=layers), its_config, dtype, tap=tap)
    else:
        state = run_layers(state, layers, specs, 0, config.rms_norm_eps, tap=tap)  # [T, D]
    if first <= L + 1 < end and (tap.wants("model.norm") or tap.wants(HEAD)):
        head(state, weights, config, tap)
    done = max(first - L - 2, 0)  # depths; each has taken a position
    mtp = slice(done, max(end - L - 2, 0))
    its_config = config._replace(mtp_layers=config.mtp_layers[mtp])
    mtp_forward(tokens[done:], state, weights._replace(mtp=weights.mtp[mtp]), its_config, tap)


def record(
    tokens: Sequence[int], weights: ModelWeights, config: Config, dtype: DTypeLike = np.float32
) -> Trace:
    """Run the main model over the sequence, then each MTP depth with the true next tokens.

    Returns every named tensor: names are the checkpoint's module paths. Attention probabilities
    [H, T, S] grow with T * T: where those of all layers are more than MOST_PROBS, they are kept for
    the first main layer of each kind and the last. Raises InputError for a bad prompt, and for a
    tensor that is not finite.
    """
    check_prompt(tokens, config)
    every, kinds = config.layers + config.mtp_layers, [spec.kind for spec in config.layers]
    shown = [*{kinds.index(kind) for kind in kinds}, len(kinds) - 1]
    if sum(spec.heads for spec in every) * len(tokens) ** 2 <= MOST_PROBS:
        shown = [*range(len(every))]
    probs = {f"{every[n].name}.self_attn.probs" for n in shown}
    trace: Trace = {}
    tap = Recorder(trace, lambda name: not name.endswith(".probs") or name in probs)
    walk(tokens, weights, config, dtype, tap)
    return trace


def described(tokens: Sequence[int], order: Sequence[str], **facts: str) -> dict[str, str]:
    """The metadata of a recording: the tokens, the names in order of computation, and facts."""
    lists = {"tokens": json.dumps(list(tokens)), "order": json.dumps(list(order))}
    return {"format": "minstep-trace", "engine": "minstep"} | lists | facts


def save_trace(trace: Trace, tokens: Sequence[int], facts: dict[str, str], path: Path) -> None:
    """Write the trace to `path`, its metadata as `described`, with `facts`. Raises OSError."""
    dtypes = {x.dtype.name for x in trace.values() if x.dtype.kind == "f"}
    dtype = {"dtype": dtypes.pop()} if len(dtypes) == 1 else {}
    tensors = {name: Data.of(x) for name, x in trace.items()}
    write_tensors(path, tensors, described(tokens, list(trace), **dtype, **facts))
