"""Opening a checkpoint of the released size, and experts that come from the disk.

Checked by: tests/bench/test_layers.py
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from minstep.bench.moe import (
    LAYER,
    Half,
    Raw,
    can_forget,
    forget,
    layer_file,
    layer_half,
    tokens_drawn,
)
from minstep.bench.peer import Setup
from minstep.bench.timing import Block, Found, Row, fastest, rounds, seconds
from minstep.config import parse_config
from minstep.moe import route
from minstep.store.checkpoint import INDEX, Checkpoint, open_checkpoint
from minstep.store.config_file import read_config
from minstep.store.random_checkpoint import Form, save_random

SHARDS, WRITTEN = 44, 24  # of the released checkpoint; experts that are written here
Span = tuple[Path, int, int]  # file, first byte, bytes


def reading(
    setup: Setup, raw: Raw | None = None, layer: int = LAYER, shards: int = SHARDS
) -> Found:
    """Opening all shards against reading their headers, and cold experts against plain reads.

    Cold: the system is asked to forget the file before every call. One token then reads its experts
    through the map, and the plain side reads the same bytes with ordinary calls. A system that has
    no way to forget has no such row.
    """
    raw = read_config("step-3.5-flash")[0] if raw is None else raw
    config, whole = parse_config(raw), setup.folder / "holes"
    form = Form("bfloat16", shards, holds=lambda name: False)
    save_random(raw, config, np.random.default_rng(setup.seed), whole, form)
    opening = {
        "ours": lambda: fastest(lambda: open_checkpoint(whole), 3),
        "plain reads": lambda: fastest(lambda: _headers(whole), 3),
    }
    times = rounds(opening, setup.rounds)
    count = len(open_checkpoint(whole).tensors)
    rows = [Row("reading", f"open {count} tensors", times.pop("ours"), times)]
    notes = [f"the plain side reads and parses {shards} headers and the index, and checks nothing"]
    if not can_forget():
        return Found(rows, notes=[*notes, "this system has no way to forget a file: nothing cold"])
    folder = layer_file(setup.folder / "moe", raw, layer, setup.seed, most=WRITTEN)
    checkpoint = open_checkpoint(folder)
    spec = checkpoint.config.layers[layer].moe
    assert spec
    half = layer_half(checkpoint, layer, min(WRITTEN, spec.experts))
    size = sum(nbytes for _, _, nbytes in _parts(checkpoint, half, _token(half, 0)))
    cold = {"ours": _cold(checkpoint, half, is_plain=False)}
    cold["plain reads"] = _cold(checkpoint, half, is_plain=True)
    times = rounds(cold, setup.rounds)
    rows.append(Row("reading", f"cold, {size / 1e6:,.0f} MB", times.pop("ours"), times))
    return Found(rows, notes=notes)


def _headers(folder: Path) -> list[Any]:
    """The index and the header of each file, read and parsed."""
    index = json.loads((folder / INDEX).read_bytes()) if (folder / INDEX).exists() else {}
    found = [index]
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as opened:
            found.append(json.loads(opened.read(int.from_bytes(opened.read(8), "little"))))
    return found


def _cold(checkpoint: Checkpoint, half: Half, is_plain: bool) -> Block:
    """The median of three tokens, each with nothing of the file in memory before."""

    def block() -> float:
        times = []
        for n in range(3):
            x = _token(half, n)
            parts = [*_parts(checkpoint, half, x)]
            forget(checkpoint)
            times.append(seconds(_plain(parts) if is_plain else _run(half, x)))
        return float(np.median(times))

    return block


def _run(half: Half, x: Any) -> Callable[[], Any]:
    return lambda: half.run(x)


def _plain(parts: list[Span]) -> Callable[[], None]:
    """Read so many bytes from each place, one after the other, into memory that is there."""
    buffer = memoryview(bytearray(max(nbytes for _, _, nbytes in parts)))

    def read() -> None:
        for file, start, nbytes in parts:
            with file.open("rb") as opened:
                opened.seek(start)
                opened.readinto(buffer[:nbytes])

    return read


def _token(half: Half, n: int) -> Any:
    assert half.weights.moe
    return tokens_drawn(n, 1, half.weights.moe.gate.shape[1])


def _parts(checkpoint: Checkpoint, half: Half, x: Any) -> Iterator[Span]:
    """Where the matrices lie that the token x [1, D] is multiplied with, the router's left out."""
    assert half.weights.moe and half.spec.moe
    (ids,) = route(x, half.weights.moe, half.spec.moe).ids
    stacks = half.matrices()
    matrices = [stack[e] for e in ids for stack in stacks[:3]] + stacks[3:]
    for matrix in matrices:
        bits = getattr(matrix, "bits", matrix)
        at = bits.__array_interface__["data"][0]
        for file, mapped in checkpoint.maps.items():
            if 0 <= at - mapped.address < len(mapped):
                yield file, at - mapped.address, bits.nbytes
