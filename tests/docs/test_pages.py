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
    ran,
    title,
)

BOOK = chapters()
WRITTEN = [path for path in BOOK if path.name != "13-footguns.md"]  # that one test_museum makes
PAGES = [DOCS / "README.md", *BOOK]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
NOT_RUN = re.compile(r"<!-- not run: .+? -->\n```\w+\n.*?^```$", re.M | re.S)


def name(path: Path) -> str:
    return path.stem


def compare_blocks(path: Path) -> None:
    """Fail at the first block of a page that is not what its marker makes."""
    written, made = path.read_text(encoding="utf-8"), fill(path)
    for old, new in zip(BLOCK.finditer(written), BLOCK.finditer(made), strict=True):
        assert old[0] == new[0], "python -m docs.make.pages writes it"
    assert written == made


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_every_block_is_what_its_marker_makes(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but those of held-out text, which take long: the next two tests are theirs."""
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr("docs.make.pages.has_held_out_text", lambda: False)
    compare_blocks(path)


HELD_OUT = [path for path in PAGES if "<!-- run-held-out " in path.read_text(encoding="utf-8")]


@pytest.mark.thorough
@pytest.mark.parametrize("path", HELD_OUT, ids=name)
def test_every_block_of_held_out_text_is_what_its_marker_makes(
    path: Path, read_once: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not has_held_out_text():
        pytest.skip("this Python documents itself otherwise")
    monkeypatch.setenv("COLUMNS", "100")
    compare_blocks(path)


FEWER = {
    "mtp": "--prompts 2 --max-tokens 5 --tokens 64",
    "router": "--tokens 512 --dtype float64 | head 8",
    "bits": "",
}


def held_out_block(lab: str) -> str:
    (block,) = (
        block[0]
        for path in HELD_OUT
        for block in BLOCK.finditer(path.read_text(encoding="utf-8"))
        if block[1] == "run-held-out" and block[2].startswith(f"minstep lab {lab}")
    )
    return block


@pytest.mark.parametrize("lab", FEWER)
def test_a_block_of_held_out_text_has_the_words_that_a_smaller_run_prints(
    lab: str, little_text: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def words(block: str) -> list[list[str]]:
        lines = block[block.index("$ minstep") :].splitlines()[1:]
        printed = lines[: lines.index("```")]
        return sorted(re.sub(r"[\d.,%-]+", "", line).split() for line in printed)

    monkeypatch.setenv("COLUMNS", "100")
    assert words(held_out_block(lab)) == words(ran(f"minstep lab {lab} {FEWER[lab]}"))


def test_the_log_of_the_training_has_the_bits_a_byte_of_the_page() -> None:
    block = held_out_block("bits")
    log = (TOP / "tiny_configs" / "trained" / "log.txt").read_text(encoding="utf-8")
    size = re.findall(r"held out ([\d,]+) bytes", log)[0]
    assert f"bits a byte of {size} bytes held out" in block
    assert float(re.findall(r"this model +([\d.]+)", block)[0]) == float(log.split()[-1])


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
