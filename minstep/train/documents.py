"""Text to train on with nothing to download: Python's own documentation, or the user's files."""

import ast
import importlib
import inspect
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from minstep.errors import InputError
from minstep.store.files import read_file

MOST_TEXT = 1 << 28  # bytes of a file: 256 MB, all of which is in memory as text and tokens
SECTION = 4096  # characters of a section of a file, up to the next blank line
TESTS = ("test", "tests", "idle_test")  # folders of the standard library that explain nothing
# Extension modules that explain nothing, and two that would change the terminal or need a display.
NO_TEXT = ("_test", "_xx", "xx", "_ctypes_test", "readline", "_tkinter")
LONGEST_SIGNATURE = 100  # characters; those of generated code fill a page
BOUND = r"\$\w+(, /(?=[,)]))?(, )?"  # the argument of a function in C that its caller does not give
Entry = tuple[str, str | None]  # a heading, and the docstring as it stands in the source


class Document(NamedTuple):
    """A text that is either trained on or held out."""

    name: str  # what decides which: topic/with, module/json.decoder or file/notes.txt#3
    text: str

    @property
    def nbytes(self) -> int:
        """Bytes of the text as UTF-8."""
        return len(self.text.encode())


def python_documents() -> list[Document]:
    """The documentation inside this Python, in an order that is the same each time.

    First the language reference's topics (`help("with")`), then the docstrings of the standard
    library's modules in Python, read from source, then those of the modules in C, which have to be
    imported. A docstring that stands in several places is given where it comes first. Another
    version or build of Python has other text.
    Raises InputError when this Python has come without any.
    Checked by: tests/train/test_data.py
    """
    documents = [Document(f"topic/{name}", _tidy(text)) for name, text in sorted(_topics())]
    seen = set[str]()
    for name, entries in (*_python_modules(), *_compiled_modules()):
        texts = list[str]()
        for heading, docstring in entries:
            doc = _tidy(inspect.cleandoc(docstring or ""))
            if doc and words(doc) not in seen:
                seen.add(words(doc))
                texts += filter(None, [heading, doc])
        if texts:
            title = f"Module {name}"
            text = "\n\n".join([f"{title}\n{'*' * len(title)}", *texts])
            documents.append(Document(f"module/{name}", text))
    if not documents:
        raise InputError("this Python has no documentation inside it, expected --text FILES")
    return documents


def file_documents(files: Sequence[Path]) -> list[Document]:
    """The user's files, cut at blank lines into sections of SECTION characters and a little more.

    Where a blank line is far, a section ends at the end of a line, or anywhere. Their text is as it
    stands, but for the ends of lines. A section is named file/PATH#N, from 1.
    Raises InputError for a file that cannot be read, is empty, has more than MOST_TEXT bytes or is
    not UTF-8.
    Checked by: tests/train/test_data.py
    """
    documents = list[Document]()
    for file in files:
        content = read_file(file, MOST_TEXT)
        try:
            text = content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
        except UnicodeDecodeError as error:
            at = f"byte {error.object[error.start]:#04x} at {error.start}"
            raise InputError(f"{file}: {at} is not UTF-8, expected a text file") from error
        if not text.strip():
            raise InputError(f"{file}: is empty, expected text")
        names = (f"file/{file.as_posix()}#{n}" for n in range(1, len(text) + 1))
        documents += map(Document, names, _sections(text))
    return documents


def unquoted(text: str) -> str:
    """A topic as one would type it: no quotes around code, but in the code that is indented."""
    lines = text.split("\n")
    return "\n".join(x if x.startswith(" ") else re.sub(r'"(\S+?)"', r"\1", x) for x in lines)


def paragraphs(text: str) -> list[str]:
    """The parts of a text between its blank lines."""
    return re.split(r"\n(?:[^\S\n]*\n)+", text)


def words(text: str) -> str:
    """The text without its layout: one space between words."""
    return " ".join(text.split())


def _sections(text: str) -> Iterator[str]:
    """Cut `text` after the first blank line, end of a line, or character behind SECTION of them."""
    start = 0
    while start < len(text):
        for mark in ("\n\n", "\n", ""):
            found = text.find(mark, start + SECTION)
            end = found + len(mark) if found >= 0 else len(text)
            if end - start <= 2 * SECTION:
                break
        yield text[start:end]
        start = end


def _topics() -> Iterator[tuple[str, str]]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions leave it out
        return
    yield from topics.items()


def _python_modules() -> Iterator[tuple[str, list[Entry]]]:
    """The name of each module of the standard library that is written in Python, and its text."""
    library = Path(sysconfig.get_path("stdlib"))
    for top in sorted(sys.stdlib_module_names):  # else also what lies in site-packages
        for path in (library / f"{top}.py", *sorted((library / top).rglob("*.py"))):
            parts = path.relative_to(library).with_suffix("").parts
            if {*parts} & {*TESTS} or not path.is_file():
                continue
            try:
                with warnings.catch_warnings(action="ignore"):  # of escapes that are none
                    tree = ast.parse(path.read_bytes())
            except (OSError, SyntaxError, ValueError):  # a library may hold broken files on purpose
                continue
            name = ".".join(part for part in parts if part != "__init__")
            yield name, [("", ast.get_docstring(tree, clean=False)), *_definitions(tree, "")]


def _definitions(node: ast.AST, outer: str) -> Iterator[Entry]:
    """The classes and functions within `node`, in the order of the source."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef):
            bases = f"({', '.join(map(ast.unparse, child.bases))})" if child.bases else ""
            heading = f"class {outer}{child.name}{bases}"
        elif isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            keyword = "def" if isinstance(child, ast.FunctionDef) else "async def"
            signature = _signature(f"({ast.unparse(child.args)})")
            heading = f"{keyword} {outer}{child.name}{signature}"
        else:
            if not isinstance(child, ast.expr):  # most of a tree, and without definitions
                yield from _definitions(child, outer)
            continue
        yield heading, ast.get_docstring(child, clean=False)
        yield from _definitions(child, f"{outer}{child.name}.")


def _compiled_modules() -> Iterator[tuple[str, list[Entry]]]:
    """The name of each module of the standard library that is written in C, and its text."""
    folder = Path(sysconfig.get_path("stdlib")) / "lib-dynload"
    extensions = {path.name.split(".")[0] for path in folder.glob("*.so")}
    for name in sorted({*sys.builtin_module_names} | extensions):
        if name.startswith(NO_TEXT):
            continue
        try:
            with warnings.catch_warnings(action="ignore"):  # of modules that will be removed
                module = importlib.import_module(name)
        except Exception:  # a library that it needs may be absent
            continue
        yield name, [("", module.__doc__), *_members(module, "")]


def _members(holder: Any, outer: str) -> Iterator[Entry]:
    """What a module or class in C defines itself, by name; an alias is not a definition."""
    for name, value in sorted(vars(holder).items()):
        original = vars(holder).get(f"__{name}__")  # of a hook of sys, which may have been replaced
        if getattr(original, "__name__", None) == name:
            value = original
        if getattr(value, "__name__", None) != name:
            continue
        docstring = value.__doc__ if isinstance(value.__doc__, str) else None
        if inspect.isclass(value) and not outer:
            yield f"class {name}", docstring
            yield from _members(value, f"{name}.")
        elif inspect.isdatadescriptor(value):
            yield f"{outer}{name}", docstring
        elif inspect.isroutine(value):
            signature = getattr(value, "__text_signature__", None) or "(...)"  # many in C have none
            yield f"def {outer}{name}{_signature(re.sub(BOUND, '', signature))}", docstring


def _signature(text: str) -> str:
    return text if len(text) <= LONGEST_SIGNATURE else "(...)"


def _tidy(text: str) -> str:
    """Nothing behind the ends of lines, no blank lines around it; cleandoc has expanded tabs."""
    return "\n".join(line.rstrip() for line in text.split("\n")).strip("\n")
