"""Every malformed checkpoint is refused in one line that names the file or tensor."""

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from minstep.errors import InputError
from minstep.store.checkpoint import open_checkpoint
from tests.conftest import Refused, Run
from tests.support.tiers import cases

Header = dict[str, Any]
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
NORM, HEAD = "model.norm.weight", "lm_head.weight"
TOKENS = ("--tokens", "4,5")


def edit_header(file: Path, edit: Callable[[Header], object]) -> None:
    """Rewrite the header of a safetensors file; its data stays."""
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    edit(header)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


def moved(name: str, begin: int, end: int) -> Callable[[Header], object]:
    """Shift a tensor's offsets."""

    def edit(header: Header) -> None:
        first, last = header[name]["data_offsets"]
        header[name]["data_offsets"] = [first + begin, last + end]

    return edit


def renamed(name: str) -> Callable[[Header], object]:
    """Give a tensor a name that nothing asks for."""
    return lambda header: header.update({f"other {name}": header.pop(name)})


@pytest.mark.parametrize(
    ("edit", "naming"),
    [
        (lambda h: h.pop(HEAD), (SINGLE,)),  # a gap where its bytes lie
        (moved(NORM, 4, 4), ("model.norm.weight", "offset")),
        (moved(NORM, -4, -4), (SINGLE, "offset")),
        (moved(NORM, 1 << 40, 1 << 40), (SINGLE, "offset")),
        (moved(NORM, 0, -4), (NORM, "data_offsets", "160 bytes")),
        (lambda h: h[NORM].update(data_offsets=[-160, 0]), (NORM, "data_offsets")),
        (lambda h: h[NORM].update(data_offsets=[0]), (NORM, "data_offsets")),
        (lambda h: h[NORM].update(data_offsets="all"), (NORM, "data_offsets")),
        (lambda h: h[NORM].update(shape=[80]), (NORM, "data_offsets")),
        (lambda h: h[NORM].update(shape=[-40]), (NORM, "shape")),
        (lambda h: h[NORM].update(shape=[True]), (NORM, "shape")),
        (lambda h: h[NORM].update(shape=None), (NORM, "shape")),
        (lambda h: h[NORM].update(shape=[10**4000] * 2), (NORM, "shape")),
        (lambda h: h[NORM].update(shape=[1 << 40] * 900), (NORM, "shape")),
        (lambda h: h[NORM].update(shape=[10.0, 4]), (NORM, "shape", "10.0")),
        (lambda h: h[NORM].pop("shape"), (NORM, "shape")),
        (lambda h: h[NORM].pop("data_offsets"), (NORM, "data_offsets")),
        (lambda h: h[NORM].update(shape=[20, 2]), (NORM, "[20, 2]", "[40]")),
        (lambda h: h[NORM].update(dtype="I32"), (NORM, "I32", "F32")),
        (lambda h: h[NORM].update(dtype="F31"), (NORM, "F31")),
        (lambda h: h[NORM].update(dtype=["F32"]), (NORM, "F32")),
        (lambda h: h.update({NORM: 7}), (NORM, "7")),
        (lambda h: h.update({"other": h.pop(NORM)}), (NORM, "missing", "[40]")),
    ],
)
def test_a_wrong_header_entry_is_refused(
    edit: Callable[[Header], object], naming: tuple[str, ...], single: Path, refused: Refused
) -> None:
    edit_header(single / SINGLE, edit)
    refused("generate", "--model", single, *TOKENS, naming=naming)
    refused("inspect", single, naming=naming)


@pytest.mark.parametrize(
    ("spoil", "naming"),
    [
        (lambda raw: raw[:-1], ("truncated",)),
        (lambda raw: raw[: len(raw) // 2], ("truncated",)),
        (lambda raw: raw[:100], ("header length",)),
        (lambda raw: raw[:7], ("header length",)),
        (lambda raw: b"", ("header length",)),
        (lambda raw: raw + b"\0", ("expected", "bytes")),
        (lambda raw: (1 << 62).to_bytes(8, "little") + raw[8:], ("header length",)),
        (lambda raw: (0).to_bytes(8, "little") + raw[8:], ("header",)),
        (lambda raw: (2000).to_bytes(8, "little") + raw[8:], ("header",)),
        (lambda raw: raw[:8] + b"[" + raw[9:], ("header",)),
        (lambda raw: (2).to_bytes(8, "little") + b"[]", ("JSON object",)),
        (lambda raw: raw[:8] + b"\xff" * 20 + raw[28:], ("header",)),
    ],
)
def test_a_corrupt_file_is_refused(
    spoil: Callable[[bytes], bytes], naming: tuple[str, ...], single: Path, refused: Refused
) -> None:
    file = single / SINGLE
    file.write_bytes(spoil(file.read_bytes()))
    refused("generate", "--model", single, *TOKENS, naming=(str(file), *naming))


def test_a_tensor_described_twice_is_refused(single: Path, refused: Refused) -> None:
    raw = (single / SINGLE).read_bytes()
    (single / SINGLE).write_bytes(raw.replace(b'"model.norm.weight"', b'"lm_head.weight"   '))
    refused("inspect", single, naming=(SINGLE, "lm_head.weight", "twice"))


def test_overlapping_tensors_are_refused(single: Path, refused: Refused) -> None:
    edit_header(single / SINGLE, lambda h: h.update({"copy": h[NORM]}))
    refused("inspect", single, naming=(SINGLE, "offset"))


def test_a_long_header_is_no_fault(single: Path, run: Run) -> None:
    """Of a model of real size it has megabytes; spaces at its end are allowed."""
    raw = (single / SINGLE).read_bytes()
    length, spaces = int.from_bytes(raw[:8], "little"), b" " * 8_000_000
    begin = (length + len(spaces)).to_bytes(8, "little") + raw[8 : 8 + length]
    (single / SINGLE).write_bytes(begin + spaces + raw[8 + length :])
    assert run("inspect", single, "--json").code == 0


@pytest.mark.parametrize("where", ["beside", "below"])
@pytest.mark.parametrize("form", ["relative", "absolute", "nested", "through", "backslash"])
def test_an_index_leads_to_no_file_outside_its_folder(
    form: str, where: str, sharded: Path, refused: Refused
) -> None:
    """The file that it names is whole and has the tensor: only its place is wrong."""
    inside = sharded / "model-00001.safetensors"
    folder = sharded.parent if where == "beside" else sharded / "below"
    folder.mkdir(exist_ok=True)
    outside = Path(inside.rename(folder / "evil.safetensors"))
    relative = "../evil.safetensors" if where == "beside" else "below/evil.safetensors"
    shard = {
        "relative": relative,
        "absolute": str(outside),
        "nested": f"./{relative}",
        "through": f"../{sharded.name}/{relative}",
        "backslash": relative.replace("/", "\\"),
    }[form]
    index = json.loads((sharded / INDEX).read_text())
    names = index["weight_map"]
    index["weight_map"] = {n: shard if f == inside.name else f for n, f in names.items()}
    (sharded / INDEX).write_text(json.dumps(index))
    is_a_name = form == "backslash" and os.sep == "/"  # of a file that is not there
    refused("generate", "--model", sharded, *TOKENS, naming=("evil.safetensors",))
    try:
        opened = open_checkpoint(sharded)
    except InputError:
        return
    assert is_a_name and outside not in {*opened.maps, *(t.file for t in opened.tensors.values())}


@pytest.mark.parametrize(
    ("content", "naming"),
    [
        ("{", ("not valid JSON",)),
        ("[]", ("JSON object",)),
        ("{}", ("weight_map",)),
        ('{"weight_map": {}}', ("weight_map",)),
        ('{"weight_map": {"lm_head.weight": 3}}', ("lm_head.weight", "3")),
        ('{"weight_map": {"lm_head.weight": "../model.safetensors"}}', ("../model.safetensors",)),
        ('{"weight_map": {"lm_head.weight": "absent.safetensors"}}', ("absent.safetensors",)),
        ('{"weight_map": {"lm_head.weight": ".."}}', ("..",)),
        ('{"weight_map": {"lm_head.weight": ""}}', ("lm_head.weight",)),
        ('{"weight_map": {"lm_head.weight": "/etc/hosts"}}', ("/etc/hosts",)),
        ('{"weight_map": {"lm_head.weight": "a\\u0000b"}}', ("missing",)),
        ('{"weight_map": {"lm_head.weight": "config.json"}}', ("config.json", "header")),
        ('{"weight_map": {"lm_head.weight": "%s"}}' % ("n" * 999), ("nnn",)),
        ('{"weight_map": "model.safetensors"}', ("weight_map",)),
        ('{"weight_map": {"nothing": "model-00001.safetensors"}}', ("nothing", "missing")),
        ('{"weight_map": {"lm_head.weight": "model-00001.safetensors"}}', ("embed_tokens",)),
    ],
)
def test_a_malformed_index_is_refused(
    content: str, naming: tuple[str, ...], sharded: Path, refused: Refused
) -> None:
    (sharded / INDEX).write_text(content)
    refused("generate", "--model", sharded, *TOKENS, naming=naming)


def test_a_missing_shard_is_named_with_the_index_that_wants_it(
    sharded: Path, refused: Refused
) -> None:
    (sharded / "model-00001.safetensors").unlink()
    naming = ("model-00001.safetensors", INDEX)
    refused("generate", "--model", sharded, *TOKENS, naming=naming)


def test_shards_without_an_index_are_refused(sharded: Path, refused: Refused) -> None:
    (sharded / INDEX).unlink()
    refused("generate", "--model", sharded, *TOKENS, naming=(str(sharded), SINGLE, INDEX))


def test_a_dtype_other_than_the_config_s_is_refused(sharded: Path, refused: Refused) -> None:
    config = json.loads((sharded / "config.json").read_text())
    (sharded / "config.json").write_text(json.dumps(config | {"torch_dtype": "float32"}))
    naming = ("model.embed_tokens.weight", "BF16", "F32")
    refused("generate", "--model", sharded, *TOKENS, naming=naming)


def test_a_folder_without_weights_or_config_is_refused(tmp_path: Path, refused: Refused) -> None:
    refused("generate", "--model", tmp_path / "no", *TOKENS, naming=(str(tmp_path / "no"),))
    refused("generate", "--model", tmp_path, *TOKENS, naming=("config.json",))
    refused("generate", "--model", __file__, *TOKENS, naming=(__file__, "folder"))


def test_an_mtp_head_missing_from_one_depth_only_is_refused(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "tiny"
    assert run("make-tiny", "tiny", "--out", out).code == 0
    gone = "model.layers.9.transformer.shared_head.output.weight"
    edit_header(out / SINGLE, renamed(gone))
    assert gone in run("inspect", out).err
    for layer in (8, 10):
        other = gone.replace(".9.", f".{layer}.")
        edit_header(out / SINGLE, renamed(other))
    base = run("generate", "--model", out, *TOKENS, "--max-tokens", 1)
    assert base.code == 0 and "lm_head is used" in base.err


@pytest.mark.parametrize(
    ("command", "count"), cases([("inspect", 30), ("generate", 12)], [("inspect", 300)])
)
@pytest.mark.parametrize("part", ["header", "data", "config.json", INDEX])
def test_random_damage_ends_in_an_answer_or_one_line(
    part: str, command: str, count: int, single: Path, sharded: Path, run: Run
) -> None:
    rng = random.Random(f"{part} {command} {count}")
    file = {INDEX: sharded / INDEX, "config.json": single / part}.get(part, single / SINGLE)
    intact = file.read_bytes()
    data = 8 + int.from_bytes(intact[:8], "little")
    first, last = {"header": (0, data), "data": (data, len(intact))}.get(part, (0, len(intact)))
    arguments: tuple[object, ...] = ("inspect", file.parent, "--json")
    if command == "generate":
        sampled = ("--max-tokens", 2, "--temp", 1, "--json")
        arguments = ("generate", "--model", file.parent, *TOKENS, *sampled)
    for _ in range(count):
        raw = bytearray(intact)
        for _ in range(rng.choice((1, 1, 2, 50))):
            raw[rng.randrange(first, last)] = rng.choice((rng.randrange(256), 0x7F, 0x39, 0x2D))
        cut = rng.random() < 0.2
        file.write_bytes(raw[: rng.randrange(first, last)] if cut else raw)
        ran = run(*arguments)
        assert ran.code in (0, 2) and "Traceback" not in ran.err, ran
        assert ran.code == 0 or (ran.err.count("\n") == 1 and not ran.out), ran
        if ran.code == 0:
            json.loads(ran.out)


def test_one_digit_after_another_changed_never_ends_in_a_traceback(single: Path, run: Run) -> None:
    """Digits of the config and the header, where damage stays valid JSON."""
    rng = random.Random(1)
    for file in (single / "config.json", single / SINGLE):
        intact = file.read_bytes()
        last = min(len(intact), 9000)
        places = [n for n in range(8, last) if intact[n : n + 1].isdigit()]
        for place in rng.sample(places, 80):
            raw = bytearray(intact)
            raw[place] = ord(rng.choice("0123456789"))
            file.write_bytes(raw)
            ran = run("generate", "--model", single, *TOKENS, "--max-tokens", 1)
            assert ran.code == 0 or (ran.code == 2 and ran.err.count("\n") == 1), ran
        file.write_bytes(intact)
