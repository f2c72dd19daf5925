"""House rules that a program can check: imports run one way, links lead on."""

import ast
import re
import tomllib
from pathlib import Path

import pytest

TOP = Path(__file__).parent.parent
PACKAGE = TOP / "minstep"
# The floor: an import may only reach a file further up this list. The lab looks at
# the model and at training from outside, the book at all of them.
ORDER = (
    "files keys quantization native config configs tap validation header parallel pages linear "
    "activations norm rope bf16 fp8 cache attention mlp moe model weights sampling mtp generate "
    "save checkpoint toolcalls reply chat patterns tokenizer_file tokenizer continuation terminal "
    "conversation draw.svg "
    "draw.axes draw.page draw.charts lab.names lab.inspect lab.trace lab.shards lab.forms "
    "lab.recording lab.facts lab.parts lab.choice lab.decided lab.steps lab.record lab.compare "
    "lab.router lab.pairs lab.copies lab.footguns lab.rerun lab.layer lab.explain lab.diff "
    "lab.checks train.gradients train.tape train.loss train.schedule train.muon "
    "train.optim train.balance train.documents train.data train.bpe train.evaluate train.workers "
    "train.log train.saved train.trainer train.run lab.baselines arguments train.flags commands "
    "lab.commands lab.acceptance lab.loads lab.bits lab.labs lab.flags lab.lens lab.view lab.walk "
    "bench.timing bench.layer bench.peers bench.targets bench.decoding bench.drafts bench.layers "
    "bench.attention bench.reading bench.training bench.report bench.peer "
    "bench.commands bench.flags "
    "cost.count cost.hardware cost.roofline cost.models cost.serving cost.prices cost.report "
    "cost.chart cost.text cost.flags "
    "book.figures book.masks book.curves book.routes book.timeline book.exhibits "
    "book.exhibits_layer book.exhibits_decoding book.scenes book.lessons_layers "
    "book.lessons_around book.lessons_beyond book.lessons book.departures book.gallery "
    "book.damage book.offstage book.museum book.footgun book.museum_page book.exercise cli "
    "__main__"
).split()
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")


def module(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


@pytest.mark.parametrize("path", FILES, ids=module)
def test_imports_only_reach_back(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("minstep."):
            imported = (node.module or "").removeprefix("minstep.")
            assert ORDER.index(imported) < ORDER.index(module(path)), imported


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
            assert not found or path == PACKAGE / "bench" / "peer.py", (path, found)


@pytest.mark.parametrize("path", [TOP / "README.md", *sorted((TOP / "docs").rglob("*.md"))])
def test_links_in_the_prose_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf-8")):
        assert "://" in target or (path.parent / target).exists(), target


def test_every_checked_by_line_names_a_test_that_exists() -> None:
    for path in FILES:
        for name in re.findall(r"tests/\w+\.py", path.read_text()):
            assert (TOP / name).exists(), f"{path.name} names {name}"


def test_the_golden_data_stays_under_twelve_megabytes() -> None:
    data = [path for path in (TOP / "tests" / "golden").rglob("*") if path.is_file()]
    assert data and sum(path.stat().st_size for path in data) < 12_000_000
