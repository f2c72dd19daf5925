"""Private copies of the package's modules with some files changed; the real ones never see them."""

import ast
import builtins
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib import import_module
from importlib.resources import files
from types import CodeType, ModuleType
from typing import Any

Find = Callable[[str], ModuleType]  # a module by its name within the package, such as train.loss


def source(name: str) -> str:
    """The text of minstep/NAME.py, `name` with dots for folders."""
    folder, _, file = f".{name}".rpartition(".")
    return files(f"minstep{folder}").joinpath(f"{file}.py").read_text(encoding="utf-8")


@cache
def _compiled(name: str) -> CodeType:
    return compile(source(name), f"minstep/{name}.py, copied", "exec")


def copies(
    changed: Mapping[str, str | ast.Module],
    chain: Sequence[str],
    places: Mapping[str, str] | None = None,
) -> Find:
    """Modules of which some are made from `changed` texts, by name; all others are the real ones.

    `chain`: those that may need a copy, in the order of their imports: from the first changed one
    on they import each other, and sets of copies can live side by side. `places`: the file that a
    changed text is from, for tracebacks.
    Checked by: tests/parity/test_known_bugs.py
    """
    made: dict[str, ModuleType] = {}

    def find(name: str, *how: Any) -> ModuleType:
        return made.get(name) or __import__(name, *how)

    first = min((chain.index(name) for name in changed), default=len(chain))
    for name in chain[first:]:
        copy = made[f"minstep.{name}"] = ModuleType(f"minstep.{name}")
        vars(copy)["__builtins__"] = vars(builtins) | {"__import__": find}
        place = (places or {}).get(name, f"minstep/{name}.py, changed")
        is_changed = name in changed
        code = compile(changed[name], place, "exec") if is_changed else _compiled(name)
        exec(code, vars(copy))
    return lambda name: made.get(f"minstep.{name}") or import_module(f"minstep.{name}")
