"""`minstep train` on the command line: what it leaves, goes on with, and refuses."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from minstep.cli.main import main
from minstep.train.run import STATE
from minstep.train.trainer import Training
from minstep.train.workers import WorkerEnded, Workers
from tests.conftest import Refused, Run

LINES = (f"Line {n} tells of the number {n * n}, which is {n} times {n}.\n\n" for n in range(400))
SHAPE = ("--config", "tiny", "--length", "24", "--sequences", "1", "--log-every", "2")
FILES = ["config.json", "loads.svg", "log.txt", "loss.svg", "model.safetensors", "tokenizer.json"]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("".join(LINES))
    return file


@pytest.fixture(scope="module")
def whole(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run that nothing interrupts leaves."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert main(flags(text, out)) == 0
    return out


def flags(text: Path, out: Path, *more: str, steps: int = 10) -> list[str]:
    own = ["--text", str(text), "--out", str(out), "--steps", str(steps), "--processes", "1"]
    return ["train", *SHAPE, *own, *more]


def test_a_run_leaves_a_checkpoint_that_generates(text: Path, tmp_path: Path, run: Run) -> None:
    ran = run(*flags(text, tmp_path / "out", steps=4))
    assert ran.code == 0 and ran.err == ""
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == FILES
    assert ran.out == (tmp_path / "out" / "log.txt").read_text()
    said = run("generate", "--model", tmp_path / "out", "--prompt", "Line", "--max-tokens", 4)
    assert said.code == 0


@pytest.mark.skipif(sys.platform == "win32", reason="needs signals")
def test_an_interrupted_run_goes_on_to_the_same_bytes(
    text: Path, whole: Path, tmp_path: Path, run: Run, refused: Refused
) -> None:
    broken = tmp_path / "broken"
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        more = ("--resume",) if broken.exists() else ()
        command = [sys.executable, "-m", "minstep", *flags(text, broken, *more)]
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # as at a terminal
        )
        assert process.stdout
        for line in process.stdout:
            if line.split()[:1] == ["step"]:
                break
        process.stdout.readline()  # a row: it is under way
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
        assert process.returncode == code and "--resume goes on" in err, err
        assert (broken / STATE).exists() and "Traceback" not in err
    refused(*flags(text, broken), naming=("unfinished run", "--resume"))
    refused(*flags(text, broken, "--resume", "--rate", "0.5"), naming=(STATE, "--rate"))
    refused(*flags(text, broken, "--resume", steps=50), naming=(STATE, "--steps"))
    other = tmp_path / "other.txt"
    other.write_text(text.read_text().replace("tells", "speaks"))  # in each section
    refused(*flags(other, broken, "--resume"), naming=(STATE, "another text"))
    assert run(*flags(text, broken, "--resume")).code == 0
    assert not (broken / STATE).exists()
    for name in FILES:
        if name != "loads.svg":
            assert (whole / name).read_bytes() == (broken / name).read_bytes(), name


@pytest.mark.skipif(sys.platform == "win32", reason="needs signals")
def test_a_signal_that_ends_the_processes_too_saves_what_was_done(
    text: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, broken, step = tmp_path / "whole", tmp_path / "broken", Training.step
    ends = {0: signal.SIGTERM, 3: signal.SIGHUP}  # the first at once, the second in the middle

    def ended(training: Training, pool: Workers) -> None:
        if number := ends.pop(training.done, None):
            signal.raise_signal(number)
            raise WorkerEnded("a process was ended")
        step(training, pool)

    assert run(*flags(text, whole, steps=6)).code == 0
    monkeypatch.setattr(Training, "step", ended)
    for more, code, done in (((), 143, 0), (("--resume",), 129, 3)):
        ran = run(*flags(text, broken, *more, steps=6))
        assert ran.code == code and f"saved after step {done} of 6" in ran.err
    assert run(*flags(text, broken, "--resume", steps=6)).code == 0
    assert (whole / "model.safetensors").read_bytes() == (broken / "model.safetensors").read_bytes()


@pytest.mark.skipif(sys.platform == "win32", reason="needs signals")
def test_a_killed_run_goes_on_from_what_was_saved(
    text: Path, whole: Path, tmp_path: Path, run: Run
) -> None:
    broken = tmp_path / "broken"
    command = [sys.executable, "-m", "minstep", *flags(text, broken, "--save-every", "3")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while not (broken / STATE).exists():
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert run(*flags(text, broken, "--resume", "--save-every", "3")).code == 0
    assert (whole / "model.safetensors").read_bytes() == (broken / "model.safetensors").read_bytes()


def test_wrong_use_is_refused_before_the_work(text: Path, tmp_path: Path, refused: Refused) -> None:
    held, file = tmp_path / "held", tmp_path / "file"
    held.mkdir()
    (held / "notes.txt").write_text("mine")
    file.write_text("short")
    missing = tmp_path / "no.txt"
    refused(*flags(missing, held), naming=("held", "notes.txt", "expected"))
    refused(*flags(missing, tmp_path / "out"), naming=("no.txt",))
    refused(*flags(text, file), naming=("file",))
    refused(*flags(file, tmp_path / "out"), naming=("too short",))
    refused(*flags(text, tmp_path / "new", "--resume"), naming=(STATE, "missing"))
    refused(*flags(text, tmp_path / "out", "--length", "4"), naming=("--length 4", "5 to 4096"))
    for count in ("1000000", "9" * 18):
        refused(*flags(text, tmp_path / "out", "--sequences", count), naming=("--sequences", count))
    refused(*flags(text, tmp_path / "out", "--config", "odd"), naming=("211", "261"))
    refused(*flags(text, tmp_path / "out", "--config", "nope"), naming=("nope",))
    file.write_bytes(b"\xff\xfe\x00")
    refused(*flags(file, tmp_path / "out"), naming=("UTF-8",))
    assert not (tmp_path / "out").exists() and not (tmp_path / "new").exists()
    assert [each.name for each in held.iterdir()] == ["notes.txt"]
