"""`minstep lab`: what the commands print and write, and what they refuse in one line."""

import json
import shutil
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from minstep.train.data import Document, hold_out
from tests.conftest import Refused, Run

PROSE = "The quick brown fox jumps over the lazy dog, and the dog does not mind at all.\n" * 40


@pytest.fixture
def prose(tmp_path: Path) -> Path:
    file = tmp_path / "prose.txt"
    file.write_text(PROSE)
    return file


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random checkpoint with a tokenizer."""
    from minstep.cli.main import main

    out = tmp_path_factory.mktemp("labs") / "model"
    assert main(["make-tiny", "tiny", "--out", str(out)]) == 0
    return out


def mtp(run: Run, *arguments: object) -> tuple[int, str]:
    few = ("--prompts", 2, "--prompt-tokens", 20, "--max-tokens", 4, "--tokens", 64)
    ran = run("lab", "mtp", *few, *arguments)
    return ran.code, ran.out


def test_mtp_reports_every_way_and_the_same_each_time(run: Run, model: Path, prose: Path) -> None:
    code, out = mtp(run, "--model", model, "--text", prose, "--json")
    report = json.loads(out)
    assert code == 0 and report["is_lossless"] and report["prompts"] == 2
    assert len(report["ways"]) == 5 and report["read_tokens"] == 63
    assert mtp(run, "--model", model, "--text", prose, "--json") == (code, out)
    other = json.loads(mtp(run, "--model", model, "--text", prose, "--json", "--seed", 5)[1])
    assert other.keys() == report.keys() and other["main_model"] == report["main_model"]
    code, table = mtp(run, "--model", model, "--text", prose)
    assert code == 0 and "lm_head as every head" in table and "the same text" in table


def test_router_reports_every_layer_or_the_experts_of_one(
    run: Run, model: Path, prose: Path
) -> None:
    given = ("lab", "router", "--model", model, "--text", prose, "--tokens", 600)
    report = json.loads(run(*given, "--json").out)
    assert report["tokens"] == 512, "windows are whole"
    assert [layer["layer"] for layer in report["layers"]] == [
        f"model.layers.{n}" for n in range(2, 8)
    ]
    texts = {k["text"] for layer in report["layers"] for e in layer["likings"] for k in e}
    assert " " in texts and all(len(text) == 1 for text in texts), "tokens of the tiny model"
    assert "model.layers.7" in run(*given).out
    shown = run(*given, "--layer", 4).out
    assert shown.startswith("model.layers.4, 4 of 16 experts") and "model.layers.5" not in shown


def test_charts_are_written_to_a_file_or_into_a_folder(
    run: Run, model: Path, prose: Path, tmp_path: Path
) -> None:
    assert mtp(run, "--model", model, "--text", prose, "--out", tmp_path)[0] == 0
    given = ("lab", "router", "--model", model, "--text", prose, "--tokens", 64, "--out")
    assert run(*given, tmp_path / "loads.svg").code == 0
    words = {}
    for name in ("mtp", "loads"):
        svg = ElementTree.parse(tmp_path / f"{name}.svg")
        words[name] = " ".join(element.text or "" for element in svg.iter())
    assert "depth 3" in words["mtp"] and "states after their norm" in words["mtp"]
    assert "no drafts" not in words["mtp"], "there is nothing to draw"
    assert "model.layers.7" in words["loads"] and "without it" in words["loads"]
    before = (tmp_path / "loads.svg").read_bytes()
    assert run(*given, tmp_path / "loads.svg").code == 0
    assert (tmp_path / "loads.svg").read_bytes() == before


def test_without_text_the_held_out_part_of_pythons_documentation_is_read(
    run: Run, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = [Document(f"topic/{n}", f"{n}: {PROSE}") for n in range(30)]
    monkeypatch.setattr("minstep.train.data.python_documents", lambda: documents)
    ran = run("lab", "router", "--model", model, "--tokens", 10**6, "--json")
    size = sum(len(each.text) + 2 for each in hold_out(documents).held_out)  # a byte a token
    assert ran.code == 0 and json.loads(ran.out)["tokens"] == size - size % 512


def test_what_cannot_be_measured_is_refused(
    refused: Refused, model: Path, prose: Path, tmp_path: Path
) -> None:
    given = ("--model", model, "--text", prose)
    naming = ("held-out text", "pieces of 9000 tokens", "at least 24")
    refused("lab", "mtp", *given, "--prompt-tokens", 9000, naming=naming)
    refused("lab", "mtp", *given, "--prompt-tokens", 0, naming=("at least 1",))
    refused("lab", "router", *given, "--layer", 1, naming=("--layer 1", "expected one of 2-7"))
    refused("lab", "mtp", *given, "--out", tmp_path / "none", naming=("none", ".svg"))
    missing = tmp_path / "none" / "mtp.svg"
    refused("lab", "mtp", *given, "--out", missing, naming=("cannot be written",))
    nothing = tmp_path / "nothing.txt"
    nothing.write_text(" ")
    naming = ("nothing.txt", "empty")
    refused("lab", "router", "--model", model, "--text", nothing, naming=naming)
    refused("lab", naming=("LAB",))
    assert not list(tmp_path.glob("*.svg"))


def test_a_model_without_drafts_experts_or_tokenizer_is_refused(
    run: Run, refused: Refused, model: Path, prose: Path, tmp_path: Path
) -> None:
    bare = shutil.copytree(model, tmp_path / "bare")
    (bare / "tokenizer.json").unlink()
    for lab in ("mtp", "router"):
        naming = ("bare", "no tokenizer.json")
        refused("lab", lab, "--model", bare, "--text", prose, naming=naming)
    raw = json.loads((model / "config.json").read_text())
    dense = raw | {"use_moe": False, "moe_layers_enum": ""}
    lists = {key: value[:8] for key, value in raw.items() if isinstance(value, list)}
    no_drafts = raw | {"num_nextn_predict_layers": 0} | lists
    for lab, config, what in (("mtp", no_drafts, "MTP"), ("router", dense, "MoE")):
        source, made = tmp_path / f"{lab}.json", tmp_path / lab
        source.write_text(json.dumps(config))
        assert run("make-tiny", source, "--out", made).code == 0
        shutil.copy(model / "tokenizer.json", made)
        refused("lab", lab, "--model", made, "--text", prose, naming=(f"no {what} layers",))
