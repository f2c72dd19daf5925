"""Whatever stands in the place of a file that a command reads is refused in one line, at once."""

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import GOLDEN, Refused
from tests.support.recordings import save

TINY = GOLDEN / "tiny" / "bf16"
IDS = ("--tokens", "4,5,6")
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


def pipe(path: Path) -> Path:
    os.mkfifo(path)
    return path


def device(path: Path) -> Path:
    path.symlink_to("/dev/zero")
    return path


def folder(path: Path) -> Path:
    path.mkdir()
    return path


def nowhere(path: Path) -> Path:
    path.symlink_to("nothing")
    return path


def itself(path: Path) -> Path:
    path.symlink_to(path.name)
    return path


def endless(path: Path) -> Path:
    """A file of a terabyte of zeros, which takes no disk."""
    with path.open("wb") as opened:
        opened.truncate(1 << 40)
    return path


def unreadable(path: Path) -> Path:
    path.write_text("{}")
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user may read everything")
    return path


KINDS = [pipe, device, folder, nowhere, itself, endless, unreadable]
PATHS = ["a\0b", "n" * 5000, "n/" * 3000, "\x1b[2J\u202e"]


@pytest.fixture
def good(tmp_path: Path) -> Path:
    """A recording of one layer."""
    x = {"model.layers.3": np.ones((3, 64), np.float32)}
    return save(x, tmp_path / "good.safetensors", tokens=[4, 5, 6])


@pytest.fixture(autouse=True)
def in_time(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No command may wait: the test ends where one does."""
    monkeypatch.setattr("minstep.train.documents.MOST_TEXT", 1 << 20)

    def late(*_: object) -> None:
        raise AssertionError("the command waits")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(30)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


Command = Callable[[Any, Path, Path], tuple[object, ...]]  # of a path, a good recording, a folder
COMMANDS: dict[str, Command] = {
    "diff ours": lambda path, good, out: ("diff", path, good),
    "diff theirs": lambda path, good, out: ("diff", good, path),
    "diff model": lambda path, good, out: ("diff", good, good, "--model", path),
    "check-layer": lambda path, good, out: ("check-layer", TINY, "--all", "--against", path),
    "record": lambda path, good, out: (
        *("record", "--model", TINY, "--layers", 3, "--input", path),
        *("--out", out / "out", *IDS),
    ),
    "view": lambda path, good, out: ("view", path, "--out", out / "page.html"),
    "messages": lambda path, good, out: ("generate", "--chat-messages", path),
    "tools": lambda path, good, out: ("chat", "--tools", path),
    "text": lambda path, good, out: ("train", "--text", path, "--out", out / "out"),
    "lab text": lambda path, good, out: ("lab", "mtp", "--text", path),
    "inspect": lambda path, good, out: ("inspect", path),
    "make-tiny": lambda path, good, out: ("make-tiny", path, "--out", out / "out"),
    "cost": lambda path, good, out: ("cost", "--config", path),
    "model": lambda path, good, out: ("generate", "--model", path, *IDS),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("command", COMMANDS)
def test_what_stands_in_the_place_of_a_file_is_refused(
    command: str, kind: Callable[[Path], Path], good: Path, tmp_path: Path, refused: Refused
) -> None:
    path = kind(tmp_path / "path")
    refused(*COMMANDS[command](path, good, tmp_path), naming=(str(path),))
    assert sorted(each.name for each in tmp_path.iterdir()) == [good.name, "path"]


@pytest.mark.parametrize("path", PATHS, ids=["zero byte", "long name", "long path", "escapes"])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_path_that_cannot_be_is_refused(
    command: str, path: str, good: Path, tmp_path: Path, refused: Refused
) -> None:
    said = refused(*COMMANDS[command](path, good, tmp_path), naming=())
    assert said.rstrip("\n").isprintable() and len(said) < 2200


@pytest.mark.parametrize("kind", [*KINDS[:3], endless])
@pytest.mark.parametrize("name", ["config.json", INDEX, SINGLE])
def test_what_stands_in_the_place_of_a_checkpoint_s_file_is_refused(
    name: str, kind: Callable[[Path], Path], tmp_path: Path, refused: Refused
) -> None:
    model = shutil.copytree(GOLDEN / "odd" / "fp32", tmp_path / "model")
    (model / name).unlink(missing_ok=True)
    path = kind(model / name)
    for command in (("generate", "--model", model, *IDS), ("inspect", model)):
        refused(*command, naming=(str(path),))


@pytest.mark.parametrize("kind", KINDS[:3])
def test_what_stands_in_the_place_of_a_shard_is_refused(
    kind: Callable[[Path], Path], tmp_path: Path, refused: Refused
) -> None:
    model = shutil.copytree(GOLDEN / "odd" / "bf16", tmp_path / "model")
    shard = sorted({*json.loads((model / INDEX).read_text())["weight_map"].values()})[0]
    (model / shard).unlink()
    path = kind(model / shard)
    refused("generate", "--model", model, *IDS, naming=(str(path), "cannot be read"))


@pytest.mark.parametrize("name", ["run.json", "lock", "00000.safetensors"])
def test_a_pipe_among_the_parts_of_a_recording_is_refused(
    name: str, tmp_path: Path, refused: Refused
) -> None:
    parts = folder(tmp_path / ".out.parts")
    (parts / "run.json").write_text("{}")
    (parts / name).unlink(missing_ok=True)
    pipe(parts / name)
    command = ("record", "--model", TINY, "--layers", 3, *IDS, "--out", tmp_path / "out")
    refused(*command, naming=(str(parts),))


@pytest.mark.parametrize("kind", [*KINDS[:3], endless])
def test_what_stands_in_the_place_of_a_tokenizer_is_refused(
    kind: Callable[[Path], Path], tmp_path: Path, refused: Refused
) -> None:
    model = shutil.copytree(GOLDEN / "odd" / "fp32", tmp_path / "model")
    path = kind(model / "tokenizer.json")
    refused("generate", "--model", model, "--prompt", "hello", naming=(str(path),))
