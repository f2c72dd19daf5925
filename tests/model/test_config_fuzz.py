"""Configs with a few settings spoiled: refused by name, or computed without a warning."""

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from minstep import InputError, decoder, head, mtp_forward
from minstep.config import Config, parse_config
from minstep.store.config_file import read_config
from minstep.store.layouts import hub_config
from minstep.weights import random_weights, tensor_shapes
from tests.store.test_layouts import TEXT

VALUES: list[Any] = [
    0, 1, 2, 3, 5, 8, -1, 2**31 - 1, 2**31, 2**63, 10**30, 10**400,
    0.0, -0.0, 0.5, 1.0, 1.5, -2.5, 1e-300, 5e-324, 1e-45, 1e-38, 1e-30, 1e-20, 1e-10, 1e-6,
    1e5, 1e10, 1e20, 1e30, 1e38, 1e39, 1e300, float("nan"), float("inf"), float("-inf"),
    True, False, None, "", "0", "1,2", "full_attention", "a" * 300, "\ud800", "9" * 5000,
    [], [0], [1.0], [[1]], [None], [True], ["full_attention"], {}, {"rope_type": "llama3"},
]  # fmt: skip
SMALL = 300_000  # parameters of a model that is run


def places(node: Any) -> Iterator[tuple[Any, Any]]:
    """Every place in nested objects and lists, as its container and its key."""
    for key in node if isinstance(node, dict) else range(len(node)):
        yield node, key
        if isinstance(node[key], (dict, list)):
            yield from places(node[key])


def spoiled(raw: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    """A copy of a config with one to three places changed, in value, type, length or presence.

    Most changes leave a number a number, since what is refused at once tells little.
    """
    raw = copy.deepcopy(raw)
    for _ in range(rng.integers(1, 4)):
        every = list(places(raw))
        node, key = every[rng.integers(len(every))]
        old, value = node[key], VALUES[rng.integers(len(VALUES))]
        kind = rng.integers(12)
        if kind > 2 and isinstance(old, list):
            node[key] = [_other(each, rng) for each in old]
        elif kind > 2 and type(old) in (int, float):
            node[key] = _other(old, rng)
        elif kind == 2 and isinstance(old, list) and old:
            old.append(old[0]) if rng.random() < 0.5 else old.pop()
        elif kind == 1:
            del node[key]
        elif kind == 0:
            node[key] = copy.deepcopy(value)
    return raw


def _other(number: Any, rng: np.random.Generator) -> Any:
    """Another whole number near a whole one, and another float of any size; all else as it is."""
    if type(number) is int:
        return max(0, number + int(rng.choice([-2, -1, 0, 1, 2, number])))
    widest = rng.choice([1, 8, 40])
    return number * 10.0 ** rng.uniform(-widest, widest) if type(number) is float else number


def runs(config: Config, seed: int) -> bool:
    """Whether the config's model is small enough, and ran: finite, or refused by name."""
    shapes = tensor_shapes(config).values()
    if sum(int(np.prod(shape, dtype=object)) for shape in shapes) > SMALL:
        return False
    rng = np.random.default_rng(seed)
    weights = random_weights(config, rng)
    tokens = rng.integers(config.vocab_size, size=min(12, config.max_positions))
    try:
        hidden = decoder(tokens, weights, config)
        every = [head(hidden, weights, config), *mtp_forward(tokens, hidden, weights, config)]
    except InputError:
        return True
    assert all(np.isfinite(logits).all() for logits in every)
    return True


def spoil(seed: int) -> str:
    """One spoiled config: what came of it."""
    rng = np.random.default_rng(seed)
    shipped = [read_config(name)[0] for name in ("tiny", "odd", "no_extras", "drafts")]
    raw = spoiled([*shipped, TEXT][seed % 5], rng)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            config = parse_config(hub_config(raw))
        except InputError as error:
            assert str(error).startswith("config.json: "), error
            return "refused"
        return "ran" if runs(config, seed) else "too large"


@pytest.mark.parametrize("first", range(0, 300, 100))
def test_a_spoiled_config_is_refused_by_name_or_runs_without_a_warning(first: int) -> None:
    outcomes = [spoil(seed) for seed in range(first, first + 100)]
    assert outcomes.count("ran") > 15 and outcomes.count("refused") > 30


@pytest.mark.thorough
@pytest.mark.parametrize("first", range(10_000, 20_000, 1000))
def test_many_spoiled_configs_are_refused_by_name_or_run_without_a_warning(first: int) -> None:
    for seed in range(first, first + 1000):
        spoil(seed)
