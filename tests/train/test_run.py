"""A run: what it gives while it goes, and what it leaves on disk."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import minstep
from minstep.errors import InputError
from minstep.fast.bf16 import BF16Array, to_bf16
from minstep.store.config_file import read_config
from minstep.text.tokenizer import byte_level_tokenizer
from minstep.train.run import STATE, Every, Run, load_state, read_rows, save_checkpoint, save_state
from minstep.train.trainer import Plan
from minstep.train.workers import workers
from minstep.weights import random_tensors
from tests.conftest import Refused


def test_a_checkpoint_is_bfloat16_with_float32_biases(tmp_path: Path) -> None:
    raw, config, _ = read_config("tiny")
    tensors = {
        n: x * np.float32(1.001) for n, x in random_tensors(config, np.random.default_rng(1))
    }
    save_checkpoint(tmp_path, tensors, raw, byte_level_tokenizer())
    opened = minstep.open_checkpoint(tmp_path)
    assert not opened.config.can_chat
    for name, x in tensors.items():
        exact = x if name.endswith("router_bias") else np.asarray(BF16Array(to_bf16(x)))
        assert (np.asarray(opened.get(name, x.shape)) == exact).all(), name
    names = {file.name for file in tmp_path.iterdir()}
    assert names == {"config.json", "model.safetensors", "tokenizer.json"}


def test_a_state_comes_back_bit_for_bit(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    state = {"a": rng.standard_normal((3, 2), np.float32), "step": np.array(7), "b": rng.random(4)}
    save_state(tmp_path, state, {"rows": [[1, [0.1, 1e-30]]]})
    again, facts = load_state(tmp_path)
    assert facts == {"rows": [[1, [0.1, 1e-30]]]}
    for name, x in state.items():
        assert again[name].dtype == x.dtype and np.array_equal(again[name], x)


@pytest.mark.parametrize("end", [0, 4, 60, -3])
def test_a_damaged_state_is_named(tmp_path: Path, end: int) -> None:
    save_state(tmp_path, {"a": np.ones(5)}, {})
    file = tmp_path / STATE
    file.write_bytes(file.read_bytes()[:end])
    with pytest.raises(InputError, match=STATE):
        load_state(tmp_path)


def test_a_missing_state_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"{STATE}: is missing"):
        load_state(tmp_path)


def test_make_tiny_does_not_take_a_trained_checkpoint_for_its_own(
    tmp_path: Path, refused: Refused
) -> None:
    raw, config, _ = read_config("tiny")
    tensors = dict(random_tensors(config, np.random.default_rng(1)))
    save_checkpoint(tmp_path, tensors, raw, byte_level_tokenizer())
    refused("make-tiny", "tiny", "--out", tmp_path, naming=("model.safetensors", "did not write"))


def test_a_run_gives_its_lines_and_steps_to_whoever_asks_and_prints_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, folder = tmp_path / "text.txt", tmp_path / "out"
    text.write_text("".join(f"Line {n} has the square {n * n}.\n\n" for n in range(800)))
    folder.mkdir()
    plan = Plan(steps=3, sequences=1, length=16)

    def run(resumes: bool) -> Run:
        return Run(folder, read_config("tiny")[0], plan, [text], Every(1, 9, 9), resumes)

    lines, done = list[str](), list[int]()
    with workers(1) as pool:
        assert not run(False).go(pool, lambda: done == [1, 2], lines.append, done.append)
        assert (folder / STATE).exists() and done == [1, 2] and len(lines) == 3
        with pytest.raises(InputError, match="an unfinished run"):
            run(False)
        assert run(True).go(pool, lambda: False, lines.append, done.append)
    assert done == [1, 2, 3] and not (folder / STATE).exists()
    assert lines[3] == lines[0] and (folder / "log.txt").read_text().count("\n") == 6
    assert "".join(capsys.readouterr()) == ""


ROW = [1, [5.0] * 4, 1e-3, 0.5, 0.0, 2.25, None]


@pytest.mark.parametrize(
    "rows",
    [
        None,
        3,
        [1],
        [[]],
        [[1, [1.0] * 4]],
        [[*ROW, 1]],
        [[1, [1.0], *ROW[2:]]],
        [[1, ["a"] * 4, *ROW[2:]]],
        [[1, [float("nan")] * 4, *ROW[2:]]],
        [[1, None, *ROW[2:]]],
        [[10**400, *ROW[1:]]],
        [[*ROW[:4], "1.0", *ROW[5:]]],
        [[*ROW[:4], float("inf"), *ROW[5:]]],
        [[*ROW[:-1], "1.0"]],
    ],
)
def test_rows_that_no_log_has_are_refused(rows: Any) -> None:
    config = read_config("tiny")[1]
    for facts in ({"rows": rows}, {"rows": [ROW, *rows]} if isinstance(rows, list) else {}):
        with pytest.raises(InputError, match="^state: is damaged: its rows"):
            read_rows(Path("state"), facts, config)
    nan = float("nan")  # of a model without experts
    assert len(read_rows(Path("state"), {"rows": [ROW, [*ROW[:4], nan, nan, 1.0]]}, config)) == 2
