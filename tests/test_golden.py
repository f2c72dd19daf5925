"""Every named tensor and every greedy token of the golden models, in both precisions."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import minstep
from minstep.lab.trace import Trace, record

GOLDEN = Path(__file__).parent / "golden"
FILES = sorted(path.parent for path in GOLDEN.glob("*/*/config.json"))
TOLERANCE = {"float64": 1e-10, "float32": 2e-5}


def meta(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder.parent / "meta.json").read_text())
    return content


def departures(trace: Trace, golden: Trace, tolerance: float) -> list[str]:
    """One line for each golden tensor that the trace misses, in the order of computation."""
    assert set(golden) <= set(trace), sorted(set(golden) - set(trace))
    lines = []
    for name in [name for name in trace if name in golden]:
        assert trace[name].shape == golden[name].shape, name
        error = np.abs(trace[name] - golden[name]).max() / np.abs(golden[name]).max()
        exact = name.endswith(".ids")
        if not error <= (0 if exact else tolerance):
            lines.append(f"{name} departs by {error:.1e} of its largest value")
    return lines


def short(folder: Path) -> str:
    return f"{folder.parent.name}-{folder.name}"


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("folder", FILES, ids=short)
def test_every_named_tensor_equals_the_golden_one(folder: Path, dtype: str) -> None:
    checkpoint = minstep.open_checkpoint(folder)
    prompt = meta(folder)["prompt"]
    trace = record(prompt, checkpoint.weights(), checkpoint.config, np.dtype(dtype))
    golden = load_file(folder.parent / "golden_f64.safetensors")
    lines = departures(trace, golden, TOLERANCE[dtype])
    assert not lines, f"{len(lines)} of {len(golden)} depart; first: {lines[0]}"


@pytest.mark.parametrize("folder", FILES, ids=short)
def test_activations_keep_the_dtype_that_was_asked_for(folder: Path) -> None:
    checkpoint = minstep.open_checkpoint(folder)
    for dtype in TOLERANCE:
        trace = record([3, 5, 4], checkpoint.weights(), checkpoint.config, np.dtype(dtype))
        others = {name: x.dtype for name, x in trace.items() if x.dtype != dtype}
        assert all(name.endswith(".ids") for name in others), others


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("chunk", [None, 1, 3, 7])
@pytest.mark.parametrize("folder", FILES, ids=short)
def test_greedy_tokens_equal_the_golden_ones_for_any_prefill_chunk(
    folder: Path, chunk: int | None, dtype: str
) -> None:
    checkpoint = minstep.open_checkpoint(folder)
    golden = meta(folder)["greedy"]
    tokens = minstep.generate(
        meta(folder)["prompt"],
        checkpoint.weights(),
        checkpoint.config,
        np.random.default_rng(0),
        max_tokens=len(golden),
        dtype=np.dtype(dtype),
        chunk=chunk,
        ignore_eos=True,
    )
    assert list(tokens) == golden


def test_a_departure_is_reported_by_the_name_of_the_first_tensor() -> None:
    golden = {"a": np.ones(2), "b": np.ones(2), "b.ids": np.array([3])}
    trace = {"a": np.ones(2), "b": np.array([1, 1.5]), "b.ids": np.array([4]), "more": np.ones(1)}
    lines = departures(trace, golden, 1e-10)
    assert [line.split()[0] for line in lines] == ["b", "b.ids"]
    assert "5.0e-01" in lines[0]
