"""House rules that a program can check: imports run one way, links lead on."""

import ast
import re
import tomllib
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from docs.make.house import imported

TOP = Path(__file__).parent.parent
PACKAGE = TOP / "minstep"
# An import may only reach a folder further left. The model's own files and fast/ are one place.
ORDER = "model store draw text train parity cost explore learn bench cli".split()
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")


def module(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


MODULES = {f"minstep.{module(path)}" for path in FILES}


def folder(name: str) -> str:
    first = name.split(".")[0] if "." in name else "model"
    return "model" if first == "fast" else first


def imports(path: Path) -> set[str]:
    """The modules of the package that a file imports, wherever in it the import stands."""
    found = imported(ast.parse(path.read_text(encoding="utf-8")), MODULES)
    return {name.removeprefix("minstep.") for name in found}


@pytest.mark.parametrize("path", FILES, ids=module)
def test_imports_only_reach_folders_on_the_left(path: Path) -> None:
    if path.name == "__main__.py":
        return
    for name in imports(path):
        assert ORDER.index(folder(name)) <= ORDER.index(folder(module(path))), name


def test_no_imports_run_in_a_circle() -> None:
    order = TopologicalSorter({module(path): imports(path) for path in FILES})
    order.prepare()  # raises CycleError, which names the circle


@pytest.mark.parametrize("path", FILES, ids=module)
def test_a_file_documents_what_is_public(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree)
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            assert ast.get_docstring(node), node.name


def test_run_time_packages_are_numpy_safetensors_and_tokenizers() -> None:
    project = tomllib.loads((TOP / "pyproject.toml").read_text())["project"]
    names = [re.split(r"[<>=]", package)[0] for package in project["dependencies"]]
    assert names == ["numpy", "safetensors", "tokenizers"]


def test_torch_is_imported_by_the_peer_of_bench_alone() -> None:
    theirs = ("torch", "transformers")
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in getattr(node, "names", []) if hasattr(alias, "name")]
            names += [getattr(node, "module", None) or ""]
            if isinstance(node, ast.Call) and "import" in ast.unparse(node.func):
                names += [ast.unparse(each).strip("'") for each in node.args]
            found = [name for name in names if name.split(".")[0] in theirs]
            assert not found or path == PACKAGE / "bench" / "torch_peer.py", (path, found)


@pytest.mark.parametrize("path", [TOP / "README.md", *sorted((TOP / "docs").rglob("*.md"))])
def test_links_in_the_prose_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf-8")):
        assert "://" in target or (path.parent / target).exists(), target


def test_every_checked_by_line_names_a_test_that_exists() -> None:
    for path in FILES:
        for name in re.findall(r"tests/[\w/]+\.py", path.read_text()):
            assert (TOP / name).exists(), f"{path.name} names {name}"


def test_the_golden_data_stays_under_twelve_megabytes() -> None:
    data = [path for path in (TOP / "tests" / "golden").rglob("*") if path.is_file()]
    assert data and sum(path.stat().st_size for path in data) < 12_000_000
