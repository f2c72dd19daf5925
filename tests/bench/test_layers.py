"""bench's layers of the released sizes, here on small ones: what is read and what it must equal."""

from pathlib import Path

import numpy as np
import pytest

from minstep import open_checkpoint
from minstep.attention import attend
from minstep.bench import timing
from minstep.bench.attention import Sizes, attention_layer, cut, filled
from minstep.bench.moe import layer_file, layer_half, moe_layer, tokens_drawn
from minstep.bench.peer import Setup
from minstep.bench.reading import _parts, reading
from minstep.bench.timing import LIMIT
from minstep.linear import as_float
from minstep.moe import route
from minstep.store.config_file import read_config

TINY, LAYER = read_config("tiny")[0], 3
SMALL = Sizes(heads=8, groups=2, width=16)


@pytest.fixture
def setup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Setup:
    monkeypatch.setattr(timing, "PAUSE", 0.0)
    return Setup(tmp_path, None, rounds=2, quick=False, seed=0)


def test_experts_that_are_not_drawn_repeat_those_that_are(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minstep.bench.moe.DRAWN", 6)
    folder = layer_file(setup.folder / "moe", TINY, LAYER, seed=0)
    moe = layer_half(open_checkpoint(folder), LAYER, 16).weights.moe
    assert moe
    for stack in moe[2:]:
        x = as_float(stack, np.float32)
        assert np.array_equal(x[:6], x[6:12]) and np.array_equal(x[:4], x[12:])
        assert not np.array_equal(x[0], x[1])
    assert layer_file(folder, TINY, LAYER, seed=1) == folder  # is there: not made again


def test_experts_beyond_those_written_are_a_hole_and_never_chosen(setup: Setup) -> None:
    folder = layer_file(setup.folder / "moe", TINY, LAYER, seed=0, most=5)
    half = layer_half(open_checkpoint(folder), LAYER, 5)
    assert half.weights.moe and half.spec.moe
    for stack in half.weights.moe[2:]:
        assert as_float(stack, np.float32)[4].any() and not as_float(stack, np.float32)[5:].any()
    chosen = route(tokens_drawn(0, 200, 64), half.weights.moe, half.spec.moe).ids
    assert chosen.max() == 4


def test_the_moe_layer_is_held_against_reading_alone(setup: Setup) -> None:
    found = moe_layer(setup, TINY, LAYER)
    one, many = found.rows
    assert list(one.others) == [LIMIT] and many.others == {} and found.errors == []
    assert many.what == "512 tokens, 16 experts"
    assert min(one.ours + many.ours + one.others[LIMIT]) > 0


def test_attention_is_timed_at_each_place_over_one_cache(setup: Setup) -> None:
    found = attention_layer(setup, (100, 5000), SMALL)
    assert [row.what for row in found.rows] == ["100 positions", "5,000 positions"]
    (curve,) = found.curves
    places = [place for place, _ in curve.lines["ours"]]
    assert places == [78, 156, 312, 625, 1250, 2500, 5000]
    limit = dict(curve.lines[LIMIT])  # grows as the bytes do
    assert limit[2500] == pytest.approx(limit[5000] / 2)
    quick = attention_layer(setup._replace(quick=True), (100, 5000), SMALL)
    assert len(quick.rows) == 1


def test_a_filled_cache_repeats_what_was_drawn() -> None:
    q, past = filled(5000, SMALL, seed=3)
    assert past.keys.shape == (2, 5000, 16) and np.array_equal(
        past.keys[:, :904], past.keys[:, 4096:]
    )
    exact = [cut(past, n) for n in (4096, 100)]
    for part in exact:
        n = part.keys.shape[1]
        scores = np.einsum("grk,gsk->grs", q.reshape(2, 4, 16), part.keys) / 4
        probs = np.exp(scores - scores.max(-1, keepdims=True))
        probs /= probs.sum(-1, keepdims=True)
        mixed = np.einsum("grs,gsk->grk", probs, part.values).reshape(1, 8, 16)
        assert np.allclose(attend(q, part, n - 1, None), mixed, atol=1e-5)


def test_the_plain_side_reads_just_the_bytes_of_the_chosen_experts(setup: Setup) -> None:
    folder = layer_file(setup.folder / "moe", TINY, LAYER, seed=0)
    checkpoint = open_checkpoint(folder)
    half = layer_half(checkpoint, LAYER, 16)
    assert half.weights.moe and half.spec.moe
    x = tokens_drawn(0, 1, 64)
    (ids,) = route(x, half.weights.moe, half.spec.moe).ids
    parts = list(_parts(checkpoint, half, x))
    assert len(parts) == 3 * len(ids) + 3
    file, start, nbytes = parts[0]
    bits = half.matrices()[0][ids[0]].bits
    assert file.read_bytes()[start : start + nbytes] == bits.tobytes()
    assert sum(part[2] for part in parts) == 2 * 3 * 64 * (4 * 24 + 32)


def test_opening_and_cold_reads_are_held_against_plain_reads(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = reading(setup, TINY, LAYER, shards=4)
    opened, cold = found.rows
    assert opened.what == "open 180 tensors" and cold.what.startswith("cold")
    assert list(opened.others) == list(cold.others) == ["plain reads"]
    monkeypatch.setattr("minstep.bench.moe.DONTNEED", None)  # as where nothing is forgotten
    again = reading(setup._replace(folder=setup.folder / "moe"), TINY, LAYER, shards=4)
    assert len(again.rows) == 1 and "nothing cold" in again.notes[-1]
