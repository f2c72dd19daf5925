"""The model with a bug planted: private copies of the package's modules with some files changed.

The real modules never see them.
Checked by: tests/parity/test_known_bugs.py
"""

import ast
import builtins
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib import import_module
from importlib.resources import files
from types import CodeType, ModuleType
from typing import Any, NamedTuple

from minstep.errors import InputError
from minstep.parity.known_bugs import Footgun

# The files that compute a layer, decode, load and read text, in the order of their imports.
CHAIN = (
    "config store.config_file norm rope cache attention mlp moe model sampling mtp generate "
    "weights store.checkpoint text.reply"
).split()
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


class Variant(NamedTuple):
    """The modules that one runs a model with: the real ones, or copies that share a bug."""

    config_file: ModuleType
    moe: ModuleType
    model: ModuleType
    mtp: ModuleType
    generate: ModuleType
    weights: ModuleType
    checkpoint: ModuleType
    reply: ModuleType


@cache
def variant(footgun: Footgun | None = None) -> Variant:
    """The package's own modules, or with a footgun private copies of those that it reaches.

    Raises InputError as `planted` does.
    """
    find = copies({footgun.module: planted(footgun)} if footgun else {}, CHAIN)
    modules = "store.config_file moe model mtp generate weights store.checkpoint text.reply".split()
    return Variant(*map(find, modules))


def planted(footgun: Footgun) -> str:
    """The text of the file of a footgun with the bug in it.

    Raises InputError unless the fragment stands in its file exactly once.
    """
    text = source(footgun.module)
    if (count := text.count(footgun.right)) != 1:
        message = f"the line that the bug '{footgun.bug}' changes stands there {count} times"
        advice = "expected once: undo the edit to plant it"
        raise InputError(f"{footgun.file}: {message}, {advice}")
    return text.replace(footgun.right, footgun.wrong)


def is_plantable(footgun: Footgun) -> bool:
    """Whether `planted` can plant it: nobody has edited its line."""
    return source(footgun.module).count(footgun.right) == 1
