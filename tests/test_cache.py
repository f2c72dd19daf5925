"""Caches: what they return, what they hold, and rolling back."""

import numpy as np
import pytest

from minstep.cache import FullCache, WindowCache

G, K = 2, 3


def rows(first: int, count: int) -> np.ndarray:
    """Keys [T, G, K] whose every number is the position."""
    positions = np.arange(first, first + count, dtype=np.float64)
    return np.broadcast_to(positions[:, None, None], (count, G, K))


def held(cache: FullCache, first: int, count: int) -> list[float]:
    past = cache.append(rows(first, count), -rows(first, count))
    assert np.array_equal(past.keys, -past.values)
    assert past.keys[0, :, 0].tolist() == list(range(past.start, first + count))
    return past.keys[1, :, 2].tolist()


def test_a_full_cache_returns_every_position_in_order() -> None:
    cache = FullCache(G, K, np.float64)
    for first, count in [(0, 5), (5, 1), (6, 1), (7, 9), (16, 1)]:
        assert held(cache, first, count) == list(range(first + count))


def test_a_full_cache_copies_the_whole_only_when_it_doubles() -> None:
    cache = FullCache(G, K, np.float64)
    buffers = set()
    for position in range(1000):
        held(cache, position, 1)
        buffers.add(cache.keys.shape[1])
    assert len(buffers) <= 11


@pytest.mark.parametrize("slack", [0, 3])
@pytest.mark.parametrize("counts", [[1] * 40, [20, 1, 1, 7, 1], [3, 3, 3, 3, 3, 3], [50, 1]])
def test_a_window_cache_returns_at_least_what_the_window_sees(
    counts: list[int], slack: int
) -> None:
    cache = WindowCache(G, K, np.float64, window=6, slack=slack)
    first = 0
    for count in counts:
        seen = held(cache, first, count)
        assert seen[0] <= max(0, first - 5 - slack)
        first += count
    kept = 6 - 1 + slack
    assert cache.keys.shape[1] <= kept + max(kept, max(counts))


def test_a_window_cache_gives_back_the_room_of_a_long_prompt() -> None:
    cache = WindowCache(G, K, np.float64, window=6, slack=3)
    held(cache, 0, 500)
    for position in range(500, 520):
        held(cache, position, 1)
    assert cache.keys.shape[1] <= 2 * (6 - 1 + 3)


@pytest.mark.parametrize("cache", [FullCache(G, K, "f8"), WindowCache(G, K, "f8", 4, 3)])
def test_truncated_positions_are_replaced_by_what_comes_after(cache: FullCache) -> None:
    for position in range(0, 20, 4):
        held(cache, position, 4)
    cache.truncate(17)
    past = cache.append(rows(17, 1) + 100, -rows(17, 1) - 100)
    assert past.keys[0, -4:, 0].tolist() == [14, 15, 16, 117]
    assert cache.end == 18


def test_truncating_to_a_dropped_position_is_refused() -> None:
    cache = WindowCache(G, K, np.float64, window=4, slack=2)
    held(cache, 0, 30)
    held(cache, 30, 1)
    with pytest.raises(ValueError, match="cannot truncate to 3"):
        cache.truncate(3)
