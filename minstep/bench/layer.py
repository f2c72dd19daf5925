"""How fast a MoE layer of a checkpoint is, beside what memory and disk of this machine allow."""

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from minstep.bench.timing import read_rate, seconds
from minstep.config import LayerSpec
from minstep.errors import InputError
from minstep.fast.pages import DONTNEED
from minstep.fast.threads import THREADS
from minstep.linear import as_float
from minstep.mlp import swiglu
from minstep.model import BlockWeights
from minstep.moe import moe
from minstep.store.checkpoint import Checkpoint
from minstep.tap import Array
from minstep.weights import block_weights

ROUNDS, CALLS, COLD = 3, 12, 5


class Half(NamedTuple):
    """The MLP half of one MoE layer: routed experts and the shared one."""

    spec: LayerSpec
    weights: BlockWeights

    def run(self, x: Array) -> Array:
        """x [T, D] -> [T, D], as model.block computes it."""
        assert self.spec.moe and self.weights.moe and self.weights.share_expert
        routed = moe(x, self.weights.moe, self.spec.moe, self.spec.swiglu_limit)
        return routed + swiglu(x, self.weights.share_expert, self.spec.swiglu_limit_shared)

    def matrices(self) -> list[Any]:
        """Three stored arrays of the routed experts, and three of the shared one."""
        assert self.weights.moe and self.weights.share_expert
        return [*self.weights.moe[2:], *self.weights.share_expert]


def bench_moe(checkpoint: Checkpoint, n: int, rng: np.random.Generator) -> dict[str, Any]:
    """Time the MLP half of layer n for one token at a time, in float32.

    Warm, in milliseconds: the fastest and the median call, and the same maths where each matrix is
    converted as a whole first. `read_gbps`: at what rate the same threads read the same bytes and
    do nothing else; `share`: what the fastest call reaches of it. Cold calls begin with nothing of
    the layer's files in memory, once without and once with asking for the chosen experts ahead;
    None where the system has no way to forget a file. Raises InputError for another kind of layer.
    Checked by: tests/bench/test_bench.py
    """
    layers = checkpoint.config.layers
    if not 0 <= n < len(layers) or layers[n].moe is None:
        found = [k for k, spec in enumerate(layers) if spec.moe]
        known = f"{found[0]} to {found[-1]}" if found else "a model that has any"
        raise InputError(f"--layer {n}: is no MoE layer of {checkpoint.path}, expected {known}")
    half = Half(
        layers[n], block_weights(layers[n], checkpoint.config.hidden_size, checkpoint.stored)
    )

    def call() -> float:
        x = rng.standard_normal((1, checkpoint.config.hidden_size), np.float32)
        return seconds(lambda: half.run(x))

    rates, warm = list[float](), list[float]()
    for _ in range(ROUNDS):
        warm += [call() for _ in range(CALLS)][2:]
        rates.append(experts_rate(half))
    plain = min(_plain(half, rng) for _ in range(ROUNDS))
    nbytes = bytes_used(half)
    return {
        "layer": n,
        "threads": THREADS,
        "bytes": nbytes,
        "read_gbps": max(rates) / 1e9,
        "gbps": nbytes / min(warm) / 1e9,
        "share": nbytes / min(warm) / max(rates),
        "warm_ms": min(warm) * 1e3,
        "warm_median_ms": float(np.median(warm)) * 1e3,
        "plain_ms": plain * 1e3,
        "cold_ms": _cold(checkpoint, call, asks=False),
        "cold_ahead_ms": _cold(checkpoint, call, asks=True),
    }


def bench_lines(report: dict[str, Any]) -> str:
    """The report as text for a terminal."""
    lines = [
        f"layer {report['layer']}, one token, {report['threads']} threads, "
        f"{report['bytes'] / 1e6:,.0f} MB of weights used",
        f"reading alone   {report['read_gbps']:8.1f} GB/s",
        f"warm            {report['warm_ms']:8.1f} ms, {report['gbps']:.1f} GB/s, "
        f"{report['share']:.2f} of reading alone (median {report['warm_median_ms']:.1f} ms)",
        f"plain, warm     {report['plain_ms']:8.1f} ms: each matrix converted as a whole first",
    ]
    if report["cold_ms"] is not None:
        lines.append(f"cold            {report['cold_ms']:8.1f} ms: read as it is needed")
        lines.append(f"cold, asked     {report['cold_ahead_ms']:8.1f} ms: experts asked for ahead")
    return "\n".join(lines)


def _bits(weight: Any) -> Any:
    """The array that a weight's bytes lie in."""
    return getattr(weight, "bits", weight)


def experts_rate(half: Half) -> float:
    """Bytes a second at which threads read 16 experts from where they lie."""
    return read_rate(_bits(stack)[e] for e in range(16) for stack in half.matrices()[:3])


def bytes_used(half: Half) -> int:
    """Bytes of the weights that one token is multiplied with."""
    routed, shared = half.matrices()[:3], half.matrices()[3:]
    assert half.spec.moe
    each_expert = sum(_bits(stack)[0].nbytes for stack in routed)
    return half.spec.moe.top_k * each_expert + sum(_bits(weight).nbytes for weight in shared)


def _plain(half: Half, rng: np.random.Generator) -> float:
    """Seconds for one token where each matrix is converted as a whole, one after the other."""
    assert half.spec.moe
    chosen = range(half.spec.moe.top_k)
    matrices = [stack[e] for e in chosen for stack in half.matrices()[:3]] + half.matrices()[3:]
    xs = [rng.standard_normal((1, matrix.shape[1]), np.float32) for matrix in matrices]
    pairs = list(zip(xs, matrices, strict=True))
    return seconds(lambda: [x @ as_float(matrix, np.float32).T for x, matrix in pairs])


def _cold(checkpoint: Checkpoint, call: Callable[[], float], asks: bool) -> float | None:
    """The median milliseconds of a call with nothing of the checkpoint in memory."""
    if DONTNEED is None or not hasattr(os, "posix_fadvise"):
        return None
    times = []
    for _ in range(COLD):
        for file, mapped in checkpoint.maps.items():
            mapped.pages.asks, mapped.pages.read = asks, None
            mapped.madvise(DONTNEED)
            with file.open("rb") as opened:
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        times.append(call())
    for mapped in checkpoint.maps.values():
        mapped.pages.asks = True
    return float(np.median(times)) * 1e3
