"""Mapped weights: what is asked for ahead, what is let go of, and how much stays resident."""

import mmap
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minstep import moe as moe_module
from minstep.config import parse_config
from minstep.errors import InputError
from minstep.fast import pages as module
from minstep.fast.bf16 import BF16Array
from minstep.fast.pages import Map, Pages, reads_disk, used, will_need
from minstep.linear import linear
from minstep.model import decoder, embed, run_layers
from minstep.moe import Choice, MoEWeights, experts
from minstep.store.checkpoint import open_checkpoint
from minstep.store.config_file import find_config
from minstep.store.header import map_file
from minstep.store.json_file import read_json
from minstep.store.random_checkpoint import Form, save_random

MB = 1 << 20
STATM = Path("/proc/self/statm")
linux = pytest.mark.skipif(not STATM.exists(), reason="needs /proc/self/statm")


@pytest.fixture
def mapped(tmp_path: Path) -> Map:
    """A mapped file of 64 MB."""
    with (tmp_path / "file").open("wb") as opened:
        for n in range(64):
            opened.write(bytes([n]) * MB)
    return map_file(tmp_path / "file", Pages())


@pytest.fixture
def advised(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    """What the system is told of maps: each advice, where it starts and how long it is."""
    said: list[tuple[int, int, int]] = []

    def madvise(self: Map, advice: int, start: int = 0, length: int = 0) -> None:
        assert start % mmap.PAGESIZE == 0 and 0 <= start and start + length <= len(self)
        said.append((advice, start, length))

    monkeypatch.setattr(Map, "madvise", madvise, raising=False)
    return said


def resident() -> int:
    """Bytes of mapped files that are resident."""
    return int(STATM.read_text().split()[2]) * mmap.PAGESIZE


def view(mapped: Map, start: int, nbytes: int) -> Any:
    return np.frombuffer(mapped, np.uint8, nbytes, start)


def test_pages_around_a_weight_are_asked_for(mapped: Map, advised: list[Any]) -> None:
    whole = np.frombuffer(mapped, np.uint16).reshape(8, -1, 4)
    will_need(
        view(mapped, 5000, 100), BF16Array(whole)[2], np.zeros(3), view(mapped, 64 * MB - 1, 1)
    )
    assert [(start, start + length) for _, start, length in advised] == [
        (4096, 4096 + 100 + mmap.PAGESIZE),
        (16 * MB, 24 * MB + mmap.PAGESIZE),
        (64 * MB - mmap.PAGESIZE, 64 * MB),
    ]
    assert {advice for advice, _, _ in advised} == {mmap.MADV_WILLNEED}


def test_the_disk_is_asked_about_once_for_each_time_it_was_read(
    mapped: Map, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = iter([7, 7, 9, 9, 9])

    class Usage:
        @property
        def ru_inblock(self) -> int:
            return next(blocks)

    monkeypatch.setattr(module.resource, "getrusage", lambda _: Usage())
    weight = view(mapped, 0, 10)
    assert [reads_disk(weight) for _ in range(5)] == [True, False, True, False, False]
    assert not reads_disk(np.zeros(3))
    monkeypatch.setattr(module, "resource", None)  # a system that does not tell
    assert reads_disk(weight) and reads_disk(weight)


@linux
def test_pages_leave_the_process_once_there_are_too_many(
    mapped: Map, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = resident()
    monkeypatch.setattr(module, "LIMIT", before + 24 * MB)
    monkeypatch.setattr(module, "OFTEN", 4 * MB)
    most = 0
    for n in range(64):
        weight = view(mapped, n * MB, MB)
        assert int(weight.max()) == n
        most = max(most, resident())
        used(weight)
    assert 16 * MB < most - before < 34 * MB
    assert int(view(mapped, 3 * MB, MB).min()) == 3  # and they come back


def test_without_the_systems_own_count_what_was_touched_counts(
    mapped: Map, advised: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "HAS_STATM", False)
    monkeypatch.setattr(module, "LIMIT", 10 * MB)
    for n in range(22):
        used(view(mapped, n * MB, MB))
    assert [advice for advice, _, _ in advised] == [mmap.MADV_DONTNEED] * 2


def test_arrays_in_memory_and_systems_without_advice_are_left_alone(
    mapped: Map, advised: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    used(np.zeros(5))
    will_need(BF16Array(np.zeros((3, 4), np.uint16)))
    monkeypatch.setattr(module, "DONTNEED", None)
    monkeypatch.setattr(module, "WILLNEED", None)
    monkeypatch.setattr(module, "LIMIT", 0)
    used(view(mapped, 0, MB))
    will_need(view(mapped, 0, MB))
    assert advised == []


def test_chosen_experts_are_asked_for_before_the_first_one_computes_and_no_other(
    mapped: Map, advised: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    E, F, D = 8, 32, 64
    monkeypatch.setattr(moe_module, "LARGE", 1)
    asked: list[list[tuple[int, int, int]]] = []
    real = moe_module.swiglu
    monkeypatch.setattr(moe_module, "swiglu", lambda *a: asked.append(list(advised)) or real(*a))
    bits = np.frombuffer(mapped, np.uint16)[: 3 * E * F * D * 16].reshape(3, E, -1)
    stacks = [bits[n][:, : F * D] for n in range(3)]  # far from each other
    gate, up, down = (
        stacks[0].reshape(E, F, D),
        stacks[1].reshape(E, F, D),
        stacks[2].reshape(E, D, F),
    )
    weights = MoEWeights(np.zeros((E, D)), None, BF16Array(gate), BF16Array(up), BF16Array(down))
    choice = Choice(np.array([[1, 6]]), np.ones((1, 2), np.float32))
    experts(np.zeros((1, D), np.float32), weights, choice, None)
    assert len(asked) == 2 and len(asked[0]) == len(asked[1]) == 6
    advised.clear()
    experts(np.zeros((1, D), np.float32), weights, choice, None)
    assert advised == [], "nothing was read from disk since: asking again would only cost time"


def test_a_product_says_what_it_used(mapped: Map, monkeypatch: pytest.MonkeyPatch) -> None:
    bits = np.frombuffer(mapped, np.uint16)[: 1 << 22].reshape(2048, 2048)
    linear(np.zeros((1, 2048), np.float32), BF16Array(bits))
    assert mapped.pages.touched == bits.nbytes


def test_a_weight_whose_file_was_cut_is_refused_and_not_touched(mapped: Map) -> None:
    """Else this test ends with a bus error, and all others with it."""
    bits = np.frombuffer(mapped, np.uint16)[: 1 << 22].reshape(2048, 2048)
    stacks = [
        BF16Array(bits.reshape(-1)[: 1 << 19].reshape(64, *s)) for s in ((128, 64), (64, 128))
    ]
    moe = MoEWeights(np.zeros((64, 64)), None, stacks[0], stacks[0], stacks[1])
    one = Choice(np.array([[1]]), np.ones((1, 1), np.float32))
    os.truncate(mapped.file, 4096)
    x = np.zeros((1, 2048), np.float32)
    whole = np.zeros((64, 128, 64), np.float32)
    down_alone = MoEWeights(np.zeros((64, 64)), None, whole, whole, stacks[1])
    for use in (
        lambda: experts(x[:, :64], down_alone, one, None),
        lambda: linear(x, BF16Array(bits)),
        lambda: linear(x, bits.view(np.float32).reshape(1024, 2048)),
        lambda: embed([5], BF16Array(bits), np.float32),
        lambda: experts(x[:, :64], moe, one, None),
    ):
        with pytest.raises(InputError, match="file: has 4096 bytes, expected .* it was cut"):
            use()


@pytest.mark.parametrize("size", [64, 4200], ids=["copied", "mapped"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_whose_files_were_cut_answers_or_names_one(
    dtype: str, size: int, tmp_path: Path
) -> None:
    """Every large tensor is looked at before it is used; small ones are in memory."""
    raw = read_json(find_config("tiny") / "config.json") | {"vocab_size": size}
    raw |= {"moe_intermediate_size": size // 14, "torch_dtype": dtype}
    config = parse_config(raw)
    save_random(raw, config, np.random.default_rng(0), tmp_path / "out", Form(dtype, 2))
    weights = open_checkpoint(tmp_path / "out").weights()
    state = decoder([1, 2, 3], weights, config)
    for file in sorted((tmp_path / "out").glob("*.safetensors")):
        os.truncate(file, 0)
    if size == 64:
        assert np.array_equal(decoder([1, 2, 3], weights, config), state)
        return
    with pytest.raises(InputError, match=r"model-0000.*has 0 bytes, expected .* it was cut"):
        decoder([1, 2, 3], weights, config)
    for layer in (n for n, spec in enumerate(config.layers) if spec.moe):
        with pytest.raises(InputError, match="it was cut"):
            run_layers(state, weights.layers[layer:][:1], config.layers[layer:][:1], 0, 1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_checkpoint_whose_file_was_cut_after_it_was_opened_is_not_read(
    dtype: str, tmp_path: Path
) -> None:
    """Small tensors are copied when a layer is asked for, long after its file was opened."""
    raw = read_json(find_config("tiny") / "config.json") | {"torch_dtype": dtype}
    config = parse_config(raw)
    save_random(raw, config, np.random.default_rng(0), tmp_path / "out", Form(dtype, 1))
    checkpoint = open_checkpoint(tmp_path / "out")
    (file,) = checkpoint.maps
    os.truncate(file, file.stat().st_size - 1)  # its last page is still there
    with pytest.raises(InputError, match="it was cut while it was in use"):
        checkpoint.get("model.norm.weight", (config.hidden_size,))
    with pytest.raises(InputError, match="it was cut while it was in use"):
        checkpoint.weights()
