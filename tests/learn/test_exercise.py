"""Exercises: unwritten functions are named, the source is green, known bugs and other mistakes red.

`pytest -m ch04` runs the checks of chapter 4 on the package's own files.
"""

import ast
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from minstep.errors import InputError
from minstep.learn.exercise import (
    BUGS,
    CHAIN,
    bugged,
    file_of,
    mark,
    returning,
    solution,
    stubs,
    without_bodies,
    write,
)
from minstep.learn.exhibits import EXHIBITS
from minstep.learn.lessons import EXERCISES, PLANT, WHOLE
from minstep.learn.scenes import Scene, departure, difference, distinct
from minstep.parity.decoding_bugs import UNSEEN
from minstep.parity.known_bugs import FOOTGUNS, Footgun
from minstep.parity.variants import Find, copies, is_plantable, planted, source
from tests.conftest import Refused, Run
from tests.support.tiers import cases


def marked(number: int, *values: Any, of: str, is_thorough: bool = False) -> Any:
    marks = [getattr(pytest.mark, mark(number)), *([pytest.mark.thorough] if is_thorough else [])]
    return pytest.param(number, *values, marks=marks, id=of)


# Whole models are run with the source of a few exercises only: they compute the same with all.
SCENES = [
    marked(
        number,
        scene,
        of=f"{number}-{scene.__name__}",
        is_thorough=scene in WHOLE and number not in (6, 9),
    )
    for number, exercise in EXERCISES.items()
    for scene in exercise.scenes
]
FUNCTIONS = [
    pytest.param(number, name, function, id=f"{number}-{function}")
    for number, exercise in EXERCISES.items()
    for name, functions in exercise.functions.items()
    for function in functions
]
KNOWN = [
    pytest.param(number, bug, id=f"{number}-{bug.bug}")
    for rows in (FOOTGUNS, UNSEEN)
    for bug in (bug for row in rows.values() for bug in row)
    for number, exercise in EXERCISES.items()
    if bug.module in exercise.functions
]


def first(scenes: tuple[Scene, ...], find: Find) -> str | None:
    """What departs first in any of the scenes; an error counts, since it turns a check red."""
    for scene in scenes:
        try:
            with np.errstate(all="ignore"):
                found = departure(scene, find)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        if found:
            return found
    return None


@pytest.mark.parametrize(("number", "scene"), SCENES)
def test_the_source_is_a_solution(number: int, scene: Scene) -> None:
    names = EXERCISES[number].functions or {bug.module: () for bug in BUGS}
    texts = {name: returning(source(name), name) for name in names}
    assert departure(scene, copies(texts, CHAIN)) is None


@pytest.mark.parametrize("number", [number for number in EXERCISES if number != PLANT])
def test_at_first_every_check_names_a_function_that_is_not_written(number: int) -> None:
    exercise, find = EXERCISES[number], copies(stubs(number), CHAIN)
    names = [name for functions in exercise.functions.values() for name in functions]
    for scene in exercise.scenes:
        assert departure(scene, find) in [f"{name} is not written yet" for name in names]


@pytest.mark.parametrize(("number", "name", "function"), FUNCTIONS)
def test_no_function_can_be_left_unwritten(number: int, name: str, function: str) -> None:
    find = copies({name: without_bodies(source(name), [function])}, CHAIN)
    assert first(EXERCISES[number].scenes, find) == f"{function} is not written yet"


@pytest.mark.parametrize(("number", "bug"), KNOWN)
def test_a_known_bug_is_no_solution(number: int, bug: Footgun) -> None:
    assert first(EXERCISES[number].scenes, copies({bug.module: planted(bug)}, CHAIN))


REPEATED = """\
    (T, H, K), (G, S, _) = q.shape, past.keys.shape
    k, v = np.repeat(past.keys, H // G, 0), np.repeat(past.values, H // G, 0)  # [H, S, K]
    scores = np.einsum("thk,hsk->hts", q, k) / np.sqrt(np.array(K, q.dtype))
    scores[:, ~visible(first, T, past.start, S, window)] = -np.inf
    return np.einsum("hts,hsk->thk", softmax(scores), v)
"""


def test_a_solution_may_be_written_otherwise_and_show_no_tensors() -> None:
    text = source("attention").replace('tap("q_norm", rms_norm(q', "(rms_norm(q")
    text = without_bodies(text, ["attend", "attend_in_blocks"])
    for name in ("attend", "attend_in_blocks"):
        text = text.replace(
            f'    raise NotImplementedError("{name} is not written yet")\n', REPEATED
        )
    assert first(EXERCISES[4].scenes, copies({"attention": text}, CHAIN)) is None


class Mistake(NamedTuple):
    """A wrong solution of an exercise that no known bug is in."""

    number: int
    module: str
    right: str
    wrong: str


MISTAKES = [
    Mistake(0, "model", "as_float(embed_tokens[ids], dtype)", "np.asarray(embed_tokens[ids])"),
    Mistake(0, "model", "check_ids(integer_ids(tokens), embed_tokens.shape[0])", "integer_ids(tokens)"),
    Mistake(2, "norm", "mean_square + eps", "mean_square"),
    Mistake(2, "norm", "axis=-1, keepdims=True", "keepdims=True"),
    Mistake(4, "activations", "x - x.max(axis=-1, keepdims=True)", "x"),
    Mistake(4, "attention", "total = total * shrink", "total = total"),
    Mistake(4, "attention", "low = 0 if window is None else max(0, first", "low = 0 if window is None else max(0, 1 + first"),
    Mistake(5, "activations", "np.exp(-np.abs(x))", "np.exp(-x)"),
    Mistake(6, "moe", "zip(chosen, starts", "zip(chosen[::-1], starts"),
    Mistake(6, "moe", 'np.argsort(-biased, axis=-1, kind="stable")', "np.argsort(biased, axis=-1)[:, ::-1]"),
    Mistake(8, "cache", "return kept", "return used"),
    Mistake(8, "cache", "self.start > max(0, end - self.sees)", "False"),
    Mistake(8, "cache", "min(used, self.keep)", "used"),
    Mistake(9, "sampling", "rest / total if total > 0 else p", "p"),
    Mistake(10, "fast.bf16", "((bits >> 16) & 1)", "1"),
    Mistake(10, "fast.bf16", "(bits + 0x7FFF + ((bits >> 16) & 1))", "bits"),
    Mistake(10, "fast.fp8", "below % 2 == 0, below, above", "below % 2 == 0, above, below"),
    Mistake(10, "fast.fp8", "largest >= 128", "False"),
    Mistake(10, "fast.fp8", "self.first - self.first % rows, end", "self.first, end"),
    Mistake(11, "parity.compare", "largest[0] or largest[1] or 1.0", "1.0"),
    Mistake(11, "parity.compare", "MASSIVE * np.median(largest)", "np.inf"),
    Mistake(12, "train.loss", "- logits.max(axis=-1, keepdims=True)", "- 0"),
    Mistake(12, "train.loss", "mtp_weight / len(depths)", "mtp_weight"),
    Mistake(12, "train.tape", "summed(a.swapaxes(-1, -2) @ g, b.shape)", "a.swapaxes(-1, -2) @ g"),
    Mistake(12, "train.optimizer", "axis=(-2, -1), keepdims=True", "keepdims=True"),
    Mistake(12, "train.balance", "np.sign(missing)", "missing"),
    Mistake(12, "train.balance", "rate * np.sign", "-rate * np.sign"),
    Mistake(12, "train.optimizer", "(step + 1) / warmup", "step / warmup"),
    Mistake(14, "store.inspect", "* moe.top_k", ""),
    Mistake(15, "sampling", "before < how.top_p", "before <= how.top_p - kept"),
    Mistake(15, "sampling", "edges / edges[-1], rng.random()", "edges / edges[-1], 0.5"),
    Mistake(15, "text.tokenizer", "begun = max((stop.begun for stop in self._stops), default=0)", "begun = 0"),
    Mistake(15, "text.prompt", "not disguised", "True"),
]  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda m: f"{m.number}-{m.wrong or 'nothing'}")
def test_a_wrong_solution_is_red(mistake: Mistake) -> None:
    text = source(mistake.module)
    assert text.count(mistake.right) == 1
    find = copies({mistake.module: text.replace(mistake.right, mistake.wrong)}, CHAIN)
    assert first(EXERCISES[mistake.number].scenes, find)


# What is compared


class Pair(NamedTuple):
    x: Any
    y: Any


ONES = np.ones((2, 3))


@pytest.mark.parametrize(
    ("expected", "got", "words"),
    [
        (ONES, ONES.astype(np.float32), "v has dtype float32, expected float64"),
        (ONES, ONES[:1], "v has shape [1, 3], expected [2, 3]"),
        (ONES, None, "v is None, expected an array"),
        (ONES, ONES * [1, np.nan, 1], "v is nan at [0, 1], expected finite numbers"),
        (ONES, ONES + np.eye(2, 3)[::-1], "v departs by 1.0e+00 of its largest value, first at [0, 1]"),
        (np.array([3, 5]), np.array([3, 4]), "v has 4 at [1], expected 5"),
        (0.5, 0.25, "v is 0.25, expected 0.5"),
        (Pair(1, ONES), Pair(1, 2 * ONES), "v.y departs"),
        (Pair(1, 2), None, "v is None, expected Pair(x=1, y=2)"),
        (None, Pair(1, 2), "v is Pair(x=1, y=2), expected None"),
        ([ONES], [ONES, ONES], "v is [array"),
        ([ONES, 1], [ONES, 2], "v[1] is 2, expected 1"),
        ({"q": ONES, "k": ONES}, {"k": 2 * ONES, "q": 3 * ONES}, "v: k departs"),
        (1, ONES, "v is array"),
    ],
)  # fmt: skip
def test_what_departs_is_said_with_its_place(expected: Any, got: Any, words: str) -> None:
    assert (difference("v", expected, got, 1e-3) or "").startswith(words)


def test_numbers_that_differ_are_shown_with_the_digits_that_tell_them_apart() -> None:
    x = np.full((2, 3), 1.7156998)
    message = difference("v", x, x * (1 + 5.2e-8), 1e-9) or ""
    assert "first at [0, 0]: 1.7156999, expected 1.7156998" in message
    assert (difference("v", 0.5, 0.5 + 1e-9, 1e-10) or "").startswith("v is 0.500000001, expected")
    assert "1, expected 2" in (difference("v", ONES * 2, ONES, 1e-3) or "")
    assert distinct(1.0, float(np.nextafter(1.0, 2))) == ("1", "1.0000000000000002")


@pytest.mark.parametrize(("by", "is_asked"), [(1e-8, True), (2e-6, True), (1e-4, False)])
def test_float32_in_a_float64_run_is_suspected(by: float, is_asked: bool) -> None:
    message = difference("v", ONES, ONES * (1 + by), 1e-9) or ""
    assert ("is a weight used in the dtype it is stored in?" in message) == is_asked
    single = difference("v", ONES.astype(np.float32), (ONES * (1 + by)).astype(np.float32), 0) or ""
    assert "stored in" not in single


@pytest.mark.parametrize(
    ("name", "function", "line"),
    [
        ("norm", "rms_norm", "return x / np.sqrt("),
        ("moe", "experts", "return (outputs"),
        ("model", "block", "return x + (routed"),
        ("mtp", "mtp_head", "return tap("),
    ],
)
@pytest.mark.parametrize("scene", WHOLE, ids=lambda scene: scene.__name__)
def test_a_forgotten_return_is_told_as_such(
    name: str, function: str, line: str, scene: Scene, tmp_path: Path
) -> None:
    text = source(name)
    assert text.count(line) == 1
    (tmp_path / f"{name}.py").write_text(text.replace(line, line.removeprefix("return ")))
    assert departure(scene, solution(tmp_path)) == f"{function} returned None"


def test_functions_that_may_return_nothing_still_do() -> None:
    text = """
def f(x: int) -> int | None:
    if x:
        return x

def g() -> None:
    f(1)

def h(x: int) -> int:
    if x:
        return x

def walk() -> Iterator[int]:
    yield 1

def untyped():
    pass
"""
    names: dict[str, Any] = {}
    exec(compile("from collections.abc import Iterator", "", "exec"), names)
    exec(compile(returning(text, "file.py"), "file.py", "exec"), names)
    assert (names["f"](0), names["g"](), names["h"](3), names["untyped"]()) == (None, None, 3, None)
    assert list(names["walk"]()) == [1]
    with pytest.raises(NotImplementedError, match="^h returned None$"):
        names["h"](0)


def test_rounding_and_tensors_that_were_not_shown_are_no_difference() -> None:
    assert difference("v", ONES, ONES * (1 + 1e-5), 1e-4) is None
    assert difference("v", {"q": ONES, "k": ONES}, {"k": ONES, "other": ONES}, 1e-4) is None
    assert difference("v", Pair(None, [1.0]), Pair(None, [1.0]), 1e-4) is None


# What is written


@pytest.mark.parametrize(("number", "name", "function"), FUNCTIONS)
def test_only_the_body_is_taken_out(number: int, name: str, function: str) -> None:
    before, after = ast.parse(source(name)), ast.parse(without_bodies(source(name), [function]))

    def found(tree: ast.Module) -> ast.FunctionDef:
        body: list[ast.stmt] = tree.body
        for part in function.split("."):
            node: Any = next(n for n in body if getattr(n, "name", None) == part)
            body = node.body
        return node

    real, stub = found(before), found(after)
    assert ast.get_docstring(real) == ast.get_docstring(stub) is not None
    assert [ast.unparse(n) for n in stub.body[1:]] == [
        f"raise NotImplementedError('{function} is not written yet')"
    ]
    stub.body = real.body
    assert ast.unparse(before) == ast.unparse(after)


def test_comments_outside_the_body_stay() -> None:
    text = "# top\ndef f(x):  # of f\n    # before\n    return x  # in f\n\n\n# between\ny = 1\n"
    stub = '# top\ndef f(x):  # of f\n    # before\n    raise NotImplementedError("f is not written'
    assert without_bodies(text, ["f"]) == f'{stub} yet")\n\n\n# between\ny = 1\n'


def test_a_seed_plants_a_known_bug_that_the_checks_see() -> None:
    files = [bugged(seed) for seed in range(12)]
    assert files == [bugged(seed) for seed in range(12)]
    assert len({text for file in files for text in file.values()}) > 6
    for file in files:
        assert file in [{bug.module: planted(bug)} for bug in BUGS]


def test_a_bug_whose_line_was_edited_is_not_planted(monkeypatch: pytest.MonkeyPatch) -> None:
    real = source

    def edited(name: str) -> str:
        return real(name).replace("gate", "door") if name == "attention" else real(name)

    monkeypatch.setattr("minstep.parity.variants.source", edited)
    for seed in range(200):
        (name,) = (files := bugged(seed))
        bugs = [bug for bug in BUGS if bug.module == name and is_plantable(bug)]
        assert files[name] in [planted(bug) for bug in bugs]
    monkeypatch.setattr("minstep.parity.variants.source", lambda name: "")
    with pytest.raises(InputError, match="exercise 13: every line"):
        bugged(0)


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.bug)
def test_every_bug_that_may_be_planted_is_seen(bug: Footgun) -> None:
    assert first(WHOLE, copies({bug.module: planted(bug)}, CHAIN))


def pytest_in(folder: Path, number: int) -> tuple[int, str]:
    """Run pytest as a reader would; its exit code and what it prints."""
    command = [sys.executable, "-m", "pytest", "-m", mark(number), str(folder)]
    ran = subprocess.run(command, cwd=folder.parent, capture_output=True, text=True)
    return ran.returncode, ran.stdout


@pytest.mark.parametrize("number", cases([PLANT], [12]))
def test_a_folder_is_red_at_first_and_green_with_the_source(
    number: int, tmp_path: Path, run: Run
) -> None:
    folder = tmp_path / "mine"
    ran = run("exercise", number, "--out", folder)
    assert ran.code == 0 and ran.err.startswith(f"wrote {folder} (")
    assert ran.out.endswith(f"now: pytest -m {mark(number)} {folder}\n")
    files = [name for name in CHAIN if (folder / file_of(name)).exists()]
    assert files and all(file_of(name) in ran.out for name in files)
    code, output = pytest_in(folder, number)
    assert code == 1 and ("departs by" if number == PLANT else "is not written yet") in output
    assert f"{len(EXERCISES[number].scenes)} failed" in output or number == PLANT
    for name in files:
        (folder / file_of(name)).write_text(source(name))
    code, output = pytest_in(folder, number)
    assert code == 0, output


@pytest.mark.parametrize("number", EXERCISES)
def test_a_folder_says_what_to_do_and_does_not_say_which_bug(number: int, tmp_path: Path) -> None:
    files = bugged(3) if number == PLANT else stubs(number)
    write(number, files, tmp_path)
    texts = {path: path.read_text() for path in tmp_path.rglob("*") if path.is_file()}
    readme = texts[tmp_path / "README.md"]
    assert f"pytest -m {mark(number)} ." in readme and "{" not in readme
    assert all(len(line) <= 100 for line in readme.splitlines())
    for name in files:
        assert file_of(name) in readme
        assert texts[tmp_path / file_of(name)] == files[name]
    for functions in EXERCISES[number].functions.values():
        assert all(f"`{function}`" in readme for function in functions)
    compile(texts[tmp_path / f"test_{mark(number)}.py"], "checks", "exec")
    bugs = [bug.bug for bug in BUGS] if number == PLANT else []
    assert not any(bug in text for bug in bugs for text in texts.values())


def test_a_reader_s_mistake_is_told_with_the_line_of_his_file(tmp_path: Path) -> None:
    (tmp_path / "norm.py").write_text(source("norm") + "\n\nrms_norm(1\n")
    with pytest.raises(SyntaxError) as error:
        solution(tmp_path)
    assert error.value.filename == str(tmp_path / "norm.py")
    with pytest.raises(InputError, match="has no file of an exercise"):
        solution(tmp_path / "nowhere")


def test_without_a_number_all_are_listed(run: Run) -> None:
    ran = run("exercise")
    assert (ran.code, ran.err) == (0, "")
    every = {bug.bug for rows in (FOOTGUNS, UNSEEN) for row in rows.values() for bug in row}
    ours = {bug.bug for bug in BUGS}
    assert f"one of {len(ours)} of the museum's {len(every)} bugs to find" in ran.out
    assert len(every) == sum(len(exhibit.bugs) for exhibit in EXHIBITS)
    for number, exercise in EXERCISES.items():
        assert f"{number:2}  {exercise.title}\n" in ran.out
        for name, functions in exercise.functions.items():
            assert f"{file_of(name)}: {', '.join(functions)}\n" in ran.out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((16, "--out", "x"), ("exercise 16", "0 to 15")),
        ((4,), ("exercise 4", "--out DIR")),
        (("--out", "x"), ("--out x", "number")),
        ((4, "--out", "x", "--seed", 1), ("--seed 1", "exercise 13")),
        (("four",), ("four", "whole number")),
        ((4, "--out", "{tmp}"), ("mine.txt", "expected a new or empty folder")),
        ((4, "--out", "{tmp}/mine.txt"), ("mine.txt", "expected a new folder")),
        ((4, "--out", "{tmp}/no/where"), ("no/where", "cannot be written")),
    ],
)
def test_what_cannot_be_written_is_refused(
    arguments: tuple[Any, ...], words: tuple[str, ...], tmp_path: Path, refused: Refused
) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    refused("exercise", *(str(a).format(tmp=tmp_path) for a in arguments), naming=words)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_checkpoint_is_not_replaced_by_an_exercise(
    tmp_path: Path, run: Run, refused: Refused
) -> None:
    assert run("make-tiny", "tiny", "--out", tmp_path / "tiny").code == 0
    files = sorted((tmp_path / "tiny").iterdir())
    refused("exercise", 4, "--out", tmp_path / "tiny", naming=("config.json", "new or empty"))
    assert sorted((tmp_path / "tiny").iterdir()) == files
