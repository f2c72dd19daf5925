"""What callers hand in, checked once at the door, and numbers that are not finite.

The command line, Python's callers and the model's own files refuse the same things here, each with
an InputError that names what was found and what was expected.
Checked by: tests/model/test_validation.py
"""

import math
import reprlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from minstep.config import Config
from minstep.errors import InputError
from minstep.tap import Array

FLOATS = (np.dtype(np.float32), np.dtype(np.float64))  # what the model computes in
Limits = tuple[str, Callable[[float], bool]]  # in words, and whether a number is within them


class NotFinite(InputError):
    """A tensor holds what is no finite number; `what`: which number, and where."""

    def __init__(self, where: str, what: str, hint: str = "") -> None:
        super().__init__(f"{where} {what}, expected finite numbers{hint}")
        self.where, self.what, self.hint = where, what, hint

    def inside(self, scope: str) -> "NotFinite":
        """The same of a tensor that belongs to the module `scope`."""
        return NotFinite(f"{scope}.{self.where}", self.what, self.hint)


def is_finite(x: Array, y: Array | None = None) -> bool:
    """Whether all of x is finite, and of y of as many elements; on a tape (see train/) too.

    Takes less time than a mask of x.
    """
    y = x if y is None else y
    # A sum of products is finite only where every factor is; where it is not, it may overflow.
    if type(x) is np.ndarray and math.isfinite(np.vdot(x, y)):
        return True
    return bool(np.isfinite(x).all() and np.isfinite(y).all())


def check_finite(where: str, x: Array, beside: str = "", y: Array | None = None) -> None:
    """Raise NotFinite where x, of any shape, is not finite, or y beside it, of as many elements.

    `where` and `beside` name the two. For the places that would hide it: a sigmoid, a clamp or a
    choice makes a plain number of what is none. Everywhere else NaN and infinity go on to the
    logits, which are refused.
    """
    if not is_finite(x, y):
        found = flaw(getattr(x, "value", x))
        if not found and y is not None:
            where, found = beside, flaw(getattr(y, "value", y))
        raise NotFinite(where, found or "", ": a weight here or before it is not, or is too large")


def flaw(x: Array) -> str | None:
    """The first of x, of any shape, that is not finite, and its place, in words; None if all is."""
    if not x.size or np.isfinite([x.min(), x.max()]).all():  # unlike a mask, takes no memory
        return None
    index = tuple(int(n) for n in np.argwhere(~np.isfinite(x))[0])
    return f"is {x[index]} at {list(index)}"


def check_integer(name: str, value: Any, least: int, most: int | None = None) -> int:
    """`value` as an int, if it is a whole number from `least` to `most`; a bool is none."""
    is_whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not is_whole or value < least or (most is not None and value > most):
        expected = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise InputError(f"{name} is {_short(value)}, expected a whole number {expected}")
    return int(value)


def check_number(name: str, value: Any, limits: Limits) -> None:
    """Raise InputError unless `value` is a finite number within `limits`; a bool is none."""
    words, holds = limits
    value = value.item() if isinstance(value, np.generic) else value
    is_number = isinstance(value, (int, float))
    if isinstance(value, bool) or not (
        is_number and abs(value) <= sys.float_info.max and holds(value)
    ):
        raise InputError(f"{name} is {_short(value)}, expected a number {words}")


def check_float(dtype: DTypeLike) -> np.dtype[Any]:
    """`dtype` as NumPy has it, if it is float32 or float64."""
    try:
        found = None if dtype is None else np.dtype(dtype)  # NumPy's None is float64
    except TypeError:
        found = None
    if found is None or found not in FLOATS:
        raise InputError(f"dtype is {_short(dtype)}, expected float32 or float64")
    return found


def check_states(x: Array, width: int) -> None:
    """Raise InputError unless x is an array of hidden states: [T, width], float32 or float64."""
    shape, dtype = getattr(x, "shape", None), getattr(x, "dtype", None)
    if shape is None or dtype is None:
        found = type(x).__name__
    elif len(shape) == 2 and shape[1] == width and dtype in FLOATS:
        return
    else:
        found = f"{dtype} {list(shape)}"
    raise InputError(f"hidden states are {found}, expected float32 or float64 [T, {width}]")


def check_generator(rng: Any) -> None:
    """Raise InputError unless `rng` is one of NumPy's generators: not a seed, nor Python's own."""
    if not isinstance(rng, np.random.Generator):
        expected = "a NumPy generator, such as np.random.default_rng(0)"
        raise InputError(f"rng is {_short(rng)}, expected {expected}")


def integer_ids(tokens: Sequence[int]) -> NDArray[Any]:
    """Token ids as an array [T] of integers; T may be 0. Raises InputError for anything else."""
    try:
        ids = np.asarray(tokens)
    except (ValueError, TypeError):  # lists of several lengths
        ids = np.empty((0, 0))
    if ids.shape == (0,):
        return ids.astype(np.intp)
    is_one_row = ids.ndim == 1
    is_whole = ids.dtype.kind in "iu" or (  # an int of more than 64 bits makes an array of objects
        ids.dtype.kind == "O" and is_one_row and all(type(token) is int for token in ids)
    )
    # NumPy takes True beside integers for 1.
    if is_one_row and is_whole and not isinstance(tokens, np.ndarray):
        is_whole = not {bool, np.bool_} & set(map(type, tokens))
    if not (is_one_row and is_whole):
        raise InputError(f"tokens are {_short(tokens)}, expected a row of integer ids")
    return ids


def check_ids(ids: NDArray[Any], count: int) -> NDArray[np.intp]:
    """Ids [T] as NumPy indexes with them.

    Raises InputError for none at all, and for one that is not below `count`.
    """
    if not ids.size:
        raise InputError("there are no tokens, expected one or more integer ids")
    listed = ids.tolist()  # of one id, a few microseconds faster than NumPy's min and max
    if min(listed) < 0 or max(listed) >= count:  # NumPy would take a negative id from the end
        position = int(np.argmax((ids < 0) | (ids >= count)))
        bad = f"token id {_short(ids.item(position))} at position {position}"
        raise InputError(f"{bad} is out of range, expected 0 to {count - 1}")
    return ids.astype(np.intp, copy=False)


def check_prompt(tokens: Sequence[int], config: Config) -> list[int]:
    """The prompt as a list of ints, whatever row of integers it is.

    Raises InputError for an empty prompt, one over the context, or an id out of range.
    """
    ids = integer_ids(tokens)  # [T]
    if not ids.size:
        raise InputError("the prompt is empty, expected at least one token")
    if ids.size > config.max_positions:
        raise InputError(
            f"the prompt has {ids.size} tokens, expected at most max_position_embeddings' "
            f"{config.max_positions}"
        )
    return check_ids(ids, config.vocab_size).tolist()


def _short(value: Any) -> str:
    """The value, cut to stay short; Python refuses to write an int of thousands of digits."""
    try:
        return reprlib.repr(value.item() if isinstance(value, np.generic) else value)
    except ValueError:
        return "a number of thousands of digits"
