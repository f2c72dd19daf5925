"""Exercises: a chapter's functions to write, and checks that say what departs.

The files are the package's own with bodies taken out, so the solution is the source. In one chapter
nothing is taken out: a bug is planted.
Checked by: tests/learn/test_exercise.py
"""

import ast
from collections.abc import Collection
from pathlib import Path

import numpy as np

from minstep.errors import InputError
from minstep.learn.lessons import EXERCISES, PLANT
from minstep.parity.decoding_bugs import EVERY
from minstep.parity.known_bugs import ALL
from minstep.parity.variants import Find, copies, is_plantable, planted, source

# What may lie in a reader's folder or imports such a file, in the order of their imports.
CHAIN = (
    "config store.config_file fast.bf16 fast.fp8 norm rope cache activations attention mlp moe "
    "model sampling mtp generate weights store.random_checkpoint store.checkpoint text.reply "
    "text.prompt text.tokenizer store.inspect parity.compare train.tape train.loss "
    "train.optimizer train.balance"
).split()
PLANTED_IN = ("config", "norm", "rope", "attention", "mlp", "moe", "model", "mtp", "weights")
BUGS = [bug for bug in ALL if bug.module in PLANTED_IN]

README = """\
# Exercise {number}: {title}

{task}

Run the checks here, or from anywhere with this folder's path in place of the dot:

    pytest -m {mark} .

They run what is here beside minstep's own on small random inputs, in float64 and float32, and where
there is one in a whole small model at last, and say what departs first and by how much.

When you are stuck: chapter {number} of the book, in minstep's docs/. The solution is the package's
own code, the files of the same names in minstep/.
"""
WRITE = """\
Write these functions. Signature and docstring are there; all else in the files is as in minstep.

{functions}

Where a function takes a `tap`, show it the tensors that minstep's own shows, by the names that
`minstep trace` writes: then the checks can tell which tensor departs, and not the result alone."""
FIND = """\
Something is wrong in {files}, a line or two: a bug that a port of this model has had. Find and
mend it. The docstrings say what is right, and the checks which tensor departs first. `--seed N`
plants another."""
TEST = '''\
"""Exercise {number}, {title}: green when your files do what minstep does."""

from pathlib import Path

import pytest

from minstep.learn.exercise import solution
from minstep.learn.lessons import EXERCISES
from minstep.learn.scenes import departure


@pytest.mark.{mark}
@pytest.mark.parametrize("scene", EXERCISES[{number}].scenes, ids=lambda scene: scene.__name__)
def test_that(scene):
    said = departure(scene, solution(Path(__file__).parent))
    if said:
        pytest.fail(said, pytrace=False)
'''
INI = """\
[pytest]
markers =
    {mark}: exercise {number}, {title}
addopts = --strict-markers --tb=short -p no:cacheprovider
"""


def listed() -> str:
    """Each exercise: its number, title, and the functions to write in each file."""
    lines = []
    for number, exercise in EXERCISES.items():
        lines.append(f"{number:2}  {exercise.title}")
        for name, functions in exercise.functions.items():
            lines.append(f"      {file_of(name)}: {', '.join(functions)}")
        if number == PLANT:
            of, all_bugs = (len({bug.bug for bug in bugs}) for bugs in (BUGS, EVERY))
            lines.append(f"      one of {of} of the museum's {all_bugs} bugs to find, by --seed")
    return "\n".join(lines)


def mark(number: int) -> str:
    """pytest's marker of an exercise."""
    return f"ch{number:02}"


def file_of(name: str) -> str:
    """Where a module lies, within the package and within a reader's folder."""
    return f"{name.replace('.', '/')}.py"


def stubs(number: int) -> dict[str, str]:
    """The files of an exercise by module, without the bodies of the functions to write."""
    functions = EXERCISES[number].functions
    return {name: without_bodies(source(name), names) for name, names in functions.items()}


def bugged(seed: int) -> dict[str, str]:
    """A file with one of the known bugs in it, whose line nobody has edited.

    Raises InputError where there is none.
    """
    bugs = [bug for bug in BUGS if is_plantable(bug)]
    if not bugs:
        message = "every line that a known bug changes was edited, expected minstep's own files"
        raise InputError(f"exercise {PLANT}: {message}")
    bug = bugs[int(np.random.default_rng(seed).integers(len(bugs)))]
    return {bug.module: planted(bug)}


def without_bodies(text: str, names: Collection[str]) -> str:
    """The source with only signature and docstring left of some functions; methods as Class.name.

    Their bodies raise NotImplementedError with a message that names them. Raises KeyError for a
    name that is not there.
    """
    lines, tree = text.splitlines(keepends=True), ast.parse(text)
    scopes = {"": tree.body} | {
        f"{c.name}.": c.body for c in tree.body if isinstance(c, ast.ClassDef)
    }
    found = {
        f"{prefix}{node.name}": node
        for prefix, body in scopes.items()
        for node in body
        if isinstance(node, ast.FunctionDef)
    }
    for name in sorted(names, key=lambda name: -found[name].lineno):  # the last first: lines move
        node = found[name]
        body = node.body[ast.get_docstring(node) is not None :]
        start = (node.body[0].end_lineno or 0) if len(body) < len(node.body) else body[0].lineno - 1
        indent = " " * (node.col_offset + 4)
        lines[start : node.end_lineno] = [
            f'{indent}raise NotImplementedError("{name} is not written yet")\n'
        ]
    return "".join(lines)


def write(number: int, files: dict[str, str], folder: Path) -> None:
    """Put the files of an exercise, its README and its checks into an empty folder."""
    exercise = EXERCISES[number]
    blanks = {"number": number, "mark": mark(number), "title": exercise.title}
    functions = (
        f"- {file_of(name)}: {', '.join(f'`{function}`' for function in names)}"
        for name, names in exercise.functions.items()
    )
    task = FIND.format(files=", ".join(map(file_of, files)))
    if exercise.functions:
        task = WRITE.format(functions="\n".join(functions))
    texts = {file_of(name): text for name, text in files.items()}
    texts["README.md"] = README.format(task=task, **blanks)
    texts[f"test_{mark(number)}.py"] = TEST.format(**blanks)
    texts["pytest.ini"] = INI.format(**blanks)
    for name, text in texts.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")


def solution(folder: Path) -> Find:
    """The package's modules with the files of a reader's folder in place of its own.

    Raises InputError where the folder has none, and SyntaxError for one that is not Python.
    """
    files = {name: folder / file_of(name) for name in CHAIN if (folder / file_of(name)).is_file()}
    if not files:
        raise InputError(f"{folder}: has no file of an exercise, expected such as attention.py")
    trees = {name: returning(file.read_text("utf-8"), str(file)) for name, file in files.items()}
    return copies(trees, CHAIN, {name: str(file) for name, file in files.items()})


def returning(text: str, file: str) -> ast.Module:
    """The source, with functions that say so when they end without the value they are to return.

    They raise NotImplementedError: without it the next function would fail on None. Raises
    SyntaxError for what is not Python.
    """
    tree = ast.parse(text, file)
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef) or node.returns is None:
            continue
        is_generator = any(isinstance(each, (ast.Yield, ast.YieldFrom)) for each in ast.walk(node))
        if not is_generator and "None" not in ast.unparse(node.returns):
            refusal = f'raise NotImplementedError("{node.name} returned None")'
            node.body += [ast.copy_location(ast.parse(refusal).body[0], node.body[-1])]
    return ast.fix_missing_locations(tree)
