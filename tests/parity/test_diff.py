"""`minstep diff`: the first tensor that departs, whatever the other engine calls its tensors."""

import json
import re
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import minstep
from minstep.errors import InputError
from minstep.fast.bf16 import BF16Array
from minstep.parity.compare import TOLERANCES, compare_all
from minstep.parity.diff import diff, routers_of, verdict
from minstep.parity.engine_tensors import Recording
from minstep.parity.facts import metadata
from minstep.parity.trace import Trace, record, save_trace
from minstep.tap import Array
from minstep.text.continuation import Pass
from tests.conftest import Ran, Refused, Run
from tests.model.test_golden import GOLDEN, WEIGHTS, meta
from tests.support.recordings import as_transformers, as_vllm, layers_of, rounded, save
from tests.support.tiers import cases

FOLDER = GOLDEN / "tiny" / "bf16"
CONFIG = minstep.load_config(FOLDER)
TOKENS = meta(FOLDER)["prompt"][:12]
FACTOR = next(spec.moe.scaling_factor for spec in CONFIG.layers if spec.moe)
L3, L4 = "model.layers.3", "model.layers.4"
ROUTERS = routers_of(FOLDER)


@pytest.fixture(scope="module")
def trace() -> Trace:
    return record(TOKENS, WEIGHTS[FOLDER], CONFIG)


def written_as(form: str, trace: Trace) -> dict[str, Any]:
    """The trace as one kind of engine would have written it."""
    if form == "transformers":
        return as_transformers(trace, FACTOR, np.random.default_rng(0))
    if form == "vllm":
        return as_vllm(trace)
    if form == "batched":
        return {name: x[None] for name, x in trace.items()}
    if form == "reversed":
        return {name: trace[name] for name in reversed(trace)}
    return {name: rounded(x, form) for name, x in trace.items()}


FORMS = ("transformers", "vllm", "batched", "reversed", "bfloat16", "float16", "float64")


def spoilt(trace: Trace, name: str, index: tuple[int, ...], by: float) -> Trace:
    """A copy in which one element is another; `by` is a share of the tensor's largest value."""
    x = trace[name].copy()
    x[index] += by * np.abs(x).max()
    return trace | {name: x}


@pytest.fixture
def files(tmp_path: Path, trace: Trace) -> tuple[Path, Path]:
    """The trace's file, and where another goes."""
    ours = save(trace, tmp_path / "ours.safetensors", tokens=TOKENS, dtype="float32")
    return ours, tmp_path / "theirs.safetensors"


# A form, and of how many tensors one is changed.
EVERY = [(form, 1 if form in ("transformers", "vllm") else 4) for form in FORMS]
FEWER = [(form, 8 * every) for form, every in EVERY]


@pytest.mark.parametrize("form", FORMS)
def test_the_same_numbers_match_in_any_form(
    form: str, files: tuple[Path, Path], trace: Trace, run: Run
) -> None:
    ours, theirs = files
    save(written_as(form, trace), theirs, tokens=TOKENS)
    ran = run("diff", ours, theirs)
    assert ran.code == 0, ran.out
    last = ran.out.splitlines()[-1]
    limit = {"bfloat16": "0.03 to 0.099", "float16": "0.004 to 0.013"}.get(form, "2e-05")
    assert last.startswith("match: ") and f"tensors within {limit} (worst " in last
    assert " departs" not in ran.out
    assert run("diff", theirs, ours).code == 0


@pytest.mark.parametrize(("form", "every"), cases(FEWER, EVERY))
def test_a_changed_element_of_any_tensor_is_found_at_its_name_and_index(
    form: str, every: int, trace: Trace
) -> None:
    rng, ours = np.random.default_rng(0), Recording("ours", trace, TOKENS)
    report = diff(ours, Recording("theirs", written_as(form, trace)))
    tolerance, common = report.tolerance, {c.name for c in report.rows}
    for name in list(trace)[FORMS.index(form) % every :: every]:
        x = trace[name]
        if name not in common or name.endswith((".moe.ids", ".moe.margin")):
            continue  # these have tests of their own
        index = tuple(int(i) for i in rng.integers(x.shape))
        sums = form in ("transformers", "vllm") and name.endswith((".moe", ".share_expert"))
        layers = 1 if ours.engine_dtype == form or form not in ("bfloat16", "float16") else 11
        by = tolerance * layers**0.5 * (20 if sums else 3)
        changed = spoilt(trace, name, index, by)
        theirs = Recording("theirs", written_as(form, changed))
        first = diff(ours, theirs).departure
        assert first is not None and first.first is not None, name
        assert (first.name, first.first.place) == (name, index)
        assert first.first.ours == x[index]
        assert first.first.theirs == pytest.approx(changed[name][index], rel=1e-2)


def test_the_first_tensor_is_named_not_the_largest_departure(
    files: tuple[Path, Path], trace: Trace, run: Run
) -> None:
    changed = spoilt(trace, f"{L3}.self_attn.q_rope", (5, 0, 12), -0.12)
    changed = spoilt(changed, f"{L3}.self_attn.q_rope", (6, 0, 0), 0.5)
    changed = spoilt(changed, "lm_head", (0, 0), 7)
    save(changed, files[1], tokens=TOKENS)
    ran = run("diff", *files)
    assert ran.code == 1
    x = trace[f"{L3}.self_attn.q_rope"][5, 0, 12]
    y = changed[f"{L3}.self_attn.q_rope"][5, 0, 12]
    assert ran.out.splitlines()[-1] == (
        "departs first at model.layers.3.self_attn.q_rope: error 5.0e-01 of the largest value, "
        f"tolerance 2e-05, first at [5, 0, 12]: {x:.6g} against {y:.6g}"
    )
    departs = [line.split()[0] for line in ran.out.splitlines() if line.endswith("departs")]
    assert departs == [f"{L3}.self_attn.q_rope", "lm_head"]


def test_layers_are_in_the_order_of_their_numbers_whatever_the_files(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    trace = {f"model.layers.{n}": rng.standard_normal((5, 4)) for n in range(14)}
    ours = {name: trace[name] for name in rng.permutation(list(trace))}
    changed = spoilt(spoilt(trace, "model.layers.10", (0, 0), 9), "model.layers.2", (4, 3), 1)
    theirs = {name: changed[name] for name in rng.permutation(list(trace))}
    report = diff(Recording("ours", ours), Recording("theirs", theirs))
    assert [row.name for row in report.rows] == list(trace)
    departing = [row for row in report.rows if not row.is_match]
    assert report.departure is report.rows[2]
    assert [row.name for row in departing] == ["model.layers.2", "model.layers.10"]


def test_json_says_the_same_and_holds_only_what_json_has(
    files: tuple[Path, Path], trace: Trace, run: Run
) -> None:
    changed = spoilt(trace, f"{L3}.self_attn.q_rope", (5, 0, 12), 0.5)
    changed[L4] = changed[L4][:, :-1]
    changed["zebra"] = changed.pop("model.norm")
    save(changed, files[1], tokens=TOKENS, dtype="float64")
    ran = run("diff", *files, "--json")
    assert ran.code == 1 and ran.out.count("\n") == 1

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    report = json.loads(ran.out, parse_constant=refuse)
    assert report["match"] is False and report["first"] == f"{L3}.self_attn.q_rope"
    assert report["tolerance"] == 2e-5
    assert report["ours"] == {"path": str(files[0]), "dtype": "float32"}
    assert report["theirs"] == {"path": str(files[1]), "dtype": "float64"}
    assert report["only_ours"] == ["model.norm"] and report["only_theirs"] == ["zebra"]
    by_name = {row["name"]: row for row in report["tensors"]}
    assert list(by_name) == [name for name in trace if name != "model.norm"]
    row = by_name[f"{L3}.self_attn.q_rope"]
    assert row["first"]["index"] == [5, 0, 12] and row["match"] is False
    assert row["max_error"] == pytest.approx(0.5, rel=1e-3)
    row = by_name[L4]
    assert row["max_error"] is None and "against" in row["note"] and row["first"] is None
    same = json.loads(run("diff", files[0], files[0], "--json").out)
    assert same["match"] is True and same["first"] is None
    assert all(row["cosine"] == pytest.approx(1) for row in same["tensors"])


def test_another_shape_is_a_mismatch_that_names_both(
    files: tuple[Path, Path], trace: Trace, run: Run
) -> None:
    save(trace | {L3: trace[L3][:, :-1]}, files[1], tokens=TOKENS)
    ran = run("diff", *files)
    assert ran.code == 1
    last = "departs first at model.layers.3: shape [12, 64] against [12, 63]"
    assert ran.out.splitlines()[-1] == last


def test_what_sixteen_bits_may_be_off_grows_with_the_root_of_the_layers(
    files: tuple[Path, Path], trace: Trace, run: Run
) -> None:
    for layer, by, code in ((0, 0.9, 0), (0, 1.1, 1), (6, 2.6, 0), (6, 2.7, 1)):
        changed = spoilt(trace, f"model.layers.{layer}", (0, 0), by * TOLERANCES["bfloat16"])
        save(changed, files[1], tokens=TOKENS, dtype="bfloat16")
        assert run("diff", *files).code == code, layer
        assert run("diff", *files, "--tolerance", by * 0.99 * 0.03).code == 1
    rows = json.loads(run("diff", *files, "--json").out)["tensors"]
    limits = {row["name"]: row["tolerance"] / 0.03 for row in rows}
    for name, layers in {"model.embed_tokens": 1, L3: 4, "lm_head": 9, "model.layers.8": 9}.items():
        assert limits[name] == pytest.approx(layers**0.5), name


def test_only_the_names_asked_for_are_looked_at(
    files: tuple[Path, Path], trace: Trace, run: Run
) -> None:
    changed = spoilt(trace, "model.embed_tokens", (0, 0), 1)
    save({n: x for n, x in changed.items() if n != f"{L4}.mlp"}, files[1], tokens=TOKENS)
    ran = run("diff", *files, "--names", "model.layers.3.*", "--names", "lm_head", "--json")
    assert ran.code == 0
    names = [row["name"] for row in json.loads(ran.out)["tensors"]]
    assert names == [n for n in trace if n.startswith(f"{L3}.") or n == "lm_head"]
    assert run("diff", *files).code == 1


def test_the_tolerance_is_the_looser_one_or_the_one_given(
    files: tuple[Path, Path], trace: Trace, run: Run
) -> None:
    save(spoilt(trace, L3, (0, 0), 1e-3), files[1], tokens=TOKENS)
    assert run("diff", *files).code == 1
    assert run("diff", *files, "--tolerance", "2e-3").code == 0
    save(spoilt(trace, L3, (0, 0), 1e-3), files[1], tokens=TOKENS, dtype="torch.bfloat16")
    assert run("diff", *files).code == 0
    assert run("diff", *reversed(files)).code == 0
    assert run("diff", *files, "--tolerance", "9e-4").code == 1


def flipped(trace: Trace, layer: str, token: int, gap: float, moved: float) -> Trace:
    """Ours and theirs: in `layer` the first rejected expert of a token replaces the last chosen.

    `gap`: by how much less it scores in ours; `moved`: how much more than that in theirs.
    """
    gate, ids = (trace[f"{layer}.moe.{part}"].astype(float) for part in ("gate", "ids"))
    bias = np.asarray(WEIGHTS[FOLDER].layers[int(layer[-1])].moe.router_bias, float)
    scores = 1 / (1 + np.exp(-gate[token]))
    order = np.argsort(-scores - bias)
    last, next_one = order[ids.shape[1] - 1], order[ids.shape[1]]
    theirs = dict(trace)
    for tensors, by in ((trace, -gap), (theirs, moved - gap)):
        score = scores[last] + bias[last] + by - bias[next_one]
        gate[token, next_one] = np.log(score / (1 - score))
        tensors[f"{layer}.moe.gate"] = gate.astype(np.float32)
    ids[token] = np.sort([*order[: ids.shape[1] - 1], next_one])
    theirs[f"{layer}.moe.ids"] = ids.astype(np.int64)
    margin = trace[f"{layer}.moe.margin"].copy()
    margin[token] = gap
    trace[f"{layer}.moe.margin"] = theirs[f"{layer}.moe.margin"] = margin
    return theirs


def test_a_flip_at_a_tie_leaves_out_its_row_and_later_all_rows_from_it(trace: Trace) -> None:
    ours = dict(trace)
    theirs = flipped(ours, L3, 5, 1e-6, 2e-6)
    assert theirs[f"{L3}.moe.ids"].tolist() != ours[f"{L3}.moe.ids"].tolist()
    names = list(trace)
    after = names[names.index(f"{L3}.moe.ids") + 1 :]
    for name in after:
        x = theirs[name] = theirs[name].copy()
        if name in (f"{L3}.moe.weights", f"{L3}.moe", L3):
            x[5] += 1
        elif not name.startswith(L3) and name.endswith(".probs"):
            x[:, 5:] = 0.5
        elif not name.startswith(L3):
            x[5:] = np.arange(x.shape[-1]) if name.endswith(".ids") else 1
    left, right = Recording("ours", ours, TOKENS), Recording("theirs", theirs, TOKENS)
    report = diff(left, right, routers=ROUTERS)
    assert report.departure is None and ".moe.ids" not in verdict(report)
    rows = {row.name: row.left_out for row in report.rows}
    assert rows[f"{L3}.moe.ids"] == rows[f"{L3}.moe"] == rows[f"{L3}.moe.weights"] == rows[L3] == 1
    assert rows[f"{L3}.share_expert"] == rows[f"{L3}.moe.gate"] == 0
    assert rows[L4] == rows["lm_head"] == rows[f"{L4}.moe.ids"] == len(TOKENS) - 5
    spoilt_later = spoilt(theirs, L4, (4, 7), 1)
    first = diff(left, Recording("theirs", spoilt_later, TOKENS), routers=ROUTERS).departure
    assert first is not None and first.name == L4
    assert first.first is not None and first.first.place == (4, 7)
    in_row = spoilt(theirs, L3, (6, 7), 1)
    first = diff(left, Recording("theirs", in_row, TOKENS), routers=ROUTERS).departure
    assert first is not None and first.name == L3
    assert first.first is not None and first.first.place == (6, 7)


def test_ties_are_told_in_the_last_line(
    files: tuple[Path, Path], trace: Trace, tmp_path: Path, run: Run
) -> None:
    ours = dict(trace)
    theirs = flipped(ours, L3, 0, 1e-6, 2e-6)
    save(ours, files[0], tokens=TOKENS)
    save(theirs, files[1], tokens=TOKENS)
    ran = run("diff", *files, "--model", FOLDER)
    table, _, alone = ran.out.partition("\n\n")  # then the layers that the tie leaves nothing of
    assert ran.code == 0 and "left out, where experts tied" in table.splitlines()[-1]
    assert alone.splitlines()[-1].startswith("match: 7 layers, ")
    lines = {line.split()[0]: line for line in table.splitlines()}
    assert lines[f"{L3}.moe"].endswith("ok, 1 rows left out")
    assert lines[L4].endswith("not compared, 12 rows left out")
    assert lines[L4].split()[3:6] == ["-", "-", "-"]
    said = f"from {L4}.input_layernorm on not compared, since a tie leaves no row: use check-layer"
    assert said in table.splitlines()[-1]
    report = json.loads(run("diff", *files, "--json", "--model", FOLDER).out)
    assert report["not_compared"][0] == f"{L4}.input_layernorm"
    assert {row["name"] for row in report["tensors"] if not row["compared"]} == set(
        report["not_compared"]
    )


@pytest.mark.parametrize("moved", [0.0, 0.02, 0.09])
def test_a_flip_that_their_own_logits_do_not_explain_is_a_wrong_router(
    moved: float, files: tuple[Path, Path], trace: Trace, run: Run
) -> None:
    ours = dict(trace)
    theirs = flipped(ours, L3, 5, 0.1, moved)
    save(ours, files[0], tokens=TOKENS)
    save(theirs, files[1], tokens=TOKENS)
    for more in ((), ("--model", FOLDER)):
        ran = run("diff", *files, "--names", f"{L3}.moe.ids", *more)
        assert ran.code == 1
        last = ran.out.splitlines()[-1 - len(more) // 2]
        count = "1 of 12 tokens have other experts"
        why = "give --model DIR, whose router bias decides"
        blind = f"{count}, at a tie or by a wrong router ({why})"
        note = f"wrong router: {count}, not at a tie" if more else blind
        assert last.startswith(f"departs first at model.layers.3.moe.ids: {note}, first at [5, ")


def test_without_a_model_other_experts_depart_and_what_their_tokens_touch_is_left_out(
    files: tuple[Path, Path], trace: Trace, run: Run
) -> None:
    ours = dict(trace)
    theirs = flipped(ours, L3, 5, 1e-6, 2e-6)  # a tie, which only the router could tell
    theirs[L3] = spoilt(theirs, L3, (5, 0), 1)[L3]
    save(ours, files[0], tokens=TOKENS)
    for hidden, first in (((), f"{L3}.moe.ids"), ((f"{L3}.moe.ids",), L3)):
        save({n: x for n, x in theirs.items() if n not in hidden}, files[1], tokens=TOKENS)
        ran = run("diff", *files, "--json")
        rows = {row["name"]: row for row in json.loads(ran.out)["tensors"]}
        assert ran.code == 1 and [n for n, row in rows.items() if not row["match"]] == [first]
        assert "give --model DIR, whose router bias decides" in rows[first]["note"]
        assert rows[L3]["left_out"] == (not hidden) and rows["lm_head"]["compared"]
        assert run("diff", *files, "--model", FOLDER).code == 0
    save({n: x for n, x in ours.items() if n != f"{L3}.moe.gate"}, files[0], tokens=TOKENS)
    save(theirs, files[1], tokens=TOKENS)
    ran = run("diff", *files, "--model", FOLDER)
    assert ran.code == 1 and "by a wrong router (record moe.gate, which decides)" in ran.out


@pytest.mark.parametrize("absent", ["", "margin", "ids", "gate", "ids gate", "ids gate margin"])
def test_a_tie_is_told_from_whatever_was_recorded(
    absent: str, files: tuple[Path, Path], trace: Trace, run: Run
) -> None:
    ours = dict(trace)
    theirs = flipped(ours, L3, 5, 1e-6, 2e-6)
    for part in absent.split():
        del theirs[f"{L3}.moe.{part}"]
        if part == "margin" and absent == "margin":
            del ours[f"{L3}.moe.margin"]
    for name in list(trace)[list(trace).index(f"{L3}.moe.ids") + 1 :]:
        if name != f"{L3}.share_expert":
            x = theirs[name] = theirs[name].copy()
            later = (
                6 if name.startswith(L3) else None
            )  # in its layer only the token's row is touched
            x[(slice(None),) * name.endswith(".probs") + (slice(5, later),)] += 1
            if name.endswith(".ids"):
                x %= trace[f"{L3}.moe.gate"].shape[1]
    save(ours, files[0], tokens=TOKENS)
    save(theirs, files[1], tokens=TOKENS)
    ran = run("diff", *files, "--model", FOLDER)
    assert ran.code == 0, ran.out
    assert "rows of " in ran.out.splitlines()[-1]
    theirs[f"{L3}.moe"] = trace[f"{L3}.moe"] * np.float32(1.01)  # a bug is in every row
    save(theirs, files[1], tokens=TOKENS)
    ran = run("diff", *files, "--model", FOLDER)
    assert ran.code == 1 and f"\ndeparts first at {L3}.moe: " in ran.out


def test_of_other_experts_that_only_their_outputs_tell_few_are_a_tie(
    files: tuple[Path, Path], trace: Trace, run: Run
) -> None:
    name, near = f"{L3}.moe", dict(trace)
    flipped(near, L3, 5, 1e-6, 2e-6)
    for part in ("gate", "ids"):  # every choice is near a tie
        near[f"{name}.{part}"] = np.tile(near[f"{name}.{part}"][5], (len(TOKENS), 1))
    for rows, code in ((6, 0), (7, 1)):
        moved = trace[name].copy()
        moved[:rows] += 1
        ours = {n: near[n] for n in (name, f"{name}.ids", f"{name}.gate")}
        save(ours, files[0], tokens=TOKENS)
        save({name: moved}, files[1], tokens=TOKENS)
        ran = run("diff", *files, "--model", FOLDER)
        assert ran.code == code, ran.out
    moved[6] = trace[name][6]  # again few enough, but for one that is no tie
    save({name: moved}, files[1], tokens=TOKENS)
    assert run("diff", *files, "--model", FOLDER).code == 0
    far = dict(trace)
    flipped(far, L3, 5, 0.1, 0)
    ours[f"{name}.gate"][3] = far[f"{name}.gate"][5]
    save(ours, files[0], tokens=TOKENS)
    ran = run("diff", *files, "--model", FOLDER)
    assert ran.code == 1 and "first at [3, 0]" in ran.out


def test_with_a_model_what_a_tie_leaves_out_is_run_from_its_recorded_input(
    files: tuple[Path, Path], trace: Trace, run: Run
) -> None:
    ours = dict(trace)
    theirs = flipped(ours, L3, 0, 1e-6, 2e-6)
    save(ours, files[0], tokens=TOKENS)
    save(theirs, files[1], tokens=TOKENS)
    command = ("diff", *files, "--model", FOLDER)
    ran = run(*command)
    assert ran.code == 0 and ran.out.splitlines()[-1].startswith("match: 7 layers, ")
    save(spoilt(theirs, "model.layers.6", (3, 3), 1), files[1], tokens=TOKENS)
    ran = run(*command)
    assert ran.code == 1 and ran.out.splitlines()[-1] == "mismatch: layers 6-7 of 7 layers checked"
    report = json.loads(run(*command, "--json").out)
    assert [layer["match"] for layer in report["continued"]["layers"]] == [
        True,
        True,
        False,
        False,
    ] + [True] * 3


def test_what_is_not_finite_departs_in_theirs_and_is_refused_in_ours(
    files: tuple[Path, Path], trace: Trace, run: Run, refused: Refused
) -> None:
    x = trace[L3].copy()
    x[7, 1] = np.nan
    save(trace | {L3: x}, files[1], tokens=TOKENS)
    ran = run("diff", *files)
    assert ran.code == 1
    assert ran.out.splitlines()[-1] == f"departs first at {L3}: is nan at [7, 1]"
    report = json.loads(run("diff", *files, "--json").out)
    assert [row["name"] for row in report["tensors"] if not row["match"]] == [L3]
    said = "theirs.safetensors: tensor model.layers.3 is nan at [7, 1], expected finite"
    refused("diff", *reversed(files), naming=(said,))


def test_a_row_that_is_off_by_its_own_length_departs(
    files: tuple[Path, Path], trace: Trace, run: Run
) -> None:
    x = trace[L3].copy()
    x[0] *= 50
    moved = x.copy()
    moved[9] *= 1.2
    save(trace | {L3: x}, files[0], tokens=TOKENS, dtype="bfloat16")
    save(trace | {L3: moved}, files[1], tokens=TOKENS, dtype="bfloat16")
    ran = run("diff", *files)
    assert ran.code == 1
    said = "row 9: error 2.0e-01 of its own length, tolerance 0.12"
    assert ran.out.splitlines()[-1] == f"departs first at {L3}: {said}"


def test_the_start_of_the_model_tells_of_another_prompt_or_other_weights(
    files: tuple[Path, Path], trace: Trace, run: Run
) -> None:
    for name in ("model.embed_tokens", "model.layers.0.input_layernorm"):
        save(spoilt(trace, name, (3, 3), 1), files[1], tokens=TOKENS)
        last = run("diff", *files).out.splitlines()[-1]
        assert last.startswith(f"departs first at {name}: ")
        assert last.endswith(": perhaps another prompt or other weights")


def test_what_a_terminal_would_act_on_is_escaped(
    files: tuple[Path, Path], trace: Trace, run: Run
) -> None:
    odd = "a\x1b[2J\nb"
    save({odd: trace[L3], f"{odd}1": trace[L3]}, files[0])
    save({odd: trace[L3] + 1, f"{odd}2": trace[L3]}, files[1])
    out = run("diff", *files).out
    assert "departs first at a\\x1b[2J\\nb: " in out and "\x1b" not in out
    assert "1 such as a\\x1b[2J\\nb1" in out and len(out.splitlines()) == 5


def test_a_margin_may_be_off_by_what_the_logits_may(trace: Trace) -> None:
    name = f"{L3}.moe.margin"
    allowed = 2e-5 * np.abs(trace[f"{L3}.moe.gate"]).max() / 2
    ours = Recording("ours", trace, TOKENS)
    for share, is_match in ((0.9, True), (1.1, False)):
        margins = trace[name].copy()
        margins[4] += share * allowed
        report = diff(ours, Recording("theirs", trace | {name: margins}, TOKENS))
        assert (report.departure is None) == is_match, share


def test_mtp_layers_may_have_more_rows_and_logits_only_the_last(trace: Trace) -> None:
    ours = Recording("ours", trace, TOKENS)
    more = dict(trace)
    for at in layers_of(trace, "eh_proj"):
        for name in [name for name in trace if f"{name}.".startswith(f"{at}.")]:
            shape = trace[name].shape
            if name.endswith(".probs"):
                more[name] = np.pad(trace[name], ((0, 0), (0, 3), (0, 3)), constant_values=0.5)
                continue
            more[name] = np.concatenate((trace[name], np.full((3, *shape[1:]), 9.0, np.float32)))
    more["lm_head"] = trace["lm_head"][-1:]
    assert diff(ours, Recording("theirs", more, TOKENS)).departure is None
    assert diff(Recording("theirs", more, TOKENS), ours).departure is None
    first = diff(ours, Recording("theirs", spoilt(more, "lm_head", (0, 3), 1), TOKENS)).departure
    assert first is not None and first.first is not None
    assert (first.name, first.first.place) == ("lm_head", (len(TOKENS) - 1, 3))


@pytest.mark.parametrize("knows", ["tokens", "rows"])
def test_a_tensor_that_is_short_of_rows_departs_whichever_has_more(
    knows: str, trace: Trace
) -> None:
    """Depth k has k rows less than the prompt, and no fewer."""
    tokens = TOKENS if knows == "tokens" else None
    depths = {at: k for k, at in enumerate(layers_of(trace, "eh_proj"), start=1)}

    def cut(name: str, rows: int) -> Array:
        x = trace[name]
        return x[:, :rows, :rows] if name.endswith(".probs") else x[:rows]

    for missing in (len(TOKENS), len(TOKENS) - 1, 5, 1):
        is_empty = missing >= len(TOKENS) - len(depths)  # nothing is left of some tensor
        less = dict[str, Array]()
        for name in trace:
            depth = next((k for at, k in depths.items() if f"{name}.".startswith(f"{at}.")), 0)
            less[name] = cut(name, max(0, len(TOKENS) - depth - missing))
        if knows == "rows":
            less["model.embed_tokens"] = trace["model.embed_tokens"]
        ours, short = Recording("ours", trace, tokens), Recording("theirs", less, tokens)
        for pair in ((ours, short), (short, ours)):
            if is_empty:
                with pytest.raises(InputError, match="expected no axis of size 0"):
                    diff(*pair)
                continue
            found = diff(*pair).rows
            assert [row.name for row in found] == list(trace)
            same = {row.name for row in found if row.is_match or "shape " not in row.note}
            assert same == ({"model.embed_tokens"} if knows == "rows" else set())


@pytest.mark.parametrize("side", ["ours", "theirs"])
@pytest.mark.parametrize("name", ["model.layers.11", f"{L3}.input_layernorm"])
def test_a_recording_of_another_model_is_refused_on_either_side(
    side: str, name: str, trace: Trace
) -> None:
    other = Recording("other", trace | {name: trace[L3][:, :40]}, TOKENS)
    good = Recording("good", trace, TOKENS)
    pair = (other, good) if side == "ours" else (good, other)
    with pytest.raises(InputError, match=f"other: tensor {re.escape(name)}.*of another model"):
        diff(*pair, config=CONFIG)
    assert diff(good, good, config=CONFIG).departure is None


@pytest.mark.parametrize("dtypes", [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_the_worst_tensor_is_the_one_nearest_its_own_tolerance(
    dtypes: tuple[str, str], trace: Trace
) -> None:
    """Where either engine has 16 bits, late layers may be off by more: an error says less there."""
    moved = spoilt(trace, "model.layers.0", (3, 3), 0.9 * 0.03)
    moved = spoilt(moved, "model.layers.6", (3, 3), 0.8 * 0.03 * 7**0.5)
    pair = zip((trace, moved), dtypes, strict=True)
    report = diff(*(Recording(dtype, x, TOKENS, dtype) for x, dtype in pair))
    errors = {row.name: row.max_error for row in report.rows}
    assert report.departure is None and errors["model.layers.6"] > 2 * errors["model.layers.0"]
    assert "(worst 2.7e-02 at model.layers.0)" in verdict(report)


def test_a_config_gives_the_sizes_and_the_factor(
    files: tuple[Path, Path], trace: Trace, run: Run
) -> None:
    ours = {name: trace[name] for name in (f"{L3}.self_attn.k_proj", f"{L3}.moe")}
    fused, native = as_vllm(trace), as_transformers(trace, FACTOR, np.random.default_rng(0))
    theirs = {f"{L3}.self_attn.qkv_proj": fused[f"{L3}.self_attn.qkv_proj"]}
    theirs |= {"layers.3.mlp.experts": native["model.language_model.layers.3.mlp.experts"]}
    save(ours, files[0])
    save(theirs, files[1])
    ran = run("diff", *files, "--json")
    assert [row["name"] for row in json.loads(ran.out)["tensors"]] == [f"{L3}.self_attn.k_proj"]
    assert json.loads(ran.out)["only_theirs"] == [f"{L3}.moe.unscaled"]
    ran = run("diff", *files, "--model", FOLDER, "--json")
    assert [row["name"] for row in json.loads(ran.out)["tensors"]] == list(ours)
    assert ran.code == 0


def test_with_a_model_the_bug_that_explains_the_first_departure_is_named(
    files: tuple[Path, Path], run: Run
) -> None:
    scaling = CONFIG.layers[0].rope.scaling
    layers = tuple(s._replace(rope=s.rope._replace(scaling=scaling)) for s in CONFIG.layers)
    save(record(TOKENS, WEIGHTS[FOLDER], CONFIG._replace(layers=layers)), files[1], tokens=TOKENS)
    ran = run("diff", *files, "--model", FOLDER)
    assert ran.code == 1
    *_, departs, why = ran.out.splitlines()
    assert departs.startswith("departs first at model.layers.1.self_attn.q_rope: ")
    assert why == "looks like: Llama-3 scaling applied to a sliding layer (minstep/config.py)"
    report = json.loads(run("diff", *files, "--model", FOLDER, "--json").out)
    assert report["explained"] == [why] and report["first"] == "model.layers.1.self_attn.q_rope"


@pytest.mark.parametrize("name", ["model.embed_tokens", L3, f"{L4}.moe", "model.norm", "lm_head"])
def test_where_the_layer_alone_is_right_that_is_said(
    name: str, files: tuple[Path, Path], trace: Trace, run: Run
) -> None:
    theirs = save(trace, files[1], tokens=TOKENS)
    ours = save(spoilt(trace, name, (3, 3), 1), files[0], tokens=TOKENS)
    ran = run("diff", ours, theirs, "--model", FOLDER)
    layer = {"model.embed_tokens": 0, L3: 3, f"{L4}.moe": 4}.get(name, len(CONFIG.layers) - 1)
    assert ran.code == 1
    last = ran.out.splitlines()[-1]
    assert last.startswith(f"layer {layer}, run from the input that {theirs}")
    assert last.endswith(f"in {ours}, or this minstep was edited since")


def test_what_cannot_be_explained_is_still_a_mismatch(
    files: tuple[Path, Path], trace: Trace, tmp_path: Path, run: Run
) -> None:
    save(spoilt({L3: trace[L3]}, L3, (0, 0), 1), files[1])
    ran = run("diff", *files, "--model", FOLDER)
    assert ran.code == 1
    assert "not explained: " in ran.out.splitlines()[-1]
    assert "theirs.safetensors: lacks the input of layer 3" in ran.out.splitlines()[-1]
    (tmp_path / "config.json").write_bytes((FOLDER / "config.json").read_bytes())
    ran = run("diff", *files, "--model", tmp_path)
    assert ran.code == 1 and "holds no weights" in ran.out.splitlines()[-1]
    assert run("diff", files[0], files[0], "--model", tmp_path).code == 0


# Continuations that differ


def continued(path: Path, tokens: list[int], prompt: int, trace: Trace | None = None) -> Path:
    """What trace writes of a prompt and the text that follows it, which may be none."""
    trace = record(tokens, WEIGHTS[FOLDER], CONFIG) if trace is None else trace
    new = [Pass(n, [], 0, 1) for n in range(len(tokens) - prompt)]
    save_trace(trace, tokens, metadata(CONFIG, passes=new), path)
    return path


@pytest.mark.parametrize("form", cases(["vllm"], ["trace"]))
def test_where_continuations_differ_what_both_texts_begin_with_is_compared(
    form: str, trace: Trace, run: Run, tmp_path: Path
) -> None:
    other = [*TOKENS[:8], 1 + TOKENS[8], *TOKENS[:5]]
    theirs = record(other, WEIGHTS[FOLDER], CONFIG)
    ours, file = continued(tmp_path / "ours", TOKENS, 5), tmp_path / "theirs"

    def compared(theirs: Trace, *more: object) -> Ran:
        if form == "vllm":  # an engine that says nothing of where its prompt ends
            save(as_vllm(theirs), file, tokens=other)
        else:
            continued(file, other, 5, theirs)
        return run("diff", ours, file, *more)

    ran = compared(theirs)
    assert ran.code == 0, ran.out
    said = "compared over the first 8 tokens, all that both texts begin with"
    assert ran.out.splitlines()[-2] == said
    last_rows = {"model.layers.5": 7, "lm_head": 7, "model.layers.8": 6, "model.layers.10": 4}
    for name, row in last_rows.items():
        for more in ((), ("--model", FOLDER)):
            ran = compared(spoilt(theirs, name, (row, 3), 1), *more)
            assert ran.code == 1 and f"departs first at {name}: " in ran.out
        assert compared(spoilt(theirs, name, (row + 1, 3), 1)).code == 0
    report = json.loads(compared(theirs, "--json").out)
    assert report["shared_tokens"] == 8
    shapes = {row["name"]: row["shape"] for row in report["tensors"]}
    assert shapes["model.layers.9"] == [6, 64] and shapes["model.norm"] == [8, 64]
    if form == "trace":
        assert [shapes[f"model.layers.{n}.self_attn.probs"][1:] for n in (0, 10)] == [
            [8, 8],
            [5, 5],
        ]
    assert json.loads(run("diff", ours, ours, "--json").out)["shared_tokens"] is None


def test_a_text_that_only_goes_on_longer_is_compared_as_far_as_the_other(
    trace: Trace, run: Run, tmp_path: Path
) -> None:
    ours = continued(tmp_path / "ours", TOKENS, 5, trace)
    for count in (9, 5):
        shorter = continued(tmp_path / "shorter", TOKENS[:count], 5)
        for files in ((ours, shorter), (shorter, ours)):
            ran = run("diff", *files)
            assert ran.code == 0 and f"compared over the first {count} tokens" in ran.out, ran.out


def test_only_the_last_token_s_logits_are_not_those_of_the_shared_ones(
    trace: Trace, run: Run, tmp_path: Path
) -> None:
    ours, theirs = continued(tmp_path / "ours", TOKENS, 5, trace), tmp_path / "theirs"
    other = record(text := [*TOKENS[:8], 1 + TOKENS[8]], WEIGHTS[FOLDER], CONFIG)
    save(other | {"lm_head": other["lm_head"][-1:], "zebra": trace[L3]}, theirs, tokens=text)
    ran = run("diff", ours, theirs)
    assert ran.code == 0, ran.out
    assert f"only in {ours}: 1 such as lm_head" in ran.out


@pytest.mark.parametrize("prompts", [(9, 5), (9, 9), (5, 10), (12, 12)])
def test_prompts_that_differ_are_no_continuations(
    prompts: tuple[int, int], trace: Trace, tmp_path: Path, refused: Refused
) -> None:
    ours = continued(tmp_path / "ours", TOKENS, prompts[0], trace)
    other = [*TOKENS[:8], 1 + TOKENS[8], *TOKENS[9:]]
    theirs = continued(tmp_path / "theirs", other, prompts[1], trace)
    naming = (f"{theirs}: was recorded from another prompt: token 8 is {other[8]}, expected",)
    refused("diff", ours, theirs, naming=naming)


def test_one_pair_of_tensors_is_in_memory_at_a_time(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    trace = {f"model.layers.{n}": rng.standard_normal((256, 1024)) for n in range(16)}
    files = [save(trace, tmp_path / name, tokens=list(range(256))) for name in "ab"]
    one = trace["model.layers.0"].nbytes
    tracemalloc.start()
    try:
        ours, theirs = map(minstep.parity.engine_tensors.open_recording, files)
        assert tracemalloc.get_traced_memory()[1] < one / 4  # nothing is read by opening
        assert all(row.is_match for row in compare_all(ours, theirs, list(trace), 1e-10))
        assert tracemalloc.get_traced_memory()[1] < 8 * one
    finally:
        tracemalloc.stop()


def write_bad(path: Path, trace: Trace, kind: str) -> None:
    """Write a file that cannot be compared."""
    if kind == "truncated":
        save(trace, path, tokens=TOKENS)
        path.write_bytes(path.read_bytes()[:-5])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("hello, this is no safetensors file")
    elif kind == "folder":
        path.mkdir()
    elif kind == "twice":
        save({L3: trace[L3], "layers.3": trace[L3]}, path, tokens=TOKENS)
    elif kind == "other token":
        save(trace, path, tokens=[*TOKENS[:3], 1, *TOKENS[4:]])
    elif kind == "first token":
        save(trace, path, tokens=[1, *TOKENS[1:]])
    elif kind == "longer":
        save(trace, path, tokens=[*TOKENS, 1])
    elif kind == "rows":
        save({name: x[:, :5] if x.ndim == 3 else x[:5] for name, x in trace.items()}, path)
    elif kind == "nothing in common":
        save({"zebra": trace[L3]}, path, tokens=TOKENS)
    elif kind == "no tensors":
        save({}, path, tokens=TOKENS)
    elif kind == "tokens":
        save(trace, path, tokens="[1, ")


BAD = {
    "missing": ("theirs.safetensors: cannot be read: No such file",),
    "truncated": ("theirs.safetensors", "truncated"),
    "empty": ("theirs.safetensors: is not a safetensors file, or not a whole one",),
    "text": ("theirs.safetensors: is not a safetensors file, or not a whole one",),
    "folder": ("theirs.safetensors", "cannot be read"),
    "twice": ("model.layers.3 and layers.3 are both model.layers.3, expected one",),
    "first token": ("another prompt: token 0 is 1, expected", "as in", "ours.safetensors"),
    "other token": ("begins as ", "but token 3 is 1, expected", "without --max-tokens"),
    "longer": ("another prompt: 13 tokens, expected 12", "ours.safetensors"),
    "rows": ("another prompt: 5 rows, expected 12", "ours.safetensors"),
    "nothing in common": ("no tensor in common", "196 such as model.embed_tokens", "zebra"),
    "no tensors": ("no tensor in common", "theirs.safetensors none"),
    "tokens": ("theirs.safetensors: metadata tokens is '[1, ', expected a JSON list",),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_recordings_are_refused_in_one_line(
    kind: str, files: tuple[Path, Path], trace: Trace, refused: Refused
) -> None:
    write_bad(files[1], trace, kind)
    refused("diff", *files, naming=BAD[kind])
    refused("diff", *files, "--json", naming=BAD[kind])


@pytest.mark.parametrize("tolerance", ["0", "-1", "nan", "inf", "x", ""])
def test_a_bad_tolerance_is_refused(
    tolerance: str, files: tuple[Path, Path], refused: Refused
) -> None:
    refused("diff", files[0], files[0], f"--tolerance={tolerance}", naming=("tolerance", "above 0"))


def test_other_arguments_are_refused(
    files: tuple[Path, Path], trace: Trace, tmp_path: Path, refused: Refused
) -> None:
    ours = files[0]
    refused("diff", ours, naming=("THEIRS",))
    glob = ("diff", ours, ours, "--names", "model.layers.99.*")
    refused(*glob, naming=("no tensor in common whose name matches model.layers.99.*",))
    refused("diff", ours, ours, "--model", tmp_path / "none", naming=("none", "cannot be read"))
    odd = GOLDEN / "odd" / "bf16"
    words = ("ours.safetensors: tensor model.layers.0.input_layernorm", "[12, 64]", "another model")
    refused("diff", ours, ours, "--model", odd, naming=words)
    save({"layers.9": trace[L3]}, files[1])
    words = ("tensor layers.9: expected layers 0 to 5", "another model")
    refused("diff", files[1], files[1], "--model", odd, naming=words)


def test_sixteen_bit_bits_are_not_taken_for_whole_numbers(
    files: tuple[Path, Path], trace: Trace, run: Run
) -> None:
    save({L3: rounded(trace[L3], "bfloat16")}, files[1])
    assert isinstance(rounded(trace[L3], "bfloat16"), BF16Array)
    assert run("diff", files[0], files[1], "--tolerance", "0.004").code == 0
    assert run("diff", files[0], files[1], "--tolerance", "0.0001").code == 1


def hooked(folder: Path, dtype: str, path: Path, tokens: list[int], bug: str = "") -> Path:
    """All that modules of a torch port return, by its own names, outputs numbered; written.

    `bug`: the module that has one wrong weight.
    """
    from tests.support.torch_port import build, torch

    port, seen = build(minstep.open_checkpoint(folder), dtype), dict[str, Any]()

    def keep(name: str, output: Any) -> None:
        if isinstance(output, tuple):
            for n, x in enumerate(output):
                keep(f"{name}.{n}", x)
        elif torch.is_tensor(output) and name not in seen:  # MTP layers embed other tokens
            is_bf16 = output.dtype == torch.bfloat16
            bits = output.view(torch.uint16) if is_bf16 else output
            seen[name] = BF16Array(bits.numpy()) if is_bf16 else bits.numpy()

    for name, module in port.named_modules():
        module.register_forward_hook(lambda _, args, output, name=name: keep(name, output))
        if bug and name == bug:
            module.weight.data[0, 3] += 8
    with torch.no_grad():
        port(torch.tensor([tokens]))
    return save(seen, path, tokens=tokens)


# A head of no_extras has 8 numbers: in bfloat16 their norm blows up what is near zero.
PORTS = [(name, dtype) for name in ("tiny", "odd", "no_extras") for dtype in ("float32", "float16")]
PORTS += [("tiny", "bfloat16"), ("odd", "bfloat16")]


@pytest.mark.torch
@pytest.mark.parametrize("name, dtype", PORTS)
def test_hooks_on_every_module_of_transformers_model(
    name: str, dtype: str, tmp_path: Path, run: Run
) -> None:
    pytest.importorskip("torch", reason="needs: pip install -e '.[oracle]'")
    folder = GOLDEN / name / "bf16"
    tokens, ours, theirs = meta(folder)["prompt"], tmp_path / "ours", tmp_path / "theirs"
    config = minstep.load_config(folder)
    save(record(tokens, WEIGHTS[folder], config), ours, tokens=tokens)
    hooked(folder, dtype, theirs, tokens)
    command = ("diff", ours, theirs, "--json", "--model", folder)  # in 16 bits there are ties
    ran = run(*command)
    report = json.loads(ran.out)
    assert ran.code == 0, report["first"]
    no_taps = ("q_rope", "k_rope", "moe.margin", "probs")
    assert [n for n in report["only_ours"] if not n.endswith(no_taps)] == []
    sums = [f"{spec.name}.mlp" for spec in config.layers if spec.moe]
    assert set(sums) <= {row["name"] for row in report["tensors"]}
    for bug in ("model.layers.1.self_attn.k_proj", "model.layers.2.mlp.shared_experts.up_proj"):
        hooked(folder, dtype, theirs, tokens, bug)
        first = json.loads(run(*command).out)["first"]
        found = {"model.layers.2.mlp.shared_experts.up_proj": "model.layers.2.share_expert"}
        assert first == found.get(bug, bug)
