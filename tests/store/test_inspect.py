"""inspect: the released model's counts, and the same answers from a config and a checkpoint."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from minstep import find_config
from tests.conftest import GOLDEN, Refused, Run

FULL = find_config("step-3.5-flash")


def report(run: Run, path: object) -> dict[str, Any]:
    ran = run("inspect", path, "--json")
    assert (ran.code, ran.err) == (0, "")
    content: dict[str, Any] = json.loads(ran.out)
    return content


@pytest.mark.parametrize(
    "path", ["step-3.5-flash", FULL, FULL / "config.json"], ids=["name", "folder", "file"]
)
def test_the_released_model_has_the_published_counts(path: object, run: Run) -> None:
    found = report(run, path)
    assert found["total_parameters"] == 199_384_301_376
    assert found["parameters_without_mtp"] == 196_956_130_368
    assert found["active_parameters_per_token"] == 10_931_407_936
    assert len(found["tensors"]) == 804
    assert found["bytes"] == 398_768_626_944
    assert found["has_weights"] is False
    assert len(found["layers"]) == 48
    for key in ("tensors", "parameters", "bytes"):
        whole = {"tensors": 804, "parameters": found["total_parameters"], "bytes": found["bytes"]}
        assert sum(part[key] for part in found["parts"].values()) == whole[key]


@pytest.mark.parametrize("folder", ["tiny/fp32", "tiny/bf16", "no_extras/bf16", "odd/fp32"])
def test_a_config_alone_gives_what_its_checkpoint_gives(
    folder: str, run: Run, tmp_path: Path
) -> None:
    shutil.copy(GOLDEN / folder / "config.json", tmp_path)
    whole, alone = report(run, GOLDEN / folder), report(run, tmp_path)
    assert (whole.pop("has_weights"), alone.pop("has_weights")) == (True, False)
    assert whole.pop("path") != alone.pop("path")
    assert whole == alone


def test_bytes_are_those_of_the_files(run: Run) -> None:
    for folder in (GOLDEN / "odd" / "bf16", GOLDEN / "odd" / "fp32"):
        data = 0
        for file in folder.glob("*.safetensors"):
            raw = file.read_bytes()
            data += len(raw) - 8 - int.from_bytes(raw[:8], "little")
        assert report(run, folder)["bytes"] == data


def test_the_table_shows_every_layer_and_tensor(run: Run) -> None:
    ran = run("inspect", "step-3.5-flash")
    assert ran.code == 0
    for line in ("199,384,301,376", "196,956,130,368", "10,931,407,936", "398,768,626,944"):
        assert line in ran.out
    for n in range(48):
        assert f"\nmodel.layers.{n} " in ran.out
    assert "8 of 288 x 1280 + 1280" in ran.out
    assert "  lm_head.weight BF16 [128896, 4096]" in ran.out


@pytest.mark.parametrize("name", ["huge", "../tiny", "no/such/place", "tiny/", "n" * 5000])
def test_what_is_neither_a_path_nor_a_shipped_name_is_refused(name: str, refused: Refused) -> None:
    refused("inspect", name, naming=(name.rstrip("/")[:500],))


def test_weights_without_their_index_are_refused(refused: Refused, tmp_path: Path) -> None:
    folder = shutil.copytree(GOLDEN / "odd" / "bf16", tmp_path / "odd")
    (folder / "model.safetensors.index.json").unlink()
    refused("inspect", folder, naming=(str(folder), "model.safetensors.index.json"))
    for shard in folder.glob("*.safetensors"):
        shard.unlink()
    (folder / "model.safetensors.index.json").symlink_to("nowhere")
    refused("inspect", folder, naming=(str(folder), "model.safetensors.index.json"))
