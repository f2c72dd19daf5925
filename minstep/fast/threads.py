"""Threads over large matrices: NumPy lets go of Python's lock while it converts or multiplies.

The library under NumPy has threads of its own, but they help only the product, not the conversion
of a stored weight before it, and a second core that reads what the first has just converted waits
for it. So the package asks for one such thread (see __init__) and shares out whole blocks here.

A process may fork between products: the child makes threads of its own. A fork while another thread
multiplies leaves the child with a lock inside that library that nobody opens: its products hang.
Checked by: tests/fast/test_threads.py
"""

import contextvars
import itertools
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import cache
from typing import Any, TypeVar

import numpy as np
from numpy.typing import DTypeLike

from minstep.tap import Array

LARGE = 1 << 20  # elements of a matrix above which a thread is worth its hand-over
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
THREADS = min(8, CORES)  # more wait for memory

Result = TypeVar("Result")
_thread = threading.local()


def each(function: Callable[..., Result], arguments: Iterable[tuple[Any, ...]]) -> Iterator[Result]:
    """The results of `function` for each tuple of arguments, in order, computed by several threads.

    Which thread computes what changes no result. A thread of the pool does not share out its own
    work again: it would wait for itself.
    """
    items = list(arguments)
    if len(items) < 2 or THREADS < 2 or getattr(_thread, "is_worker", False):
        yield from itertools.starmap(function, items)
        return
    contexts = [contextvars.copy_context() for _ in items]  # NumPy keeps its errstate there
    yield from _pool().map(lambda context, item: context.run(function, *item), contexts, items)


def scratch(shape: tuple[int, ...], dtype: DTypeLike) -> Array:
    """Memory of this thread, of any content; the next call of the same dtype gives it again.

    Fresh memory would cost more than the maths, since the system must first clear each page.
    """
    name, size = np.dtype(dtype).name, math.prod(shape)
    kept = getattr(_thread, name, None)
    if kept is None or kept.size < size:
        kept = np.empty(size, dtype)
        setattr(_thread, name, kept)
    return kept[:size].reshape(shape)


def fetch(array: Array) -> None:
    """Read an array, of any float dtype, and forget it: what uses it next finds it in the cache."""
    np.max(array.view(np.uint32))


@cache
def _pool() -> Executor:
    def start() -> None:
        _thread.is_worker = True

    return ThreadPoolExecutor(THREADS, "minstep", start)


def _begin_anew() -> None:
    """In a process that was forked: its one thread is no worker, and the pool has no threads."""
    _pool.cache_clear()
    _thread.is_worker = False


if hasattr(os, "register_at_fork"):  # not on Windows, where nothing forks
    os.register_at_fork(after_in_child=_begin_anew)
