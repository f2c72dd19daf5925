"""Signals at any moment, and what the command line leaves behind in a process that goes on."""

import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import minstep.cli.parity
from minstep.cli.main import main
from minstep.errors import InputError
from minstep.store import output
from minstep.store.output import atomic_file, atomic_folder, locked, owned_folder
from tests.conftest import GOLDEN, Refused, Run
from tests.support.tiers import cases

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")

MODEL = GOLDEN / "odd" / "fp32"
ENDS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}
NAMES = {number: number.name for number in ENDS}


def command(code: str, *arguments: str) -> list[str]:
    """The command line after some Python code; as at a terminal, no signal is ignored."""
    start = "import os, signal, sys\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
    end = "\nfrom minstep.__main__ import main\nsys.exit(main())\n"
    return [sys.executable, "-c", start + code + end, *arguments]


def process(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run it to its end."""
    its = command(code, *arguments)
    return subprocess.run(its, capture_output=True, text=True, check=False, timeout=60)


# At the n-th import or at the end of Python a signal comes in.
AT_IMPORT = """
class Finder:
    count = 0
    def find_spec(self, *_):
        Finder.count += 1
        if Finder.count == {n}:
            os.kill(os.getpid(), {number})
import minstep.__main__
sys.meta_path.insert(0, Finder())
"""
AT_EXIT = "import atexit; atexit.register(os.kill, os.getpid(), {number})"


@pytest.mark.parametrize(
    ("n", "number"),
    [
        *((n, signal.SIGINT) for n in (1, 5, 40, 150, 220)),
        (99, signal.SIGTERM),
        (99, signal.SIGHUP),
    ],
)
def test_a_signal_during_imports_ends_without_a_word(n: int, number: signal.Signals) -> None:
    ran = process(AT_IMPORT.format(n=n, number=int(number)), "inspect", "tiny")
    assert (ran.returncode, ran.stdout, ran.stderr) == (ENDS[number], "", "")


@pytest.mark.parametrize("number", ENDS, ids=NAMES.get)
def test_a_signal_after_the_work_changes_nothing(number: signal.Signals) -> None:
    ran = process(AT_EXIT.format(number=int(number)), "--version")
    assert (ran.returncode, ran.stderr) == (0, "") and ran.stdout.startswith("minstep ")


def test_nothing_large_is_imported_before_signals_are_answered() -> None:
    code = "import minstep.__main__, sys; print([*sys.modules])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in ran.stdout.split("'")}
    assert not loaded & {"numpy", "tokenizers", "safetensors", "argparse", "concurrent"}


AT_ANY_MOMENT = """
import minstep.__main__ as entry
[signal.signal(each, entry._leave) for each in entry.ENDS]  # main does it at once
print("started", flush=True)
"""


@pytest.mark.parametrize("k", cases([0, 2, 4, 6], [1, 3, 5, 7, 8]))
def test_a_signal_at_any_moment_leaves_nothing_half_written(k: int, tmp_path: Path) -> None:
    number, out = [*ENDS][k % 3], tmp_path / "out"
    with subprocess.Popen(
        command(AT_ANY_MOMENT, "make-tiny", "tiny", "--shards", "9", "--out", str(out)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as running:
        assert running.stdout and running.stdout.readline() == "started\n"
        time.sleep(0.08 * k)
        running.send_signal(number)
        _, err = running.communicate(timeout=60)
    assert running.returncode in (0, ENDS[number]) and err == ""
    assert [*tmp_path.iterdir()] in ([], [out])
    assert out.exists() or running.returncode
    assert not out.exists() or (out / "model.safetensors.index.json").exists()


# In one process


def raising(number: signal.Signals, then: Callable[[], None] = lambda: None) -> Callable[..., Any]:
    """What a command does in a test: it gets a signal, and would go on."""

    def runs(*_: object) -> Any:
        signal.raise_signal(number)
        then()
        return ""

    return runs


def test_a_signal_ends_the_command_which_tidies_up(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, code in ENDS.items():
        monkeypatch.setattr(minstep.cli.parity, "record", raising(number))
        out = tmp_path / "trace"
        assert run("trace", "--model", MODEL, "--tokens", 4, "--out", out) == (code, "", "")
        assert [*tmp_path.iterdir()] == []


def test_an_ignored_signal_stays_ignored(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in ENDS:
        before = signal.signal(number, signal.SIG_IGN)
        try:
            text = raising(number)
            monkeypatch.setattr("minstep.cli.learn.exhibit_text", text)
            assert run("footgun", "show", "window-off-by-one") == (0, "\n", "")
            assert signal.getsignal(number) is signal.SIG_IGN
        finally:
            signal.signal(number, before)


@pytest.mark.parametrize(
    ("arguments", "raised"),
    [
        (["inspect", "tiny", "--json"], None),
        (["inspect", "none"], None),
        (["--version"], SystemExit),
        (["dance"], SystemExit),
        (["footgun", "show", "window-off-by-one"], RuntimeError),
        (["footgun", "show", "window-off-by-one"], KeyboardInterrupt),
        (["footgun", "show", "window-off-by-one"], SystemExit),
    ],
)
@pytest.mark.parametrize("is_closed", [False, True])
def test_main_leaves_handlers_streams_and_warnings_as_they_were(
    arguments: list[str],
    raised: type[BaseException] | None,
    is_closed: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def own(*_: object) -> None: ...

    def breaks(*_: object) -> None:
        raise raised or AssertionError

    monkeypatch.setattr("minstep.cli.learn.exhibit_text", breaks)
    monkeypatch.setattr(warnings, "showwarning", own)
    if is_closed:
        monkeypatch.setattr(sys, "stderr", None)
    streams, errors = (sys.stdout, sys.stderr), sys.stdout.errors
    before = {number: signal.signal(number, own) for number in ENDS}
    try:
        if raised in (None, KeyboardInterrupt):
            assert main(arguments) in (0, 2, 130)
        else:
            assert raised
            with pytest.raises(raised):
                main(arguments)
        assert {signal.getsignal(number) for number in ENDS} == {own}
        assert (sys.stdout, sys.stderr) == streams and sys.stdout.errors == errors
        assert warnings.showwarning is own
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_main_runs_in_a_thread(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"Line {n} tells of {n * n}.\n\n" for n in range(400)))
    train = ["train", "--config", "tiny", "--length", "8", "--sequences", "1", "--steps", "1"]
    train += ["--text", str(text), "--out", str(tmp_path / "out")]
    codes: list[int] = []
    for arguments in (["inspect", "tiny"], ["inspect", "none"], train):
        thread = threading.Thread(target=lambda a=arguments: codes.append(main(a)))  # type: ignore[misc]
        thread.start()
        thread.join()
    assert codes == [0, 2, 0]


@pytest.mark.parametrize("opens", [atomic_file, atomic_folder])
def test_a_second_ctrl_c_while_it_is_tidied_up_leaves_nothing(
    opens: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {"unlink": Path.unlink, "rmtree": output.shutil.rmtree}
    count = 0

    def interrupted(name: str) -> Any:
        def removes(*arguments: Any, **more: Any) -> Any:
            nonlocal count
            count += 1
            if count == 1:
                raise KeyboardInterrupt
            return names[name](*arguments, **more)

        return removes

    monkeypatch.setattr(Path, "unlink", interrupted("unlink"))
    monkeypatch.setattr(output.shutil, "rmtree", interrupted("rmtree"))
    with pytest.raises(KeyboardInterrupt), opens(tmp_path / "out"):
        raise KeyboardInterrupt
    assert count > 1 and [*tmp_path.iterdir()] == []


# A folder for one process


def test_two_runs_do_not_write_into_one_folder(run: Run, refused: Refused, tmp_path: Path) -> None:
    out, text = tmp_path / "deep" / "out", tmp_path / "text.txt"
    text.write_text("".join(f"Line {n} tells of {n * n}.\n\n" for n in range(400)))
    train = ("train", "--config", "tiny", "--length", 8, "--sequences", 1, "--steps", 1)
    train += ("--text", text, "--out", out)
    bench = ("bench", "--only", "tiny", "--out", out)
    with owned_folder(out):
        for refusing in (train, (*train, "--resume"), bench):
            refused(*refusing, naming=(str(out), "another run is writing there"))
    assert not out.parent.exists()
    out.mkdir(parents=True)
    (out / output.OWNED).touch()  # of a run that was killed
    assert run(*train).code == 0
    assert output.OWNED not in [path.name for path in out.iterdir()]


def test_a_folder_goes_where_nothing_was_written(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    for out in (tmp_path / "there", tmp_path / "a" / "b"):
        with pytest.raises(KeyboardInterrupt), owned_folder(out):
            raise KeyboardInterrupt
    assert [path.name for path in tmp_path.rglob("*")] == ["there"]
    with owned_folder(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "kept").touch()
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["kept"]


def test_what_is_there_and_no_folder_is_refused_as_such(tmp_path: Path) -> None:
    out = {name: tmp_path / name for name in ("file", "pipe", "link", "circle")}
    out["file"].touch()
    os.mkfifo(out["pipe"])
    out["link"].symlink_to("nothing")
    out["circle"].symlink_to("circle")
    for path in out.values():
        with pytest.raises(InputError, match="expected a folder"), owned_folder(path):
            pass
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(out)


def test_a_system_without_locks_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output, "fcntl", None)
    with locked(tmp_path / "lock", tmp_path), locked(tmp_path / "lock", tmp_path):
        pass

    class Locks:
        LOCK_EX = LOCK_NB = 0

        def flock(self, *_: object) -> None:
            raise OSError("no locks on this drive")

    monkeypatch.setattr(output, "fcntl", Locks())
    with locked(tmp_path / "lock", tmp_path):
        pass


def test_a_lock_ends_with_its_process(tmp_path: Path) -> None:
    code = "import sys, time; from pathlib import Path; from minstep.store.output import locked\n"
    code += "folder = Path(sys.argv[1])\n"
    code += "with locked(folder / 'lock', folder): print('here', flush=True); time.sleep(60)"
    arguments = [sys.executable, "-c", code, str(tmp_path)]
    other = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout and other.stdout.readline() == "here\n"
        with pytest.raises(InputError, match="another run"), locked(tmp_path / "lock", tmp_path):
            pass
    finally:
        other.kill()
        other.wait()
    with locked(tmp_path / "lock", tmp_path):
        pass
