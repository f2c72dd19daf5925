"""Variants of the package: what a footgun changes, and that nothing else does."""

import sys
from pathlib import Path

import numpy as np
import pytest

import minstep
from minstep.lab.footguns import CHAIN, FOOTGUNS, Footgun, Variant, variant
from minstep.tap import Array

TINY = Path(__file__).parent / "golden" / "tiny" / "bf16"
ALL = [footgun for row in FOOTGUNS.values() for footgun in row]
TOKENS = [5, 17, 9, 200, 3, 3, 64, 8, 250, 31, 7, 90]
NORM = FOOTGUNS["norm weight"][0]


def logits(chain: Variant) -> list[Array]:
    """What a chain of modules computes from a checkpoint, MTP layers included."""
    config = chain.config.load_config(TINY)
    weights = chain.weights.assemble(config, minstep.open_checkpoint(TINY).get)
    hidden = chain.model.decoder(TOKENS, weights, config)
    heads = chain.mtp.mtp_forward(TOKENS, hidden, weights, config)
    return [chain.model.head(hidden, weights, config), *heads]


def equal(one: list[Array], other: list[Array]) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(one, other, strict=True))


@pytest.mark.parametrize("footgun", ALL, ids=lambda footgun: footgun.bug)
def test_the_line_of_each_footgun_is_there_once(footgun: Footgun) -> None:
    chain = variant(footgun)
    changed = [
        name for name in Variant._fields if getattr(chain, name) != sys.modules[f"minstep.{name}"]
    ]
    after = CHAIN[CHAIN.index(footgun.module) :]
    assert changed == [name for name in Variant._fields if name in after]


def test_no_two_footguns_change_the_same_thing_and_each_can_follow_looks_like() -> None:
    assert len({footgun[1:] for footgun in ALL}) == len(ALL)
    assert all(footgun.bug.strip() and "\n" not in footgun.bug for footgun in ALL)


@pytest.mark.parametrize(("right", "count"), [("no such line", "0"), ("weight", "[2-9]")])
def test_a_line_that_is_gone_or_stands_twice_is_reported(right: str, count: str) -> None:
    with pytest.raises(RuntimeError, match=f"stale: its line stands {count} times in norm.py"):
        variant(Footgun("stale", "norm", right, ""))


@pytest.mark.parametrize("module", CHAIN)
def test_copies_without_a_bug_compute_the_same_bits(module: str) -> None:
    docstring = sys.modules[f"minstep.{module}"].__doc__ or ""
    harmless = Footgun("none", module, docstring, docstring)
    assert equal(logits(variant(harmless)), logits(variant()))


def test_variants_live_side_by_side_and_the_real_modules_never_see_them() -> None:
    before, modules = logits(variant()), dict(sys.modules)
    one, other = variant(NORM), variant(FOOTGUNS["norm weight"][1])
    assert not equal(logits(one), before) and not equal(logits(other), before)
    assert not equal(logits(one), logits(other))
    assert equal(logits(variant()), before)
    assert {name: sys.modules[name] for name in modules} == modules


def test_every_name_that_a_bug_uses_is_there() -> None:
    # A bug that cannot run at all would never be named.
    failed = {}
    for footgun in ALL:
        try:
            logits(variant(footgun))
        except (NameError, AttributeError, TypeError, minstep.InputError) as error:
            failed[footgun.bug] = str(error)
    assert list(failed) == ["head count of full layers used everywhere"]
    assert "q_proj.weight has shape" in str(failed)
