"""Keys and values of past positions: all of them, or as many as a window can still see."""

from typing import NamedTuple

import numpy as np
from numpy.typing import DTypeLike

from minstep.config import LayerSpec
from minstep.tap import Array


class Past(NamedTuple):
    """Keys and values [G, S, K] of positions start, start + 1, ..., start + S - 1."""

    keys: Array
    values: Array
    start: int


class FullCache:
    """Keeps every position. Capacity doubles, so appending is not a copy of the whole each time."""

    keep: int | None = None  # positions that must survive an append; None: all

    def __init__(self, groups: int, head_dim: int, dtype: DTypeLike) -> None:
        self.keys = np.empty((groups, 0, head_dim), dtype)  # [G, capacity, K]
        self.values = np.empty((groups, 0, head_dim), dtype)  # [G, capacity, K]
        self.start = 0  # absolute position of the first slot
        self.end = 0  # absolute position after the last one held

    def append(self, k: Array, v: Array) -> Past:
        """Add k, v [T, G, K] at positions end, end + 1, ...; return all that is now visible."""
        count = len(k)
        used = self.end - self.start
        if used + count > self.keys.shape[1]:
            kept = used if self.keep is None else min(used, self.keep)
            room = kept + max(count, kept if self.keep is None else self.keep)
            self.keys = _moved(self.keys, used - kept, used, room)  # [G, room, K]
            self.values = _moved(self.values, used - kept, used, room)  # [G, room, K]
            self.start, used = self.end - kept, kept
        self.keys[:, used : used + count] = k.swapaxes(0, 1)  # [G, T, K]
        self.values[:, used : used + count] = v.swapaxes(0, 1)  # [G, T, K]
        self.end += count
        used += count
        return Past(self.keys[:, :used], self.values[:, :used], self.start)  # [G, used, K]

    def truncate(self, end: int) -> None:
        """Forget positions `end` and later. Raises ValueError when they were already dropped."""
        if not self.start <= end <= self.end:
            raise ValueError(f"cannot truncate to {end}: holds {self.start} to {self.end}")
        self.end = end


class WindowCache(FullCache):
    """Keeps the last `window - 1 + slack` positions before an append, never the whole prompt.

    A query sees itself and the window - 1 positions before it; `slack` more are kept so that up
    to that many rejected drafts can be rolled back. Memory is at most
    2 (window - 1 + slack) + T positions, T being the longest append.
    """

    def __init__(
        self, groups: int, head_dim: int, dtype: DTypeLike, window: int, slack: int = 0
    ) -> None:
        super().__init__(groups, head_dim, dtype)
        self.keep = window - 1 + slack


def new_caches(specs: tuple[LayerSpec, ...], dtype: DTypeLike, slack: int) -> list[FullCache]:
    """An empty cache for each layer: a window where it slides, everything where it does not."""
    return [
        FullCache(spec.groups, spec.head_dim, dtype)
        if spec.window is None
        else WindowCache(spec.groups, spec.head_dim, dtype, spec.window, slack)
        for spec in specs
    ]


def _moved(old: Array, first: int, last: int, room: int) -> Array:
    """Slots first..last of `old` [G, capacity, K] at the front of a new array [G, room, K]."""
    new = np.empty((old.shape[0], room, old.shape[2]), old.dtype)  # [G, room, K]
    new[:, : last - first] = old[:, first:last]  # [G, last-first, K]
    return new
