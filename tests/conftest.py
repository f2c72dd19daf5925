"""What several tests share: the command line as a function, and a checkpoint to spoil."""

import gc
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from minstep.cli.main import main
from minstep.store.output import atomic_file
from minstep.train.documents import Document, python_documents

GOLDEN = Path(__file__).parent / "golden"


class Ran(NamedTuple):
    """What one command left: exit code, standard output and standard error."""

    code: int
    out: str
    err: str

    @property
    def only_wrote(self) -> bool:
        """Whether it went well, and all it told is which file it wrote."""
        told = re.fullmatch(r"wrote .+ \([\d.,]+ \w+\)(: open it in a browser)?\n", self.err)
        return self.code == 0 and self.out == "" and told is not None


Run = Callable[..., Ran]
Refused = Callable[..., str]


@pytest.fixture(scope="session")
def documents(tmp_path_factory: pytest.TempPathFactory) -> list[Document]:
    """The documentation inside Python: it takes seconds to read, and workers share it."""
    folder = tmp_path_factory.getbasetemp()
    file = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "documents"
    if not file.exists():
        with atomic_file(file) as temporary:
            temporary.write_bytes(pickle.dumps(python_documents()))
    found: list[Document] = pickle.loads(file.read_bytes())
    return found


@pytest.fixture
def read_once(documents: list[Document], monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands take the documentation that has been read already."""
    monkeypatch.setattr("minstep.train.data.python_documents", lambda: documents)


@pytest.fixture
def little_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of Python's documentation, which takes seconds to read."""
    text = "The quick brown fox jumps over the lazy dog, and the dog does not mind at all.\n" * 12
    names = [f"{kind}/{n}" for kind in ("topic", "module") for n in range(70)]
    few = [Document(name, f"{name}: {text}") for name in names]
    monkeypatch.setattr("minstep.train.data.python_documents", lambda: few)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """`minstep ARGUMENTS` in this process; bench does not look at the machine, which takes long."""
    monkeypatch.setattr("minstep.cli.bench.idle_share", lambda: 1.0)
    monkeypatch.setattr("minstep.cli.bench.memory_rates", lambda: (1e10, 2e10))

    def runs(*arguments: object) -> Ran:
        capsys.readouterr()
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as exit:
            code = int(exit.code or 0)
        return Ran(code, *capsys.readouterr())

    return runs


@pytest.fixture
def refused(run: Run) -> Refused:
    """Run a command that must be refused: exit code 2, nothing on stdout, one line on stderr."""

    def runs(*arguments: object, naming: tuple[str, ...]) -> str:
        ran = run(*arguments)
        assert ran.code == 2, ran
        assert ran.out == ""
        assert ran.err.count("\n") == 1 and ran.err.startswith("minstep"), ran.err
        for word in naming:
            assert word in ran.err, ran.err
        return ran.err

    return runs


@pytest.fixture
def single(tmp_path: Path) -> Path:
    """A copy of a one-file checkpoint."""
    return shutil.copytree(GOLDEN / "odd" / "fp32", tmp_path / "single")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A copy of a two-shard bfloat16 checkpoint, one shard's name without "-of-"."""
    return shutil.copytree(GOLDEN / "odd" / "bf16", tmp_path / "sharded")


def pytest_collection_finish() -> None:
    """Thousands of tests stay until the end: the garbage collector need not look at them again."""
    gc.collect()
    gc.freeze()
