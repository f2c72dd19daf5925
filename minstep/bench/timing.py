"""Timing side by side: blocks in rounds, what a case found, and how fast memory is meanwhile.

Calls of two libraries are never mixed: threads that one of them leaves waiting spin for a while and
take a core from the other. So each side runs a block of its own calls, after a pause and a warm-up.
Checked by: tests/bench/test_bench.py
"""

import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from minstep.fast.threads import each
from minstep.tap import Array

PAUSE = 0.25  # seconds before a block: longer than idle threads of torch spin
LIMIT = "limit"  # in place of a side: the time that reading the bytes alone takes
STAT = Path("/proc/stat")  # on Linux: what the processors did, in ticks
Block = Callable[[], float]  # runs one side's calls and returns the seconds of the fastest unit
Rounds = dict[str, list[float]]  # of each side, the seconds of a unit in each round


class Row(NamedTuple):
    """One thing that was timed, ours and what it is held against."""

    case: str  # the name that --only takes
    what: str  # and for what one time stands
    ours: list[float]  # seconds, one a round
    others: Rounds  # by name

    def ratio(self, other: str) -> tuple[float, float, float]:
        """How many times as fast as `other`, from the fastest rounds; least and most of a round."""
        theirs = self.others[other]
        each_round = [b / a for a, b in zip(self.ours, theirs, strict=False)]
        return min(theirs) / min(self.ours), min(each_round), max(each_round)


class Curve(NamedTuple):
    """Times over the length of the context, as lines of one chart."""

    title: str
    lines: dict[str, list[tuple[float, float]]]  # positions, milliseconds a token


class Found(NamedTuple):
    """What a case found: its rows and curves, and in `errors` what was not the same computation."""

    rows: list[Row]
    errors: list[str] = []  # noqa: RUF012  (a default that nobody changes)
    notes: list[str] = []  # noqa: RUF012
    curves: list[Curve] = []  # noqa: RUF012


def rounds(sides: Mapping[str, Block], count: int) -> Rounds:
    """The times of each side: `count` rounds, in each of which every side runs its block."""
    times: Rounds = {name: [] for name in sides}
    for _ in range(count):
        for name, block in sides.items():
            time.sleep(PAUSE)
            times[name].append(block())
    return times


def seconds(work: Callable[[], object]) -> float:
    """How long `work` takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def fastest(work: Callable[[], object], calls: int, warm_up: int = 2) -> float:
    """The seconds of the fastest of so many calls, after some that do not count."""
    for _ in range(warm_up):
        work()
    return min(seconds(work) for _ in range(calls))


def read_rate(arrays: Iterable[Array], in_threads: bool = True) -> float:
    """Bytes a second at which arrays are read, each by one thread, and nothing else is done.

    The largest of unsigned numbers is what NumPy finds at the rate of memory.
    """
    parts = [(array.reshape(-1).view(np.uint8),) for array in arrays]
    parts = [(x.view(np.uint32) if x.nbytes % 4 == 0 else x,) for (x,) in parts]

    def read() -> None:
        for _ in each(np.max, parts) if in_threads else (np.max(x) for (x,) in parts):
            pass

    return float(sum(x.nbytes for (x,) in parts) / fastest(read, 4, warm_up=1))


def memory_rates() -> tuple[float, float]:
    """Bytes a second that one thread reads of memory, and that all threads together read."""
    parts = np.array_split(np.ones(1 << 28, np.uint8), 16)
    return read_rate(parts, in_threads=False), read_rate(parts)


def idle_share(wait: float = 0.5) -> float | None:
    """The share of all processors that does nothing for `wait` seconds; None where unknown."""
    before = _ticks()
    time.sleep(wait if before else 0)
    after = _ticks()
    if before is None or after is None or sum(after) == sum(before):
        return None
    idle = sum(after[3:5]) - sum(before[3:5])  # idle, and waiting for a disk
    return idle / (sum(after) - sum(before))


def _ticks() -> list[int] | None:
    try:
        return [int(word) for word in STAT.read_text().split("\n", 1)[0].split()[1:9]]
    except (OSError, ValueError):
        return None
