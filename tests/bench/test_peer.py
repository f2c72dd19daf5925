"""bench's other process: asked in JSON lines, ended however the run ends, and the same maths."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from minstep.bench import attention, decoding, moe, timing, training
from minstep.bench import peer as peers_module
from minstep.bench.peer import PeerError, Setup, peer
from minstep.store.config_file import read_config
from tests.conftest import Run

FAKE = """
import json, os, sys, time
mode = sys.argv[0].rsplit("-", 1)[1].removesuffix(".py")
if mode == "crashes":
    sys.exit("cannot load a library")
if mode == "missing":
    print(json.dumps({"missing": "No module named 'torch'"}), flush=True)
    sys.exit()
print(json.dumps({"versions": {"torch": "0"}, "threads": 1}), flush=True)
for line in sys.stdin:
    do = json.loads(line)["do"]
    if mode == "sleeps":
        with open(sys.argv[0] + ".pid", "w") as file:
            file.write(str(os.getpid()))
        time.sleep(600)
    if mode == "ends" and do == "decode":
        sys.exit("out of memory")
    answer = {"seconds": 0.5, "tokens": [-1] if mode == "wrong" else []}
    if mode == "refuses" and do == "text":
        answer = {"error": "KeyError: 'no such layer'"}
    print(json.dumps(answer), flush=True)
"""
RUN = """
import sys, pathlib
import minstep.bench.peer as peers
from minstep.cli.main import main
peers.SCRIPT = pathlib.Path(sys.argv[1])
sys.exit(main(sys.argv[2:]))
"""


def fake(folder: Path, mode: str) -> Path:
    """A script that answers as a peer does, or fails in its own way."""
    file = folder / f"fake-{mode}.py"
    file.write_text(FAKE)
    return file


@pytest.fixture
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "PAUSE", 0.0)
    for name, value in {"NEW": 3, "LONG": 12, "CONTEXTS": (4, 8), "AFTER": 2}.items():
        monkeypatch.setattr(decoding, name, value)


def bench(mode: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the tiny case reports beside such a peer."""
    monkeypatch.setattr(peers_module, "SCRIPT", fake(tmp_path, mode))
    ran = run("bench", "--only", "tiny", "--quick", "--json")
    assert (ran.code, ran.err) == (0, "")
    report: dict[str, Any] = json.loads(ran.out)
    return report


def test_rows_hold_ours_against_both_dtypes(
    quickly: None, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = bench("fine", run, tmp_path, monkeypatch)
    assert report["machine"]["peer"] == "torch 0, 1 threads"
    case = report["cases"]["tiny"]
    assert case["errors"] == []
    for row in case["rows"]:
        assert row["others"] == {"float32": [0.5, 0.5], "bfloat16": [0.5, 0.5]}
        ratio = row["ratios"]["float32"]
        assert ratio["ratio"] == pytest.approx(0.5 / min(row["ours"]))
        assert ratio["least"] <= ratio["ratio"] <= ratio["most"] * 1.0001


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("wrong", "tiny, decode, a token: float32 has another token at 1"),
        ("refuses", "tiny: float32: KeyError: 'no such layer'"),
        ("ends", "the peer: the peer ended: out of memory"),
    ],
)
def test_what_the_peer_does_otherwise_is_an_error_line(
    mode: str,
    expected: str,
    quickly: None,
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert expected in bench(mode, run, tmp_path, monkeypatch)["cases"]["tiny"]["errors"]


@pytest.mark.parametrize("mode", ["missing", "crashes"])
def test_without_its_packages_there_is_no_peer_and_the_rest_runs(
    mode: str, quickly: None, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = bench(mode, run, tmp_path, monkeypatch)
    said = {"missing": "No module named 'torch' (pip install", "crashes": "cannot load a library"}
    assert report["machine"]["peer"] is None and said[mode] in report["machine"]["no_peer"]
    assert [row["others"] for row in report["cases"]["tiny"]["rows"]] == [{}, {}]


def test_a_peer_ends_with_its_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers_module, "SCRIPT", fake(tmp_path, "fine"))
    with pytest.raises(KeyboardInterrupt), peer(sys.executable) as running:
        process = running._process
        assert running.ask("decode")["seconds"] == 0.5 and process.poll() is None
        raise KeyboardInterrupt
    assert process.returncode is not None


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_end_from_outside_leaves_neither_files_nor_the_peer(
    sent: signal.Signals, tmp_path: Path
) -> None:
    script, temporary = fake(tmp_path, "sleeps"), tmp_path / "temporary"
    temporary.mkdir()
    argv = [sys.executable, "-c", RUN, str(script), "bench", "--only", "tiny", "--quick"]
    running = subprocess.Popen(argv, env=os.environ | {"TMPDIR": str(temporary)})
    pid_file = Path(f"{script}.pid")
    while not (pid_file.exists() and pid_file.read_text()):
        assert running.poll() is None
        time.sleep(0.02)
    assert list(temporary.iterdir())
    running.send_signal(sent)
    assert running.wait(60) == {signal.SIGINT: 130, signal.SIGTERM: 143}[sent]
    assert not list(temporary.iterdir())
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid_file.read_text()), 0)


# The real one

REASON = "the comparison with torch needs: pip install -e '.[oracle]'"


@pytest.fixture
def real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quickly: None) -> Any:
    pytest.importorskip("torch", reason=REASON)
    pytest.importorskip("transformers.models.step3p7.modeling_step3p7", reason=REASON)
    monkeypatch.setattr(training, "SEQUENCES", 2)
    with peer(sys.executable) as running:
        yield Setup(tmp_path, running, rounds=1, quick=False, seed=0)


@pytest.mark.torch
def test_torch_computes_the_same_in_every_case(
    real: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw, small = read_config("tiny")[0], attention.Sizes(8, 2, 16)
    found = [
        decoding.tiny(real),
        decoding.trained(real),
        moe.moe_layer(real, raw, 3),
        attention.attention_layer(real, (100, 5000), small),
        training.training(real, length=24),
    ]
    assert [each.errors for each in found] == [[]] * 5
    for row in found[0].rows:
        assert set(row.others) == {"float32", "bfloat16"}
    assert set(found[0].curves[0].lines) == {"ours", "float32"}
    assert set(found[2].rows[0].others) == {"float32", "bfloat16", "limit"}
    assert set(found[3].rows[0].others) == {"torch sdpa", "torch matmul", "limit"}


@pytest.mark.torch
def test_a_different_computation_is_told(real: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    raw, drawn = read_config("tiny")[0], moe.tokens_drawn
    monkeypatch.setattr(moe, "tokens_drawn", lambda n, count, size: drawn(n + 1, count, size))
    assert moe.moe_layer(real, raw, 3).errors
    fill = attention.filled
    monkeypatch.setattr(attention, "filled", lambda n, sizes, seed: fill(n, sizes, seed + 1))
    assert attention.attention_layer(real, (100,), attention.Sizes(8, 2, 16)).errors
    with pytest.raises(PeerError, match="no_such"):
        assert real.peer
        real.peer.ask("decode", name="no_such", prompt=[1], count=1)
