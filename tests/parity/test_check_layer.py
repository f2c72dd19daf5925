"""check-layer: one layer against a recording; each porting bug is found, and named."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import minstep
from minstep.parity.check_layer import Checked, Rerun, layer_input, run_layer
from minstep.parity.compare import Comparison
from minstep.parity.diagnosis import (
    Checks,
    Trial,
    checkable,
    checks_table,
    explain,
    leading,
    not_tried,
    reaches,
)
from minstep.parity.engine_tensors import Recording
from minstep.parity.known_bugs import ALL, FOOTGUNS, Footgun
from minstep.parity.trace import Recorder, Trace
from minstep.parity.variants import variant
from tests.conftest import GOLDEN, Ran, Refused, Run
from tests.support.recordings import as_transformers, as_vllm, rounded, save
from tests.support.tiers import cases

MODELS = ("tiny", "odd", "no_extras", "drafts")
L = "model.layers."
TINY = GOLDEN / "tiny" / "bf16"  # MoE layers 2-7, MTP layers 8-10; full attention in 0 and 4


def prompt(name: str) -> list[int]:
    content: list[int] = json.loads((GOLDEN / name / "meta.json").read_text())["prompt"]
    return content


def traced(
    folder: Path, footgun: Footgun | None = None, dtype: str = "float32", tokens: Any = None
) -> Trace:
    """What a checkpoint, or its port with a bug, computes over the golden prompt."""
    chain, checkpoint = variant(footgun), minstep.open_checkpoint(folder)
    config, trace = chain.config_file.load_config(folder), Trace()
    weights = chain.weights.assemble(config, leading(checkpoint))
    tokens, tap = tokens or prompt(folder.parent.name), Recorder(trace)
    hidden = chain.model.decoder(tokens, weights, config, np.dtype(dtype), tap=tap)
    chain.model.head(hidden, weights, config, tap)
    chain.mtp.mtp_forward(tokens, hidden, weights, config, tap)
    return trace


def hooked(trace: Trace) -> Trace:
    """Without what no module of a port computes."""
    between = (".probs", "_rope", ".margin", "h0")
    return {name: x for name, x in trace.items() if not name.endswith(between)}


@pytest.fixture(scope="module")
def tiny() -> Trace:
    """What the right model computes."""
    return traced(TINY)


Check = Callable[..., Ran]


@pytest.fixture
def check(run: Run, tmp_path: Path) -> Check:
    """Write a recording, and check layers of the tiny golden model against it."""

    def runs(trace: dict[str, Any], *arguments: object, **metadata: Any) -> Ran:
        metadata = {"tokens": prompt("tiny")} | metadata
        file = save(trace, tmp_path / "recording", **metadata)
        return run("check-layer", TINY, *arguments, "--against", file)

    return runs


def said(ran: Ran, layer: int) -> list[str]:
    """What is printed of one layer below the table."""
    at = f"layer {layer} "
    return [line.removeprefix(at) for line in ran.out.splitlines() if line.startswith(at)]


# The right model


@pytest.mark.parametrize("dtype", cases(["float32", "bfloat16"], ["float64", "float16"]))
@pytest.mark.parametrize("name", MODELS)
def test_the_right_model_matches_in_every_layer(
    name: str, dtype: str, run: Run, tmp_path: Path
) -> None:
    folder, is_short = GOLDEN / name / "bf16", dtype in ("float16", "bfloat16")
    trace = traced(folder, dtype="float32" if is_short else dtype)
    theirs = {n: rounded(x, dtype) for n, x in trace.items()} if is_short else trace
    file = save(theirs, tmp_path / "file", tokens=prompt(name), dtype=dtype)
    for own in ("float32", "float64"):
        ran = run("check-layer", folder, "--all", "--against", file, "--dtype", own)
        assert ran.code == 0, ran.out
        assert ran.err == ""
        config = minstep.load_config(folder)
        count = len(config.layers) + len(config.mtp_layers)
        assert ran.out.splitlines()[-1].startswith(f"match: {count} layers, {len(trace)} tensors")


@pytest.mark.parametrize("name", MODELS)
def test_the_golden_tensors_match_in_every_layer(name: str, run: Run, tmp_path: Path) -> None:
    golden = load_file(GOLDEN / name / "golden_f64.safetensors")
    file = save(golden, tmp_path / "file", tokens=prompt(name))
    ran = run("check-layer", GOLDEN / name / "bf16", "--all", "--against", file, "--json")
    assert ran.code == 0
    assert sum(len(layer["tensors"]) for layer in json.loads(ran.out)["layers"]) == len(golden)


@pytest.mark.parametrize("name", ["transformers", "vllm"])
def test_other_frameworks_names_are_understood(name: str, tiny: Trace, check: Check) -> None:
    rng = np.random.default_rng(0)
    theirs = as_vllm(tiny) if name == "vllm" else as_transformers(tiny, 3.0, rng)
    ran = check(theirs, "--all")
    assert ran.code == 0, ran.out
    assert "model.layers.3.mlp " in ran.out and "model.layers.3.self_attn.q_proj" in ran.out
    assert ("not checked: layers 8-10, since" in ran.out) == (name == "transformers")


def test_a_layer_runs_from_its_own_recorded_input(tiny: Trace, check: Check) -> None:
    moved = tiny["model.layers.2"] + np.float32(0.5)
    apart = {
        "model.layers.3.input": tiny["model.layers.2"],
        "model.layers.3": tiny["model.layers.3"],
    }
    assert check(apart, "--layer", 3).code == 0
    assert check(apart | {"model.layers.2": moved}, "--layer", 3).code == 0  # it goes before
    assert check(apart | {"model.layers.3.input": moved}, "--layer", 3).code == 1


def test_layer_0_runs_from_the_tokens_where_no_embedding_was_recorded(
    tiny: Trace, check: Check
) -> None:
    assert check({"model.layers.0": tiny["model.layers.0"]}, "--layer", 0).code == 0


def test_an_mtp_layer_takes_as_many_rows_as_have_a_token(tiny: Trace, check: Check) -> None:
    names = ("model.layers.8", "model.layers.9.eh_proj", "model.layers.9")
    theirs = {name: np.concatenate((tiny[name], tiny[name][:3] + 9)) for name in names}
    ran = check(theirs, "--layer", 9)
    assert ran.code == 0, ran.out
    assert f"[{len(prompt('tiny')) - 2}, 64]" in ran.out


def test_a_prompt_of_one_token_is_enough_for_a_main_layer(run: Run, tmp_path: Path) -> None:
    for form in (dict, lambda trace: as_transformers(trace, 3.0, np.random.default_rng(0))):
        file = save(form(traced(TINY, tokens=[7])), tmp_path / "file", tokens=[7])
        ran = run("check-layer", TINY, "--all", "--against", file)
        assert ran.code == 0, ran.out
        assert ran.out.splitlines()[-1].startswith("match: 8 layers")


def test_layers_are_given_by_numbers_and_ranges(tiny: Trace, check: Check) -> None:
    ran = check(tiny, "--layer", "7,0-1", "--layer", 9, "--json")
    report = json.loads(ran.out)
    assert [layer["layer"] for layer in report["layers"]] == [0, 1, 7, 9]
    assert [report["match"], report["skipped"], report["layers"][0]["first"]] == [True, {}, None]
    names = [tensor["name"] for tensor in report["layers"][0]["tensors"]]
    assert names[0] == "model.embed_tokens" and names[-1] == "model.layers.0"
    names = [tensor["name"] for tensor in report["layers"][2]["tensors"]]
    assert names[-3:] == ["model.layers.7", "model.norm", "lm_head"]


def test_all_says_what_it_could_not_check(tiny: Trace, check: Check) -> None:
    parts = ("model.layers.1.input", "model.layers.1", "model.layers.4.mlp", "model.layers.8")
    theirs = {name: tiny.get(name, tiny["model.layers.0"]) for name in parts}
    ran = check(theirs, "--all")
    assert ran.code == 0, ran.out
    assert ran.out.splitlines()[-3:-1] == [
        "not checked: layers 0,2-3,5-7,9-10, since the recording has no output of theirs",
        "not checked: layers 4,8, since the recording has no input of theirs",
    ]
    assert ran.out.splitlines()[-1].startswith("match: 1 layer, 1 tensors within 2e-05")
    unknown = {"model.layers.2.rotary_emb": np.zeros(3), "model.layers.2.mlp.weight": np.zeros(3)}
    assert check(theirs | unknown, "--all").out == ran.out


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_a_depth_is_checkable_where_the_prompt_leaves_it_a_position(
    count: int, tiny: Trace
) -> None:
    """Another engine may have recorded rows of every depth for the shortest prompt, padded."""
    padded = {name: x[:, :count, :count] if x.ndim == 3 else x[:count] for name, x in tiny.items()}
    theirs = Recording("theirs", padded, prompt("tiny")[:count])
    numbers, skipped = checkable(minstep.open_checkpoint(TINY), theirs)
    depths = range(1, 4)
    assert numbers == [*range(8), *(7 + k for k in depths if k < count)]
    short = [7 + k for k in depths if k >= count]
    assert skipped == ({"the prompt is too short": short} if short else {})


def test_the_worst_tensor_of_all_layers_is_told_by_its_largest_error(tiny: Trace) -> None:
    def row(name: str, largest: float, mean: float) -> Comparison:
        return Comparison(name, (3, 4), largest, mean, 1.0, None, True, 0.1)

    rows = [row(f"{L}2", 0.01, 0.009), row(f"{L}3.moe", 0.08, 0.001), row(f"{L}3", 0.02, 0.01)]
    layers = [Checked(n, 0.1, rows[m:end], 3, 0, []) for n, m, end in ((2, 0, 1), (3, 1, 3))]
    table = checks_table(Checks(layers, {}, {}))
    said = "match: 2 layers, 3 tensors within 0.1 (worst 8.0e-02 at model.layers.3.moe)"
    assert table.splitlines()[-1] == said


def test_what_nothing_here_computes_is_told(tiny: Trace, check: Check) -> None:
    names = ("model.layers.1.mlp.up_proj", "model.layers.1.unheard_of", "model.layers.1.input")
    ran = check(tiny | dict.fromkeys(names, tiny["model.layers.0"]), "--layer", 1)
    assert ran.code == 0
    such = "2 such as model.layers.1.mlp.up_proj"
    assert f"layer 1: not compared, since nothing here computes it: {such}" in ran.out


# Bugs

FIRST = {  # the layer checked and its first departing tensor, for each way to have the bug
    "MTP head replaced by lm_head": ["8.transformer.shared_head.output"],
    "norm before an MTP head replaced by model.norm": ["9.transformer.shared_head.norm"],
    "norm before an MTP head applied twice": ["10.transformer.shared_head.norm"],
    "norm before an MTP head forgotten": ["8.transformer.shared_head.norm"],
    "hidden passed between MTP depths after the norm": ["10.eh_proj"],
    "main model's state fed to every MTP depth": ["10.eh_proj"],
    "norm weight used as w, not 1 + w": ["0.input_layernorm"],
    "1 added twice to the norm weight": ["0.input_layernorm"],
    "QK-norm weight used as w, not 1 + w": ["1.self_attn.q_norm"],
    "Llama-3 scaling applied to a sliding layer": ["1.self_attn.o_proj"],
    "Llama-3 scaling applied to no layer": ["4.self_attn.o_proj"],
    "every frequency slowed by the factor, not by Llama-3's rule": ["4.self_attn.o_proj"],
    "first element of rope_theta taken for all layers": ["5.self_attn.o_proj"],
    "head count of full layers used everywhere": ["6.self_attn.q_proj"],
    "rotary exponent over head_dim, not the rotary width": ["0.self_attn.o_proj"],
    "whole head rotated where partial_rotary_factors says a part": ["4.self_attn.o_proj"],
    "interleaved instead of half-split rotation": ["1.self_attn.o_proj", "4.self_attn.o_proj"],
    "rows of q_proj and k_proj permuted for interleaved rotation, but half-split is used": [
        "4.self_attn.q_proj"
    ],
    "QK-norm after the rotation": ["1.self_attn.q_norm", "2.self_attn.q_norm"],
    "QK-norm on the queries only": ["0.self_attn.k_norm"],
    "gate as SiLU, not sigmoid": ["2.self_attn.o_proj"],
    "gate on the output of o_proj": [f"{n}.self_attn.o_proj" for n in (2, 4, 1, 3)],
    "gate forgotten": ["8.self_attn.o_proj"],
    "biased scores used as expert weights": ["2.moe.weights"],
    "router bias forgotten when experts are chosen": ["3.moe.ids"],
    "router bias added to the logits": ["4.moe.ids"],
    "softmax router, not sigmoid": ["5.moe.ids"],
    "expert weights normalised over all experts": ["6.moe.weights"],
    "expert weights not normalised": ["7.moe.weights"],
    "scaling factor on the shared expert too": ["2.share_expert", "3", "4.moe.weights"],
    "scaling factor of the experts forgotten": ["2", "3.moe.weights"],
    "clamp before SiLU": ["6.moe", "7.moe"],
    "clamp of the routed experts used for the shared expert": ["6.share_expert"],
    "clamp of the routed experts used for the dense MLP": ["1.mlp"],
    "clamp of the shared expert used for the routed experts": ["7.moe"],
    "up clamped above only": ["9.mlp"],
    "up not clamped": ["7.moe"],
    "clamp forgotten": ["6.moe"],
    "window one too long": ["3.self_attn.o_proj"],
    "window one too short": ["8.self_attn.o_proj"],
    "window forgotten": ["5.self_attn.o_proj"],
    "norm subtracts the mean": ["0.input_layernorm"],
    "rotation the other way round": ["1.self_attn.o_proj"],
    "next token visible": ["2.self_attn.o_proj"],
    "causal mask missing": ["4.self_attn.o_proj"],
    "key-value heads repeated in stripes": ["2.self_attn.o_proj"],
    "scores scaled by 1/K": ["3.self_attn.o_proj"],
    "shared expert dropped": ["2"],
    "enorm and hnorm halves swapped before eh_proj": ["9.eh_proj"],
    "MTP depth fed the token before": ["10.eh_proj"],
}
WAYS = [
    (footgun, where)
    for bug, places in FIRST.items()
    for footgun, where in zip([f for f in ALL if f.bug == bug], places, strict=True)
]
NEAREST, ROUNDED = ([(*way, dtype) for way in WAYS] for dtype in ("float32", "bfloat16"))


def test_every_footgun_has_a_place_where_it_shows_first() -> None:
    assert {footgun.bug for footgun in ALL} == set(FIRST)


@pytest.mark.parametrize(
    ("footgun", "where", "dtype"),
    cases(NEAREST[::2] + ROUNDED[1::20], NEAREST + ROUNDED),
    ids=lambda x: getattr(x, "bug", x),
)
def test_a_bug_is_found_at_its_first_tensor_and_named(
    footgun: Footgun, where: str, dtype: str, check: Check
) -> None:
    layer = int(where.partition(".")[0])
    trace = {name: rounded(x, dtype) for name, x in hooked(traced(TINY, footgun)).items()}
    ran = check(trace, "--layer", layer)
    assert ran.code == 1
    departs, *lines = said(ran, layer)
    assert departs.startswith(f"departs first at model.layers.{where}: ")
    named = {f"looks like: {footgun.bug} ({footgun.file})"}
    if footgun.bug == "clamp of the routed experts used for the dense MLP":
        named.add("looks like: clamp forgotten (minstep/mlp.py)")  # there is none: the same numbers
    assert len(lines) == len(named) and set(lines) == named
    assert ran.out.splitlines()[-1] == f"mismatch: layer {layer} of 1 layer checked"


def test_a_fused_projection_with_too_few_query_heads_is_named(check: Check) -> None:
    bug = next(footgun for footgun in ALL if footgun.bug.startswith("head count of full layers"))
    trace = hooked(traced(TINY, bug))
    at = "model.layers.6.self_attn"
    parts = [trace.pop(f"{at}.{proj}_proj") for proj in "qkv"]
    trace[f"{at}.qkv_proj"] = np.concatenate(parts, axis=-1)
    ran = check(trace, "--layer", 6)
    assert ran.code == 1
    departs, *lines = said(ran, 6)
    assert departs.startswith(f"departs first at {at}.q_proj: shape [37, 96] against [37, 64]")
    assert lines == [f"looks like: {bug.bug} (minstep/config.py)"]


def test_where_nothing_could_be_compared_there_is_no_verdict(
    tiny: Trace, check: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = minstep.parity.check_layer.compare_all

    def emptied(*arguments: Any, **how: Any) -> Any:
        for row in real(*arguments, **how):
            yield row._replace(shape=(0, *row.shape[1:]), left_out=3)

    monkeypatch.setattr("minstep.parity.check_layer.compare_all", emptied)
    ran = check(tiny, "--layer", 3)
    assert ran.out.splitlines()[-1].startswith("no verdict: 1 layer, of which no tensor")


def test_a_bug_that_shows_in_every_layer_is_tried_first_on_the_next(
    check: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[int] = []

    def counting(*arguments: Any, **how: Any) -> Any:
        tried.append(len(arguments[4]) if len(arguments) > 4 else len(ALL))
        return explain(*arguments, **how)

    monkeypatch.setattr("minstep.parity.diagnosis.explain", counting)
    bug = next(footgun for footgun in ALL if footgun.bug == "window one too long")
    ran = check(hooked(traced(TINY, bug)), "--all")
    assert ran.code == 1
    for layer in (1, 2, 3, 5, 6, 7, 8, 9, 10):
        assert said(ran, layer)[1:] == ["looks like: window one too long (minstep/attention.py)"]
    assert ran.out.splitlines()[-1] == "mismatch: layers 1-3,5-10 of 11 layers checked"
    assert tried == [0, len(ALL), 1, 1, 1, 1, 1, 1, 1, 1]


def test_bugs_whose_lines_were_edited_are_not_tried_which_is_said_once(
    check: Check, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = minstep.parity.variants.source

    def edited(name: str) -> str:
        return real(name).replace("spec.window, tap)", "spec.window,  tap)")

    silu, window = (
        next(footgun for footgun in ALL if footgun.bug == bug)
        for bug in ("gate as SiLU, not sigmoid", "window one too long")
    )
    traces = [hooked(traced(TINY, footgun)) for footgun in (silu, window)]
    monkeypatch.setattr("minstep.parity.variants.source", edited)
    not_tried = "not tried: 3 known bugs, whose lines in minstep/attention.py were changed"
    found, unknown = (check(trace, "--layer", "2-3") for trace in traces)
    assert found.code == unknown.code == 1
    for ran in (found, unknown):
        assert ran.out.splitlines()[-2] == not_tried and ran.out.count("not tried") == 1
    assert said(found, 2)[1:] == [f"looks like: {silu.bug} (minstep/attention.py)"]
    assert said(unknown, 2)[1:] == ["no known porting bug explains it"]
    report = json.loads(check(traces[1], "--layer", 2, "--json").out)
    assert len(report["not_tried"]) == 3 and window.bug in report["not_tried"]
    ours = save(hooked(traced(TINY)), tmp_path / "ours", tokens=prompt("tiny"))
    ran = run("diff", ours, tmp_path / "recording", "--model", TINY)
    assert ran.code == 1 and ran.out.splitlines()[-1] == not_tried
    assert "not tried" not in check(hooked(traced(TINY)), "--layer", 2).out


def test_files_with_edited_lines_are_each_named() -> None:
    first, second = FOOTGUNS["window"][0], FOOTGUNS["rope_theta"][0]
    assert not_tried([]) == []
    one = "not tried: 1 known bug, whose line in minstep/attention.py was changed"
    assert not_tried([first, first]) == [one]
    assert (
        "2 known bugs, whose lines in minstep/attention.py and minstep/config.py"
        in (not_tried([first, second])[0])
    )


@pytest.mark.parametrize(
    ("trials", "named"),
    [  # tensors that match, sum of mean errors, what still departs
        ([(5, 1.0, None), (5, 1.9, None), (5, 2.1, None)], [0, 1]),  # up to twice the least error
        ([(5, 1.9, None), (5, 1.0, None), (5, 50.0, None)], [1, 0]),  # the best comes first
        ([(9, 0.1, "moe"), (5, 1.0, None)], [1]),  # one that explains all before any other
        ([(9, 0.1, "moe"), (4, 0.0, "mlp"), (9, 0.15, "moe")], [0, 2]),  # else those furthest on
        ([None, (3, 0.0, None), None, (3, 1e-13, None)], [1, 3]),
        ([None, None], []),
    ],
)
def test_the_bugs_named_are_those_that_explain_most_and_nearly_as_well_as_the_best(
    trials: list[Any], named: list[int], tiny: Trace, monkeypatch: pytest.MonkeyPatch
) -> None:
    bugs = list(ALL[: len(trials)])

    def tried(footgun: Footgun, *_: object) -> Trial | None:
        found = trials[bugs.index(footgun)]
        return found and Trial(footgun, *found)

    monkeypatch.setattr("minstep.parity.diagnosis._try", tried)
    monkeypatch.setattr("minstep.parity.diagnosis.reaches", lambda *_: True)
    departs = Comparison(f"{L}3.moe", (3, 4), 1.0, 1.0, 1.0, None, False, 0.1)
    checked, theirs = Checked(3, 0.1, [departs], 3, 0, []), Recording("theirs", tiny)
    found = explain(minstep.open_checkpoint(TINY), theirs, checked, footguns=bugs)
    assert [bugs.index(trial.footgun) for trial in found] == named


@pytest.mark.parametrize("layer", range(11))
def test_a_bug_that_is_not_tried_on_a_layer_changes_nothing_there(layer: int, tiny: Trace) -> None:
    checkpoint = minstep.open_checkpoint(TINY)
    theirs = Recording("tiny", tiny, prompt("tiny"))
    state = layer_input(checkpoint, layer, theirs, np.float32)
    left_out = [footgun for footgun in ALL if not reaches(footgun, checkpoint, layer)]
    assert left_out
    for footgun in left_out:
        run = Rerun(checkpoint, theirs, 2e-5)
        run.wants = lambda name: True
        run_layer(variant(footgun), layer, state, run)
        assert len(run.tensors) > 10
        assert all(np.array_equal(tiny[name], x) for name, x in run.tensors.items()), footgun.bug


def test_a_departure_that_no_bug_explains_is_said_to_be_one(tiny: Trace, check: Check) -> None:
    theirs = dict(tiny)
    for n in (2, 3):
        theirs[f"model.layers.{n}.self_attn.v_proj"] = (
            tiny[f"model.layers.{n}.self_attn.v_proj"] * 2
        )
    ran = check(theirs, "--all")
    assert ran.code == 1
    unknown = "no known porting bug explains it"
    for n, expected in ((2, unknown), (3, f"is of the same kind as layer 2: {unknown}")):
        departs, *lines = said(ran, n)
        assert "v_proj: error 1.0e+00 of the largest value" in departs
        assert ", first at [0, " in departs
        assert lines == [expected]


def test_a_bug_that_explains_only_the_first_departure_is_told_as_that(check: Check) -> None:
    bug = next(footgun for footgun in ALL if footgun.bug == "gate forgotten")
    theirs = hooked(traced(TINY, bug))
    theirs["model.layers.1.mlp"] = theirs["model.layers.1.mlp"] * 2
    ran = check(theirs, "--layer", 1)
    assert said(ran, 1)[1:] == [
        "looks like: gate forgotten (minstep/attention.py), which explains "
        "model.layers.1.self_attn.o_proj, but model.layers.1.mlp still departs"
    ]


def test_the_tolerance_may_be_given(tiny: Trace, check: Check) -> None:
    moved = tiny | {"model.layers.1": tiny["model.layers.1"] * np.float32(1.001)}
    assert check(moved, "--layer", 1).code == 1
    assert check(moved, "--layer", 1, "--tolerance", 0.01).code == 0
    assert check(moved, "--layer", 1, dtype="bfloat16").code == 0


# Experts


def favouring(folder: Path, half: int, by: float) -> Path:
    """The tiny model where of layer 3's experts n and n + 8, n < 5, one scores a little more."""
    shutil.copytree(GOLDEN / "tiny" / "fp32", folder)
    file, at = folder / "model.safetensors", "model.layers.3.moe."
    tensors = load_file(file)
    for name in (f"{at}gate.weight", f"{at}router_bias"):
        tensors[name][8:13] = tensors[name][:5]
    tensors[f"{at}router_bias"][half * 8 :][:5] += np.float32(by)
    save_file(tensors, file)
    return folder


def choices(trace: Trace) -> Trace:
    """Layer 3 as hooks see it, and its input."""
    names = [name for name in hooked(trace) if name.startswith("model.layers.3")]
    return {name: trace[name] for name in ["model.layers.2", *names]}


@pytest.mark.parametrize("has_gate", [True, False])
def test_a_tie_that_falls_otherwise_is_told_and_everything_after_it_compared(
    has_gate: bool, run: Run, tmp_path: Path
) -> None:
    ours, theirs = (favouring(tmp_path / str(half), half, 3e-7) for half in (0, 1))
    a, b = traced(ours, tokens=prompt("tiny")), choices(traced(theirs, tokens=prompt("tiny")))
    ids = "model.layers.3.moe.ids"
    differ = int((a[ids] != b[ids]).any(axis=-1).sum())
    assert 1 < differ < len(prompt("tiny"))
    for name in ("model.layers.3.moe.gate",) if not has_gate else ():
        del b[name]
    file = save(b, tmp_path / "file", tokens=prompt("tiny"))
    command = ("check-layer", ours, "--layer", 3, "--against", file)
    ran = run(*command)
    assert ran.code == 0, ran.out
    count = f"{differ} of {len(prompt('tiny'))} tokens"
    tied = f"layer 3: {count} chose other experts at a tie; went on with the recorded"
    assert ran.out.splitlines()[-2] == tied
    assert "left out" not in ran.out and "model.layers.3.moe.weights" in ran.out
    report = json.loads(run(*command, "--json").out)
    assert report["layers"][0]["ties"] == differ
    assert {tensor["left_out"] for tensor in report["layers"][0]["tensors"]} == {0}


def test_other_experts_that_no_tie_explains_are_a_wrong_router(run: Run, tmp_path: Path) -> None:
    ours, theirs = favouring(tmp_path / "a", 0, 0.01), favouring(tmp_path / "b", 1, 0.01)
    file = save(
        choices(traced(theirs, tokens=prompt("tiny"))), tmp_path / "file", tokens=prompt("tiny")
    )
    ran = run("check-layer", ours, "--layer", 3, "--against", file)
    assert ran.code == 1
    departs = said(ran, 3)[0]
    assert departs.startswith("departs first at model.layers.3.moe.ids: wrong router: ")
    assert "tokens have other experts, not at a tie, first at [" in departs


def apart(tmp_path: Path) -> tuple[Path, Trace, Trace, int]:
    """A checkpoint, what it computes, and layer 3 of a right engine with other experts at ties."""
    ours, theirs = (favouring(tmp_path / str(half), half, 3e-7) for half in (0, 1))
    a, b = (traced(folder, tokens=prompt("tiny")) for folder in (ours, theirs))
    ids = "model.layers.3.moe.ids"
    return ours, a, choices(b), int((a[ids] != b[ids]).any(axis=-1).sum())


@pytest.mark.parametrize("dtype", cases(["bfloat16"], ["float32"]))
@pytest.mark.parametrize("absent", ["ids", "ids gate", "everything between"])
def test_experts_that_nobody_recorded_raise_no_alarm_and_hide_no_bug(
    absent: str, dtype: str, run: Run, tmp_path: Path
) -> None:
    ours, _, b, differ = apart(tmp_path)
    at, input_and_output = "model.layers.3.moe", ("model.layers.2", "model.layers.3")
    gone = [f"{at}.{part}" for part in (*absent.split(), "weights")]
    b = {n: rounded(x, dtype) for n, x in b.items() if n not in gone}
    if absent == "everything between":
        b = {name: b[name] for name in input_and_output}
    file = save(b, tmp_path / "file", tokens=prompt("tiny"))
    command = ("check-layer", ours, "--layer", 3, "--against", file)
    ran = run(*command)
    assert ran.code == 0, ran.out
    if dtype == "float32":
        assert differ > 3 and f"ok, {differ} rows left out" in ran.out
    for bug in ("gate as SiLU, not sigmoid", "router bias forgotten when experts are chosen"):
        footgun = next(footgun for footgun in ALL if footgun.bug == bug)
        theirs = traced(ours, footgun, tokens=prompt("tiny"))
        save({n: rounded(theirs[n], dtype) for n in b}, file, tokens=prompt("tiny"))
        ran = run(*command)
        assert ran.code == 1
        assert said(ran, 3)[1:] == [f"looks like: {bug} ({footgun.file})"]


@pytest.mark.parametrize("has_gate", [True, False])
def test_a_router_that_most_rows_would_excuse_is_wrong(
    has_gate: bool, tiny: Trace, check: Check
) -> None:
    at = "model.layers.3.moe"
    theirs = {n: rounded(x, "bfloat16") for n, x in hooked(tiny).items() if n.startswith(at[:-4])}
    theirs["model.layers.2"] = rounded(tiny["model.layers.2"], "bfloat16")
    ids = tiny[f"{at}.ids"].copy()
    for row in ids:  # one expert that has nothing to do with the scores
        row[0] = next(e for e in (15, 9, 4, 2, 1) if e not in row)
    theirs[f"{at}.ids"] = ids
    if not has_gate:
        del theirs[f"{at}.gate"]
    ran = check(theirs, "--layer", 3)
    assert ran.code == 1
    assert said(ran, 3)[0].startswith(f"departs first at {at}.ids: wrong router: ")


def test_what_is_not_finite_in_theirs_departs(tiny: Trace, check: Check) -> None:
    name = "model.layers.3.moe.gate"
    x = tiny[name].copy()
    x[4, 2] = np.inf
    ran = check(tiny | {name: x}, "--all")
    assert ran.code == 1
    assert said(ran, 3)[0] == f"departs first at {name}: is inf at [4, 2]"
    assert ran.out.splitlines()[-1] == "mismatch: layer 3 of 11 layers checked"
    x = tiny["model.layers.2"].copy()
    x[4, 2] = np.nan
    ran = check(tiny | {"model.layers.2": x}, "--all")
    assert ran.code == 1
    assert said(ran, 2)[0] == "departs first at model.layers.2: is nan at [4, 2]"
    assert "not checked: layers 3, since their input is not finite" in ran.out
    assert ran.out.splitlines()[-1] == "mismatch: layer 2 of 10 layers checked"


@pytest.mark.parametrize("batch", [False, True])
def test_an_mtp_layer_may_have_one_position_left(batch: bool, run: Run, tmp_path: Path) -> None:
    trace = traced(TINY, tokens=[3, 4, 5])
    theirs = {n: x[None] if batch else x for n, x in trace.items()}
    for parts in ("", ".self_attn.q_"):
        kept = {n: x for n, x in theirs.items() if parts in n or n == "model.layers.8"}
        file = save(kept, tmp_path / "file", tokens=[3, 4, 5])
        ran = run("check-layer", TINY, "--layer", 9, "--against", file)
        assert ran.code == 0, ran.out
        assert re.search(r"9.self_attn.q_norm +\[1, 6, 16\] ", ran.out)
    assert trace["model.layers.9.self_attn.q_norm"].shape[0] == 1


def test_recorded_experts_that_the_model_does_not_have_are_refused(
    tiny: Trace, tmp_path: Path, refused: Refused
) -> None:
    ids = "model.layers.3.moe.ids"
    for bad in (tiny[ids] + 13, tiny[ids].astype(np.float32), tiny[ids] - 5):
        file = save(tiny | {ids: bad}, tmp_path / "file", tokens=prompt("tiny"))
        command = ("check-layer", TINY, "--layer", 3, "--against", file)
        refused(*command, naming=(str(file), ids, "expected 0 to 15"))


# Parts of a checkpoint


def halved(folder: Path, missing: str) -> Path:
    """The tiny model without one of its two shards."""
    shutil.copytree(TINY, folder)
    (folder / missing).unlink()
    return folder


def layers_in(shard: str) -> list[int]:
    """The layers that lie in a shard of the tiny model as a whole."""
    places = json.loads((TINY / "model.safetensors.index.json").read_text())["weight_map"]
    own = [[p for n, p in places.items() if n.startswith(f"model.layers.{k}.")] for k in range(11)]
    return [k for k, files in enumerate(own) if set(files) == {shard}]


def test_a_layer_is_checked_where_only_its_shard_is_there(
    tiny: Trace, run: Run, refused: Refused, tmp_path: Path
) -> None:
    first, last = "model-00001.safetensors", "model-00002-of-00002.safetensors"
    file = save(tiny, tmp_path / "file", tokens=prompt("tiny"))
    there, absent = layers_in(last)[0], layers_in(first)[-1]
    folder = halved(tmp_path / "half", first)
    assert run("check-layer", folder, "--layer", there, "--against", file).code == 0
    ran = run("check-layer", folder, "--all", "--against", file)
    assert ran.code == 0, ran.out
    left = [k for k in range(11) if k not in layers_in(last) or k > 7]  # MTP takes the embedding
    assert (
        ran.out.splitlines()[-2]
        == f"not checked: layers 0-{len(left) - 4},8-10, since shards are missing"
    )
    command = ("check-layer", folder, "--layer", absent, "--against", file)
    refused(*command, naming=(first, "is missing", f"model.layers.{absent}."))
    assert layers_in(last)[-1] == 10
    command = ("check-layer", folder, "--layer", 10, "--against", file)
    refused(*command, naming=(first, "model.embed_tokens.weight"))
    folder = halved(tmp_path / "other", last)
    ran = run("check-layer", folder, "--all", "--against", file)
    assert ran.code == 0 and "since shards are missing" in ran.out, ran.out


def test_the_end_of_the_model_is_left_out_where_its_weights_are_missing(
    tiny: Trace, run: Run, tmp_path: Path
) -> None:
    shutil.copytree(GOLDEN / "tiny" / "fp32", tmp_path / "part")
    weights = tmp_path / "part" / "model.safetensors"
    tensors = load_file(weights)
    for name in ("model.embed_tokens", "lm_head", "model.norm"):
        del tensors[f"{name}.weight"]
    save_file(tensors, weights)
    file = save(tiny, tmp_path / "file", tokens=prompt("tiny"))
    ran = run("check-layer", tmp_path / "part", "--layer", "0,7", "--against", file)
    assert ran.code == 0
    assert "lm_head" not in ran.out and "model.norm" not in ran.out


def test_the_logits_of_an_mtp_layer_take_a_head_that_is_there(
    tiny: Trace, run: Run, tmp_path: Path
) -> None:
    shutil.copytree(GOLDEN / "tiny" / "fp32", tmp_path / "base")
    weights = tmp_path / "base" / "model.safetensors"
    tensors = {n: x for n, x in load_file(weights).items() if not n.endswith("head.output.weight")}
    output = "model.layers.8.transformer.shared_head.output"
    theirs = {n: x for n, x in tiny.items() if n != output}
    file = save(theirs | {output: tiny["lm_head"][:-1]}, tmp_path / "file", tokens=prompt("tiny"))
    for code, absent in ((1, ""), (0, "lm_head.weight")):
        tensors.pop(absent, None)
        save_file(tensors, weights)
        ran = run("check-layer", tmp_path / "base", "--layer", 8, "--against", file)
        assert ran.code == code and (f"{output}  [" in ran.out) == (code == 1), ran.out


# What is refused


def less(trace: Trace, *names: str) -> Trace:
    return {name: x for name, x in trace.items() if name not in names}


CASES: dict[str, tuple[Callable[[Trace], dict[str, Any]], Any, Any, tuple[str, ...]]] = {
    "no input": (
        lambda t: less(t, "model.layers.2"),
        "3",
        None,
        ("input of layer 3", "model.layers.3.input or model.layers.2"),
    ),
    "no output": (
        lambda t: {"model.layers.2": t["model.layers.2"]},
        "3",
        None,
        ("no tensor of layer 3", "model.layers.3"),
    ),
    "another width": (
        lambda t: t | {"model.layers.2": t["model.layers.2"][:, :32]},
        "3",
        None,
        ("model.layers.2", "[37, 32]", "[positions, 64]", "another model"),
    ),
    "another length": (
        lambda t: t,
        "3",
        {"tokens": [5, 17, 9]},
        ("model.layers.2", "37 positions, expected 3 by the tokens"),
    ),
    "no tokens": (lambda t: t, "8", {"tokens": ""}, ("metadata tokens", "JSON list")),
    "too few tokens": (lambda t: t, "10", {"tokens": [5, 17, 9]}, ("tokens holds 3 ids", "4 or")),
    "too few rows": (
        lambda t: t | {"model.layers.7": t["model.layers.7"][:20]},
        "8",
        None,
        ("model.layers.7", "20 positions, expected 36"),
    ),
    "no such token": (
        lambda t: t,
        "8",
        {"tokens": [320] * 37},
        ("metadata tokens", "holds 320", "0 to 319"),
    ),
    "no such layer": (lambda t: t, "11", None, ("--layer 11", "0 to 10")),
    "not a layer": (lambda t: t, "x", None, ("'x' is not a list of layers",)),
    "not finite": (
        lambda t: t | {"model.layers.2": t["model.layers.2"] * np.float32("nan")},
        "3",
        None,
        ("model.layers.2", "is nan at [0, 0]"),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_refused_in_a_line(
    case: str, tiny: Trace, tmp_path: Path, refused: Refused
) -> None:
    spoil, layer, metadata, naming = CASES[case]
    metadata = {"tokens": prompt("tiny")} | (metadata or {})
    file = save(spoil(tiny), tmp_path / "file", **metadata)
    refused("check-layer", TINY, "--layer", layer, "--against", file, naming=naming)


def test_an_mtp_layer_needs_the_tokens(tiny: Trace, tmp_path: Path, refused: Refused) -> None:
    file = save(tiny, tmp_path / "file")
    naming = ("metadata tokens is missing", "for MTP layer 8")
    refused("check-layer", TINY, "--layer", 8, "--against", file, naming=naming)


def test_a_recording_of_nothing_that_can_be_checked_is_refused(
    tiny: Trace, tmp_path: Path, refused: Refused
) -> None:
    file = save({"model.norm": tiny["model.norm"]}, tmp_path / "file")
    naming = ("no layer can be checked", "layers 0-10: the recording has no output")
    refused("check-layer", TINY, "--all", "--against", file, naming=naming)


def test_what_is_no_recording_or_no_checkpoint_is_refused(
    tiny: Trace, tmp_path: Path, refused: Refused
) -> None:
    file = save(tiny, tmp_path / "file", tokens=prompt("tiny"))
    layer = ("--layer", "3")
    refused("check-layer", tmp_path, *layer, "--against", file, naming=("config.json",))
    missing = tmp_path / "missing"
    refused("check-layer", TINY, *layer, "--against", missing, naming=(str(missing),))
    file.write_bytes(file.read_bytes()[:-1])
    refused("check-layer", TINY, *layer, "--against", file, naming=("it is truncated",))
    both = ("--layer", "3", "--all", "--against", file)
    refused("check-layer", TINY, *both, naming=("not allowed with",))
    refused("check-layer", TINY, "--against", file, naming=("--layer", "--all"))


def test_a_tensor_of_the_layer_that_is_missing_is_named(
    tiny: Trace, single: Path, tmp_path: Path, refused: Refused
) -> None:
    weights = single / "model.safetensors"
    tensors = load_file(weights)
    del tensors["model.layers.2.moe.gate.weight"]
    save_file(tensors, weights)
    file = save(traced(GOLDEN / "odd" / "bf16"), tmp_path / "file", tokens=prompt("odd"))
    command = ("check-layer", single, "--layer", 2, "--against", file)
    refused(*command, naming=("model.layers.2.moe.gate.weight",))
