"""How a lesson is checked: a scene runs functions of the package, the reader's and the real ones.

Both get the same small random inputs, and what they give is compared in the order in which it
comes: so the first tensor that departs is named, with its error.
Checked by: tests/learn/test_exercise.py
"""

import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from minstep.config import Config
from minstep.errors import InputError
from minstep.parity.compare import TOLERANCES, compare
from minstep.parity.trace import Recorder, Trace
from minstep.parity.variants import Find, copies
from minstep.store.config_file import read_config
from minstep.tap import Array
from minstep.validation import flaw
from minstep.weights import Get, Shape, random_rows

Rng = np.random.Generator
Shown = Iterator[tuple[str, Any]]  # what was computed, and the value
Scene = Callable[[Find, Rng, DTypeLike], Shown]
SLACK = 10  # times the tolerance of the same code: a solution may add up in another order
ROUNDED = (1e-9, 1e-5)  # between these lies what float32 makes of a float64 run


def departure(scene: Scene, find: Find) -> str | None:
    """What departs first in a scene with modules from `find`, in words; None where nothing does.

    A function that raises NotImplementedError is named by its message; other errors pass.
    """
    for dtype in (np.float64, np.float32):
        name = np.dtype(dtype).name
        real, theirs = (scene(f, np.random.default_rng(0), dtype) for f in (copies({}, ()), find))
        try:
            for (what, expected), (_, got) in zip(real, theirs, strict=True):
                if found := difference(what, expected, got, SLACK * TOLERANCES[name]):
                    return f"{found} ({name})"
        except NotImplementedError as error:
            return str(error)
    return None


def difference(what: str, expected: Any, got: Any, tolerance: float) -> str | None:
    """Where `got` is not `expected` first, in words; errors are shares of the largest value.

    Named tuples, lists and tuples are compared by their members, dicts by what both hold: a trace
    may lack tensors.
    """
    if isinstance(expected, np.ndarray):
        return _array_difference(what, expected, got, tolerance)
    if isinstance(expected, float) and isinstance(got, (float, np.floating)):
        return _array_difference(what, np.array(expected), np.array(float(got)), tolerance)
    members: list[tuple[str, Any, Any]] | None = None
    if isinstance(expected, dict) and isinstance(got, dict):
        members = [(f"{what}: {n}", expected[n], x) for n, x in got.items() if n in expected]
    elif getattr(expected, "_fields", None) and type(got).__name__ == type(expected).__name__:
        fields = zip(expected._fields, expected, got, strict=True)
        members = [(f"{what}.{field}", x, y) for field, x, y in fields]
    elif type(got) is type(expected) in (list, tuple) and len(got) == len(expected):
        pairs = enumerate(zip(expected, got, strict=True))
        members = [(f"{what}[{n}]", x, y) for n, (x, y) in pairs]
    if members is None:
        same = type(got) is not np.ndarray and bool(got == expected)
        return None if same else f"{what} is {got!r:.200}, expected {expected!r:.200}"
    return next((found for x in members if (found := difference(*x, tolerance))), None)


def _array_difference(what: str, expected: Array, got: Any, tolerance: float) -> str | None:
    if not isinstance(got, (np.ndarray, np.generic)):
        return f"{what} is {got!r:.80}, expected an array"
    got = np.asarray(got)
    if got.shape != expected.shape:
        return f"{what} has shape {list(got.shape)}, expected {list(expected.shape)}"
    if got.dtype != expected.dtype and {got.dtype.kind, expected.dtype.kind} != {"i"}:
        return f"{what} has dtype {got.dtype}, expected {expected.dtype}"
    if np.array_equal(got, expected):
        return None
    if expected.dtype.kind != "f":
        place = tuple(int(n) for n in np.argwhere(got != expected)[0])
        return f"{what} has {got[place]} at {list(place)}, expected {expected[place]}"
    if fault := flaw(got):
        return f"{what} {fault}, expected finite numbers"
    first = (c := compare("", expected, got, tolerance)).first
    if first is None:
        return None
    wrong, right = distinct(first.theirs, first.ours)
    message = f"{what} is {wrong}, expected {right}"
    if got.ndim:
        at = f"first at {list(first.place)}: {wrong}, expected {right}"
        message = f"{what} departs by {c.max_error:.1e} of its largest value, {at}"
    if expected.dtype == np.float64 and ROUNDED[0] < c.max_error < ROUNDED[1]:
        message += "; about what float32 rounds: is a weight used in the dtype it is stored in?"
    return message


def distinct(x: float, y: float) -> tuple[str, str]:
    """Two numbers that differ, with as few digits as show it, but six at least."""
    pairs = ((f"{x:.{digits}g}", f"{y:.{digits}g}") for digits in range(6, 18))
    return next(pair for pair in pairs if pair[0] != pair[1])


def watched(what: str, function: Callable[..., Any], *arguments: Any, **options: Any) -> Shown:
    """What a function that takes a tap shows it, and what it returns."""
    trace: Trace = {}
    result = function(*arguments, **options, tap=Recorder(trace))
    yield what, trace
    yield f"{what}: result", result


def refused(function: Callable[..., Any], *arguments: Any, naming: str = "") -> str:
    """Which error a call raises, and whether it names what it should; or that it raises none."""
    try:
        function(*arguments)
    except (InputError, ValueError) as error:
        return f"{type(error).__name__}{' that names ' + naming if naming in str(error) else ''}"
    return "no error"


def drawn(rng: Rng) -> Get:
    """Random weights by name, the same in whatever order they are asked for."""
    seed = int(rng.integers(1 << 32))

    def get(name: str, shape: Shape) -> Array:
        named = np.random.default_rng([seed, zlib.crc32(name.encode())])
        return random_rows(name, shape, shape[0], named)

    return get


def shipped(name: str) -> Config:
    """A configuration that is shipped."""
    return read_config(name)[1]


def floats(rng: Rng, shape: Shape, dtype: DTypeLike) -> Array:
    """Random numbers [shape]."""
    return rng.standard_normal(shape).astype(dtype)
