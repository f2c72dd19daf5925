"""Holds every shape stated in a source to what a run of it makes: comments, weights, docstrings.

After each statement, what it assigned or returned is looked at. A shape that nothing it read has
must be stated at its end, as `# [T, D]` or `# [T, D], [D]; why`; and what is stated, there, for a
weight or in a docstring (`x [T, D]`, `Returns [T, D]`), must hold, a letter being one size
throughout a call. Float arrays must have the dtype of the run or one that the statement
or its comment names.
"""

import ast
import re
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import cache
from itertools import product
from types import CodeType, FrameType
from typing import Any

import numpy as np

from minstep.fast.bf16 import BF16Array

SHAPE = r"\[[A-Za-z0-9.][^\]\"']*\]"
Place = tuple[str, int]  # a source's file name and line


def arrays(value: Any) -> list[Any]:
    """The arrays in a value: itself, or those in a tuple or list."""
    if isinstance(value, (tuple, list)):
        return [x for item in value for x in arrays(item)]
    return [value] if isinstance(value, (np.ndarray, BF16Array)) and value.shape else []


class Shapes:
    """What some sources (text by file name) state, which of it a run met, and what was wrong."""

    def __init__(self, sources: dict[str, str], sizes: dict[str, set[int]], dtype: str) -> None:
        self.sizes, self.dtype = sizes, dtype
        self.large = {n for choices in sizes.values() for n in choices if n > 36}
        self.met, self.wrong = set[Place](), dict[Place, str]()  # the first failure of each line
        self.stated, self.statements = dict[Place, list[str]](), dict[Place, ast.stmt]()
        self.fields, self.calls = dict[str, dict[str, Place]](), dict[FrameType, Call]()
        self.files, self.comments = set(sources), dict[Place, str]()
        for file, source in sources.items():
            for n, line in enumerate(source.splitlines(), 1):
                comment = line.partition("  # ")[2].split(";")[0]
                if said := re.findall(SHAPE, comment):
                    self.stated[file, n], self.comments[file, n] = said, comment
            for node in ast.walk(ast.parse(source)):
                if isinstance(node, (ast.Assign, ast.Return, ast.For)):
                    end = node.lineno if isinstance(node, ast.For) else node.end_lineno or 0
                    self.statements |= {(file, n): node for n in range(node.lineno, end + 1)}
                elif isinstance(node, ast.ClassDef):
                    fields = [f for f in node.body if isinstance(f, ast.AnnAssign)]
                    places = {ast.unparse(f.target): (file, f.lineno) for f in fields}
                    self.fields[node.name] = places

    def unmet(self) -> set[Place]:
        """The lines that state a shape and made nothing in the run."""
        return set(self.stated) - self.met

    def choices(self, letter: str, size: int) -> Collection[int]:
        """What a letter may stand for in a dimension of this size; T and S never for D's size."""
        free = [n for n in range(size + 4) if letter not in "TS" or n not in self.large]
        return self.sizes.get(letter, free)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Look at every call into the sources, for the length of the block."""
        before = sys.gettrace()
        sys.settrace(self._enter)
        yield
        sys.settrace(before)

    def _enter(self, frame: FrameType, *_: Any) -> Any:
        if frame.f_code.co_filename not in self.files or frame.f_code.co_name[0] == "<":
            return None
        if frame not in self.calls:  # a generator is entered more than once
            self.calls[frame] = Call(self, frame)
        return self.calls[frame].step


class Call:
    """One call, and every reading of the letters that fits all that has been stated so far."""

    def __init__(self, shapes: Shapes, frame: FrameType) -> None:
        self.shapes, self.before = shapes, variables(frame)
        self.node: ast.stmt | None = None
        self.readings: list[dict[str, int]] = [{}]
        self.rounds: dict[ast.stmt, list[dict[str, int]]] = {}  # the readings before each loop
        self.place = (frame.f_code.co_filename, frame.f_code.co_firstlineno)
        doc = str(frame.f_code.co_consts[0])
        self.returns = re.findall(rf"Returns (?:[\w^]+ )?({SHAPE})", doc)
        for names, shape in re.findall(rf"((?:\w+, |\w+ and )*\w+) ({SHAPE})", doc):
            for name in re.findall(r"\w+", names):
                self.hold(self.place, [shape], arrays(self.before.get(name)))
        for value in frame.f_locals.values():
            self.hold_fields(value)

    def step(self, frame: FrameType, event: str, value: Any) -> Any:
        """Called before each line and at the return: look at the statement that has ended."""
        node = self.shapes.statements.get((self.place[0], frame.f_lineno))
        if event == "return":
            self.hold_fields(value, integers(frame.f_locals))
        if event == "return" or node is not self.node:
            after = variables(frame)
            if self.node:
                self.look(self.node, after, value)
            self.node, self.before = node, after
        if isinstance(node, ast.For):  # a letter may stand for another size in each round
            self.readings = self.rounds.setdefault(node, self.readings)
            for inner in loops(node):
                self.rounds.pop(inner, None)
        return self.step

    def look(self, node: ast.stmt, after: dict[str, Any], value: Any) -> None:
        """Hold what a statement assigned or returned to what it states."""
        place = (self.place[0], node.end_lineno or 0)
        said = self.shapes.stated.get(place, [])
        sizes = integers(after)
        if isinstance(node, ast.Return):
            made = arrays(value)
            self.hold(self.place, self.returns, made, sizes)
        elif isinstance(node, ast.Assign):
            parts = (t for t in targets(node) if said or "[" not in t)
            made = [x for target in parts for x in arrays(eval(code(target), None, after))]
        else:
            return
        read = [x for name in names(node) for x in arrays(self.before.get(name))]
        if not said and any(x.shape not in [r.shape for r in read] for x in made):
            self.shapes.wrong.setdefault(place, f"states no shape for {made[0].shape}")
        self.hold(place, said, made, sizes)
        dtypes = {self.shapes.dtype} | {str(x.dtype) for x in read if isinstance(x, np.ndarray)}
        named = "".join(names(node)) + self.shapes.comments.get(place, "")
        for x in (x for x in made if isinstance(x, np.ndarray) and x.dtype.kind == "f"):
            if str(x.dtype) not in dtypes and str(x.dtype) not in named:
                self.shapes.wrong.setdefault(place, f"makes {x.dtype}")

    def hold_fields(self, value: Any, sizes: dict[str, int] | None = None) -> None:
        """Hold the fields of a named tuple to what its class states."""
        for field, place in self.shapes.fields.get(type(value).__name__, {}).items():
            said = self.shapes.stated.get(place, [])
            self.hold(place, said, arrays(getattr(value, field)), sizes)

    def hold(
        self, place: Place, said: list[str], made: list[Any], sizes: dict[str, int] | None = None
    ) -> None:
        """Keep the readings in which the arrays have the shapes; `sizes` are the call's own."""
        if not said or not made:
            return
        self.shapes.met.add(place)
        for shape, x in zip(said if len(said) > 1 else said * len(made), made, strict=True):
            dims, found = shape[1:-1].split(", "), x.shape
            if dims[0] == "...":
                dims, found = dims[1:], found[len(found) - len(dims) + 1 :]
            fits = self.readings if len(dims) == len(found) else []
            for dim, size in zip(dims, found, strict=False):
                fits = [r | new for r in fits for new in self.solve(dim, size, r | (sizes or {}))]
            if not fits:
                self.shapes.wrong.setdefault(place, f"states {shape}, but makes {list(x.shape)}")
            self.readings = fits or self.readings

    def solve(self, dim: str, size: int, known: dict[str, int]) -> list[dict[str, int]]:
        """What the letters not known yet stand for where `dim`, such as R*T, is `size`."""
        new = [letter for letter in re.findall(r"[A-Za-z]\w*", dim) if letter not in known]
        choices = [self.shapes.choices(letter, size) for letter in new]
        if new == [dim]:
            return [{dim: size}] * (size in choices[0])
        readings = (dict(zip(new, chosen, strict=True)) for chosen in product(*choices))
        return [reading for reading in readings if eval(code(dim), None, known | reading) == size]


@cache
def code(expression: str) -> CodeType:
    """An expression, compiled once."""
    return compile(expression, "shape", "eval")


@cache
def names(node: ast.stmt) -> set[str]:
    """The names in a statement, dotted ones whole."""
    return {ast.unparse(n) for n in ast.walk(node) if isinstance(n, (ast.Name, ast.Attribute))}


@cache
def loops(node: ast.For) -> list[ast.For]:
    """The loops inside a loop."""
    return [n for n in ast.walk(node) if isinstance(n, ast.For) and n is not node]


def integers(variables: dict[str, Any]) -> dict[str, int]:
    """Those of the variables that may be sizes."""
    return {name: value for name, value in variables.items() if type(value) is int}


@cache
def targets(node: ast.Assign) -> list[str]:
    """What a statement assigns to, as source."""
    return [ast.unparse(t) for target in node.targets for t in getattr(target, "elts", [target])]


def variables(frame: FrameType) -> dict[str, Any]:
    """A frame's variables, and the attributes of its arguments under dotted names."""
    found = dict(frame.f_locals)
    for name, value in frame.f_locals.items():
        fields = value._asdict() if hasattr(value, "_asdict") else getattr(value, "__dict__", {})
        found |= {f"{name}.{field}": inner for field, inner in fields.items()}
    return found
