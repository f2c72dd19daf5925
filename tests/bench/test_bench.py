"""bench: what it reports adds up, with and without torch; how fast a machine is, nobody tests."""

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from minstep import open_checkpoint
from minstep.bench import decoding, timing
from minstep.bench.moe import bench_moe
from minstep.bench.peer import Setup
from minstep.bench.report import (
    TARGETS,
    bench_report,
    bench_table,
    case_lines,
    charts,
    is_busy,
    judged,
    target,
)
from minstep.bench.timing import LIMIT, Curve, Found, Row, read_rate, rounds
from minstep.bench.training import training
from minstep.fast import pages
from tests.conftest import GOLDEN, Refused, Run

KEYS = {"layer", "threads", "bytes", "read_gbps", "gbps", "share", "warm_ms", "warm_median_ms"}
KEYS |= {"plain_ms", "cold_ms", "cold_ahead_ms"}
MACHINE: dict[str, Any] = {"threads": 2, "numpy": "2", "idle": 0.2, "read_rates": [1e9, 2e9]}
MACHINE |= {"peer": None, "no_peer": "No module named 'torch'"}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few tokens and no pauses."""
    monkeypatch.setattr(timing, "PAUSE", 0.0)
    for name, value in {"NEW": 3, "LONG": 12, "CONTEXTS": (4, 8), "AFTER": 2}.items():
        monkeypatch.setattr(decoding, name, value)


# One layer


@pytest.fixture(scope="module")
def fp8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from minstep.cli.main import main

    out = tmp_path_factory.mktemp("bench") / "fp8"
    assert main(["make-tiny", "tiny", "--out", str(out), "--dtype", "fp8"]) == 0
    return out


@pytest.mark.parametrize("folder", ["tiny/fp32", "tiny/bf16", "fp8"])
def test_figures_of_a_layer_belong_together(folder: str, fp8: Path, run: Run) -> None:
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
    monkeypatch.setattr("minstep.bench.moe.DONTNEED", None)  # as on a system that cannot forget
    report = bench_moe(checkpoint, 3, np.random.default_rng(0))
    assert report["cold_ms"] is None and report["cold_ahead_ms"] is None
    assert pages.DONTNEED is not None


# Rounds, rows and the report


def test_sides_take_turns_a_block_at_a_time(small: None) -> None:
    order = list[str]()

    def side(name: str, took: float) -> timing.Block:
        return lambda: order.append(name) or took  # type: ignore[func-returns-value]

    times = rounds({"a": side("a", 1.0), "b": side("b", 2.0)}, 3)
    assert order == ["a", "b"] * 3 and times == {"a": [1.0] * 3, "b": [2.0] * 3}


def test_a_ratio_is_of_the_fastest_rounds_and_has_a_spread() -> None:
    row = Row("tiny", "decode", [2.0, 1.0, 4.0], {"float32": [5.0, 3.0, 4.0]})
    assert row.ratio("float32") == (3.0, 1.0, 3.0)


def test_reading_counts_all_bytes_and_takes_any_array() -> None:
    arrays = [np.zeros((3, 5), np.uint8), np.zeros((64, 64), np.float32)]
    assert read_rate(arrays) > 0 and read_rate(arrays, in_threads=False) > 0


def test_the_share_of_idle_processors_is_known_or_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(timing, "STAT", tmp_path / "stat")
    assert timing.idle_share(0) is None
    lines = iter(["cpu 10 0 10 100 0 0 0 0", "cpu 20 0 20 150 30 0 0 0"])
    stat = tmp_path / "stat"
    stat.write_text(next(lines))
    monkeypatch.setattr(timing.time, "sleep", lambda _: stat.write_text(next(lines)))
    assert timing.idle_share() == pytest.approx(80 / 100)


def test_a_time_is_that_of_the_fastest_call_after_two_that_do_not_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lengths = iter([0.1, 0.2, 5.0, 3.0, 4.0])
    clock = [0.0]

    def work() -> None:
        clock[0] += next(lengths)

    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    assert timing.fastest(work, 3) == pytest.approx(3.0) and next(lengths, None) is None


def test_a_time_has_the_unit_that_suits_it_and_a_busy_machine_is_called_so() -> None:
    times = {2.5: "2.50 s", 1.0: "1.00 s", 0.25: "250.00 ms", 1e-3: "1.00 ms", 5e-4: "500.0 us"}
    for seconds, said in times.items():
        (line,) = case_lines(judged(Found([Row("tiny", "x", [seconds, 9.0], {})])))
        assert line.endswith(said), line
    assert [is_busy(idle) for idle in (None, 0.0, 0.89, 0.9, 1.0)] == [0, 1, 1, 0, 0]


def test_targets_are_met_or_not_by_the_ratio() -> None:
    assert target("tiny", "decode, a token", "float32") == 2.0
    assert target("tiny", "decode, a token", "bfloat16") is None
    fast = Row("tiny", "decode, a token", [1.0, 1.0], {"float32": [2.5, 2.0]})
    slow = Row("moe", "one token of 283 MB", [1.0], {LIMIT: [0.3]})
    report = bench_report(MACHINE, {"tiny": Found([fast], ["off"]), "moe": Found([slow])})
    (tiny,), (moe,) = (report["cases"][name]["rows"] for name in ("tiny", "moe"))
    assert tiny["ratios"]["float32"]["is_met"] and not moe["ratios"][LIMIT]["is_met"]
    table = bench_table(report)
    for words in (
        "2.00 met",
        "0.42 NOT met",
        "1 of 2 targets met",
        "ERROR: off",
        "OTHERS ARE AT WORK",
        "no peer: No module named 'torch'",
        "reading alone",
    ):
        assert words in table, words
    assert json.loads(json.dumps(report)) == report


def test_charts_have_the_ratios_to_torch_and_every_curve() -> None:
    row = Row("mid", "decode, a token", [1.0], {"float32": [2.0], "without": [3.0]})
    curve = Curve("mid: cost", {"ours": [(64, 1.0), (128, 2.0)]})
    drawn = charts({"mid": Found([row], curves=[curve])})
    assert set(drawn) == {"ratios.svg", "mid.svg"}
    for text in drawn.values():
        ElementTree.fromstring(text)
    assert "torch float32 2.00" in drawn["ratios.svg"] and "without" not in drawn["ratios.svg"]
    assert charts({"mid": Found([])}) == {}


@pytest.mark.parametrize(
    ("case", "what", "other", "at_least"),
    [  # as asked for
        ("tiny", "decode, a token", "float32", 2),
        ("trained", "decode, a token", "float32", 2),
        ("mid", "decode, a token", "float32", 1),
        ("mid", "prefill, 512 tokens", "float32", 0.8),
        ("moe", "one token of 283 MB", LIMIT, 0.42),
        ("moe", "512 tokens, 288 experts", "bfloat16", 0.4),
        ("attention", "262,144 positions", LIMIT, 0.4),
        ("drafts", "with drafts, 3 a pass", "without", 1.25),
    ],
)
def test_a_row_has_the_target_that_was_asked_for(
    case: str, what: str, other: str, at_least: float
) -> None:
    assert target(case, what, other) == pytest.approx(at_least) and len(TARGETS) == 8
    assert target(case, f"x{what}", other) is None


def test_every_target_belongs_to_a_case() -> None:
    from minstep.cli.bench import CASES

    assert {each.case for each in TARGETS} <= set(CASES)


# The command without torch


def test_without_torch_ours_is_timed_and_the_table_says_why(
    small: None, run: Run, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    ran = run("bench", "--only", "tiny,trained", "--quick", "--peer", "no-such", "--out", out)
    assert ran.code == 0 and ran.err.startswith(f"wrote {out}")
    assert "no peer: no-such: cannot be run" in ran.out
    assert "tiny, decode, a token" in ran.out and "trained, prefill of 12" in ran.out
    assert (out / "report.txt").read_text() == ran.out
    report = json.loads((out / "report.json").read_text())
    rows = report["cases"]["tiny"]["rows"]
    assert all(len(row["ours"]) == 2 and min(row["ours"]) > 0 for row in rows)
    assert [row["others"] for row in rows] == [{}, {}]


def test_the_cost_over_the_context_is_a_curve(small: None, run: Run, tmp_path: Path) -> None:
    ran = run("bench", "--only", "tiny", "--peer", "no-such", "--json", "--out", tmp_path)
    (curve,) = json.loads(ran.out)["cases"]["tiny"]["curves"]
    assert [place for place, _ in curve["lines"]["ours"]] == [4, 8]
    ElementTree.fromstring((tmp_path / "tiny.svg").read_text())


def test_drafts_are_timed_beside_one_draft_and_none(
    small: None, little_text: None, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minstep.bench.decoding.NEW", 4)
    monkeypatch.setattr("minstep.cli.bench.FEWER", 1)
    ran = run("bench", "--only", "drafts", "--quick", "--peer", "no-such", "--json")
    found = json.loads(ran.out)["cases"]["drafts"]
    (row,) = found["rows"]
    assert set(row["others"]) == {"one draft", "without"} and found["errors"] == []


def test_a_training_step_is_timed_without_a_peer_too(tmp_path: Path) -> None:
    setup = Setup(tmp_path, None, rounds=1, quick=False, seed=0)
    found = training(setup, GOLDEN / "tiny" / "fp32", length=8)
    (row,) = found.rows
    assert row.case == "training" and min(row.ours) > 0 and not row.others and not found.errors


@pytest.mark.parametrize("names", ["tiny,large", "", "tiny;mid"])
def test_an_unknown_case_is_refused(names: str, refused: Refused) -> None:
    refused("bench", "--only", names, naming=("--only", "expected some of tiny, trained"))


def test_what_cannot_be_is_refused_before_the_work(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused("bench", "--only", "tiny", "--out", tmp_path / "file", naming=(str(tmp_path / "file"),))
    refused("bench", "--only", "tiny", "--layer", 3, naming=("--layer", "expected no --only"))


def test_the_mid_model_is_what_transformers_and_we_can_both_read() -> None:
    from minstep.config import parse_config
    from minstep.weights import tensor_shapes

    config = parse_config(decoding.mid_config())
    sizes = [int(np.prod(shape)) for shape in tensor_shapes(config).values()]
    assert 0.27e9 < sum(sizes) < 0.3e9 and not config.mtp_layers
    moe = config.layers[0].moe
    assert moe and (moe.experts, moe.top_k, moe.width) == (32, 8, 320)
