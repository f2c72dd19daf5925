"""Some of the shards: which files hold a layer, which are missing, and what is to be fetched."""

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

import minstep
from minstep import find_config
from minstep.config import parse_config
from minstep.store.inspect import expected
from minstep.store.shards import some_weights
from tests.conftest import GOLDEN, Refused, Run

TINY = GOLDEN / "tiny" / "bf16"  # layers 0 and 1 are dense, 2 to 7 have experts, 8 to 10 are MTP
FIRST, SECOND = "model-00001.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
ALL = expected(minstep.load_config(TINY))
MAP: dict[str, str] = json.loads((TINY / INDEX).read_text())["weight_map"]
L = "model.layers."


@pytest.fixture
def half(tmp_path: Path) -> Path:
    """A checkpoint whose second shard, with a part of layer 5 and all after it, is missing."""
    folder = shutil.copytree(TINY, tmp_path / "half")
    (folder / SECOND).unlink()
    return folder


def asked(run: Run, *arguments: object) -> dict[str, Any]:
    ran = run("inspect", *arguments, "--json")
    assert (ran.code, ran.err) == (0, "")
    content: dict[str, Any] = json.loads(ran.out)
    return content


def nbytes(file: str, scope: str = "") -> int:
    """The bytes of the tensors that the index puts into a file, and whose names begin so."""
    return sum(ALL[n].nbytes for n, f in MAP.items() if f == file and n.startswith(scope))


# The whole checkpoint with some files missing


def test_a_partial_checkpoint_is_counted_by_the_config(run: Run, half: Path) -> None:
    whole, some = asked(run, TINY), asked(run, half)
    gone = [name for name, file in MAP.items() if file == SECOND]
    missing = some.pop("missing")
    assert whole.pop("missing") == {"tensors": 0, "parameters": 0, "bytes": 0, "files": []}
    assert missing["tensors"] == len(gone) and missing["files"] == [SECOND]
    assert missing["bytes"] == nbytes(SECOND)
    sizes = {
        name: shape.nbytes // (4 if name.endswith("bias") else 2) for name, shape in ALL.items()
    }
    assert missing["parameters"] == sum(sizes[name] for name in gone)
    assert whole.pop("path") != some.pop("path")
    assert whole == some
    text = run("inspect", half).out
    line = next(line for line in text.splitlines() if line.startswith("missing"))
    assert line.split()[:4] == ["missing", "90", "480,512", "961,088"]
    assert "missing" not in run("inspect", TINY).out


def test_an_index_alone_says_all_that_a_checkpoint_does(run: Run, half: Path) -> None:
    (half / FIRST).unlink()
    some, whole = asked(run, half), asked(run, TINY)
    assert some["missing"]["files"] == [FIRST, SECOND]
    assert some["missing"]["bytes"] == some["bytes"] == whole["bytes"]
    assert some["tensors"] == whole["tensors"]


def test_what_is_there_is_still_checked(run: Run, refused: Refused, half: Path) -> None:
    config = json.loads((half / "config.json").read_text())
    (half / "config.json").write_text(json.dumps(config | {"intermediate_size": 7}))
    naming = (FIRST, f"{L}0.mlp.gate_proj.weight", "[7, 64]")
    for how in ((), ("--shards",), ("--layer", 3), ("--first", 1)):
        refused("inspect", half, *how, naming=naming)
    (half / "config.json").write_text(json.dumps(config))
    index = {"weight_map": {name: file for name, file in MAP.items() if name != "lm_head.weight"}}
    (half / INDEX).write_text(json.dumps(index))
    refused("inspect", half, naming=("lm_head.weight", "is missing"))
    (half / INDEX).write_text((TINY / INDEX).read_text())


@pytest.mark.parametrize("damage", ["truncated", "Git LFS pointer", "does not fit a file of 0"])
def test_a_damaged_file_is_told_and_stands_in_the_way_of_its_own_layers_only(
    damage: str, run: Run, refused: Refused, tmp_path: Path
) -> None:
    folder = shutil.copytree(TINY, tmp_path / "damaged")
    lfs = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    whole = (TINY / FIRST).read_bytes()
    (folder / FIRST).write_bytes({"truncated": whole[:-1], "Git LFS pointer": lfs}.get(damage, b""))
    first, other = (
        sorted({int(n.split(".")[2]) for n, f in MAP.items() if f == FIRST and L in n})[0],
        9,
    )
    assert all(MAP[name] != FIRST for name in MAP if name.startswith(f"{L}{other}."))
    for how in (("--shards",), ("--layer", first)):
        ran = run("inspect", folder, *how)
        assert ran.code == 0 and damage in ran.out and f"{FIRST} (" in ran.out
    assert FIRST in run("inspect", folder).out
    out = tmp_path / "out"
    record = ("record", "--model", folder, "--tokens", "5,17", "--out", out)
    refused(*record, "--layers", first, naming=(FIRST, damage))
    refused("generate", "--model", folder, "--tokens", "5", naming=(FIRST, damage))
    assert not out.exists()


@pytest.mark.parametrize("name", ["foo", "", "x.y", "²", "3"])
def test_tensors_with_names_that_nobody_knows_are_listed(
    name: str, run: Run, tmp_path: Path
) -> None:
    folder = shutil.copytree(TINY, tmp_path / "odd")
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"][f"model.layers.{name}"] = "elsewhere.safetensors"
    (folder / INDEX).write_text(json.dumps(index))
    for how in ((), ("--shards",), ("--layer", 3)):
        assert run("inspect", folder, *how).code == 0
    assert "elsewhere.safetensors (missing)" in run("inspect", folder, "--shards").out


def test_fp8_scales_are_counted_where_they_are_and_where_they_are_missing(
    run: Run, tmp_path: Path
) -> None:
    made = tmp_path / "made"
    assert run("make-tiny", "tiny", "--out", made, "--dtype", "fp8", "--shards", 3).code == 0
    whole = asked(run, made)
    data = 0
    for file in made.glob("*.safetensors"):
        raw = file.read_bytes()
        data += len(raw) - 8 - int.from_bytes(raw[:8], "little")
    assert whole["bytes"] == data and whole["parts"]["FP8 scales"]["tensors"] == 18
    assert whole["total_parameters"] == asked(run, TINY)["total_parameters"]
    second = made / "model-00002-of-00003.safetensors"
    second.unlink()
    some = asked(run, made)
    assert some["tensors"] == whole["tensors"] and some["bytes"] == data
    files = {entry["file"]: entry for entry in asked(run, made, "--shards")["files"]}
    assert some["missing"]["bytes"] == files[second.name]["bytes"] > 0
    (made / INDEX).rename(tmp_path / "index")
    for file in made.glob("*.safetensors"):
        file.unlink()
    alone = asked(run, made)
    assert alone["tensors"] == whole["tensors"] and alone["bytes"] == data


# --shards


def test_each_file_is_said_to_be_there_or_missing(run: Run, half: Path) -> None:
    for folder in (TINY, half):
        files = asked(run, folder, "--shards")["files"]
        assert [entry["file"] for entry in files] == [FIRST, SECOND]
        for entry in files:
            name = entry["file"]
            held = [tensor for tensor, file in MAP.items() if file == name]
            assert entry["tensors"] == len(held) and entry["bytes"] == nbytes(name)
            numbers = {int(t.split(".")[2]) for t in held if t.startswith(L)}
            assert entry["layers"] == sorted(numbers)
            assert sorted(entry["outside_layers"]) == sorted(t for t in held if not t.startswith(L))
            assert entry["there"] == (folder / name).exists()
            size = (folder / name).stat().st_size if entry["there"] else None
            assert entry["file_bytes"] == size
            assert (entry["disk_bytes"] or 0) >= (size or 0)
    lines = run("inspect", half, "--shards").out.splitlines()
    assert lines[0] == str(half) and len(lines) == 3
    assert FIRST in lines[1] and "layers 0-5, model.embed_tokens.weight" in lines[1]
    assert lines[2].endswith(f"{SECOND} (missing): 961,088 bytes of tensors, layers 5-10")


def test_a_checkpoint_of_one_file_has_shards_too(run: Run, single: Path) -> None:
    (entry,) = asked(run, single, "--shards")["files"]
    size = (single / "model.safetensors").stat().st_size
    assert (entry["file"], entry["there"], entry["file_bytes"]) == ("model.safetensors", True, size)
    report = asked(run, single, "--layer", "0")
    assert report["beside"] == {"config.json": True, "tokenizer.json": False}
    assert report["download"] == []


def test_holes_take_no_disk(run: Run, half: Path) -> None:
    with (half / SECOND).open("wb") as opened:
        opened.write((TINY / SECOND).read_bytes()[:12_000])
        opened.truncate((TINY / SECOND).stat().st_size)
    entry = asked(run, half, "--shards")["files"][1]
    assert entry["there"] and entry["disk_bytes"] < entry["file_bytes"] == 971_256


# --layer and --first


@pytest.mark.parametrize("number", range(11))
def test_a_layer_needs_its_own_tensors_and_what_feeds_it(number: int, run: Run, half: Path) -> None:
    report = asked(run, half, "--layer", number)
    (layer,) = report["layers"]
    scope = f"{L}{number}."
    assert layer["name"] == scope[:-1]
    for entry in layer["files"]:
        mine = nbytes(entry["file"], scope)
        assert entry["bytes"] == mine
        assert entry["share"] == pytest.approx(mine / nbytes(entry["file"]), abs=1e-4)
        assert entry["there"] == (entry["file"] == FIRST)
    assert {e["file"] for e in layer["files"]} == {f for n, f in MAP.items() if n.startswith(scope)}
    assert layer["tensors"] == sum(n.startswith(scope) for n in MAP)
    assert layer["bytes"] == sum(ALL[n].nbytes for n in MAP if n.startswith(scope))
    outside = [entry["tensor"] for entry in layer["outside"]]
    assert outside == (["model.embed_tokens.weight"] if number in (0, 8, 9, 10) else [])
    before = "model.embed_tokens" if number == 0 else f"{L}{number - 1}"
    assert layer["input"] == before
    wanted = [SECOND] if number >= 5 else []
    assert report["download"] == [{"file": name, "bytes": nbytes(name)} for name in wanted]
    assert report["beside"] == {"config.json": True, INDEX: True, "tokenizer.json": False}
    assert {e["tensor"] for e in report["logits"]} == {"model.norm.weight", "lm_head.weight"}
    assert all(entry["there"] and entry["file"] == FIRST for entry in report["logits"])


def test_the_embedding_is_fetched_for_an_mtp_layer(run: Run, half: Path) -> None:
    (half / FIRST).unlink()
    shutil.copy(TINY / SECOND, half)
    assert asked(run, half, "--layer", 7)["download"] == []
    for number in (0, 9):
        assert [e["file"] for e in asked(run, half, "--layer", number)["download"]] == [FIRST]


def test_layers_may_be_given_in_ranges_and_several_times(run: Run, half: Path) -> None:
    report = asked(run, half, "--layer", "0-2,4", "--layer", "9", "--layer", "1")
    assert [layer["layer"] for layer in report["layers"]] == [0, 1, 2, 4, 9]
    assert [e["file"] for e in report["download"]] == [SECOND]
    first = asked(run, half, "--first", 3)
    assert first == asked(run, half, "--layer", "0-2")
    assert first["download"] == []
    assert asked(run, half, "--first", 6)["download"] == report["download"]


def test_what_is_to_be_downloaded_can_be_read(run: Run, half: Path) -> None:
    text = run("inspect", half, "--layer", "5", "--layer", "8").out
    for line in (
        f"{L}5: 17 tensors, 195,712 bytes",
        f"  its input is the output of {L}4",
        f"  {SECOND} (missing): 110,592 bytes of the layer, 11.5% of the file",
        f"  outside, in {FIRST}: model.embed_tokens.weight, 40,960 bytes: embeds the next tokens",
        "to download: 1",
        f"  {SECOND}, 961,088 bytes of tensors by the config",
    ):
        assert f"\n{line}\n" in text, line
    assert "to download: nothing\n" in run("inspect", TINY, "--first", 11).out


def test_an_mtp_layer_without_a_head_of_its_own_needs_lm_head(run: Run, half: Path) -> None:
    index = {"weight_map": {n: f for n, f in MAP.items() if "shared_head.output" not in n}}
    (half / INDEX).write_text(json.dumps(index))
    (layer,) = asked(run, half, "--layer", 9)["layers"]
    assert [e["tensor"] for e in layer["outside"]] == [
        "model.embed_tokens.weight",
        "lm_head.weight",
    ]


def test_a_tied_model_has_its_embedding_for_a_head(run: Run, half: Path) -> None:
    config = json.loads((half / "config.json").read_text()) | {"tie_word_embeddings": True}
    (half / "config.json").write_text(json.dumps(config))
    index = {"weight_map": {n: f for n, f in MAP.items() if n != "lm_head.weight"}}
    (half / INDEX).write_text(json.dumps(index))
    logits = asked(run, half, "--first", 1)["logits"]
    assert [e["tensor"] for e in logits] == ["model.norm.weight", "model.embed_tokens.weight"]


@pytest.mark.parametrize(
    ("how", "naming"),
    [
        (("--layer", "99"), ("--layer 99", "0 to 10")),
        (("--layer", "0-11"), ("--layer 11", "0 to 10")),
        (("--layer", "0", "--layer", "11"), ("--layer 11", "0 to 10")),
        (("--first", "12"), ("--first 12", "0 to 10")),
        (("--first", "0"), ("--first", "at least 1")),
        (("--layer", "2-1"), ("--layer", "'2-1'", "0-17,45")),
        (("--layer", "one"), ("--layer", "'one'")),
        (("--layer", "1", "--shards"), ("--shards", "--layer")),
        (("--layer", "1", "--first", "2"), ("--first", "--layer")),
    ],
)
def test_wrong_layers_are_refused(
    how: tuple[str, ...], naming: tuple[str, ...], half: Path, refused: Refused
) -> None:
    refused("inspect", half, *how, naming=naming)


def test_a_config_alone_has_no_files(refused: Refused) -> None:
    folder = find_config("step-3.5-flash")
    needed = ("17 tensors", "9,312,421,504 bytes")
    refused("inspect", folder, "--layer", 17, naming=(str(folder), "no weights", *needed))
    refused("inspect", "step-3.5-flash", "--first", 1, naming=("12 tensors", "428,360,192 bytes"))
    refused("inspect", "step-3.5-flash", "--shards", naming=("step-3.5-flash", "no weights"))
    refused("inspect", folder / "config.json", "--shards", naming=("config.json", "not a folder"))
    refused("inspect", folder / "config.json", "--layer", 1, naming=("config.json", "no weights"))


def test_an_index_that_names_a_tensor_twice_is_refused(half: Path, refused: Refused) -> None:
    text = (half / INDEX).read_text().replace('"lm_head.weight"', '"model.norm.weight"')
    (half / INDEX).write_text(text)
    for how in (("--layer", 1), ("--shards",), ()):
        refused("inspect", half, *how, naming=(INDEX, "key model.norm.weight stands twice"))


def test_only_the_weights_that_were_asked_for_are_looked_up(half: Path) -> None:
    checkpoint = minstep.open_checkpoint(half)
    names = [n for n in MAP if n.startswith(f"{L}3.")]
    weights = some_weights(checkpoint, names)
    assert weights.layers[3].self_attn.q_proj.shape == ALL[f"{L}3.self_attn.q_proj.weight"].shape
    assert weights.layers[6].self_attn.q_proj.shape == (0,) and weights.lm_head.shape == (0,)
    with pytest.raises(minstep.InputError, match=SECOND):
        some_weights(checkpoint, [f"{L}6.moe.gate.weight"])


def test_the_expected_tensors_are_the_files(tmp_path: Path, run: Run) -> None:
    made = tmp_path / "made"
    assert run("make-tiny", "odd", "--out", made, "--dtype", "fp8").code == 0
    config = json.loads((made / "config.json").read_text())
    assert sorted(expected(parse_config(config))) == sorted(minstep.open_checkpoint(made).tensors)
    plain = load_file(GOLDEN / "odd" / "fp32" / "model.safetensors")
    shapes = expected(minstep.load_config(GOLDEN / "odd" / "fp32"))
    assert {n: (t.dtype, t.shape) for n, t in shapes.items()} == {
        name: ("F32", x.shape) for name, x in plain.items()
    }


def test_an_index_of_many_files_is_listed_in_linear_time(half: Path, run: Run) -> None:
    index = json.loads((half / INDEX).read_text())
    index["weight_map"] |= {f"other.{n}": f"other-{n}.safetensors" for n in range(20_000)}
    (half / INDEX).write_text(json.dumps(index))
    start = time.perf_counter()
    ran = run("inspect", half, "--shards", "--json")
    assert ran.code == 0 and len(json.loads(ran.out)["files"]) > 20_000
    assert time.perf_counter() - start < 30  # comparing all with all takes minutes
