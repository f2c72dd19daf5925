"""Variants of the package: what a footgun changes, and that nothing else does."""

import sys
from pathlib import Path

import numpy as np
import pytest

import minstep
from minstep.parity.check_layer import check_layer
from minstep.parity.diagnosis import check_layers, explain, looks_like
from minstep.parity.engine_tensors import Recording
from minstep.parity.known_bugs import FOOTGUNS, Footgun
from minstep.parity.trace import Recorder, Trace
from minstep.parity.variants import CHAIN, Variant, is_plantable, variant
from minstep.tap import Array, Tap

TINY = Path(__file__).parents[1] / "golden" / "tiny" / "bf16"
ALL = [footgun for row in FOOTGUNS.values() for footgun in row]
TOKENS = [5, 17, 9, 200, 3, 3, 64, 8, 250, 31, 7, 90]
NORM = FOOTGUNS["norm weight"][0]


def logits(chain: Variant) -> list[Array]:
    """What a chain of modules computes from a checkpoint, MTP layers included."""
    config = chain.config_file.load_config(TINY)
    weights = chain.weights.assemble(config, minstep.open_checkpoint(TINY).get)
    hidden = chain.model.decoder(TOKENS, weights, config)
    heads = chain.mtp.mtp_forward(TOKENS, hidden, weights, config)
    return [chain.model.head(hidden, weights, config), *heads]


def bugs(words: str) -> list[Footgun]:
    return [footgun for footgun in ALL if footgun.bug == words]


def traced(footgun: Footgun) -> Trace:
    """What a port with a bug computes of the main model, probs included."""
    chain, trace = variant(footgun), Trace()
    config = chain.config_file.load_config(TINY)
    weights = chain.weights.assemble(config, minstep.open_checkpoint(TINY).get)
    chain.model.decoder(TOKENS, weights, config, tap=Recorder(trace))
    return trace


def equal(one: list[Array], other: list[Array]) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(one, other, strict=True))


@pytest.mark.parametrize("footgun", ALL, ids=lambda footgun: footgun.bug)
def test_the_line_of_each_footgun_is_there_once(footgun: Footgun) -> None:
    chain = variant(footgun)
    changed = [module.__name__ for module in chain if module != sys.modules[module.__name__]]
    after = [f"minstep.{name}" for name in CHAIN[CHAIN.index(footgun.module) :]]
    assert changed == [module.__name__ for module in chain if module.__name__ in after]


def test_no_two_footguns_change_the_same_thing_and_each_can_follow_looks_like() -> None:
    assert len({footgun[1:] for footgun in ALL}) == len(ALL)
    assert all(footgun.bug.strip() and "\n" not in footgun.bug for footgun in ALL)


@pytest.mark.parametrize(("right", "count"), [("no such line", "0"), ("weight", "[2-9]")])
def test_a_line_that_is_gone_or_stands_twice_is_reported(right: str, count: str) -> None:
    stale = Footgun("stale", "norm", right, "")
    said = f"the line that the bug 'stale' changes stands there {count} times, expected once"
    with pytest.raises(minstep.InputError, match=f"^minstep/norm.py: {said}: undo the edit"):
        variant(stale)
    assert not is_plantable(stale)


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


# What bugs compute, where that is easily got wrong


def test_a_norm_that_subtracts_the_mean_is_a_layer_norm() -> None:
    (bug,) = bugs("norm subtracts the mean")
    trace, checkpoint = traced(bug), minstep.open_checkpoint(TINY)
    x = trace["model.embed_tokens"].astype(np.float64)  # [T, D]
    weight = np.asarray(checkpoint.get("model.layers.0.input_layernorm.weight", (64,)), np.float64)
    centred = x - x.mean(axis=-1, keepdims=True)
    expected = centred / np.sqrt(x.var(axis=-1, keepdims=True) + checkpoint.config.rms_norm_eps)
    normed = trace["model.layers.0.input_layernorm"]
    np.testing.assert_allclose(normed, expected * (1 + weight), rtol=1e-4, atol=1e-5)


def test_probs_of_heads_in_stripes_are_in_the_order_of_the_queries() -> None:
    (bug,) = bugs("key-value heads repeated in stripes")
    trace = traced(bug)
    q, k, probs = (trace[f"model.layers.0.self_attn.{x}"] for x in ("q_rope", "k_rope", "probs"))
    (T, H, K), G = q.shape, k.shape[1]
    assert (H, G) == (4, 2)
    for head in range(H):
        scores = q[:, head] @ k[:, head % G].T * K**-0.5  # [T, T]
        weights = np.exp(scores) * np.tri(T)
        expected = weights / weights.sum(axis=-1, keepdims=True)
        np.testing.assert_allclose(probs[head], expected, rtol=1e-4, atol=1e-6)


def test_norms_after_the_rotation_take_what_a_port_rotated_from_its_projection() -> None:
    usual, second = (traced(bug) for bug in bugs("QK-norm after the rotation"))
    at = "model.layers.0.self_attn"
    assert np.array_equal(usual[f"{at}.q_rope"], usual[f"{at}.q_norm"])
    raw = second[f"{at}.q_proj"].reshape(second[f"{at}.q_rope"].shape)
    np.testing.assert_array_equal(second[f"{at}.q_rope"][0], raw[0])  # position 0 does not turn
    for part in ("q_norm", "k_norm", "o_proj"):
        np.testing.assert_allclose(second[f"{at}.{part}"], usual[f"{at}.{part}"], atol=1e-5)


class WantsProbs(Tap):
    """So that all scores are held at once."""

    def wants(self, name: str) -> bool:
        return True

    def at(self, scope: str) -> Tap:
        return self


OF_ATTENTION = ("next token visible", "causal mask missing", "scores scaled by 1/K")
OF_ATTENTION += ("window one too long", "key-value heads repeated in stripes")


@pytest.mark.parametrize("words", OF_ATTENTION)
def test_bugs_of_attention_are_the_same_in_long_prompts(words: str) -> None:
    (bug,) = bugs(words)
    chain, checkpoint = variant(bug), minstep.open_checkpoint(TINY)
    spec, D = checkpoint.config.layers[1], checkpoint.config.hidden_size  # with a window
    layer = chain.weights.block_weights(spec, D, checkpoint.get)
    x = np.random.default_rng(0).standard_normal((440, D)).astype(np.float32)
    assert spec.heads * len(x) ** 2 > minstep.attention.LARGE
    whole, silent = (
        chain.model.run_layers(x, (layer,), (spec,), 0, 1e-5, tap=tap)
        for tap in (WantsProbs(), Tap())
    )
    np.testing.assert_allclose(whole, silent, atol=1e-4)


# What is said of them


def test_a_bug_that_is_there_in_several_ways_is_told_once() -> None:
    (bug, _), checkpoint = (
        bugs("scaling factor of the experts forgotten"),
        minstep.open_checkpoint(TINY),
    )
    trace = traced(bug)
    some = {name: trace[name] for name in ("model.layers.2", "model.layers.3")}
    some["model.layers.3"] = some["model.layers.3"] * np.float32(1 + 1e-6)  # as rounding does
    theirs = Recording("port", some, TOKENS)
    checked = check_layer(checkpoint, 3, theirs)
    trials = explain(checkpoint, theirs, checked)
    assert {trial.footgun.module for trial in trials} == {"model", "moe"}
    (line,) = looks_like(checked, trials)
    assert line.startswith("looks like: scaling factor of the experts forgotten (minstep/")


@pytest.mark.parametrize("part", ["share_expert", "self_attn.v_proj"])
def test_a_known_bug_is_found_in_layers_of_a_kind_that_no_bug_explained(part: str) -> None:
    """Layer 2 departs in something else too: after the bug, or before it."""
    (bug,) = bugs("window one too long")
    trace, checkpoint = traced(bug), minstep.open_checkpoint(TINY)
    name = f"model.layers.2.{part}"
    kept = {key: x for key, x in trace.items() if not key.endswith((".probs", ".margin"))}
    theirs = Recording("port", kept | {name: 2 * kept[name]}, TOKENS)
    said = check_layers(checkpoint, theirs, [2, 3, 5]).explained
    assert said[2] != said[3]
    assert said[3] == said[5] == ["looks like: window one too long (minstep/attention.py)"]
