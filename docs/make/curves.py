"""Figures of what follows from the configuration alone, drawn as lines by the functions themselves.

Checked by: tests/docs/test_gallery.py
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from minstep.config import FULL, SLIDING, Config, LayerSpec
from minstep.cost.count import cache_bytes
from minstep.draw.charts import Point, line_chart
from minstep.fast.bf16 import BF16Array, to_bf16
from minstep.fast.fp8 import FP8Array, to_fp8
from minstep.mlp import MLPWeights, swiglu
from minstep.rope import inverse_frequencies
from minstep.store.stages import spans
from minstep.tap import Array

REACH = 20  # of the SwiGLU's inputs, on both sides
SHORTEST = 64  # text whose caches are counted
FINEST, COARSEST = 2.0**-20, 2.0**9  # magnitudes whose neighbours are looked at


def rope_svg(config: Config) -> str:
    """The wavelength of each rotated pair: full layers with and without scaling, sliding ones.

    Raises ValueError for a model that lacks either kind, or whose full layers are not scaled.
    """
    full, sliding = _first(config, FULL).rope, _first(config, SLIDING).rope
    if full.scaling is None:
        raise ValueError("the full layers are not scaled, expected a figure of scaling to have any")
    factor, low, high, original = full.scaling
    ropes = {
        f"full, scaled by {factor:g}": full,
        "full, not scaled": full._replace(scaling=None),
        "sliding": sliding,
    }
    waves = {name: 2 * math.pi / inverse_frequencies(r, np.float64) for name, r in ropes.items()}
    marks = {
        f"{config.max_positions:,}: the context": config.max_positions,
        f"{original / low:,.0f}: longer waves are stretched by {factor:g}": original / low,
        f"{original / high:,.0f}: shorter waves stay": original / high,
    }
    return line_chart(
        f"RoPE: θ is {full.theta:,.0f} in full layers, {sliding.theta:,.0f} in sliding ones",
        {name: _over_pairs(wave) for name, wave in waves.items()},
        "rotated pair",
        "wavelength in positions",
        bases=(0, 10),
        y_marks=marks,
    )


def scaling_svg(config: Config) -> str:
    """How much slower scaling makes each pair of a full layer turn."""
    rope = _first(config, FULL).rope
    plain = inverse_frequencies(rope._replace(scaling=None), np.float64)  # [P]
    slowed = plain / inverse_frequencies(rope, np.float64)  # [P]
    title = "Scaling slows the slow pairs of full layers"
    return line_chart(title, {"full": _over_pairs(slowed)}, "rotated pair", "times slower")


def cache_svg(config: Config) -> str:
    """Memory of the caches over the length of the text, beside the same layers all full.

    A window has room for what is in sight, and while MTP layers draft, for M positions to roll back
    and M + 1 to append. For a model that has both kinds of layers and MTP layers.
    """
    L, M = len(config.layers), len(config.mtp_layers)
    layers, mtp = (
        [spec._replace(window=spec.window and spec.window + 2 * M) for spec in specs]
        for specs in (config.layers, config.mtp_layers)
    )
    full = [spec for spec in layers if spec.window is None]
    parts: dict[str, Sequence[LayerSpec]] = {
        f"all {L} + {M} as if full": [spec._replace(window=None) for spec in layers + mtp],
        f"all {L} + {M} as they are": layers + mtp,
        f"{len(full)} full": full,
        f"{L - len(full)} sliding": [spec for spec in layers if spec.window],
        f"{M} MTP": mtp,
    }
    lengths = np.geomspace(SHORTEST, config.max_positions, 25).round().astype(int).tolist()
    series = {
        name: [(float(n), cache_bytes(specs, n) / 1e6) for n in lengths]
        for name, specs in parts.items()
    }
    window = _first(config, SLIDING).window or 0
    return line_chart(
        "Memory of the caches, 2 bytes a number",
        series,
        "positions of the text",
        "megabytes",
        bases=(4, 10),
        x_marks={f"window {window:,}": float(window)},
    )


def precision_svg(block: NDArray[np.float32]) -> str:
    """How far the next number is, as a share of the number: bfloat16, FP8, FP8 with a scale.

    `block` [O, I]: weights that share a scale. It is the scale that they are stored with.
    """
    low, high = to_bf16(np.array([FINEST, COARSEST], np.float32)).tolist()
    halves = BF16Array(np.arange(low, high + 1, dtype=np.uint16))
    scale = to_fp8(block, (len(block), block.shape[1]))[1]  # [1, 1]
    size = np.abs(block)
    return line_chart(
        "How coarse bfloat16 and FP8 are",
        {
            "bfloat16": _spacing(np.asarray(halves, np.float64)),
            "FP8, unscaled": _spacing(fp8_values(np.ones((1, 1), np.float32))),
            "FP8, block scale": _spacing(fp8_values(scale)),
        },
        "size of a number",
        "distance to the next one, in % of it",
        bases=(10, 10),
        x_marks={
            "half of a block's weights are smaller": float(np.median(size)),
            "its largest weight": float(size.max()),
        },
    )


def fp8_values(scale: NDArray[np.float32]) -> Array:
    """The positive numbers of FP8 in increasing order, times scale [1, 1], in float64."""
    codes = np.arange(1, 0x7F, dtype=np.uint8)[None]  # [1, 126]
    return np.asarray(FP8Array(codes, scale, codes.shape, "codes"), np.float64)[0]


def swiglu_svg(config: Config, gate: float | None = None, up: float | None = None) -> str:
    """SwiGLU without a limit and with each limit of the model, over each input not given."""
    limits: dict[str, float | None] = {"no limit": None}
    for who, key in (("experts", "swiglu_limit"), ("shared", "swiglu_limit_shared")):
        for limit in sorted({getattr(spec, key) for spec in config.layers} - {None}):
            clamped = [n for n, spec in enumerate(config.layers) if getattr(spec, key) == limit]
            limits[f"limit {limit:g}: {who} of {', '.join(spans(clamped))}"] = limit
    over = np.linspace(-REACH, REACH, 8 * REACH + 1)  # [T]
    inputs = [over if fixed is None else np.full_like(over, fixed) for fixed in (gate, up)]
    x = np.stack(inputs, axis=-1)  # [T, 2]
    eye = np.eye(2)
    weights = MLPWeights(eye[:1], eye[1:], np.ones((1, 1)))  # [1, 2], [1, 2], [1, 1]
    series = {
        name: list(zip(over.tolist(), swiglu(x, weights, limit)[:, 0].tolist(), strict=True))
        for name, limit in limits.items()
    }
    values = {"gate": gate, "up": up}
    free = " and ".join(name for name, fixed in values.items() if fixed is None)
    given = " and ".join(f"{name} is {x:g}" for name, x in values.items() if x is not None)
    label = f"{free}, where {given}" if given else free
    return line_chart(f"SwiGLU and its limits, over {free}", series, label, "silu(gate) × up")


def _first(config: Config, kind: str) -> LayerSpec:
    for spec in config.layers:
        if spec.kind == kind:
            return spec
    raise ValueError(f"the model has no layer of kind {kind}, expected one to draw")


def _over_pairs(values: Array) -> list[Point]:
    return [(float(pair), value) for pair, value in enumerate(values.tolist())]


def _spacing(values: Array) -> list[Point]:
    """Each of `values` [N], which increase, and the distance to the next in percent of it."""
    shares = 100 * np.diff(values) / values[:-1]  # [N-1]
    return list(zip(values[:-1].tolist(), shares.tolist(), strict=True))
