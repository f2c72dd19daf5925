"""The book's generated blocks: quoted code, commands with what they print, links.

    python -m docs.make.pages [FILE...]

writes them into docs/ (all of them where none is named), and what doctests there print;
tests/docs/test_pages.py fails where a block is not what its marker makes. A block stands
between its marker and an end marker, each on its own line:

    <!-- quote minstep/norm.py rms_norm -->   a function or class, without its docstring
    <!-- quote minstep/moe.py route "logits =" "ids" -->   from one line's text to another's
    <!-- run minstep inspect tiny -->         a command and what it prints
    <!-- run minstep walk | head 12 -->       its first lines
    <!-- run-held-out minstep lab bits -->    one that reads the held-out part of Python's own
                                              documentation: made where that is the same only
    <!-- contents -->  <!-- nav -->           the chapters; the way to the ones beside
    <!-- end -->
"""

import ast
import contextlib
import doctest
import io
import os
import re
import shlex
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

from minstep.cli.main import main
from minstep.train.data import read_corpus

TOP = Path(__file__).parents[2]
DOCS = TOP / "docs"
BLOCK = re.compile(
    r"^<!-- (quote|run|run-held-out|contents|nav)(?: (.*?))? -->\n(?:.*?\n)??<!-- end -->$",
    re.M | re.S,
)


def chapters() -> list[Path]:
    """The chapters, in reading order."""
    return sorted(DOCS.glob("[0-9][0-9]-*.md"))


def title(path: Path) -> str:
    """A chapter's title, with its number."""
    return path.read_text(encoding="utf-8").split("\n", 1)[0].removeprefix("# ")


def question(path: Path) -> str:
    """What a chapter answers: its first paragraph, in italics."""
    found = re.search(r"^\*(.+?)\*$", path.read_text(encoding="utf-8"), re.M | re.S)
    assert found, f"{path.name} asks no question"
    return " ".join(found[1].split())


def fill(path: Path) -> str:
    """The text of `path` with all its blocks made anew; commands run in one empty folder."""
    text = path.read_text(encoding="utf-8")
    makers: dict[str, Callable[[str], str]] = {
        "quote": quoted,
        "run": ran,
        "run-held-out": ran,
        "contents": lambda _: contents(),
        "nav": lambda _: nav(path),
    }
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):

        def made(found: re.Match[str]) -> str:
            marker = found[0].split("\n", 1)[0]
            if found[1] == "run-held-out" and not has_held_out_text():
                return found[0]
            return f"{marker}\n{makers[found[1]](found[2] or '')}\n<!-- end -->"

        return BLOCK.sub(made, text)


@cache
def has_held_out_text() -> bool:
    """Whether this Python documents itself as the one that the shipped model was trained on."""
    log = (TOP / "tiny_configs" / "trained" / "log.txt").read_text(encoding="utf-8")
    held_out = sum(document.nbytes for document in read_corpus().held_out)
    return f"held out {held_out:,} bytes" in log


def quoted(what: str) -> str:
    """The code of one name of a file, without its docstring, and where it stands."""
    file, name, *ends = shlex.split(what)
    source = (TOP / file).read_text(encoding="utf-8")
    node = _found(ast.parse(source), name.split("."))
    first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
    numbers = set(range(first, (node.end_lineno or first) + 1))
    if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node):
        docstring = node.body[0]
        numbers -= set(range(docstring.lineno, (docstring.end_lineno or 0) + 1))
        if isinstance(node, ast.ClassDef):
            numbers.discard((docstring.end_lineno or 0) + 1)  # the empty line below it
    lines = [line for n, line in enumerate(source.splitlines(), 1) if n in numbers]
    if ends:
        start = next(n for n, line in enumerate(lines) if ends[0] in line)
        stop = next(n for n, line in enumerate(lines[start:], start) if ends[-1] in line)
        lines = lines[start : stop + 1]
    indent = min(len(line) - len(line.lstrip()) for line in lines if line.strip())
    code = "\n".join(line[indent:] for line in lines).strip("\n")
    return f"```python\n{code}\n```\n[{file}](../{file}): `{name}`"


def _found(tree: ast.AST, names: list[str]) -> ast.stmt:
    for node in ast.iter_child_nodes(tree):
        named = [*getattr(node, "targets", []), getattr(node, "target", None)]
        targets = [t.id for t in named if isinstance(t, ast.Name)]
        if getattr(node, "name", None) == names[0] or names[0] in targets:
            assert isinstance(node, ast.stmt)
            return _found(node, names[1:]) if names[1:] else node
    raise AssertionError(f"{names[0]} is not there to be quoted")


def ran(what: str) -> str:
    """A command and what it prints; what it refuses goes to stderr, and is shown too."""
    command, _, most = what.partition(" | head ")
    program, *arguments = shlex.split(command)
    assert program == "minstep", what
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(arguments)
        except SystemExit as exit:
            code = int(exit.code or 0)
    lines = [line.rstrip() for line in (err if code == 2 else out).getvalue().rstrip().splitlines()]
    if most and len(lines) > int(most):
        lines = [*lines[: int(most)], "..."]
    return "\n".join(["```console", f"$ {command}", *lines, "```"])


def contents() -> str:
    """The chapters with their questions."""
    return "\n".join(f"- [{title(path)}]({path.name}): {question(path)}" for path in chapters())


def nav(path: Path) -> str:
    """Links to the chapter before, to the contents and to the chapter after."""
    every = chapters()
    n = every.index(path)
    links = [f"[← {title(other)}]({other.name})" for other in every[max(0, n - 1) : n]]
    links.append("[contents](README.md)")
    links += [f"[{title(other)} →]({other.name})" for other in every[n + 1 : n + 2]]
    return " · ".join(links)


class _Printed(doctest.DocTestRunner):
    """Runs the doctests of a text, and puts what they print where something else stands."""

    def __init__(self, text: str) -> None:
        super().__init__(verbose=False)
        self.lines, self.moved = text.splitlines(keepends=True), 0

    def report_failure(self, out: object, test: object, example: doctest.Example, got: str) -> None:
        first = example.lineno + example.source.count("\n") + self.moved
        want, new = example.want.splitlines(), got.splitlines(keepends=True)
        self.lines[first : first + len(want)] = new
        self.moved += len(new) - len(want)


def printed(text: str, name: str) -> str:
    """The text with what its doctests print now; an example that raises stays as it is."""
    runner = _Printed(text)
    runner.run(doctest.DocTestParser().get_doctest(text, {}, name, name, 0))
    return "".join(runner.lines)


if __name__ == "__main__":
    os.environ["COLUMNS"] = "100"
    for file in [Path(name).resolve() for name in sys.argv[1:]] or [
        DOCS / "README.md",
        *chapters(),
    ]:
        text = printed(fill(file), file.name)
        if text != file.read_text(encoding="utf-8"):
            file.write_text(text, encoding="utf-8")
            print("filled", file.name)
