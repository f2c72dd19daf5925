"""From logits to a token: every filter against its definition, their order, and the draw."""

import numpy as np
import pytest

from minstep import InputError
from minstep.sampling import (
    GREEDY,
    Sampling,
    acceptance,
    distribution,
    draw,
    log_probabilities,
    verify,
)
from minstep.tap import Array

V = 40


def logits(seed: int, size: int = V) -> Array:
    """Logits [size] of which some are equal: multiples of a half."""
    return np.round(np.random.default_rng(seed).normal(0, 2, size) * 2) / 2


def chances(x: Array, temperature: float = 1.0) -> list[float]:
    powers = np.exp(np.asarray(x, np.float64) / temperature)
    return (powers / powers.sum()).tolist()


def likeliest_first(x: Array) -> list[int]:
    return sorted(range(len(x)), key=lambda token: (-x[token], token))


def share(probs: list[float], kept: list[int]) -> Array:
    """The kept tokens' probabilities, which share all that there is; the others' are 0."""
    total = sum(probs[token] for token in kept)
    return np.array([probs[t] / total if t in kept else 0.0 for t in range(len(probs))])


def close(got: Array, expected: Array) -> None:
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-14)
    assert np.array_equal(got > 0, expected > 0), "other tokens are kept"
    assert got.dtype == np.float64 and abs(got.sum() - 1) < 1e-14


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("seed", range(5))
def test_temperature_divides_the_logits(seed: int, temperature: float) -> None:
    x = logits(seed)
    close(distribution(x, [], Sampling(temperature)), np.array(chances(x, temperature)))


@pytest.mark.parametrize("top_k", [1, 2, 7, V - 1, V, V + 1, 10 * V])
@pytest.mark.parametrize("seed", range(5))
def test_top_k_keeps_the_k_likeliest_and_of_equals_the_lowest_ids(seed: int, top_k: int) -> None:
    x = logits(seed)
    expected = share(chances(x), likeliest_first(x)[:top_k])
    close(distribution(x, [], Sampling(1.0, top_k=top_k)), expected)


@pytest.mark.parametrize("top_p", [1e-9, 0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("seed", range(5))
def test_top_p_keeps_the_fewest_tokens_that_reach_it(seed: int, top_p: float) -> None:
    x = logits(seed)
    probs, kept = chances(x), list[int]()
    for token in likeliest_first(x):
        kept.append(token)
        if sum(probs[t] for t in kept) >= top_p:
            break
    close(distribution(x, [], Sampling(1.0, top_p=top_p)), share(probs, kept))


@pytest.mark.parametrize("min_p", [0.01, 0.1, 0.5, 0.99])
@pytest.mark.parametrize("seed", range(5))
def test_min_p_keeps_what_is_at_least_that_share_of_the_likeliest(seed: int, min_p: float) -> None:
    x = logits(seed)
    probs = chances(x)
    kept = [token for token in range(V) if probs[token] >= min_p * max(probs)]
    close(distribution(x, [], Sampling(1.0, min_p=min_p)), share(probs, kept))


def test_a_tiny_top_p_keeps_one_token_and_min_p_of_one_all_that_equal_the_largest() -> None:
    x = np.array([1.0, 3.0, 3.0, 2.0, 3.0])
    assert distribution(x, [], Sampling(1.0, top_p=1e-300)).tolist() == [0, 1, 0, 0, 0]
    close(distribution(x, [], Sampling(1.0, min_p=1.0)), np.array([0, 1, 1, 0, 1]) / 3)


def test_filters_that_are_off_keep_tokens_however_unlikely() -> None:
    x = np.array([0.0, 100.0, -500.0, 60.0])
    assert (distribution(x, [], Sampling(1.0)) > 0).all()


def test_a_tie_at_the_edge_of_top_p_keeps_the_lowest_ids() -> None:
    x = np.zeros(8)  # an eighth each: sums are exact
    close(distribution(x, [], Sampling(1.0, top_p=0.375)), np.array([1, 1, 1, 0, 0, 0, 0, 0]) / 3)
    close(distribution(x, [], Sampling(1.0, top_p=0.376)), np.array([1, 1, 1, 1, 0, 0, 0, 0]) / 4)


def test_filters_apply_in_the_order_of_the_docstring() -> None:
    x = np.log([0.4, 0.3, 0.2, 0.1])
    # top-p of 0.75: three tokens of all, two of the two that top-k leaves (4/7 and 3/7).
    both = distribution(x, [], Sampling(1.0, top_k=2, top_p=0.75))
    close(both, np.array([4, 3, 0, 0]) / 7)
    # Of three tokens of the first three (4/9, 3/9, 2/9) two reach 0.75: more than 0.7 of all do.
    close(distribution(x, [], Sampling(1.0, top_k=3, top_p=0.75)), np.array([4, 3, 0, 0]) / 7)
    close(distribution(x, [], Sampling(1.0, top_p=0.75)), np.array([4, 3, 2, 0]) / 9)
    # Temperature comes before top-p: a hot one makes all alike, and four tokens are needed.
    assert (distribution(x, [], Sampling(100.0, top_p=0.76)) > 0).all()
    # The penalty comes before all: the likeliest falls to where the cut of top-k is.
    x = np.array([2.0, 1.5, 1.2, 1.1])
    assert distribution(x, [0], Sampling(1.0, top_k=2, repetition_penalty=2.0))[0] == 0
    # min-p is measured against the likeliest that is left, after temperature.
    x = np.array([2.0, 1.0, 0.0])
    assert (distribution(x, [], Sampling(10.0, min_p=0.8)) > 0).all()
    assert np.count_nonzero(distribution(x, [], Sampling(0.5, min_p=0.8))) == 1


@pytest.mark.parametrize("seed", range(40))
def test_all_filters_together_are_one_after_the_other(seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, seen = logits(seed), rng.integers(V, size=12).tolist()
    how = Sampling(
        temperature=rng.choice([0.5, 1.0, 3.0]),
        top_k=int(rng.integers(1, V)),
        top_p=rng.uniform(0.2, 1),
        min_p=rng.uniform(0, 0.3),
        repetition_penalty=rng.uniform(0.7, 1.5),
    )
    x = np.array([punished(x[t], how) if t in seen else x[t] for t in range(V)])
    kept = likeliest_first(x)[: how.top_k]
    probs = share(chances(x, how.temperature), kept).tolist()
    reached = [sum(probs[t] for t in kept[:n]) >= how.top_p for n in range(1, len(kept) + 1)]
    kept = kept[: reached.index(True) + 1 if any(reached) else len(kept)]
    probs = share(probs, kept).tolist()
    kept = [token for token in kept if probs[token] >= how.min_p * max(probs)]
    close(distribution(logits(seed), seen, how), share(probs, kept))


def punished(x: float, how: Sampling) -> float:
    return x / how.repetition_penalty if x > 0 else x * how.repetition_penalty


def test_the_penalty_divides_positive_logits_and_multiplies_negative_ones_once_per_token() -> None:
    x = np.array([4.0, -4.0, 0.0, 4.0, -4.0, 0.0])
    got = distribution(x, [0, 1, 2, 0, 0, 1], Sampling(1.0, repetition_penalty=2.0))
    close(got, np.array(chances(np.array([2.0, -8.0, 0.0, 4.0, -4.0, 0.0]))))
    encouraged = distribution(x, [0, 1], Sampling(1.0, repetition_penalty=0.5))
    close(encouraged, np.array(chances(np.array([8.0, -2.0, 0.0, 4.0, -4.0, 0.0]))))


def test_the_penalty_leaves_the_logits_that_were_given_alone() -> None:
    for dtype in (np.float32, np.float64):
        x = np.array([4.0, -4.0, 1.0], dtype)
        distribution(x, [0, 1], Sampling(0.5, top_k=1, repetition_penalty=2.0))
        assert x.tolist() == [4.0, -4.0, 1.0]


def test_greedy_is_the_largest_logit_the_lowest_id_of_a_tie_and_minds_the_penalty() -> None:
    x = np.array([0, 3, 3, 1.0])
    assert distribution(x, [], GREEDY).tolist() == [0, 1, 0, 0]
    assert distribution(x, [1], Sampling(repetition_penalty=1.5)).tolist() == [0, 0, 1, 0]
    assert distribution(x, [1, 2], Sampling(repetition_penalty=4.0)).tolist() == [0, 0, 0, 1]
    filters = Sampling(top_k=3, top_p=0.1, min_p=0.9)
    assert distribution(x, [1], filters).tolist() == [0, 1, 0, 0]


def test_a_logit_of_minus_infinity_has_no_chance() -> None:
    x = np.array([-np.inf, 1.0, 0.0, -np.inf])
    with np.errstate(all="raise", under="ignore"):
        for how in (Sampling(1.0), Sampling(0.1, repetition_penalty=2.0), Sampling(1.0, top_k=4)):
            got = distribution(x, [0, 2], how)
            assert got[[0, 3]].tolist() == [0, 0] and abs(got.sum() - 1) < 1e-15


@pytest.mark.parametrize("temperature", [1e-300, 1e-30, 1e-6, 1e6, 1e300])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_extreme_temperatures_and_logits_neither_overflow_nor_give_nan(
    temperature: float, dtype: str
) -> None:
    x = np.array([1e4, -1e4, 9.9e3, 1e4], dtype)
    with np.errstate(all="raise", under="ignore"):
        got = distribution(x, [2], Sampling(temperature, 3, 0.99, 1e-9, 1.01))
    assert np.isfinite(got).all() and abs(got.sum() - 1) < 1e-15
    if temperature < 1:
        assert got.tolist() == [0.5, 0, 0, 0.5]
    else:
        assert np.count_nonzero(got) == 3 and got[1] == 0


@pytest.mark.parametrize("penalty", [0.01, 0.5, 1.0, 1.3, 100.0])
def test_the_largest_float64_logits_are_refused_by_name_or_drawn_from_without_a_warning(
    penalty: float,
) -> None:
    most, how = np.finfo(np.float64).max, Sampling(1.0, 3, 0.9, 0.1, penalty)
    with np.errstate(all="raise", under="ignore"):
        for x in ([most, -most, 0], [-most, 0, 1], [-most, -most, 0]):
            logits = np.array(x)
            assert log_probabilities(logits).max() == 0 or np.argmax(logits) == 2
            if penalty < 1 and x[0] > 0:
                with pytest.raises(InputError, match="logit 0 is inf"):
                    distribution(logits, [0, 1], how)
            else:
                got = distribution(logits, [0, 1], how)
                assert got[np.argmax(logits)] == got.max() and abs(got.sum() - 1) < 1e-15


def test_log_probabilities_are_the_models_own_in_float64() -> None:
    for seed in range(5):
        x = logits(seed)
        got = log_probabilities(x.astype(np.float32))
        assert got.dtype == np.float64
        np.testing.assert_allclose(got, np.log(chances(x)), rtol=1e-13)
    with np.errstate(all="raise", under="ignore"):
        far = log_probabilities(np.array([3e38, -3e38, 0], np.float32))
    assert far[0] == 0 and np.isfinite(far).all() and far[1] < far[2] < -1e38


def test_the_same_state_of_the_generator_draws_the_same_tokens() -> None:
    probs = distribution(logits(0), [], Sampling(1.0))
    first, second, third = (
        [draw(probs, rng) for _ in range(50)]
        for rng in (np.random.default_rng(seed) for seed in (1, 1, 2))
    )
    assert first == second != third


class Fixed(np.random.Generator):
    """A generator whose next number is known."""

    def __init__(self, number: float) -> None:
        super().__init__(np.random.PCG64(0))
        self.number = number

    def random(self, *_: object) -> float:  # type: ignore[override]
        return self.number


@pytest.mark.parametrize("number", [0.0, 0.5, np.nextafter(0.5, 0), np.nextafter(1, 0)])
def test_no_number_draws_a_token_without_a_chance(number: float) -> None:
    for probs in ([0, 0.5, 0, 0.5, 0], [0, 1, 0], [0, 0, 0.1, 0.2, 0.3, 0.4, 0], [1 / 3] * 3):
        assert probs[draw(np.array(probs), Fixed(number))] > 0
    assert draw(np.array([0.5, 0.5]), Fixed(number)) == int(number >= 0.5)


@pytest.mark.parametrize("apart", [1.0, 1e-3, 1e-6, 1e-12])
def test_a_replaced_draft_is_distributed_as_the_model_wants_however_near_the_two_are(
    apart: float,
) -> None:
    for seed in range(20):
        rng = np.random.default_rng(seed)
        q, other = rng.dirichlet(np.ones(9)), rng.dirichlet(np.ones(9))
        p = (1 - apart) * q + apart * other
        total = np.zeros(9)
        for draft in range(9):
            chance, rest = acceptance(draft, q, p)
            assert chance == min(1, p[draft] / q[draft]) and rest.sum() == pytest.approx(1)
            total += q[draft] * (chance * np.eye(9)[draft] + (1 - chance) * rest)
            assert not (rest[p < q] > 0).any()  # what the drafter proposes too often replaces none
        np.testing.assert_allclose(total, p, rtol=1e-12)


@pytest.mark.parametrize("number", [0.0, np.nextafter(1, 0)])
def test_no_number_keeps_a_draft_without_a_chance_or_refuses_a_sure_one(number: float) -> None:
    x = np.array([[-np.inf, 3.0, -np.inf, 2.0], [0.0, 1.0, -np.inf, 2.0]])
    even, sure = np.full(4, 0.25), np.array([0, 0.1, 0.9, 0])
    for draft, q, kept in ((0, even, 0), (2, even, 0), (2, sure, 0), (1, sure, 1)):
        count, token = verify([draft], [q], x, [], Sampling(1.0), Fixed(number))
        assert count == kept and x[kept, token] > -np.inf


@pytest.mark.parametrize(
    "how",
    [Sampling(0.5), Sampling(1.0), Sampling(2.0), Sampling(1.0, 5, 0.95, 0.05, 1.3)],
    ids=str,
)
def test_draws_follow_the_distribution(how: Sampling) -> None:
    x = np.array([0.0, 1.0, -1.0, 0.5, -np.inf, 1.5, 0.2])
    probs, rng, n = distribution(x, [1, 2], how), np.random.default_rng(0), 20_000
    counts = np.bincount([draw(probs, rng) for _ in range(n)], minlength=len(x))
    kept = probs > 0
    assert not counts[~kept].any()
    chi_square = ((counts - n * probs)[kept] ** 2 / (n * probs[kept])).sum()
    # The 0.1 % points with 1 to 6 degrees of freedom.
    assert chi_square < [10.8, 13.8, 16.3, 18.5, 20.5, 22.5][np.count_nonzero(kept) - 2]
