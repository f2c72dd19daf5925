"""The book: what it quotes, prints and says is what the code computes."""

import ast
import re
from pathlib import Path

import pytest

import minstep
from docs.make.pages import (
    BLOCK,
    DOCS,
    TOP,
    chapters,
    fill,
    has_held_out_text,
    question,
    title,
)

BOOK = chapters()
WRITTEN = [path for path in BOOK if path.name != "13-footguns.md"]  # that one test_museum makes
PAGES = [DOCS / "README.md", *BOOK]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
NOT_RUN = re.compile(r"<!-- not run: .+? -->\n```\w+\n.*?^```$", re.M | re.S)


def name(path: Path) -> str:
    return path.stem


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_every_block_is_what_its_marker_makes(
    path: Path, read_once: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    written, made = path.read_text(encoding="utf-8"), fill(path)
    for old, new in zip(BLOCK.finditer(written), BLOCK.finditer(made), strict=True):
        assert old[0] == new[0], "python -m docs.make.pages writes it"
    assert written == made
    if "<!-- run-held-out " in written and not has_held_out_text():
        pytest.skip("all but its held-out text is compared: this Python documents itself otherwise")


@pytest.mark.parametrize("path", WRITTEN, ids=name)
def test_code_in_a_chapter_is_quoted_run_or_a_doctest(path: Path) -> None:
    text = NOT_RUN.sub("", BLOCK.sub("", path.read_text(encoding="utf-8")))
    for language, code in FENCE.findall(text):
        is_doctest = language == "python" and code.startswith(">>> ")
        assert is_doctest or language in ("math", "text"), f"nobody runs this:\n{code}"


@pytest.mark.parametrize("path", WRITTEN, ids=name)
def test_a_chapter_has_the_parts_of_one(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert title(path).startswith(f"{int(path.name[:2])}. ") and question(path)
    assert len(text.splitlines()) >= 150
    assert re.search(r"!\[.+?\]\(\S+\.svg\)", text, re.S), "no figure"
    assert "## Where others differ" in text and "## Exercises" in text
    assert "<!-- quote" in text and (">>> " in text or "<!-- run" in text)
    assert text.rstrip().endswith("<!-- end -->") and "<!-- nav -->" in text


def test_the_package_says_which_chapter_each_of_its_files_has() -> None:
    order = re.findall(r"^ +(\d+) +(.+)$", minstep.__doc__ or "", re.M)
    assert [int(number) for number, _ in order] == list(range(1, len(BOOK)))
    for number, files in order:
        text = BOOK[int(number)].read_text(encoding="utf-8")
        for module in files.split(", "):
            file = f"minstep/{module.replace('.', '/')}.py"
            is_there = f"<!-- quote {file} " in text or f"](../{file})" in text
            assert is_there, f"chapter {number}: {module}"


def test_the_package_says_what_each_of_its_own_names_is() -> None:
    described = re.findall(r"^    ([A-Za-z]\w+)  +\w.*$", minstep.__doc__ or "", re.M)
    assert sorted(described) == sorted(minstep.__all__)


def test_every_public_name_of_the_model_is_in_a_chapter() -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in BOOK)
    words = set(re.findall(r"\w+", text))
    for file in sorted((TOP / "minstep").glob("[!_]*.py")):
        body = ast.parse(file.read_text(encoding="utf-8")).body
        defined = [node for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
        missing = {node.name for node in defined if not node.name.startswith("_")} - words
        assert not missing, f"no chapter names {missing} of {file.name}"


def test_figures_of_the_book_are_all_shown() -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in [*PAGES, TOP / "README.md"])
    shown = set(re.findall(r"([\w-]+\.svg)\)", text))
    assert {path.name for path in (DOCS / "figures").glob("*.svg")} <= shown
