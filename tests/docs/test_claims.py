"""The documentation's numbers: computed where they stand, or with a source or a measurement."""

import ast
from pathlib import Path

import pytest

from docs.make.museum_page import HEAD, TAIL
from docs.make.pages import DOCS, TOP, chapters
from minstep.learn.exhibits import EXHIBITS
from tests.support.claims import claimed, numbers, pieces, shown, unfounded
from tests.test_house import FILES, module

MUSEUM = DOCS / "13-footguns.md"
PAGES = [
    TOP / "README.md",
    *(DOCS / name for name in ("README.md", "partial.md", "speed.md")),
    *(path for path in chapters() if path != MUSEUM),
]
COMPUTED = "```python\n>>> 33 * 7\n231\n```\n"
MEASURED = "Measured on 2026-11-30 on two cores of a server by `minstep bench`"


def left(text: str, folder: Path = DOCS) -> list[str]:
    """The numbers of a small page that rest on nothing."""
    page = folder / "page.md"
    page.write_text(text, encoding="utf-8")
    return [found.split(" in: ")[0] for found in unfounded(text, shown(page), folder)]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_each_number_in_prose_is_computed_or_says_what_it_rests_on(path: Path) -> None:
    assert not unfounded(path.read_text(encoding="utf-8"), shown(path), path.parent)


def test_each_number_in_the_stories_of_the_museum_is_computed_on_its_page() -> None:
    tables = (
        piece.text
        for piece in pieces(MUSEUM.read_text(encoding="utf-8"))
        if piece.language is not None or piece.text.startswith("|")
    )
    computed = set().union(*map(numbers, tables))
    stories = (f"{exhibit.title}. {exhibit.story}" for exhibit in EXHIBITS)
    assert not unfounded("\n\n".join([HEAD, *stories, TAIL]), computed, DOCS)


def test_each_number_in_the_first_line_of_a_docstring_stands_in_the_code_of_its_file() -> None:
    for path in FILES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        firsts = {
            node.name: (ast.get_docstring(node) or "").split("\n")[0]
            for node in tree.body
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module) and ast.get_docstring(
                node
            ):
                node.body = node.body[1:] or [ast.Pass()]
        known = numbers(ast.unparse(tree))
        for name, first in firsts.items():
            assert not claimed(first) - known, f"{module(path)}.{name}"


def test_each_number_in_the_recipe_says_what_it_rests_on() -> None:
    recipe = DOCS / "recipes" / "record_torch.py"
    text = ast.get_docstring(ast.parse(recipe.read_text(encoding="utf-8"))) or ""
    assert text and not unfounded(text, set(), recipe.parent)


@pytest.mark.parametrize(
    "claim",
    [
        "It is 231.",
        "It is 20 of 20.",
        "It is 412 ([report](https://arxiv.org/abs/2602.10604)).",
        "It is 412 (arXiv 2602.10604, section 4).",
        f"It is 412. {MEASURED}.",
        f"It is 412.[^run] It is 413.[^run]\n\n[^run]: {MEASURED}.",
        f"{MEASURED}:\n\n| tokens | ms |\n|---|---|\n| 512 | 41.2 |",
        f"{MEASURED}:\n\n```text\n41.2 ms\n```\n\nSo it takes 41.2 ms.",
        "It is 412 (see [there](other.md)).",
    ],
)
def test_a_number_stands_where_it_is_computed_sourced_or_measured(
    claim: str, tmp_path: Path
) -> None:
    (tmp_path / "other.md").write_text("```python\n>>> 412\n412\n```\n", encoding="utf-8")
    assert not left(f"{COMPUTED}\n{claim}\n", tmp_path)


@pytest.mark.parametrize(
    ("claim", "missing"),
    [
        ("It is 232.", "232"),
        ("It takes 4 ms, is 11B large and 0.4 wide.", "0.4 11 4"),
        ("**41.2**", "41.2"),
        ("## All 412 ways", "412"),
        ("From 412-413 or 414–415.", "412 413 414 415"),
        ("It is -412, −413, ~414 or 10^17, 10⁻⁷ of it.", "10^17 10⁻⁷ 412 413 414"),
        ("It takes 4 seconds, 5 minutes or 6 h.", "4 5 6"),
        ("It takes 4 KB, 5 GiB, 6K or 8 million.", "4 5 6 8"),
        ("It is 4 times, 5x or 6× as fast, 8 tokens a second.", "4 5 6 8"),
        ("It costs $4 and 5 GFLOPS.", "4 5"),
        ("It takes 64 GB and 48 hours.", "48 64"),  # two values of the released config
        ("At step 412 of Step 413.", "412 413"),
        ("![It takes 4 ms](figures/model.svg)", "4"),
        ("```sh\nsleep 5  # takes 4 ms\n```", "4"),
        ("```console\n$ sleep 5\n4 ms\n```", "4"),
        ("It is 412 ([there](other.md)).", "412"),  # where it is said, and not computed
        ("It is 412. So says [the report](https://arxiv.org/abs/2602.10604).", "412"),
        ("It is 412, as was measured on two cores.", "412"),
        ("It is 412, measured on 2026-11-30 on two cores.", "412"),
        (f"{MEASURED}.\n\nIt is 412.", "412"),
        (f"{MEASURED}.\n\nIn short:\n\n| tokens |\n|---|\n| 41.2 |", "41.2"),
        ("It took:\n\n```text\n41.2 ms\n```\n\nSo it takes 41.2 ms.", "41.2 41.2"),
        ("```math\nx = 412\n```", "412"),
        ("It is 412.[^run]\n\n[^run]: Measured once.", "412"),
    ],
)
def test_a_number_that_rests_on_nothing_is_found(claim: str, missing: str, tmp_path: Path) -> None:
    (tmp_path / "other.md").write_text("It is 412.\n", encoding="utf-8")
    assert left(f"{COMPUTED}\n{claim}\n", tmp_path) == missing.split()
