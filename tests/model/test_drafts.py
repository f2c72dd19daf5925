"""Drafts change how fast the text comes, never which text: by sums, by chance, and by stopping."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from typing import Any

import numpy as np
import pytest

import minstep
from minstep import mtp, sampling
from minstep.config import Config, parse_config
from minstep.generate import Step
from minstep.model import BlockWeights, ModelWeights
from minstep.sampling import GREEDY, Sampling, acceptance, distribution
from minstep.store.random_checkpoint import random_tensors
from minstep.tap import Array
from minstep.weights import assemble
from tests.model.test_golden import GOLDEN, meta
from tests.model.test_plain import drawn_config
from tests.support.tiers import cases

TINY = minstep.load_config(minstep.find_config("tiny"))
HOWS = [
    Sampling(1.0),
    Sampling(0.6, top_p=0.8),
    Sampling(1.5, top_k=2),
    Sampling(1.0, min_p=0.4),
    Sampling(0.8, top_k=3, top_p=0.95, min_p=0.05, repetition_penalty=1.6),
    GREEDY,
]

PUNISHED = Sampling(1.0, top_k=2, repetition_penalty=2.0)  # few ways, whose chances drafts change

# Exactly: sums over everything that can happen.


@pytest.mark.parametrize("how", HOWS, ids=str)
@pytest.mark.parametrize("seed", range(25))
def test_a_draft_kept_or_replaced_is_distributed_as_if_there_were_none(
    seed: int, how: Sampling
) -> None:
    rng = np.random.default_rng(seed)
    seen = rng.integers(7, size=4).tolist()
    p = distribution(rng.normal(0, 2, 7), seen, how)
    for q in (distribution(rng.normal(0, 2, 7), seen, how), p, distribution(p, seen, GREEDY)):
        result = np.zeros(7)
        for draft in np.flatnonzero(q):
            chance, rest = acceptance(int(draft), q, p)
            assert 0 <= chance <= 1 and (rest >= 0).all() and abs(rest.sum() - 1) < 1e-12
            result[draft] += q[draft] * chance
            result += q[draft] * (1 - chance) * rest
        np.testing.assert_allclose(result, p, rtol=0, atol=1e-12)
        assert np.array_equal(result > 0, p > 0), "a token that p never gives, or one too few"


@pytest.mark.parametrize(
    ("q", "p"),
    [
        ([0.5, 0.5, 0, 0], [0, 0, 0.3, 0.7]),  # no draft can be right
        ([1, 0, 0, 0], [0.25, 0.25, 0.25, 0.25]),
        ([0.25, 0.25, 0.25, 0.25], [0, 0, 1, 0]),
        ([0.1, 0.9, 0, 0], [0.1, 0.9, 0, 0]),
        ([0, 0.6, 0.4, 0], [0.3, 0.3, 0.4, 0]),
    ],
)
def test_zeros_on_either_side_are_no_exception(q: list[float], p: list[float]) -> None:
    with np.errstate(all="raise"):
        pairs = [(d, *acceptance(d, np.array(q), np.array(p))) for d in range(4) if q[d]]
    result = sum(q[d] * ((1 - chance) * rest + chance * np.eye(4)[d]) for d, chance, rest in pairs)
    np.testing.assert_allclose(result, p, rtol=0, atol=1e-15)


class Fork(np.random.Generator):
    """In place of a generator: takes one way through all that may happen, and keeps its chance."""

    def __init__(self, path: list[list[int]]) -> None:
        super().__init__(np.random.PCG64(0))
        self.path, self.depth, self.chance = path, 0, 1.0

    def choose(self, chances: Array) -> int:
        """One of the things that may happen; which, is said by the path so far."""
        ways = np.flatnonzero(chances)
        if self.depth == len(self.path):
            self.path.append([0, len(ways)])
        taken = ways[self.path[self.depth][0]]
        self.depth += 1
        self.chance *= chances[taken]
        return int(taken)

    def random(self) -> "Fork":  # type: ignore[override]
        return self

    def __ge__(self, chance: float) -> bool:
        """`rng.random() >= chance`: both ways, where both are possible."""
        return bool(self.choose(np.array([chance, 1 - chance])))


def every_way(run: Callable[[Any], list[Step]]) -> Iterator[tuple[float, list[Step]]]:
    """The chance and the outcome of everything that may happen in a run."""
    path = list[list[int]]()
    while True:
        fork = Fork(path)
        steps = run(fork)
        assert fork.depth == len(path)
        yield fork.chance, steps
        while path and path[-1][0] == path[-1][1] - 1:
            path.pop()
        if not path:
            return
        path[-1][0] += 1


def let_forks_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draws ask the fork; a draw by one random number is tests/model/test_sampling.py's matter."""
    for module in (sampling, mtp):
        monkeypatch.setattr(module, "draw", lambda probs, rng: rng.choose(probs))


@pytest.fixture
def forking(monkeypatch: pytest.MonkeyPatch) -> None:
    let_forks_draw(monkeypatch)


def plain_joint(
    prompt: Sequence[int], weights: ModelWeights, config: Config, count: int, how: Sampling
) -> dict[tuple[int, ...], float]:
    """The probability of each text of `count` new tokens, by the chain rule, without a cache."""
    joint: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(count):
        longer = dict[tuple[int, ...], float]()
        for text, chance in joint.items():
            tokens = [*prompt, *text]
            hidden = minstep.decoder(tokens, weights, config, np.float64)
            p = distribution(minstep.head(hidden, weights, config)[-1], tokens, how)
            longer |= {(*text, int(t)): chance * p[t] for t in np.flatnonzero(p)}
        joint = longer
    return joint


def small(vocabulary: int, depths: int, seed: int = 0) -> tuple[ModelWeights, Config]:
    """A full and a sliding layer (window 8) with random weights, and some MTP layers."""
    config = TINY._replace(
        hidden_size=12,
        vocab_size=vocabulary,
        eos_token_ids=(),
        layers=tuple(spec._replace(mlp_width=8) for spec in TINY.layers[:2]),
        mtp_layers=tuple(spec._replace(mlp_width=8) for spec in TINY.mtp_layers[:depths]),
    )
    weights = minstep.random_weights(config, np.random.default_rng(seed))
    softer = 0.5 * np.asarray(weights.lm_head)  # many texts are likely, drafts are too sure
    return weights._replace(lm_head=softer), config


def same_joint(
    prompt: list[int],
    weights: ModelWeights,
    config: Config,
    new: int,
    how: Sampling,
    drafts: int,
) -> set[int]:
    """Hold the distribution with drafts to the one without; which numbers of drafts were kept."""
    got, accepted = defaultdict[tuple[int, ...], float](float), set[int]()
    for chance, steps in every_way(
        lambda fork: list(
            minstep.steps(
                prompt, weights, config, fork, new, how, np.float64, num_draft_tokens=drafts
            )
        )
    ):
        got[tuple(token for step in steps for token in step.tokens)] += chance
        accepted |= {step.accepted for step in steps[1:]}
    expected = plain_joint(prompt, weights, config, new, how)
    assert abs(sum(got.values()) - 1) < 1e-12
    assert set(got) == set(expected)
    for text, chance in expected.items():
        assert abs(got[text] - chance) < 1e-12, f"{text}: {got[text]:.3f}, plain {chance:.3f}"
    return accepted


@pytest.mark.usefixtures("forking")
@pytest.mark.parametrize(
    ("vocabulary", "depths", "new", "how"),
    cases(
        [(*sizes, how) for sizes in ((3, 1, 3), (3, 2, 2)) for how in HOWS]
        + [(3, 2, 3, PUNISHED), (3, 3, 2, HOWS[2])],
        [(*sizes, how) for sizes in ((4, 1, 3), (3, 2, 3), (3, 3, 2)) for how in HOWS],
    ),
    ids=str,
)
def test_the_joint_distribution_of_new_tokens_is_exactly_the_plain_one(
    vocabulary: int, depths: int, new: int, how: Sampling
) -> None:
    weights, config = small(vocabulary, depths)
    accepted = same_joint([1, 0, 2, 2, 1], weights, config, new, how, depths)
    same_joint([0, 0], weights, config, new, how, depths)  # a penalty meets tokens not yet seen
    if how == HOWS[0]:
        assert accepted == set(range(depths + 1)), "every number of drafts is kept in some way"


@pytest.mark.usefixtures("forking")
@pytest.mark.parametrize("drafts", [1, 2])
def test_the_joint_distribution_of_a_golden_model_is_exactly_the_plain_one(drafts: int) -> None:
    folder = GOLDEN / "drafts" / "bf16"
    checkpoint = minstep.open_checkpoint(folder)
    config = checkpoint.config._replace(eos_token_ids=())
    how = Sampling(0.9, top_k=3, repetition_penalty=1.1)
    same_joint(meta(folder)["prompt"], checkpoint.weights(), config, 2, how, drafts)


# By chance: many short texts through the code as it is.


def bound(freedom: int) -> float:
    """The 0.1 % point of chi-square, by Wilson and Hilferty's approximation."""
    part = 2 / (9 * freedom)
    return freedom * (1 - part + 3.09 * part**0.5) ** 3


def chi_square(runs: int, drafts: int, how: Sampling) -> tuple[float, int]:
    """How far `runs` texts of 3 tokens are from the plain distribution; degrees of freedom."""
    weights, config = small(3, 2)
    prompt, rng = [1, 0, 2, 2, 1], np.random.default_rng(0)
    counts = Counter(
        tuple(
            minstep.generate(
                prompt, weights, config, rng, 3, how, dtype=np.float64, num_draft_tokens=drafts
            )
        )
        for _ in range(runs)
    )
    joint = plain_joint(prompt, weights, config, 3, how)
    assert set(counts) <= set(joint)
    large = {text for text, chance in joint.items() if chance * runs >= 5}
    cells = [(counts[text], joint[text] * runs) for text in large]
    rest = [runs - sum(cell) for cell in zip(*cells, strict=True)]
    cells += [(rest[0], rest[1])] if rest[1] >= 5 else []
    return sum((seen - mean) ** 2 / mean for seen, mean in cells), len(cells) - 1


@pytest.mark.parametrize("how", [HOWS[0], HOWS[4]], ids=str)
def test_texts_with_drafts_are_as_frequent_as_the_plain_distribution_says(how: Sampling) -> None:
    statistic, freedom = chi_square(400, 2, how)
    assert statistic < bound(freedom), f"{statistic:.1f} with {freedom} degrees of freedom"


@pytest.mark.thorough
@pytest.mark.parametrize("drafts", [0, 1, 2])
@pytest.mark.parametrize("how", HOWS[:5], ids=str)
def test_many_texts_are_as_frequent_as_the_plain_distribution_says(
    how: Sampling, drafts: int
) -> None:
    statistic, freedom = chi_square(5000, drafts, how)
    assert statistic < bound(freedom), f"{statistic:.1f} with {freedom} degrees of freedom"


def test_the_test_of_frequencies_sees_drafts_that_are_always_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sampling, "acceptance", lambda draft, q, p: (1.0, p))
    statistic, freedom = chi_square(400, 2, HOWS[0])
    assert statistic > 2 * bound(freedom)


# Random models: greedy text is the same whatever is drafted, and drafts are what they should be.


def drawn_model(rng: np.random.Generator) -> tuple[ModelWeights, Config]:
    """A random model with random settings and 1 to 3 MTP layers, which may be full attention."""
    raw = drawn_config(rng)
    while not raw["num_nextn_predict_layers"]:
        raw = drawn_config(rng)
    raw["sliding_window"] = int(rng.integers(1, 31))
    raw["vocab_size"] = int(rng.choice([2, 3, 5, 31]))  # in few tokens drafts are right by chance
    config = parse_config(raw)
    tensors = dict(random_tensors(config, rng))
    return assemble(config, lambda name, _: tensors[name]), config


def same_text(seed: int) -> None:
    """One random model, one random prompt: every draft count gives what no drafts give."""
    rng = np.random.default_rng(seed)
    weights, config = drawn_model(rng)
    prompt = rng.integers(config.vocab_size, size=rng.integers(1, 30)).tolist()
    config = config._replace(eos_token_ids=tuple(rng.integers(config.vocab_size, size=2).tolist()))
    if rng.random() < 0.2:
        config = config._replace(max_positions=len(prompt) + int(rng.integers(1, 9)))
    how = Sampling(repetition_penalty=float(rng.choice([1.0, 1.0, 1.3, 0.8])))
    chunk = int(rng.integers(1, 12)) if rng.random() < 0.7 else None
    new, free = int(rng.integers(1, 14)), bool(rng.random() < 0.7)

    def text(drafts: int) -> tuple[list[int], str | None]:
        steps = list(
            minstep.steps(prompt, weights, config, rng, new, how, np.float64, chunk, free, drafts)
        )
        return [token for step in steps for token in step.tokens], steps[-1].stop

    plain = text(0)
    for drafts in range(1, len(weights.mtp) + 1):
        assert text(drafts) == plain, f"model {seed} with {drafts} drafts"


@pytest.mark.parametrize("first", cases(range(0, 40, 20), range(1000, 3000, 20)))
def test_greedy_text_of_random_models_is_the_same_with_any_number_of_drafts(first: int) -> None:
    for seed in range(first, first + 20):
        same_text(seed)


@pytest.mark.parametrize("seed", cases(range(20), range(20, 60)))
def test_each_draft_is_what_its_depth_says_of_the_whole_text(seed: int) -> None:
    rng = np.random.default_rng(seed)
    weights, config = drawn_model(rng)
    tokens = rng.integers(config.vocab_size, size=rng.integers(1, 20)).tolist()
    new = minstep.steps(tokens, weights, config, rng, 9, GREEDY, np.float64, 4, ignore_eos=True)
    drafted = 0
    for step in new:
        for k, draft in enumerate(step.drafts, start=1):
            text = [*tokens, *step.drafts[: k - 1]]
            # The states of the last token and of drafts are not known: no draft depends on them.
            known = minstep.decoder(tokens, weights, config, np.float64)[:-1]
            hidden = np.concatenate((known, np.zeros((k, config.hidden_size))))
            logits = minstep.mtp_forward(text, hidden, weights, config)[k - 1]
            assert len(logits) == len(known)
            assert draft == np.argmax(logits[-1]), f"draft {k} after {len(tokens)} tokens"
        tokens += step.tokens
        drafted += len(step.drafts)
    assert drafted >= len(weights.mtp)


# A model whose drafts are right.

COUNT = 11  # its vocabulary


def quiet(block: BlockWeights) -> BlockWeights:
    """A block that adds nothing."""
    assert block.mlp
    attention = block.self_attn._replace(o_proj=0 * np.asarray(block.self_attn.o_proj))
    mlp = block.mlp._replace(down_proj=0 * np.asarray(block.mlp.down_proj))
    return block._replace(self_attn=attention, mlp=mlp)


def counting(noise: float = 0.0, start: int = 3) -> tuple[ModelWeights, Config, list[int]]:
    """A model that counts round its vocabulary, with drafts that do too, but for some noise.

    Blocks add nothing, so a state is the embedding of its token, and a depth that passes on the
    embedding it is given has the state that the main model will have there.
    """
    D = 12
    weights, config = small(COUNT, 3)
    rng = np.random.default_rng(0)
    lm_head = np.roll(np.eye(COUNT, D), 1, axis=0)
    flat = np.zeros(D)
    depths = [
        depth._replace(
            enorm=flat,
            eh_proj=np.eye(D, 2 * D),
            block=quiet(depth.block),
            shared_head_norm=flat,
            shared_head_output=lm_head + noise * rng.standard_normal((COUNT, D)),
        )
        for depth in weights.mtp
    ]
    layers = tuple(quiet(layer) for layer in weights.layers)
    weights = ModelWeights(np.eye(COUNT, D), layers, flat, lm_head, tuple(depths))
    return weights, config, [start]


def counted(start: int, count: int) -> list[int]:
    return [(start + n) % COUNT for n in range(1, count + 1)]


@pytest.mark.parametrize("drafts", [0, 1, 2, 3])
@pytest.mark.parametrize("how", [GREEDY, Sampling(1.0), Sampling(2.0, top_k=5)], ids=str)
def test_drafts_that_are_right_are_all_kept(how: Sampling, drafts: int) -> None:
    weights, config, prompt = counting()
    rng = np.random.default_rng(0)
    steps = list(
        minstep.steps(
            prompt, weights, config, rng, 1 + 12, how, np.float64, num_draft_tokens=drafts
        )
    )
    assert [step.accepted for step in steps] == [0] + [drafts] * (12 // (drafts + 1))
    for step in steps:
        assert step.drafts == step.tokens[:-1] and len(step.logits) == len(step.tokens)
    if how == GREEDY:
        assert [t for step in steps for t in step.tokens] == counted(3, 13)


@pytest.mark.parametrize("how", [GREEDY, Sampling(1.0)], ids=str)
def test_drafts_that_are_sometimes_right_are_kept_as_far_as_they_are(how: Sampling) -> None:
    weights, config, prompt = counting(noise=0.6)
    rng = np.random.default_rng(0)
    steps = list(minstep.steps(prompt, weights, config, rng, 200, how, np.float64))
    kept = Counter(step.accepted for step in steps[1:-1])
    assert set(kept) == {0, 1, 2, 3}, kept
    text = [t for step in steps for t in step.tokens]
    if how == GREEDY:
        assert text == counted(3, 200)
    for step in steps[1:-1]:
        assert step.tokens[:-1] == step.drafts[: step.accepted]
        assert len(step.tokens) == step.accepted + 1 == len(step.logits)


# Where the text ends.


@pytest.mark.parametrize("drafts", [0, 1, 2, 3])
@pytest.mark.parametrize("place", range(1, 13))
def test_an_end_token_among_kept_drafts_ends_the_text_there(place: int, drafts: int) -> None:
    weights, config, _ = counting()
    prompt = [COUNT - 2]
    text = counted(prompt[0], 11)
    config = config._replace(eos_token_ids=(text[place - 1],)) if place <= 11 else config
    rng = np.random.default_rng(0)
    steps = list(minstep.steps(prompt, weights, config, rng, 11, num_draft_tokens=drafts))
    assert [t for step in steps for t in step.tokens] == text[:place]
    assert [step.stop for step in steps] == [None] * (len(steps) - 1) + [
        "eos" if place <= 11 else "length"
    ]
    free = minstep.generate(prompt, weights, config, rng, 11, ignore_eos=True)
    assert list(free) == text


@pytest.mark.parametrize("drafts", [0, 1, 2, 3])
@pytest.mark.parametrize("count", range(1, 10))
def test_the_wanted_length_cuts_kept_drafts(count: int, drafts: int) -> None:
    weights, config, prompt = counting()
    rng = np.random.default_rng(0)
    steps = list(minstep.steps(prompt, weights, config, rng, count, num_draft_tokens=drafts))
    assert [t for step in steps for t in step.tokens] == counted(prompt[0], count)
    assert [step.stop for step in steps] == [None] * (len(steps) - 1) + ["length"]
    assert all(step.tokens for step in steps)


@pytest.mark.parametrize("noise", [0.0, 0.6, 3.0])
@pytest.mark.parametrize("room", range(1, 10))
def test_near_the_end_of_the_context_there_are_fewer_drafts_and_nothing_runs_past_it(
    room: int, noise: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, config, prompt = counting(noise)
    prompt = counted(prompt[0], 4)
    config = config._replace(max_positions=len(prompt) + room)
    module, ends = import_module("minstep.generate"), list[int]()
    real = module.decoder

    def watched(tokens: Sequence[int], *rest: Any) -> Array:
        ends.append(rest[-1][0].end + len(tokens))
        return real(tokens, *rest)

    monkeypatch.setattr(module, "decoder", watched)
    done = len(prompt)
    steps = list(minstep.steps(prompt, weights, config, np.random.default_rng(0), 100))
    for step in steps:
        if done > len(prompt):
            assert len(step.drafts) == min(3, config.max_positions - done)
        done += len(step.tokens)
    assert max(ends) <= config.max_positions == done
    assert [step.stop for step in steps] == [None] * (len(steps) - 1) + ["context"]
    assert [t for step in steps for t in step.tokens] == counted(prompt[-1], room)


def test_a_text_that_has_no_room_for_a_token_says_why_and_length_comes_before_context() -> None:
    weights, config, prompt = counting()
    config = config._replace(max_positions=6)
    rng = np.random.default_rng(0)
    assert [s.stop for s in minstep.steps(prompt, weights, config, rng, 5)][-1] == "length"
    for tokens, count, reason in [
        ([1] * 6, 5, "context"),
        ([1] * 6, 0, "length"),
        ([1], 0, "length"),
    ]:
        (step,) = minstep.steps(tokens, weights, config, rng, count)
        assert (step.tokens, step.drafts, step.accepted, step.stop) == ([], [], 0, reason)
        assert step.logits.shape == (0, COUNT)


def test_as_many_drafts_as_mtp_layers_are_made_at_most_and_more_are_refused() -> None:
    weights, config, prompt = counting()
    rng = np.random.default_rng(0)
    steps = list(minstep.steps(prompt, weights, config, rng, 9))
    assert [len(step.drafts) for step in steps] == [0, 3, 3]
    with pytest.raises(minstep.InputError, match="num_draft_tokens is 4, .* from 0 to 3"):
        list(minstep.steps(prompt, weights, config, rng, 9, num_draft_tokens=4))
    fewer = weights._replace(mtp=weights.mtp[:2])  # those that were loaded
    steps = list(minstep.steps(prompt, fewer, config, rng, 9, num_draft_tokens=3))
    assert max(len(step.drafts) for step in steps) == 2
    bare = weights._replace(mtp=())
    steps = list(minstep.steps(prompt, bare, config._replace(mtp_layers=()), rng, 9))
    assert [len(step.drafts) for step in steps] == [0] * 9


@pytest.mark.parametrize("drafts", [0, 3])
def test_a_step_gives_the_logits_that_each_of_its_tokens_was_chosen_from(drafts: int) -> None:
    weights, config = small(31, 3)
    prompt = [4, 9, 2, 30, 7]
    rng = np.random.default_rng(3)
    steps = minstep.steps(
        prompt, weights, config, rng, 25, Sampling(1.5), np.float64, num_draft_tokens=drafts
    )
    tokens = list(prompt)
    for step in steps:
        assert len(step.logits) == step.accepted + 1
        for token, logits in zip(step.tokens, step.logits, strict=False):
            hidden = minstep.decoder(tokens, weights, config, np.float64)
            expected = minstep.head(hidden, weights, config)[-1]
            np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-11)
            tokens.append(token)
    assert len(tokens) == 30
