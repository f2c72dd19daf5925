"""Caches: what they return, what they hold, rolling back, and the bytes of it."""

from importlib import import_module
from itertools import product

import numpy as np
import pytest

import minstep
from minstep.cache import FullCache, WindowCache, new_caches
from tests.support.tiers import cases

G, K = 2, 3
POSITION = 2 * G * K * 8  # bytes of one position's keys and values in float64


def rows(first: int, count: int, era: int = 0) -> np.ndarray:
    """Keys [T, G, K]: the position, and a fraction that says in which append it came."""
    positions = np.arange(first, first + count) + era / 1024
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
    copied, capacity = 0, 0
    for position in range(5000):
        held(cache, position, 1)
        if cache.keys.shape[1] != capacity:
            copied, capacity = copied + position, cache.keys.shape[1]
        assert cache.nbytes <= 2 * (position + 1) * POSITION
    assert copied <= 2 * 5000, "each position is copied once or twice in all"


def test_a_full_cache_with_reserved_room_copies_nothing() -> None:
    cache = FullCache(G, K, np.float64, room=100)
    keys, values = cache.keys, cache.values
    assert cache.nbytes == 100 * POSITION
    end = 0
    for count in [60, 1, 1, 4, 4, 30]:
        held(cache, end, count)
        end += count
        cache.truncate(end)
    cache.truncate(50)
    held(cache, 50, 50)
    assert cache.keys is keys and cache.values is values
    held(cache, 100, 1)
    assert cache.keys is not keys and cache.nbytes == 200 * POSITION


@pytest.mark.parametrize("slack", [0, 3])
@pytest.mark.parametrize("counts", [[1] * 40, [20, 1, 1, 7, 1], [3, 3, 3, 3, 3, 3], [50, 1]])
def test_a_window_cache_returns_at_least_what_the_window_sees(
    counts: list[int], slack: int
) -> None:
    cache = WindowCache(G, K, np.float64, window=6, slack=slack, longest=max(counts))
    first = 0
    for count in counts:
        seen = held(cache, first, count)
        assert seen[0] <= max(0, first - 5 - slack)
        first += count


@pytest.mark.parametrize(
    ("window", "slack", "longest"),
    cases([(1, 3, 1), (2, 1, 7), (8, 0, 4), (8, 3, 7)], product([1, 2, 8], [0, 1, 3], [1, 4, 7])),
)
def test_a_window_cache_never_has_more_bytes_than_the_formula(
    window: int, slack: int, longest: int
) -> None:
    cache = WindowCache(G, K, np.float64, window, slack, longest)
    rng, most = np.random.default_rng(0), (window - 1 + slack + longest) * POSITION
    end = largest = 0
    for _ in range(3000):
        count = int(rng.integers(1, longest + 1))
        held(cache, end, count)
        end += count - int(rng.integers(0, min(slack, count) + 1))
        cache.truncate(end)
        largest = max(largest, cache.nbytes)
        assert cache.nbytes <= most, f"{cache.nbytes} bytes at position {end}"
    assert end > 1000 and largest == most


def test_a_window_cache_gives_back_the_room_of_a_long_prompt() -> None:
    cache = WindowCache(G, K, np.float64, window=6, slack=3, longest=4)
    held(cache, 0, 500)
    assert cache.nbytes == 500 * POSITION
    for position in range(500, 520):
        held(cache, position, 1)
    assert cache.nbytes == (6 - 1 + 3 + 4) * POSITION


@pytest.mark.parametrize("cache", [FullCache(G, K, "f8"), WindowCache(G, K, "f8", 4, 3)])
def test_truncated_positions_are_replaced_by_what_comes_after(cache: FullCache) -> None:
    for position in range(0, 20, 4):
        held(cache, position, 4)
    cache.truncate(17)
    past = cache.append(rows(17, 1) + 100, -rows(17, 1) - 100)
    assert past.keys[0, -4:, 0].tolist() == [14, 15, 16, 117]
    assert cache.end == 18


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("kind", ["full", "window"])
def test_appends_and_roll_backs_leave_what_a_list_would_hold(kind: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    window, slack, longest = (int(rng.integers(*bounds)) for bounds in [(1, 9), (0, 5), (1, 8)])
    cache = FullCache(G, K, "f8", room=int(rng.integers(20)))
    if kind == "window":
        cache = WindowCache(G, K, "f8", window, slack, longest)
    model: list[float] = []
    begun = 0  # the furthest position where an append began
    for era in range(300):
        # Now and then a long append, as a prompt in one piece is.
        count = int(rng.integers(1, longest + 1)) if rng.random() < 0.97 else 40
        begun = max(begun, len(model))
        new = rows(len(model), count, era)
        past = cache.append(new, -new)
        model += new[:, 0, 0].tolist()
        for g in range(G):
            assert past.keys[g, :, 0].tolist() == model[past.start :], f"after append {era}"
            assert past.values[g, :, -1].tolist() == [-x for x in model[past.start :]]
        sees = max(0, len(model) - count - window + 1)
        assert past.start <= (sees if kind == "window" else 0)
        lowest = max(0, begun - slack) if kind == "window" else 0
        del model[int(rng.integers(max(lowest, len(model) - 5), len(model) + 1)) :]
        cache.truncate(len(model))
        assert cache.end == len(model)


@pytest.mark.parametrize("window", [1, 5])
def test_up_to_slack_positions_can_be_rolled_back_wherever_the_cache_was_last_moved(
    window: int,
) -> None:
    slack = 3
    for last in range(30, 45):
        cache = WindowCache(G, K, "f8", window, slack)
        for position in range(last):
            held(cache, position, 1)
        cache.truncate(last - slack)
        assert held(cache, last - slack, 1)[0] <= last - slack - window + 1


def test_truncating_to_a_dropped_position_is_refused() -> None:
    cache = WindowCache(G, K, np.float64, window=4, slack=2)
    held(cache, 0, 30)
    held(cache, 30, 1)
    with pytest.raises(ValueError, match="cannot truncate to 3: holds 25 to 31"):
        cache.truncate(3)
    with pytest.raises(ValueError, match="cannot truncate to 32"):
        cache.truncate(32)


def test_truncating_to_where_a_query_would_see_less_is_refused() -> None:
    cache = WindowCache(G, K, np.float64, window=4, slack=2)
    held(cache, 0, 30)
    held(cache, 30, 1)  # holds 25 to 31, so that a query at 28 still sees 25, 26 and 27
    with pytest.raises(ValueError, match="cannot truncate to 27: holds 25 to 31"):
        cache.truncate(27)
    cache.truncate(28)
    assert held(cache, 28, 1)[0] == 25


@pytest.mark.parametrize("M", [0, 1, 3])
@pytest.mark.parametrize("chunk", [2, 16])
def test_decoding_holds_the_bytes_that_the_arithmetic_says(
    M: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = minstep.load_config(minstep.find_config("tiny"))
    weights = minstep.random_weights(config, np.random.default_rng(0))
    prompt, made = list(range(3, 63)), []

    def remembered(*arguments: object, **named: object) -> list[FullCache]:
        made.append(new_caches(*arguments, **named))  # type: ignore[arg-type]
        return made[-1]

    for name in ("minstep.generate", "minstep.mtp"):
        monkeypatch.setattr(import_module(name), "new_caches", remembered)
    rng = np.random.default_rng(0)
    steps = minstep.steps(
        prompt, weights, config, rng, 40, chunk=chunk, num_draft_tokens=M, ignore_eos=True
    )
    assert sum(len(step.tokens) for step in steps) == 40
    main, drafting = made
    longest, rows = max(chunk, M + 1), max(chunk, M + 1, 2 * M)
    for caches, specs, most in (
        (main, config.layers, longest),
        (drafting, config.mtp_layers, rows),
    ):
        for cache, spec in zip(caches, specs, strict=False):
            positions = 60 + 40 + M  # the prompt, the new tokens and the drafts
            if spec.window is not None:
                positions = spec.window - 1 + M + most
            size = 2 * positions * spec.groups * spec.head_dim * 4
            assert cache.nbytes == size, f"{spec.name}: {cache.nbytes} bytes, expected {size}"
    assert len(main) == len(config.layers) and len(drafting) == M
