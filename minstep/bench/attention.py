"""Decoding attention of one full layer of the released sizes, over a cache of float32.

One token reads all keys and values and does little with each, so reading them alone is the limit.
Checked by: tests/bench/test_layers.py, tests/bench/test_peer.py
"""

from typing import NamedTuple

import numpy as np

from minstep.attention import attend
from minstep.bench.peer import Setup
from minstep.bench.timing import LIMIT, Block, Curve, Found, Row, fastest, read_rate, rounds
from minstep.cache import Past
from minstep.tap import Array

PLACES = (4096, 32768, 262144)  # positions before the token, its own with them
PERIOD = 4096  # positions drawn; more are these again
WAYS = ("sdpa", "matmul")  # of torch: its own attention, and two products by hand
TOLERANCE = 1e-4  # of the largest output


class Sizes(NamedTuple):
    """Query heads, key-value heads and their width: those of a full layer as released."""

    heads: int = 64
    groups: int = 8
    width: int = 128


FULL_LAYER = Sizes()


def attention_layer(
    setup: Setup, places: tuple[int, ...] = PLACES, sizes: Sizes = FULL_LAYER
) -> Found:
    """One token after so many positions, against torch and the limit; and a curve over positions.

    The quick form leaves out the longest place, where each side holds 2.1 GB.
    """
    places = places[:-1] if setup.quick and len(places) > 1 else places
    q, whole = filled(max(places), sizes, setup.seed)
    errors, rows = list[str](), list[Row]()
    if setup.peer:
        shape = [sizes.groups, max(places), sizes.width]
        asked = {"query": [sizes.heads, sizes.width], "keys": shape, "seed": setup.seed}
        setup.peer.ask("attention", **asked)
    for place in places:
        past = cut(whole, place)
        calls = max(2, min(20, PLACES[1] * 5 // place))
        blocks = {"ours": _ours(q, past, calls)}
        if setup.peer:
            for way in WAYS:
                blocks[f"torch {way}"] = _theirs(setup, q, past, way, calls, errors)
        blocks[LIMIT] = _limit(past)
        times = rounds(blocks, setup.rounds)
        rows.append(Row("attention", f"{place:,} positions", times.pop("ours"), times))
    if setup.peer:
        setup.peer.ask("drop")
    return Found(rows, sorted(set(errors)), curves=[_curve(q, whole, places, rows)])


def filled(positions: int, sizes: Sizes, seed: int) -> tuple[Array, Past]:
    """A query [1, H, K], and keys and values [G, positions, K] float32, as the peer makes them."""
    rng, (H, G, K) = np.random.default_rng(seed), sizes
    drawn = [rng.standard_normal((G, min(positions, PERIOD), K), np.float32) for _ in range(2)]
    keys, values = (np.tile(x, (1, -(-positions // PERIOD), 1)) for x in drawn)
    return rng.standard_normal((1, H, K), np.float32), cut(Past(keys, values, 0), positions)


def cut(past: Past, positions: int) -> Past:
    """The first so many positions, as a cache with room for more hands them out."""
    return Past(past.keys[:, :positions], past.values[:, :positions], 0)


def _ours(q: Array, past: Past, calls: int) -> Block:
    last = past.keys.shape[1] - 1
    return lambda: fastest(lambda: attend(q, past, last, None), calls, warm_up=1)


def _limit(past: Past) -> Block:
    nbytes = past.keys.nbytes + past.values.nbytes
    heads = [head for x in past[:2] for head in x]  # each lies in one piece
    parts = [part for head in heads for part in np.array_split(head, max(1, len(head) // PERIOD))]
    return lambda: nbytes / read_rate(parts)


def _theirs(setup: Setup, q: Array, past: Past, way: str, calls: int, errors: list[str]) -> Block:
    positions = past.keys.shape[1]
    ours = attend(q, past, positions - 1, None)[0, 0]  # [K]

    def block() -> float:
        assert setup.peer
        answer = setup.peer.ask("attend", way=way, positions=positions, calls=calls)
        off = np.abs(ours - answer["row"]).max() / np.abs(ours).max()
        if not off <= TOLERANCE:
            errors.append(f"attention, {positions:,} positions: {way} is off by {off:.1e}")
        return float(answer["seconds"])

    return block


def _curve(q: Array, whole: Past, places: tuple[int, ...], rows: list[Row]) -> Curve:
    """What a token costs at each doubling, what torch's does, and what the bytes say.

    Bytes grow with the positions: the line is the limit of the last row, which has most of them.
    """
    most, ours = whole.keys.shape[1], list[tuple[float, float]]()
    place = most
    while place >= 64 and len(ours) < 8:
        calls = max(2, min(20, PLACES[1] * 5 // place))
        ours.insert(0, (place, _ours(q, cut(whole, place), calls)() * 1e3))
        place //= 2
    limit = min(rows[-1].others[LIMIT]) * 1e3
    lines = {"ours": ours, LIMIT: [(place, limit * place / most) for place, _ in ours]}
    for name in (name for name in rows[0].others if name != LIMIT):
        times = (min(row.others[name]) * 1e3 for row in rows)
        lines[name] = list(zip(places, times, strict=True))
    title = "Attention of one full layer: milliseconds a token"
    return Curve(title, lines)
