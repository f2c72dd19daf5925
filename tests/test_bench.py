"""bench: what it reports adds up, on any checkpoint; how fast this machine is is nobody's test."""

import json
from pathlib import Path

import numpy as np
import pytest

from minstep import open_checkpoint, pages
from minstep.lab.bench import bench_moe
from tests.conftest import GOLDEN, Refused, Run

KEYS = {"layer", "threads", "bytes", "read_gbps", "gbps", "share", "warm_ms", "warm_median_ms"}
KEYS |= {"plain_ms", "cold_ms", "cold_ahead_ms"}


@pytest.fixture(scope="module")
def fp8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from minstep.cli import main

    out = tmp_path_factory.mktemp("bench") / "fp8"
    assert main(["make-tiny", "tiny", "--out", str(out), "--dtype", "fp8"]) == 0
    return out


@pytest.mark.parametrize("folder", ["tiny/fp32", "tiny/bf16", "fp8"])
def test_figures_belong_together(folder: str, fp8: Path, run: Run) -> None:
    model = fp8 if folder == "fp8" else GOLDEN / folder
    ran = run("bench", "--model", model, "--layer", 3, "--json")
    assert (ran.code, ran.err) == (0, "")
    report = json.loads(ran.out)
    assert report.keys() == KEYS and report["layer"] == 3
    # tiny: 4 of 16 experts of width 24 and a shared one of 32, hidden size 64
    sizes = {"tiny/fp32": (4, 4), "tiny/bf16": (2, 2), "fp8": (1, 2)}[folder]
    assert report["bytes"] == 3 * 64 * (4 * 24 * sizes[0] + 32 * sizes[1])
    assert report["gbps"] == pytest.approx(report["bytes"] / report["warm_ms"] / 1e6)
    assert report["share"] == pytest.approx(report["gbps"] / report["read_gbps"])
    assert 0 < report["warm_ms"] <= report["warm_median_ms"]
    lines = run("bench", "--model", model, "--layer", 3).out
    assert "of reading alone" in lines and "asked for ahead" in lines


def test_a_layer_without_experts_is_refused(refused: Refused) -> None:
    for layer in ("0", "8", "99"):
        naming = (f"--layer {layer}", "no MoE layer", "expected 2 to 7")
        refused("bench", "--model", GOLDEN / "tiny" / "bf16", "--layer", layer, naming=naming)


def test_afterwards_weights_are_asked_for_ahead_again(monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(GOLDEN / "tiny" / "bf16")
    bench_moe(checkpoint, 3, np.random.default_rng(0))
    assert all(mapped.pages.asks for mapped in checkpoint.maps.values())
    monkeypatch.setattr("minstep.lab.bench.DONTNEED", None)  # as on a system that cannot forget
    report = bench_moe(checkpoint, 3, np.random.default_rng(0))
    assert report["cold_ms"] is None and report["cold_ahead_ms"] is None
    assert pages.DONTNEED is not None
