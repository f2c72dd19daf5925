"""Figures of what passes through the layers: the size of states, and how far ports depart.

Checked by: tests/docs/test_gallery.py
"""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from minstep.config import Config
from minstep.draw.charts import Point, line_chart
from minstep.fast.bf16 import BF16Array, to_bf16
from minstep.model import ModelWeights, decoder
from minstep.parity.compare import TOLERANCES, compare
from minstep.parity.known_bugs import Footgun
from minstep.parity.trace import Recorder, Trace
from minstep.parity.variants import variant
from minstep.store.stages import EMBEDDING
from minstep.tap import Array

Round = Callable[[Array], Array]
LEFT_OUT = (".ids", ".margin", ".probs")  # what is no state
LEAST = 1e-8  # error that is drawn


class Rounding(Recorder):
    """Rounds all that it is shown as a port would that keeps it in fewer bits, and keeps it too."""

    def __init__(self, tensors: Trace, rounded: Round) -> None:
        super().__init__(tensors, lambda name: not name.endswith(LEFT_OUT))
        self._rounded = rounded

    def __call__(self, name: str, x: Array) -> Array:
        return super().__call__(name, self._rounded(x) if x.dtype.kind == "f" else x)


def norm_svg(tokens: Sequence[int], weights: ModelWeights, config: Config) -> str:
    """The root mean square of what enters each layer, and of what its first norm makes of it."""
    trace: Trace = {}
    decoder(tokens, weights, config, np.float64, tap=Recorder(trace))
    enters = [EMBEDDING, *(spec.name for spec in config.layers[:-1])]
    normed = [f"{spec.name}.input_layernorm" for spec in config.layers]
    series = {
        name: [
            (float(n), float(np.sqrt(np.square(trace[key]).mean()))) for n, key in enumerate(keys)
        ]
        for name, keys in (("residual stream", enters), ("after the norm", normed))
    }
    title = "The stream grows, and what layers read of it does not"
    return line_chart(title, series, "layer", "root mean square of the states")


def departure_svg(
    tokens: Sequence[int], weights: ModelWeights, config: Config, footgun: Footgun
) -> str:
    """How far each tensor is from float64 in ports: of float32, of bfloat16, and of one with a bug.

    Every named tensor is rounded, sums within it are not, so that any machine draws the same. The
    port with the bug is of float32.
    """
    run = partial(_run, tokens, weights, config)
    ours = run(lambda x: x)
    ports = {
        "float32": run(_float32),
        "bfloat16": run(_bfloat16),
        "float32 with a bug": run(_float32, footgun),
    }
    series: dict[str, list[Point]] = {}
    departs: dict[str, float] = {}
    for port, theirs in ports.items():
        tolerance = TOLERANCES["bfloat16" if port == "bfloat16" else "float32"]
        found = [compare(name, x, theirs[name], tolerance) for name, x in ours.items()]
        series[port] = [(n, max(each.max_error, LEAST)) for n, each in enumerate(found)]
        if port == "float32 with a bug":
            departs = {each.name: n for n, each in enumerate(found) if not each.is_match}
    first = next(iter(departs.items()), None)
    return line_chart(
        f"A bug departs at one tensor: {footgun.bug}",
        series,
        "tensor, in the order in which the model computes them",
        "largest error, as a share of the largest value",
        bases=(0, 10),
        x_marks=dict([first] if first else []),
    )


def _run(
    tokens: Sequence[int],
    weights: ModelWeights,
    config: Config,
    rounded: Round,
    footgun: Footgun | None = None,
) -> Trace:
    trace: Trace = {}
    model = variant(footgun).model
    model.decoder(tokens, weights, config, np.float64, tap=Rounding(trace, rounded))
    return trace


def _float32(x: Array) -> Array:
    return x.astype(np.float32).astype(x.dtype)


def _bfloat16(x: Array) -> Array:
    return np.asarray(BF16Array(to_bf16(x.astype(np.float32))), x.dtype)
