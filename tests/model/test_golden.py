"""Every named tensor and every greedy token of the golden models, in both precisions."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from safetensors.numpy import load_file

import minstep
from minstep import attention
from minstep.fast.pages import SMALL
from minstep.parity.trace import Recorder, Trace, record
from tests.support.tiers import cases

GOLDEN = Path(__file__).parents[1] / "golden"
FILES = sorted(path.parent for path in GOLDEN.glob("*/*/config.json"))
MODELS = [folder for folder in FILES if folder.name == "bf16"]  # the same numbers as in fp32/
WEIGHTS = {folder: minstep.open_checkpoint(folder).weights() for folder in MODELS}
TOLERANCE = {"float64": 1e-10, "float32": 2e-5}


class Text(NamedTuple):
    """What a greedy decode gave: new tokens, and a row of the golden `mtp_trace` for each step."""

    tokens: list[int]
    trace: list[list[Any]]


def decode(folder: Path, chunk: int | None, dtype: str, count: int) -> Text:
    """Continue the golden prompt by as many tokens as were written down, with `count` drafts."""
    text = Text([], [])
    for step in minstep.steps(
        meta(folder)["prompt"],
        WEIGHTS[folder],
        minstep.load_config(folder),
        np.random.default_rng(0),
        max_tokens=len(meta(folder)["greedy"]),
        dtype=np.dtype(dtype),
        chunk=chunk,
        ignore_eos=True,
        num_draft_tokens=count,
    ):
        if step.drafts:
            text.trace.append([len(text.tokens), step.drafts, step.accepted])
        text.tokens.extend(step.tokens)
    return text


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


@pytest.mark.parametrize("small", [0, SMALL], ids=["as stored", "small ones converted"])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("folder", FILES, ids=short)
def test_every_named_tensor_equals_the_golden_one(
    folder: Path, dtype: str, small: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minstep.store.checkpoint.SMALL", small)
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
@pytest.mark.parametrize("folder", FILES, ids=short)
def test_every_activation_equals_the_golden_one_when_attention_goes_in_blocks(
    folder: Path, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    real = attention.attend_in_blocks
    monkeypatch.setattr(attention, "attend_in_blocks", lambda *a: calls.append(a) or real(*a))
    monkeypatch.setattr(attention, "LARGE", 0)
    monkeypatch.setattr(attention, "ROWS", 11)
    monkeypatch.setattr(attention, "KEYS", 3)
    checkpoint = minstep.open_checkpoint(folder)
    prompt, weights, config = meta(folder)["prompt"], checkpoint.weights(), checkpoint.config
    trace: Trace = {}
    tap = Recorder(trace, lambda name: not name.endswith(".probs"))
    hidden = minstep.decoder(prompt, weights, config, dtype, tap=tap)
    minstep.head(hidden, weights, config, tap)
    minstep.mtp_forward(prompt, hidden, weights, config, tap)
    assert len(calls) == len(config.layers) + len(config.mtp_layers)
    golden = load_file(folder.parent / "golden_f64.safetensors")
    golden = {name: x for name, x in golden.items() if not name.endswith(".probs")}
    lines = departures(trace, golden, TOLERANCE[dtype])
    assert not lines, f"{len(lines)} of {len(golden)} depart; first: {lines[0]}"


@pytest.mark.parametrize(
    ("chunk", "dtype"),
    cases(
        [(None, "float32"), (1, "float64"), (7, "float32")],
        [(chunk, dtype) for chunk in (None, 1, 3, 7, 512) for dtype in TOLERANCE],
    ),
)
@pytest.mark.parametrize("folder", MODELS, ids=lambda folder: folder.parent.name)
def test_greedy_tokens_and_drafts_are_the_golden_ones_for_any_chunk_and_draft_count(
    folder: Path, chunk: int | None, dtype: str
) -> None:
    golden, depths = meta(folder), len(WEIGHTS[folder].mtp)
    for count in range(depths + 1):
        text = decode(folder, chunk, dtype, count)
        assert text.tokens == golden["greedy"], f"{count} drafts"
        if count == depths:
            assert text.trace == golden.get("mtp_trace", [])
        assert all(len(drafts) == count for _, drafts, _ in text.trace)


@pytest.mark.parametrize("folder", MODELS, ids=lambda folder: folder.parent.name)
def test_greedy_tokens_and_drafts_are_the_golden_ones_when_attention_goes_in_blocks(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "LARGE", 0)
    monkeypatch.setattr(attention, "ROWS", 8)
    monkeypatch.setattr(attention, "KEYS", 5)
    text = decode(folder, 7, "float64", len(WEIGHTS[folder].mtp))
    assert text == (meta(folder)["greedy"], meta(folder).get("mtp_trace", []))


def test_a_departure_is_reported_by_the_name_of_the_first_tensor() -> None:
    golden = {"a": np.ones(2), "b": np.ones(2), "b.ids": np.array([3])}
    trace = {"a": np.ones(2), "b": np.array([1, 1.5]), "b.ids": np.array([4]), "more": np.ones(1)}
    lines = departures(trace, golden, 1e-10)
    assert [line.split()[0] for line in lines] == ["b", "b.ids"]
    assert "5.0e-01" in lines[0]
