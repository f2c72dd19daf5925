"""Checkpoints in hub layout: what make-tiny writes, how shards are found, what opening reads."""

import json
import math
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from minstep import find_config, load_config, open_checkpoint
from minstep.cli.main import main
from minstep.config import Config, parse_config
from minstep.fast.bf16 import BF16Array, to_bf16
from minstep.linear import Weight
from minstep.model import decoder
from minstep.store import random_checkpoint as save
from minstep.store.checkpoint import INDEX
from minstep.store.header import read_header
from minstep.weights import assemble, tensor_shapes
from tests.conftest import GOLDEN, Refused, Run

BIAS = "model.layers.2.moe.router_bias"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def tensors(folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Every tensor of a checkpoint as float32."""
    checkpoint = open_checkpoint(folder)
    shapes = tensor_shapes(checkpoint.config)
    return {
        name: np.asarray(checkpoint.get(name, shape), np.float32) for name, shape in shapes.items()
    }


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of one seed in several forms, and one of another seed."""
    top = tmp_path_factory.mktemp("made")
    for name, options in {
        "float32": [],
        "again": [],
        "other": ["--seed", "2"],
        "bfloat16": ["--dtype", "bfloat16"],
        "float32-3": ["--shards", "3"],
        "bfloat16-2": ["--dtype", "bfloat16", "--shards", "2"],
        "bfloat16-7": ["--dtype", "bfloat16", "--shards", "7"],
    }.items():
        assert main(["make-tiny", "tiny", "--out", str(top / name), "--seed", "1", *options]) == 0
    return top


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(made: Path) -> None:
    assert contents(made / "float32") == contents(made / "again")
    first, other = tensors(made / "float32"), tensors(made / "other")
    assert all(not np.array_equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("form", ["bfloat16", "float32-3", "bfloat16-2", "bfloat16-7"])
def test_dtype_and_shards_never_change_the_numbers(form: str, made: Path) -> None:
    first, other = tensors(made / "float32"), tensors(made / form)
    assert first.keys() == other.keys()
    assert all(np.array_equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("form", ["float32", "bfloat16", "float32-3", "bfloat16-7"])
def test_the_safetensors_package_reads_what_is_written(form: str, made: Path) -> None:
    names: dict[str, str] = {}
    dtypes: dict[str, str] = {}
    for file in sorted((made / form).glob("*.safetensors")):
        with safe_open(file, "numpy") as opened:
            assert opened.metadata() == {"format": "pt", "made_by": "minstep make-tiny"}
            for name in opened.keys():  # noqa: SIM118  (it is no mapping)
                names[name] = file.name
                dtypes[name] = opened.get_slice(name).get_dtype()
    assert names.keys() == tensor_shapes(load_config(made / form)).keys()
    stored = "F32" if form.startswith("float32") else "BF16"
    for name, dtype in dtypes.items():
        assert dtype == ("F32" if name.endswith("router_bias") else stored), name
    if (made / form / INDEX).exists():
        index = json.loads((made / form / INDEX).read_text())
        assert index["weight_map"] == names
        assert index["metadata"]["total_size"] == sum(
            tensor.nbytes
            for file in (made / form).glob("*.safetensors")
            for tensor in read_header(file).values()
        )
    if form == "float32":
        ours = tensors(made / form)
        theirs = load_file(made / form / "model.safetensors")
        assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)


def test_what_the_safetensors_package_writes_is_read(made: Path, tmp_path: Path) -> None:
    ours = tensors(made / "float32")
    shutil.copy(made / "float32" / "config.json", tmp_path)
    save_file(ours, tmp_path / "model.safetensors")
    again = tensors(tmp_path)
    assert all(np.array_equal(ours[name], again[name]) for name in ours)


def test_made_folders_hold_the_named_shards_and_the_tokenizer(made: Path) -> None:
    for folder in made.iterdir():
        config = json.loads((folder / "config.json").read_text())
        bfloat16 = folder.name.startswith("bfloat16")
        assert config["torch_dtype"] == ("bfloat16" if bfloat16 else "float32")
        source = find_config("tiny") / "tokenizer.json"
        assert (folder / "tokenizer.json").read_bytes() == source.read_bytes()
        shards = {path.name for path in folder.glob("*.safetensors")}
        if (folder / INDEX).exists():
            index = json.loads((folder / INDEX).read_text())
            assert set(index["weight_map"].values()) == shards
            assert len(shards) == int(folder.name[-1])
        else:
            assert shards == {"model.safetensors"}


@pytest.mark.parametrize("name", ["tiny", "odd", "no_extras", "drafts"])
def test_shards_are_found_by_the_index_whatever_they_are_called(name: str) -> None:
    folder = GOLDEN / name / "bf16"
    checkpoint = open_checkpoint(folder)
    files = {file.name for file in checkpoint.maps}
    assert files == {"model-00001.safetensors", "model-00002-of-00002.safetensors"}
    assert checkpoint.tensors.keys() >= tensor_shapes(checkpoint.config).keys()
    assert checkpoint.weights().lm_head.shape[0] == checkpoint.config.vocab_size


@pytest.mark.parametrize("form", ["float32", "bfloat16"])
def test_the_router_may_be_stored_in_either_dtype(form: str, made: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(made / form, tmp_path / "mixed")
    checkpoint = open_checkpoint(folder)
    name = "model.layers.2.moe.gate.weight"
    stored = checkpoint.tensors[name]
    raw = (folder / "model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    begin, end = header[name]["data_offsets"]
    gate = np.asarray(checkpoint.get(name, stored.shape), np.float32)
    other = to_bf16(gate).tobytes() if stored.dtype == "F32" else gate.tobytes()
    header[name]["dtype"] = "BF16" if stored.dtype == "F32" else "F32"
    for entry in header.values():
        span = entry.get("data_offsets", [0, 0])
        if span[0] >= end:
            entry["data_offsets"] = [n + len(other) - (end - begin) for n in span]
    header[name]["data_offsets"] = [begin, begin + len(other)]
    text = json.dumps(header).encode()
    data = data[:begin] + other + data[end:]
    whole = len(text).to_bytes(8, "little") + text + data
    (folder / "model.safetensors").write_bytes(whole)
    again = tensors(folder)
    assert all(np.array_equal(x, again[name]) for name, x in tensors(made / form).items())


def test_tensors_the_config_does_not_ask_for_are_left_alone(sharded: Path) -> None:
    save_file({"stray": np.zeros(3, np.int64)}, sharded / "extra.safetensors")
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"]["stray"] = "extra.safetensors"
    (sharded / INDEX).write_text(json.dumps(index))
    assert "stray" in open_checkpoint(sharded).tensors
    open_checkpoint(sharded).weights()


def test_small_tensors_are_converted_when_all_are_put_in_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("minstep.store.checkpoint.SMALL", 64 * 24)
    checkpoint = open_checkpoint(GOLDEN / "tiny" / "bf16")
    weights = checkpoint.weights()
    norm, experts = weights.norm, weights.layers[3].moe.gate_proj
    assert isinstance(norm, np.ndarray) and norm.dtype == np.float32
    assert isinstance(experts, BF16Array) and experts.shape == (16, 24, 64)
    assert np.array_equal(norm, np.asarray(checkpoint.stored("model.norm.weight", (64,))))


@pytest.mark.parametrize("small", [0, 1 << 18], ids=["mapped", "copied"])
def test_no_weight_can_be_written(monkeypatch: pytest.MonkeyPatch, small: int) -> None:
    monkeypatch.setattr("minstep.store.checkpoint.SMALL", small)
    weights = open_checkpoint(GOLDEN / "odd" / "fp32").weights()
    assert isinstance(weights.lm_head, np.ndarray) and isinstance(weights.norm, np.ndarray)
    for weight in (weights.lm_head, weights.norm):
        assert not weight.flags.writeable and weight.flags.owndata == bool(small)


def wide(folder: Path, experts: tuple[int, ...]) -> Path:
    """A sparse checkpoint of over 40 GB: every weight 0, biases that choose `experts`."""
    raw = json.loads((find_config("tiny") / "config.json").read_text())
    raw |= {"torch_dtype": "bfloat16", "moe_num_experts": 288, "moe_intermediate_size": 65536}
    raw |= {"moe_top_k": len(experts)}
    config = parse_config(raw)
    header: dict[str, Any] = {}
    end = 0
    for name, shape in tensor_shapes(config).items():
        begin, end = end, end + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as opened:
        opened.write(len(text).to_bytes(8, "little") + text)
        for name in header:
            if name.endswith("router_bias"):
                begin = 8 + len(text) + header[name]["data_offsets"][0]
                for expert in experts:
                    opened.seek(begin + 2 * expert)
                    opened.write(b"\x80\x3f")  # 1 in bfloat16
        opened.truncate(8 + len(text) + end)
    (folder / "config.json").write_text(json.dumps(raw))
    return folder


MEASURED = """
import resource, sys
from pathlib import Path
from minstep import open_checkpoint
from minstep.model import decoder
def peak():
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
before = peak()
checkpoint = open_checkpoint(Path(sys.argv[1]))
weights = checkpoint.weights()
opened = peak()
decoder([4, 5], weights, checkpoint.config, "float32")
print(opened - before, peak() - before)
"""


def test_opening_reads_headers_only_and_running_only_the_chosen_experts(tmp_path: Path) -> None:
    pytest.importorskip("resource")
    folder = wide(tmp_path, (3, 200))
    assert (folder / "model.safetensors").stat().st_size > 40e9
    try:
        started = time.perf_counter()
        checkpoint = open_checkpoint(folder)
        weights = checkpoint.weights()
        assert time.perf_counter() - started < 1
        command = [sys.executable, "-c", MEASURED, str(folder)]
        ran = subprocess.run(command, capture_output=True, text=True, check=True)
        opened, run = map(int, ran.stdout.split())
        assert opened < 10e6
        # Two experts of six layers are 6 * 2 * 25 MB of map, 300 MB; all of them are 43 GB.
        assert run < 600e6

        layers = []
        read: set[Any] = set()
        for layer in weights.layers:
            if layer.moe is not None:
                seen = {
                    name: Recording(getattr(layer.moe, name), read)
                    for name in ("gate_proj", "up_proj", "down_proj")
                }
                layer = layer._replace(moe=layer.moe._replace(**seen))
            layers.append(layer)
        recorded = weights._replace(layers=tuple(layers))
        decoder([4, 5], recorded, checkpoint.config, np.float32)
        assert read == {3, 200}
    finally:
        (folder / "model.safetensors").unlink()


class Recording:
    """A stored tensor that notes what is taken from it, and is never converted as a whole."""

    def __init__(self, stored: Weight, read: set[Any]) -> None:
        self._stored = stored
        self._read = read
        self.shape = stored.shape

    def __getitem__(self, index: Any) -> Any:
        self._read.add(int(index))
        return self._stored[index]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        raise AssertionError("all experts were read")


def test_random_weights_take_every_place_of_the_released_model() -> None:
    config: Config = load_config(find_config("step-3.5-flash"))
    asked: dict[str, tuple[int, ...]] = {}

    def get(name: str, shape: tuple[int, ...]) -> Any:
        assert name not in asked
        asked[name] = shape
        return None

    weights = assemble(config, get)
    assert len(asked) == 804 and len(weights.layers) == 45 and len(weights.mtp) == 3
    assert asked["model.layers.3.moe.down_proj.weight"] == (288, 4096, 1280)
    assert asked["model.layers.1.self_attn.g_proj.weight"] == (96, 4096)
    assert asked[BIAS.replace(".2.", ".44.")] == (288,)
    assert BIAS not in asked


def test_a_folder_made_twice_is_replaced_as_a_whole(made: Path, tmp_path: Path, run: Run) -> None:
    out = tmp_path / "out"
    for options in (["--shards", 4], []):
        assert run("make-tiny", "tiny", "--out", out, "--seed", 1, *options).code == 0
    assert contents(out) == contents(made / "float32")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_only_named_tensors_are_written_and_the_rest_are_holes(run: Run, tmp_path: Path) -> None:
    only = ("--only", "model.layers.3.*", "--only", "model.norm.weight", "--experts", "5")
    out = tmp_path / "sparse"
    assert run("make-tiny", "tiny", "--out", out, "--seed", "1", "--shards", "4", *only).code == 0
    written = tensors(out)
    shapes = tensor_shapes(load_config(out))
    assert {name: x.shape for name, x in written.items()} == shapes
    for name, x in written.items():
        if name == "model.layers.3.moe.router_bias":
            assert (x[5:] == -2).all() and (abs(x[:5]) < 1).all() and x[:5].all()
        elif name.startswith("model.layers.3.") or name == "model.norm.weight":
            rows = 5 if x.ndim == 3 else len(x)
            assert x[:rows].any(axis=tuple(range(1, x.ndim))).all() and not x[rows:].any(), name
        else:
            assert not x.any(), name


def test_holes_take_no_disk(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "sparse"
    only = ("--only", "model.norm.weight")
    assert run("make-tiny", "long", "--out", out, "--dtype", "fp8", *only).code == 0
    apparent = (out / "model.safetensors").stat()
    assert apparent.st_blocks * 512 < 100_000 < apparent.st_size


def test_a_glob_that_matches_nothing_is_refused(refused: Refused, tmp_path: Path) -> None:
    naming = ("--only model.layer.*", "matches no tensor")
    only = ("--only", "lm_head.*", "--only", "model.layer.*")
    refused("make-tiny", "tiny", "--out", tmp_path / "x", *only, naming=naming)
    assert not (tmp_path / "x").exists()


def test_rows_drawn_a_few_at_a_time_are_the_same(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for dtype in ("float32", "bfloat16", "fp8"):
        for at_once in (1 << 26, 700):
            monkeypatch.setattr(save, "AT_ONCE", at_once)
            out = tmp_path / f"{dtype}-{at_once}"
            argv = ["make-tiny", "tiny", "--out", str(out), "--seed", "1", "--dtype", dtype]
            assert main(argv) == 0
        assert contents(out) == contents(tmp_path / f"{dtype}-{1 << 26}")
    assert contents(tmp_path / "bfloat16-700") == contents(made / "bfloat16")


def test_without_drafts_the_shards_of_mtp_layers_are_not_needed(
    run: Run, refused: Refused, tmp_path: Path
) -> None:
    out = tmp_path / "some"
    assert run("make-tiny", "tiny", "--out", out, "--shards", "20").code == 0
    weight_map = json.loads((out / INDEX).read_text())["weight_map"]
    files = {"main": set[str](), "mtp": set[str]()}
    for name, file in weight_map.items():
        files[
            "mtp" if name.startswith(tuple(f"model.layers.{n}." for n in (8, 9, 10))) else "main"
        ].add(file)
    only_mtp = files["mtp"] - files["main"]
    assert only_mtp
    for file in only_mtp:
        (out / file).unlink()
    how = ("generate", "--model", out, "--tokens", "5,9", "--max-tokens", "3")
    refused(*how, naming=(min(only_mtp), INDEX))
    for drafts in (["--no-mtp"], ["--num-draft-tokens", "0"]):
        assert run(*how, *drafts).code == 0
    assert run("trace", "--model", out, "--tokens", "5", "--out", tmp_path / "trace").code == 0
    refused("trace", "--model", out, "--tokens", "5,6", "--out", tmp_path / "t", naming=(INDEX,))


def test_fewer_experts_than_a_token_chooses_are_refused(refused: Refused, tmp_path: Path) -> None:
    how = ("make-tiny", "tiny", "--out", tmp_path / "few", "--experts")
    refused(*how, "3", naming=("--experts 3", "moe_top_k's 4"))


def test_a_checkpoint_owns_every_file_that_it_is_read_from_through_links_too(
    sharded: Path, tmp_path: Path
) -> None:
    (sharded / "model-00001.safetensors").unlink()  # a file that is to come is its own as well
    checkpoint = open_checkpoint(sharded)
    index = json.loads((sharded / INDEX).read_text())
    own = {INDEX, "model.safetensors", "config.json", "tokenizer.json"}
    for name in own | {*index["weight_map"].values()}:
        link = tmp_path / f"link-{name}"
        link.symlink_to(sharded / name)
        folder = tmp_path / "folder"
        folder.unlink(missing_ok=True)
        folder.symlink_to(sharded)
        for file in (sharded / name, link, folder / name, sharded / ".." / sharded.name / name):
            assert checkpoint.owns(file), file
        assert not checkpoint.owns(sharded / f"{name}.old")
        assert not checkpoint.owns(tmp_path / name)


@pytest.mark.parametrize("first", [1, 1000])
def test_however_many_shards_there_are_each_has_a_tensor(first: int) -> None:
    for sizes in ([first, *[1] * 11], [*[1] * 11, first], [1] * 6 + [first] + [1] * 5):
        for shards in range(1, 13):
            ends = save._shard_ends(sizes, shards)
            assert len(ends) == shards and ends[-1] == 12
            assert all(a < b for a, b in zip([0, *ends], ends, strict=False)), (sizes, ends)


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2)])
def test_the_space_that_is_asked_for_is_what_the_tensors_take(dtype: str, size: int) -> None:
    config = load_config(find_config("tiny"))
    count = sum(math.prod(shape) for shape in tensor_shapes(config).values())
    assert save.needed_space(config, save.Form(dtype)) == size * count
    none = save.Form(dtype, holds=lambda name: "moe" not in name)
    held = {n: shape for n, shape in tensor_shapes(config).items() if "moe" not in n}
    assert save.needed_space(config, none) == size * sum(map(math.prod, held.values()))
