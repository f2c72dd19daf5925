"""Keys and values of past positions: all of them, or as many as a window can still see."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import DTypeLike

from minstep.config import LayerSpec
from minstep.errors import InputError
from minstep.tap import Array
from minstep.validation import check_integer


class Past(NamedTuple):
    """Keys and values of positions start, start + 1, ..., start + S - 1."""

    keys: Array  # [G, S, K]
    values: Array  # [G, S, K]
    start: int


class FullCache:
    """Keeps every position. Capacity doubles, so appending is not a copy of the whole each time.

    `room`: positions to reserve, where the length is known; memory that is reserved but not yet
    used costs nothing but addresses.
    """

    keep: int | None = None  # positions that must survive an append; None: all
    most: int | None = None  # positions that there is room for at most; None: no bound

    def __init__(self, groups: int, head_dim: int, dtype: DTypeLike, room: int = 0) -> None:
        self.keys = np.empty((groups, room, head_dim), dtype)  # [G, room, K]
        self.values = np.empty((groups, room, head_dim), dtype)  # [G, room, K]
        self.start = 0  # absolute position of the first slot
        self.end = 0  # absolute position after the last one held

    @property
    def nbytes(self) -> int:
        """Bytes reserved for keys and values."""
        return self.keys.nbytes + self.values.nbytes

    def append(self, k: Array, v: Array) -> Past:
        """Add k, v [T, G, K] at positions end, end + 1, ...; return all that is now visible."""
        count, used = len(k), self.end - self.start
        if used + count > self.keys.shape[1]:
            used = self._make_room(count)
        self.keys[:, used : used + count] = k.swapaxes(0, 1)  # [G, count, K]
        self.values[:, used : used + count] = v.swapaxes(0, 1)  # [G, count, K]
        self.end += count
        used += count
        return Past(self.keys[:, :used], self.values[:, :used], self.start)  # [G, used, K]

    def _make_room(self, count: int) -> int:
        """Drop what nobody will see again, grow if need be; returns how many positions are left."""
        used = self.end - self.start
        kept = used if self.keep is None else min(used, self.keep)
        room = max(kept + count, 2 * self.keys.shape[1])
        room = room if self.most is None else max(kept + count, min(room, self.most))
        self.keys = _moved(self.keys, used - kept, used, room)  # [G, room, K]
        self.values = _moved(self.values, used - kept, used, room)  # [G, room, K]
        self.start = self.end - kept
        return kept

    def truncate(self, end: int) -> None:
        """Forget positions `end` and later. Raises ValueError when they were already dropped."""
        if not self.start <= end <= self.end:
            raise ValueError(f"cannot truncate to {end}: holds {self.start} to {self.end}")
        self.end = end


class WindowCache(FullCache):
    """Keeps the last `window - 1 + slack` positions before an append, never the whole prompt.

    A query sees itself and the window - 1 positions before it; `slack` more are kept so that up to
    that many rejected drafts can be rolled back. With appends of at most `longest` positions, it
    has room for window - 1 + slack + longest, however long the text: that much is moved to the
    front once it is full, which is seldom where `longest` is much more than an append.
    """

    def __init__(
        self,
        groups: int,
        head_dim: int,
        dtype: DTypeLike,
        window: int,
        slack: int = 0,
        longest: int = 1,
    ) -> None:
        super().__init__(groups, head_dim, dtype)
        self.sees = window - 1  # positions before a query
        self.keep = self.sees + slack
        self.most = self.keep + longest

    def truncate(self, end: int) -> None:
        """Forget positions `end` and later. Raises ValueError when a query there would see less."""
        if self.start > max(0, end - self.sees):
            raise ValueError(f"cannot truncate to {end}: holds {self.start} to {self.end}")
        super().truncate(end)


def new_caches(
    specs: Sequence[LayerSpec], dtype: DTypeLike, slack: int, longest: int, room: int = 0
) -> list[FullCache]:
    """An empty cache for each layer: a window where it slides, everything where it does not.

    `slack` positions can be rolled back, appends have at most `longest` positions, and `room` in
    all are expected. Raises InputError for what are no whole numbers, and for too few of them.
    """
    for name, count, least in (("slack", slack, 0), ("longest", longest, 1), ("room", room, 0)):
        check_integer(name, count, least)
    return [
        FullCache(spec.groups, spec.head_dim, dtype, room)
        if spec.window is None
        else WindowCache(spec.groups, spec.head_dim, dtype, spec.window, slack, longest)
        for spec in specs
    ]


def check_caches(caches: Sequence[FullCache], specs: Sequence[LayerSpec], dtype: DTypeLike) -> None:
    """Raise InputError unless there is a cache for each layer, all of `dtype` and equally full.

    A cache that forgets what its layer still sees, or has other heads, is of another layer.
    """
    if len(caches) != len(specs):
        raise InputError(f"there are {len(caches)} caches, expected one for each of {len(specs)}")
    end = caches[0].end
    for cache, spec in zip(caches, specs, strict=True):
        (groups, _, width), found = cache.keys.shape, cache.keys.dtype
        if found != dtype or cache.end != end:
            message = f"holds {cache.end} positions in {found}, expected {end} in {dtype}"
            raise InputError(f"the cache of {spec.name} {message}")
        forgets = cache.keep is not None and (spec.window is None or cache.keep < spec.window - 1)
        if forgets or groups != spec.groups or width != spec.head_dim:
            raise InputError(f"the cache of {spec.name} is of another kind of layer")


def _moved(old: Array, first: int, last: int, room: int) -> Array:
    """Slots first..last of `old` [G, capacity, K] at the front of an array [G, room, K]."""
    G, capacity, K = old.shape
    new = old if room == capacity else np.empty((G, room, K), old.dtype)  # [G, room, K]
    new[:, : last - first] = old[:, first:last]  # [G, last-first, K]
    return new
