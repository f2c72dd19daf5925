"""One MoE layer: of a checkpoint beside memory and disk, and of the released sizes beside torch.

For torch the layer lies in a mapped file with transformers' own names, its experts in bfloat16, and
both sides map it, so that they read the same memory. Of the experts some are drawn and repeated,
which no side can notice: 9 GB are read all the same.
Checked by: tests/bench/test_bench.py, tests/bench/test_layers.py, tests/bench/test_peer.py
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from minstep.bench.peer import Setup
from minstep.bench.timing import LIMIT, Block, Found, Row, read_rate, rounds, seconds
from minstep.config import LayerSpec, MoESpec, parse_config
from minstep.errors import InputError
from minstep.fast.bf16 import BF16Array, to_bf16
from minstep.fast.pages import DONTNEED
from minstep.fast.threads import THREADS
from minstep.linear import as_float
from minstep.mlp import swiglu
from minstep.model import BlockWeights
from minstep.moe import moe
from minstep.store.checkpoint import Checkpoint, open_checkpoint
from minstep.store.config_file import read_config
from minstep.store.output import check_space, laid_out
from minstep.store.random_checkpoint import NEVER
from minstep.tap import Array
from minstep.weights import block_weights

ROUNDS, CALLS_ALONE, COLD = 3, 12, 5  # where one layer is timed alone
LAYER, DRAWN = 17, 24  # which layer; experts with numbers of their own
FEWER = 48  # experts of the quick form
MANY, FEW_CALLS, CALLS = 512, 1, 8  # tokens of a chunk; calls of a block with it, and with one
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.05}  # of the largest output
Raw = dict[str, Any]


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
        warm += [call() for _ in range(CALLS_ALONE)][2:]
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
    if not can_forget():
        return None
    times = []
    for _ in range(COLD):
        for mapped in checkpoint.maps.values():
            mapped.pages.asks = asks
        forget(checkpoint)
        times.append(call())
    for mapped in checkpoint.maps.values():
        mapped.pages.asks = True
    return float(np.median(times)) * 1e3


def can_forget() -> bool:
    """Whether the system has a way to drop what it holds of a file."""
    return DONTNEED is not None and hasattr(os, "posix_fadvise")


def forget(checkpoint: Checkpoint) -> None:
    """Have the system drop what it holds of the files; their pages are clean."""
    assert DONTNEED is not None
    for file, mapped in checkpoint.maps.items():
        mapped.pages.read = None  # ask for the experts ahead, as a first token does
        mapped.madvise(DONTNEED)
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def moe_layer(setup: Setup, raw: Raw | None = None, layer: int = LAYER) -> Found:
    """One token, and a chunk of 512 that needs every expert; `raw`: another model's config.json.

    One token is held against reading its weights alone, at the rate measured in the same round.
    Torch's float32 is timed for one token only: all experts would take 18 GB. The quick form has
    fewer experts, and so more tokens for each.
    """
    raw = read_config("step-3.5-flash")[0] if raw is None else raw
    raw = raw | {"moe_num_experts": min(FEWER, raw["moe_num_experts"])} if setup.quick else raw
    folder = layer_file(setup.folder / "moe", raw, layer, setup.seed)
    checkpoint = open_checkpoint(folder)
    experts = _spec(checkpoint, layer).experts
    drawn = min(DRAWN, experts)
    few, every = layer_half(checkpoint, layer, drawn), layer_half(checkpoint, layer, experts)
    errors: list[str] = []
    one = {"ours": _ours(few, 1, CALLS)}
    if setup.peer:
        for dtype in TOLERANCE:
            asked = {"folder": str(folder), "layer": layer, "dtype": dtype, "experts": drawn}
            setup.peer.ask("layer", name=f"one {dtype}", **asked)
            one[dtype] = _theirs(setup, few, dtype, 1, CALLS, errors)
    one[LIMIT] = lambda: bytes_used(few) / experts_rate(few)
    times = rounds(one, setup.rounds)
    rows = [Row("moe", f"one token of {bytes_used(few) / 1e6:,.0f} MB", times.pop("ours"), times)]
    many = {"ours": _ours(every, MANY, FEW_CALLS)}
    if setup.peer:
        setup.peer.ask("drop")
        asked = {"folder": str(folder), "layer": layer, "dtype": "bfloat16", "experts": experts}
        setup.peer.ask("layer", name="many bfloat16", **asked)
        many["bfloat16"] = _theirs(setup, every, "bfloat16", MANY, FEW_CALLS, errors)
    times = rounds(many, min(setup.rounds, 3))
    rows.append(Row("moe", f"{MANY} tokens, {experts} experts", times.pop("ours"), times))
    if setup.peer:
        setup.peer.ask("drop")
    return Found(rows, sorted(set(errors)))


def layer_file(folder: Path, raw: Raw, layer: int, seed: int, most: int | None = None) -> Path:
    """The folder with that layer's MLP half alone, made where it is not there yet, and on disk.

    `most`: only so many experts are written, the rest of the file is a hole.
    """
    if folder.exists():
        return folder
    spec = parse_config(raw).layers[layer].moe
    assert spec
    D, E, F, S = raw["hidden_size"], spec.experts, spec.width, spec.shared_width
    start = f"model.layers.{layer}.mlp"
    stored = {
        f"{start}.gate.weight": ("F32", (E, D)),
        f"{start}.gate.e_score_correction_bias": ("F32", (E,)),
        f"{start}.experts.gate_up_proj": ("BF16", (E, 2 * F, D)),
        f"{start}.experts.down_proj": ("BF16", (E, D, F)),
        f"{start}.shared_experts.gate_proj.weight": ("BF16", (S, D)),
        f"{start}.shared_experts.up_proj.weight": ("BF16", (S, D)),
        f"{start}.shared_experts.down_proj.weight": ("BF16", (D, S)),
    }
    header, places = laid_out(stored, {"format": "pt"})
    written = E if most is None else min(most, E)
    check_space(folder, 6 * D * (written * F + S) + 4 * E * (D + 1))
    folder.mkdir()
    rng = np.random.default_rng(seed)
    with (folder / "model.safetensors").open("wb") as opened:
        opened.write(header)
        for name, (dtype, shape) in stored.items():
            rows = min(DRAWN, written) if len(shape) == 3 else shape[0]
            scale = np.float32(0.1 if len(shape) == 1 else shape[-1] ** -0.5)
            x = rng.standard_normal((rows, *shape[1:]), np.float32) * scale
            bits = (x if dtype == "F32" else to_bf16(x)).tobytes()
            whole = written * len(bits) // rows if len(shape) == 3 else len(bits)
            opened.seek(places[name])
            for at in range(0, whole, len(bits)):
                opened.write(bits[: whole - at])
        opened.flush()
        os.fsync(opened.fileno())  # or the system would write it while something is timed
    stored_config = json.dumps(raw | {"torch_dtype": "bfloat16"})
    (folder / "config.json").write_text(stored_config, encoding="utf-8")
    return folder


def layer_half(checkpoint: Checkpoint, layer: int, experts: int) -> Half:
    """The MLP half of a layer whose file has nothing else; its router chooses the first experts."""
    config = checkpoint.config

    def get(name: str, shape: tuple[int, ...]) -> Any:
        return checkpoint.stored(name, shape) if name in checkpoint.tensors else np.empty(0)

    weights = block_weights(config.layers[layer], config.hidden_size, get)
    assert weights.moe and weights.moe.router_bias is not None
    bias = as_float(weights.moe.router_bias, np.float32).copy()  # [E]
    bias[experts:] = NEVER
    moe = weights.moe._replace(router_bias=bias)
    return Half(config.layers[layer], weights._replace(moe=moe))


def tokens_drawn(n: int, count: int, size: int) -> Array:
    """The n-th input [count, size] float32, rounded to bfloat16: the same on both sides."""
    x = np.random.default_rng(n).standard_normal((count, size), np.float32)
    return np.asarray(BF16Array(to_bf16(x)), np.float32)


def _spec(checkpoint: Checkpoint, layer: int) -> MoESpec:
    spec = checkpoint.config.layers[layer].moe
    assert spec
    return spec


def _ours(half: Half, count: int, calls: int) -> Block:
    """A block of ours: each call other tokens, which choose other experts."""
    warm_up, size = _warm_up(calls), half.weights.moe.gate.shape[1] if half.weights.moe else 0

    def block() -> float:
        xs = [tokens_drawn(n, count, size) for n in range(warm_up + calls)]
        return min([seconds(_call(half, x)) for x in xs][warm_up:])

    return block


def _warm_up(calls: int) -> int:
    """Calls that do not count; a single one takes seconds, and its first round warms up."""
    return 2 if calls > 1 else 0


def _call(half: Half, x: Array) -> Callable[[], Array]:
    return lambda: half.run(x)


def _theirs(
    setup: Setup, half: Half, dtype: str, count: int, calls: int, errors: list[str]
) -> Block:
    """The peer's block, and whether its last row of the first call is ours."""
    name = f"{'one' if count == 1 else 'many'} {dtype}"
    size = half.weights.moe.gate.shape[1] if half.weights.moe else 0

    def block() -> float:
        assert setup.peer
        asked = {"name": name, "tokens": count, "calls": calls, "warm_up": _warm_up(calls)}
        answer = setup.peer.ask("run_layer", **asked)
        if not errors:
            row = half.run(tokens_drawn(0, count, size))[-1]
            off = np.abs(row - answer["row"]).max() / np.abs(row).max()
            if not off <= TOLERANCE[dtype]:
                errors.append(f"moe, {count} tokens: {dtype} is off by {off:.1e} of the largest")
        return float(answer["seconds"])

    return block
