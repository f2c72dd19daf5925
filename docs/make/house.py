"""How large the package is: files and lines by folder, and of all that two commands import.

    python -m docs.make.house [REVISION [REVISION]]

prints that for the working tree, for a revision of git, or for two side by side. What a module
imports, late imports included, is read from its text, and so on from module to module: that is its
closure. A package's own __init__.py counts only where something is imported from it by name.
Checked by: tests/docs/test_house.py
"""

import ast
import io
import subprocess
import sys
import tarfile
from collections.abc import Collection
from pathlib import Path

TOP = Path(__file__).parents[2]
Tree = dict[str, str]  # the text of each file by its path, as in minstep/norm.py
Size = tuple[int, int]  # files and lines


def working_tree(top: Path = TOP) -> Tree:
    """The package as it lies in a folder."""
    files = [file for file in sorted((top / "minstep").rglob("*")) if file.is_file()]
    texts = [file for file in files if "__pycache__" not in file.parts]
    return {file.relative_to(top).as_posix(): file.read_text("utf-8") for file in texts}


def revision(name: str) -> Tree:
    """The package as it was in a revision. Raises CalledProcessError where git knows of none."""
    packed = subprocess.run(["git", "archive", name, "minstep"], cwd=TOP, check=True, stdout=-1)
    with tarfile.open(fileobj=io.BytesIO(packed.stdout)) as archive:
        files = {member.name: archive.extractfile(member) for member in archive}
        return {path: file.read().decode() for path, file in files.items() if file}


def imported(module: ast.Module, known: Collection[str]) -> set[str]:
    """Which of the `known` modules, by dotted name, a module imports, wherever in it."""
    found = set[str]()
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name if name in known else node.module for name in names}
    return found & {*known}


def closure(modules: dict[str, ast.Module], first: str) -> set[str]:
    """The modules, by dotted name, that come along with `first`; itself included."""
    found, ahead = set[str](), {first} & modules.keys()
    while ahead:
        found |= ahead
        ahead = set().union(*(imported(modules[name], modules) for name in ahead)) - found
    return found


def sizes(tree: Tree) -> dict[str, Size]:
    """Files and lines of each folder, of Python in all, and of the two closures without fast/."""
    paths = {path[:-3].replace("/", ".").removesuffix(".__init__"): path for path in tree}
    paths = {name: path for name, path in paths.items() if path.endswith(".py")}
    modules = {name: ast.parse(tree[path]) for name, path in paths.items()}
    checks = (
        name
        for name, module in modules.items()
        for node in module.body
        if isinstance(node, ast.FunctionDef) and node.name == "check_layers"
    )
    groups: dict[str, list[str]] = {}
    for path in tree:
        other = "" if path.endswith(".py") else ", other text"
        groups.setdefault(f"{Path(path).parent.as_posix()}/{other}", []).append(path)
    groups["all Python"] = list(paths.values())
    for title, name in (("generate", "minstep.generate"), ("check-layer", next(checks, ""))):
        every = groups[f"{title} and what it imports"] = [paths[n] for n in closure(modules, name)]
        slow = [path for path in every if not path.startswith("minstep/fast/")]
        groups[f"{title}, without fast/"] = slow
    lines = {path: len(text.splitlines()) for path, text in tree.items()}
    return {row: (len(group), sum(lines[path] for path in group)) for row, group in groups.items()}


def table(columns: dict[str, dict[str, Size]]) -> str:
    """The sizes of each tree by its title, side by side."""
    rows = [*dict.fromkeys(row for column in columns.values() for row in column)]
    rows.sort(key=lambda row: (0, row) if row.startswith("minstep/") else (1, ""))  # sums last
    lines = [f"{'':34}" + "".join(f"{title:>18.16}" for title in columns)]
    lines.append(f"{'':34}" + f"{'files':>9}{'lines':>9}" * len(columns))
    for row in rows:
        pairs = [column.get(row, (0, 0)) for column in columns.values()]
        lines.append(f"{row:34}" + "".join(f"{files:9,}{count:9,}" for files, count in pairs))
    return "\n".join(lines)


if __name__ == "__main__":
    named = {name: sizes(revision(name)) for name in sys.argv[1:]}
    print(table(named or {"working tree": sizes(working_tree())}))
