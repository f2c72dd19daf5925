"""`minstep cost`: what it prints, draws and refuses, for every configuration that is shipped."""

import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minstep.cost.count import FORMS, decoding_pass
from minstep.cost.hardware import HARDWARE
from minstep.cost.report import Wanted, report, si
from minstep.cost.roofline import HIGH, LOW, Deployment, gpus_for, roofline_svg
from minstep.store.config_file import find_config, load_config, shipped_folder
from tests.conftest import Run

NAMES = sorted(path.parent.name for path in shipped_folder().glob("*/config.json"))
SVG = "{http://www.w3.org/2000/svg}"
ALL = tuple(HARDWARE.values())


def told(run: Run, *flags: Any) -> dict[str, Any]:
    ran = run("cost", *flags, "--json")
    assert (ran.code, ran.err) == (0, "")
    found: dict[str, Any] = json.loads(ran.out)
    return found


def test_all_that_was_asked_for_is_in_the_text(run: Run) -> None:
    ran = run("cost")
    assert (ran.code, ran.err) == (0, "")
    lines = ran.out.splitlines()
    assert len(lines) <= 80 and max(map(len, lines)) <= 110
    for heading in ("PARAMETERS", "ONE TOKEN", "ONE PASS", "TOKENS A SECOND", "SERVING", "A CONV"):
        assert any(line.startswith(heading) for line in lines), heading
    for number in ("199.384B", "196.956B", "196.710B", "196.81B", "10.931B", "398.8GB", "6 of 6"):
        assert number in ran.out, number
    for device in HARDWARE.values():
        assert device.label in ran.out


# Of the released checkpoint, summed up by hand from the shapes of its 804 tensors. The announced
# figures are in arXiv 2602.10604, table 6, and in the model card: 196B and 0.81B, 11B active.
PARAMETERS = {
    "embedding": 527_958_016,  # 128,896 x 4,096
    "attention": 12 * 75_759_872 + 33 * 109_445_376,
    "dense MLPs": 3 * 138_412_032,
    "router": 42 * 1_179_936,
    "routed experts": 190_253_629_440,
    "shared experts": 42 * 15_728_640,
    "norms": 368_640 + 4_096,
    "output matrix": 527_958_016,
    "MTP layers": 3 * 809_390_336,
}
TOTALS = {
    "total": 199_384_301_376,
    "without_mtp": 196_956_130_368,
    "main_layers": 195_900_214_336,
    "one_mtp_layer": 809_390_336,
    "active": 10_931_407_936,
    "active_with_output_matrix": 11_459_365_952,
}
CACHES = {  # bytes in bfloat16 of full layers, sliding ones, those of drafts, and of 45 full ones
    4_096: (201_326_592, 69_206_016, 6_291_456, 754_974_720),
    32_768: (1_610_612_736, 69_206_016, 6_291_456, 6_039_797_760),
    131_072: (6_442_450_944, 69_206_016, 6_291_456, 24_159_191_040),
    262_144: (12_884_901_888, 69_206_016, 6_291_456, 48_318_382_080),
}


def test_the_report_of_the_released_model_has_the_numbers_of_its_files(run: Run) -> None:
    found = told(run)
    parts = {name: part["parameters"] for name, part in found["parameters"]["parts"].items()}
    assert parts == PARAMETERS
    assert {name: found["parameters"][name] for name in TOTALS} == TOTALS
    caches = {row["context"]: tuple(row["cache"].values()) for row in found["contexts"]}
    assert caches == CACHES
    assert [row["texts"] for row in found["batches"]] == [1, 4, 16, 64, 256, 1024]
    usual = (found["context"], found["batch"], found["latency_ms"], found["acceptance"])
    assert usual == (32_768, 1, 20, [0.77] * 3)
    talk = found["conversation"]
    assert (talk["turns"], talk["input"], talk["output"]) == (20, 515_000, 10_000)
    assert talk["cny"] == pytest.approx((475_000 * 0.14 + 40_000 * 0.7 + 10_000 * 2.1) / 1e6)


def test_a_cost_that_is_off_by_a_fifth_is_explained(run: Run) -> None:
    """Each line of the table that tells a cause is such a line, and each such line tells one."""
    lines = [line.split() for line in run("cost").out.splitlines() if re.search(r" [+-]\d+%", line)]
    assert len(lines) == 6
    for words in lines:
        place = next(n for n, word in enumerate(words) if re.fullmatch(r"[+-]\d+%", word))
        found, published = map(float, words[place - 2 : place])
        is_far = abs(int(words[place].rstrip("%"))) > 20
        assert is_far == (len(words) > place + 1), words
        assert found / published == pytest.approx(1 + int(words[place][:-1]) / 100, abs=0.06)


def test_devices_for_350_tokens_a_second_are_the_fewest_that_give_them(run: Run) -> None:
    """The speed that the model card announces at best."""
    config = load_config(find_config("step-3.5-flash"))
    for row, device in zip(told(run)["hardware"], ALL, strict=True):
        setup = Deployment(config, device, row["gpus"], row["form"], 32_768, (0.77,) * 3)
        assert row["gpus_for_350"] == gpus_for(setup, 350), row["label"]


@pytest.mark.parametrize("name", NAMES)
def test_every_shipped_configuration_has_a_report(name: str, run: Run) -> None:
    text, found = run("cost", "--config", name), told(run, "--config", name)
    config = load_config(find_config(name))
    assert text.code == 0 and len(text.out.splitlines()) <= 80
    parts = found["parameters"]["parts"]
    assert sum(part["parameters"] for part in parts.values()) == found["parameters"]["total"]
    assert ("196.81B" in text.out) == (name == "step-3.5-flash")
    assert ("MTP layers" in parts) == bool(config.mtp_layers) == ("drafts each" in text.out)
    assert all(row["context"] <= config.max_positions for row in found["contexts"])


def test_a_model_without_experts_has_a_report_too(tmp_path: Path, run: Run) -> None:
    raw = json.loads((find_config("odd") / "config.json").read_text(encoding="utf-8"))
    raw |= {"use_moe": False, "moe_layers_enum": ""}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    (tmp_path / "model.safetensors").write_text("weights are not looked at")
    found = told(run, "--config", tmp_path, "--hardware", "h20")
    assert "routed experts" not in found["parameters"]["parts"]
    assert found["batches"][0]["alone"]["experts_read"] == 0
    assert run("cost", "--config", tmp_path / "config.json").code == 0


def test_flags_change_what_they_name(run: Run) -> None:
    flags = ("--context", 1024, "--context", 4096, "--hardware", "h200", "--gpus", 4)
    flags += ("--dtype", "fp8", "--batch", 16, "--acceptance", "0.9,0.5", "--latency", 50)
    found = told(run, *flags, "--turns", 3, "--tokens", "1000,500")
    (row,) = found["hardware"]
    assert (found["context"], [r["context"] for r in found["contexts"]]) == (1024, [1024, 4096])
    assert (row["label"], row["gpus"], row["form"], found["batch"]) == ("H200", 4, "fp8", 16)
    assert (found["acceptance"], found["latency_ms"]) == ([0.9, 0.5], 50)
    assert found["tokens_per_pass"] == pytest.approx(2.35)
    assert found["conversation"]["tokens_at_the_end"] == 4500
    alone = told(run, "--acceptance", 0, "--hardware", "h200")
    assert alone["acceptance"] == [] and alone["tokens_per_pass"] == 1
    assert alone["hardware"][0]["at_most"]["alone"] == alone["hardware"][0]["at_most"]["drafting"]


def test_what_does_not_fit_is_said(run: Run) -> None:
    ran = run("cost", "--hardware", "m4-max", "--dtype", "bf16")
    assert ran.code == 0 and "does not fit into 128GB" in ran.out
    found = told(run, "--hardware", "m4-max", "--dtype", "bf16")
    assert found["hardware"][0]["fits"] is False and found["hardware"][0]["room"] < 0


def test_this_machine_is_added_when_it_is_measured(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = HARDWARE["h20"]._replace(label="here", usual=1, source="measured")
    monkeypatch.setattr("minstep.cli.cost.measure", lambda: here)
    labels = [row["label"] for row in told(run, "--measure")["hardware"]]
    assert labels == [*(device.label for device in ALL), "here"]
    found = told(run, "--measure", "--hardware", "h100")
    assert [row["label"] for row in found["hardware"]] == ["H100", "here"]


def test_a_roofline_is_drawn_through_its_ridges(tmp_path: Path, run: Run) -> None:
    file = tmp_path / "roofline.svg"
    ran = run("cost", "--hardware", "h100", "--hardware", "h20", "--out", file)
    assert ran.code == 0 and "roofline.svg" in ran.err
    figure = ElementTree.fromstring(file.read_text(encoding="utf-8"))
    said = figure.findtext(f"{SVG}desc") or ""
    for device in (HARDWARE["h100"], HARDWARE["h20"]):
        first = LOW * device.bandwidth / 1e12
        assert f"{device.label}: TFLOP/s from {first:.4g} to {device.bf16 / 1e12:.4g}" in said
        assert LOW < device.ridge < HIGH
    texts = " ".join("".join(element.itertext()) for element in figure.iter(f"{SVG}text"))
    for words in ("H100", "H20", "1 text", "64 texts", "1 text, 3 drafts", "32,768"):
        assert words in texts, words


def test_marks_of_the_roofline_are_intensities_of_passes() -> None:
    config = load_config(find_config("step-3.5-flash"))
    cost = decoding_pass(config, FORMS["bf16"], 32_768, 64)
    figure = ElementTree.fromstring(roofline_svg(config, 32_768))
    from minstep.draw.charts import LEFT, PLOT_WIDTH

    share = np.log(cost.intensity / LOW) / np.log(HIGH / LOW)
    x = LEFT + PLOT_WIDTH * share
    paths = [element.get("d", "") for element in figure.iter(f"{SVG}path")]
    starts = [float(found[1]) for d in paths if (found := re.match(r"M([\d.]+) ", d))]
    assert min(abs(start - x) for start in starts) < 0.06


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--config", "nothing"), "nothing: no such file or folder"),
        (("--hardware", "b300"), "--hardware b300: is not known, expected one of h800"),
        (("--context", "300000"), "--context 300000: expected at most the model's 262144"),
        (("--acceptance", "0.9,0.9,0.9,0.9"), "--acceptance: has 4 depths, expected at most"),
        (("--acceptance", "1.5"), "expected shares from 0 to 1"),
        (("--acceptance", "x"), "expected shares from 0 to 1"),
        (("--tokens", "100"), "expected two numbers such as 2000,500"),
        (("--tokens", "0,5"), "expected a whole number of at least 1"),
        (("--turns", "9" * 18), "997,500 tokens in all, expected at most the API's 262,144"),
        (("--turns", "1000"), "--turns 1000: 2,500,000 tokens in all, expected at most the API's"),
        (("--latency", "0"), "expected a number above 0"),
        (("--gpus", "0"), "expected a whole number of at least 1"),
        (("--dtype", "fp4"), "invalid choice: 'fp4'"),
        (("--config", "no_extras", "--acceptance", "0.5"), "has 1 depths, expected at most"),
    ],
)
def test_wrong_use_is_refused_in_one_line(flags: tuple[str, ...], message: str, run: Run) -> None:
    ran = run("cost", *flags)
    assert ran.code == 2 and ran.out == "" and message in ran.err
    assert len(ran.err.splitlines()) == 1


def test_a_chart_has_at_most_six_devices(tmp_path: Path, run: Run) -> None:
    names = [word for name in HARDWARE for word in ("--hardware", name)]
    ran = run("cost", *names, "--hardware", "h20", "--out", tmp_path / "x.svg")
    assert ran.code == 2 and ran.out == "" and "draws at most 6 devices" in ran.err
    assert not (tmp_path / "x.svg").exists()


def test_numbers_keep_four_digits_and_take_a_prefix() -> None:
    numbers = {0: "0", 0.5: "0.5", 104.56: "105", 1271.4: "1,271", 12_345: "12.35k"}
    numbers |= {1_885_000: "1.885M", 22.916e9: "22.92G", 1.72e12: "1.72T"}
    assert {x: si(x) for x in numbers} == numbers


def test_speeds_grow_with_devices_and_shrink_with_context() -> None:
    def drafting(context: int, gpus: int) -> float:
        wanted = Wanted(contexts=(context,), hardware=ALL[:1], gpus=gpus)
        speed: float = report(wanted)["hardware"][0]["expected"]["drafting"]
        return speed

    assert drafting(4096, 16) > drafting(4096, 8) > drafting(131_072, 8)
