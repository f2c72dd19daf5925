"""The footgun museum: its exhibits, what `minstep footgun` prints, and the page made of it."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

import minstep
from docs.make.museum_page import _section, measured_all, museum_page
from minstep.learn.damage import RUNNERS, Patient
from minstep.learn.exhibits import CLAMPS, DECODING, DRAFTS, EXHIBITS, FILES, Exhibit
from minstep.learn.museum import changes, find_exhibit, measured, patient, report_text, ways
from minstep.parity.decoding_bugs import IN_DRAFTER, UNSEEN
from minstep.parity.known_bugs import FOOTGUNS
from minstep.parity.variants import planted, source
from minstep.text.tokenizer import load_tokenizer
from tests.conftest import Refused, Run

TRAINED = minstep.find_config("trained")
TOKENS, PROMPTS, MAX_TOKENS = 80, 2, 12  # more than a window; the page has more of each
PAGE = Path(__file__).parents[2] / "docs" / "13-footguns.md"
TABLE = {f.bug for table in (FOOTGUNS, UNSEEN) for row in table.values() for f in row}
NAMES = [exhibit.name for exhibit in EXHIBITS]
# The dense layers have no limit in either list, so that the lists may be mixed up there.
HARMLESS = {"clamp of the routed experts used for the dense MLP"}

Report = dict[str, Any]


@pytest.fixture(scope="module")
def reports() -> dict[str, Report]:
    """What all bugs do to the shipped model over part of the page's text, by exhibit."""
    checkpoint, tokenizer = minstep.open_checkpoint(TRAINED), load_tokenizer(TRAINED)
    assert tokenizer
    whole = patient(checkpoint, tokenizer)
    part = Patient(checkpoint, whole.tokens[:TOKENS], whole.prompts[:PROMPTS], MAX_TOKENS)
    return {exhibit.name: measured(exhibit, part, tokenizer) for exhibit in EXHIBITS}


@pytest.fixture(scope="module")
def page_reports() -> dict[str, Report]:
    """The same over all of it."""
    return {report["name"]: report for report in measured_all()}


def ran(run: Run, name: str, *arguments: object) -> Report:
    done = run("footgun", "run", name, "--json", *arguments)
    assert done.code == 0, done
    report: Report = json.loads(done.out)
    return report


# The table


def test_every_bug_of_the_tables_stands_in_one_exhibit() -> None:
    shown = [bug for exhibit in EXHIBITS for bug in exhibit.bugs]
    assert sorted(shown) == sorted(TABLE)
    assert len(set(NAMES)) == len(NAMES)
    assert {exhibit.bugs[0] for exhibit in EXHIBITS if exhibit.group == FILES} == set(RUNNERS)


@pytest.mark.parametrize("exhibit", EXHIBITS, ids=NAMES)
def test_an_exhibit_has_a_name_to_type_a_story_and_places_to_look_up(exhibit: Exhibit) -> None:
    assert re.fullmatch("[a-z0-9]+(-[a-z0-9]+)*", exhibit.name)
    assert 2 <= len(re.findall(r"\.(?= [A-Z]|$)", exhibit.story)) <= 5
    for met in exhibit.met:
        assert re.fullmatch(r"[\w.-]+/[\w.-]+/(pull|issues)/\d+", met.place)
        assert len(met.what) < 120
    assert len(set(exhibit.met)) == len(exhibit.met)


@pytest.mark.parametrize("exhibit", EXHIBITS, ids=NAMES)
def test_the_lines_that_are_shown_make_the_bug(exhibit: Exhibit) -> None:
    for footgun in (way for bug in exhibit.bugs for way in ways(bug)):
        parts = [part for part in (footgun, IN_DRAFTER.get(footgun.bug)) if part]
        shown = changes(footgun)
        assert shown
        for part in parts:
            lines, moved = source(part.module).splitlines(), 0
            wrong = planted(part).splitlines()
            for change in shown if len(parts) == 1 else shown[parts.index(part) :][:1]:
                assert change.file == part.file
                at = change.line - 1 + moved
                assert lines[at : at + len(change.before)] == change.before
                lines[at : at + len(change.before)] = change.after
                moved += len(change.after) - len(change.before)
            assert lines == wrong


# What the bugs do


def test_every_bug_does_what_its_group_says(reports: dict[str, Report]) -> None:
    depths = [f"{spec.name}." for spec in minstep.load_config(TRAINED).mtp_layers]
    for exhibit in EXHIBITS:
        for bug in reports[exhibit.name].get("bugs", ()):
            right = reports[exhibit.name]["as_it_is"]
            is_mtp = (bug["tensor"] or "").startswith(tuple(depths))
            if exhibit.group == DECODING:
                assert bug["tensor"] is None and bug["perplexity"] == right["perplexity"]
            elif exhibit.group == DRAFTS:
                assert is_mtp and bug["perplexity"] == right["perplexity"]
                assert bug["texts"] == right["texts"], "drafts never change greedy text"
            elif bug["bug"] in HARMLESS:
                assert bug["tensor"] is None and bug["texts"] == right["texts"]
            else:
                assert bug["tensor"] and not is_mtp, bug["bug"]
                assert bug["error"] is None or bug["error"] > 1e-10
                assert bug["perplexity"] != right["perplexity"]
            assert (bug["refused"] is not None) == (exhibit.name == "head-count")


def test_the_right_run_is_the_same_for_all_exhibits_of_a_setting(
    reports: dict[str, Report],
) -> None:
    settings: dict[str, Report] = {}
    for report in reports.values():
        if "setting" in report:
            first = settings.setdefault(report["setting"], report["as_it_is"])
            assert report["as_it_is"] == first
    assert len(settings) == 3


def test_gross_bugs_cost_perplexity_and_wrong_heads_cost_drafts(
    reports: dict[str, Report],
) -> None:
    for name in ("norm-weight", "rotation-interleaved", "gate", "rope-theta"):
        bug, right = reports[name]["bugs"][0], reports[name]["as_it_is"]
        assert bug["perplexity"] > 1.2 * right["perplexity"], name
    for name in ("mtp-head", "mtp-halves", "mtp-main-state"):
        bug, right = reports[name]["bugs"][0], reports[name]["as_it_is"]
        assert bug["accepted"] < right["accepted"] and sum(bug["agreed"]) < sum(right["agreed"])
    future, right = reports["future-visible"]["bugs"][0], reports["future-visible"]["as_it_is"]
    assert future["perplexity"] < right["perplexity"], "it sees what it should foretell"


def test_drafts_that_nobody_checks_are_all_kept(reports: dict[str, Report]) -> None:
    (bug,) = reports["drafts-unchecked"]["bugs"]
    assert bug["accepted"] == len(bug["agreed"]) == 3
    assert bug["texts"] != reports["drafts-unchecked"]["as_it_is"]["texts"]


def test_a_text_goes_on_behind_an_end_token_that_was_overlooked(
    reports: dict[str, Report],
) -> None:
    (bug,) = reports["end-token"]["bugs"]
    pairs = zip(reports["end-token"]["as_it_is"]["texts"], bug["texts"], strict=True)
    longer = [(right, wrong) for right, wrong in pairs if right != wrong]
    assert longer and all(
        wrong.startswith(right) and len(wrong) > len(right) for right, wrong in longer
    )


def test_loose_clamps_are_said_to_change_nothing(reports: dict[str, Report]) -> None:
    for exhibit in EXHIBITS:
        for bug in reports[exhibit.name].get("bugs", ()):
            assert ("departs_with_own_limits" in bug) == (exhibit.group == CLAMPS)
            if bug["bug"] in HARMLESS:
                assert not bug["departs_with_own_limits"]


@pytest.mark.parametrize(("bug", "first"), [("long", 0), ("short", -1)])
def test_a_window_off_by_one_shows_at_its_edge_and_no_sooner(
    run: Run, reports: dict[str, Report], bug: str, first: int
) -> None:
    window = max(spec.window or 0 for spec in minstep.load_config(TRAINED).layers)
    number = ["long", "short"].index(bug)
    found = reports["window-off-by-one"]["bugs"][number]
    assert bug in found["bug"]
    assert found["tensor"] == "model.layers.1.self_attn.probs"
    assert found["token"] == window + first
    less = ran(run, "window-off-by-one", "--tokens", window + first)
    assert less["bugs"][number]["tensor"] is None


def test_files_and_text_are_read_wrongly(reports: dict[str, Report]) -> None:
    shards = reports["shards-pattern"]["happened"]
    right, wrong = (int(re.findall(r": (\d+) tensors", line)[0]) for line in shards[1:])
    assert 0 < wrong < right and "is missing" in shards[2] and "loads" in shards[1]
    layers = reports["moe-layers"]["happened"]
    assert "layers 3-44; all 804 tensors" in layers[0] and "layers 0-9;" in layers[1]
    assert "no layer has experts" in layers[2] and all("is missing" in line for line in layers[1:])
    *kept, lost = reports["tool-calls"]["happened"][1:]
    assert all(line.endswith("calls Oslo, Rome") for line in kept)
    assert "calls Oslo, and says" in lost


# The commands


def test_list_has_every_name_in_its_group(run: Run) -> None:
    out = run("footgun", "list").out
    groups = list(dict.fromkeys(exhibit.group for exhibit in EXHIBITS))
    assert [line for line in out.splitlines() if line and line[0] != " "] == groups
    assert [line.split()[0] for line in out.splitlines() if line.startswith(" ")] == NAMES
    assert max(map(len, out.splitlines())) <= 100


def test_show_has_the_story_the_lines_and_who_met_it(run: Run) -> None:
    out = run("footgun", "show", "window-off-by-one").out
    exhibit = find_exhibit("window-off-by-one")
    assert exhibit.story in " ".join(out.split())
    assert all(bug in out for bug in exhibit.bugs)
    (change,) = changes(ways(exhibit.bugs[0])[0])
    assert f"minstep/attention.py, line {change.line}" in out
    assert f"-{change.before[0]}" in out and f"+{change.after[0]}" in out
    assert all(f"https://github.com/{met.place}" in out for met in exhibit.met)
    assert run("footgun", "show", "gate").out.count("or else") == 3


def test_run_prints_what_the_json_says_and_a_bug_that_is_quiet(run: Run) -> None:
    name, few = "window-off-by-one", ("--tokens", 40, "--dtype", "float32")
    done = run("footgun", "run", name, *few)
    assert done.code == 0 and "small model shipped here" in done.err
    assert done.out.count("departs first  nowhere") == 2
    assert done.out.count("greedy text    the same for every prompt") == 2
    perplexity = ran(run, name, *few)["as_it_is"]["perplexity"]
    assert done.out.count(f"perplexity     {perplexity:.2f}") == 3


def test_run_tells_a_refusal_and_what_comes_when_it_is_overridden(run: Run) -> None:
    out = run("footgun", "run", "head-count", "--tokens", 20).out
    assert "refused        model.safetensors: tensor model.layers.1.self_attn.q_proj.weight" in out
    assert "cut to that size" in out and "in its shape" in out and str(TRAINED) not in out


def test_a_refusal_is_told_each_time() -> None:
    checkpoint = minstep.open_checkpoint(TRAINED)
    tried = Patient(checkpoint, [0, 5, 17], [[0, 5]], max_tokens=2)
    (bug,) = find_exhibit("head-count").bugs
    first, again = (tried.spoiled(ways(bug)[0]) for _ in range(2))
    assert first.refused and first == again


def test_where_nothing_is_drafted_no_drafts_are_counted() -> None:
    checkpoint = minstep.open_checkpoint(TRAINED)
    tried, tokenizer = Patient(checkpoint, [0, 5, 17], [[0, 5]], 1), load_tokenizer(TRAINED)
    assert tokenizer
    report = measured(find_exhibit("window-forgotten"), tried, tokenizer)
    assert report["as_it_is"]["accepted"] is None
    assert "drafts kept    none -> none a pass" in report_text(report)


def test_a_model_of_ones_own_is_run_drafts_or_not(run: Run, tmp_path: Path) -> None:
    own = tmp_path / "own"
    assert run("make-tiny", "tiny", "--out", own).code == 0
    report = ran(run, "mtp-head", "--model", own, "--tokens", 12)
    assert report["bugs"][0]["tensor"].endswith("shared_head.output")
    raw = json.loads((own / "config.json").read_text())
    depths, raw["num_nextn_predict_layers"] = raw["num_nextn_predict_layers"], 0
    raw |= {k: v[:-depths] for k, v in raw.items() if k in PER_LAYER}
    bare = tmp_path / "bare"
    (folder := tmp_path / "config").mkdir()
    (folder / "config.json").write_text(json.dumps(raw))
    assert run("make-tiny", folder, "--out", bare).code == 0
    shutil.copy(own / "tokenizer.json", bare)
    report = ran(run, "norm-weight", "--model", bare, "--tokens", 12)
    assert report["as_it_is"]["agreed"] == [] and report["bugs"][0]["tensor"]
    assert "drafts" not in run("footgun", "run", "gate", "--model", bare, "--tokens", 12).out


PER_LAYER = (
    "layer_types rope_theta partial_rotary_factors swiglu_limits swiglu_limits_shared".split()
)


def test_a_bug_whose_line_was_edited_is_refused_and_all_others_are_not(
    run: Run, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    def edited(name: str) -> str:
        text = source(name)
        if name == "mtp":  # the second place of a bug, in the Drafter
            return text.replace("x, layer,", "x,  layer,")
        return text.replace("spec.window, tap)", "spec.window,  tap)")

    monkeypatch.setattr("minstep.parity.variants.source", edited)
    for what in ("show", "run"):
        naming = ("minstep/attention.py: the line", "'window one too long'", "undo the edit")
        refused("footgun", what, "window-off-by-one", naming=naming)
        refused("footgun", what, "mtp-main-state", naming=("minstep/mtp.py: the line that",))
    assert run("footgun", "list").code == run("footgun", "show", "gate").code == 0


def test_unknown_names_and_bad_arguments_are_refused(refused: Refused, tmp_path: Path) -> None:
    for what in ("show", "run"):
        naming = ("windw", "window-", "or another of minstep footgun list")
        refused("footgun", what, "windw", naming=naming)
        refused("footgun", what, "zzzz", naming=("zzzz", "expected one of minstep footgun list"))
    refused("footgun", naming=("WHAT",))
    refused("footgun", "run", naming=("NAME",))
    refused("footgun", "run", "gate", "--tokens", 1, naming=("at least 2",))
    refused("footgun", "run", "gate", "--tokens", 10**6, naming=("1000000", "at most"))
    refused("footgun", "run", "gate", "--model", tmp_path / "no", naming=("no", "not a folder"))
    bare = shutil.copytree(TRAINED, tmp_path / "bare")
    (bare / "tokenizer.json").unlink()
    refused("footgun", "run", "gate", "--model", bare, naming=("bare", "no tokenizer.json"))


# The page


def without_nav(text: str) -> str:
    return re.sub(r"(<!-- nav -->\n).*?(<!-- end -->)", r"\1\2", text, flags=re.S)


def without_figures(text: str) -> list[str]:
    """The lines of the page that no run decides: heads, stories, changes, and who met a bug."""
    findings = text.index("## What the numbers say"), text.index("The small model is no measure")
    text = text[: findings[0]] + text[findings[1] :]
    text = re.sub(r"^(After `.*\n\n)?```text\n.*?^```$", "", text, flags=re.M | re.S)
    text = re.sub(r"^With the limits of the model.*?\n$", "", text, flags=re.M | re.S)
    measured = r"\|.*|Greedy text stays .*|.* in float64, reads .*|it was not trained on, .*"
    return [line for line in text.splitlines() if line and not re.fullmatch(measured, line)]


STALE = "the page is stale: python -m docs.make.museum_page writes it"


@pytest.mark.thorough
def test_the_page_is_what_the_museum_measures(page_reports: dict[str, Report]) -> None:
    made, page = museum_page([*page_reports.values()]), PAGE.read_text(encoding="utf-8")
    assert without_nav(page) == made, STALE


def test_the_page_has_what_the_museum_says_and_a_section_for_each_exhibit(
    reports: dict[str, Report],
) -> None:
    page = PAGE.read_text(encoding="utf-8")
    made = museum_page([*reports.values()])
    assert without_figures(without_nav(page)) == without_figures(made), STALE
    assert re.findall("^### (.+)$", page, re.M) == NAMES
    assert re.findall(r"^\| \[[^]]+\]\(#(.+?)\)", page, re.M) == NAMES
    assert str(TRAINED.parent) not in page
    tables = [line for line in page.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in tables} == {7, 8}


@pytest.mark.parametrize("name", ["tool-calls", "norm-weight"])
def test_a_run_alone_gives_the_section_of_the_page(run: Run, name: str) -> None:
    section = "\n".join(_section(find_exhibit(name), ran(run, name)))
    assert section in PAGE.read_text(encoding="utf-8"), STALE


@pytest.mark.thorough
def test_a_run_alone_gives_the_figures_of_all_runs(
    run: Run, page_reports: dict[str, Report]
) -> None:
    for name in ("clamp-list", "end-token"):
        assert ran(run, name) == page_reports[name]
