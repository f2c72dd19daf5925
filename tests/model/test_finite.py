"""What is not finite never becomes text: in any tensor, greedy and sampled, with drafts or not."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import minstep
from minstep import InputError, Sampling
from minstep.explore.expert_loads import routed
from minstep.model import ModelWeights, block, rotations
from minstep.moe import MoEWeights, route
from minstep.sampling import GREEDY, acceptance, distribution, draw, log_probabilities, verify
from minstep.store.random_checkpoint import random_tensors
from minstep.tap import Array
from minstep.train.loss import objective
from minstep.train.tape import Variable
from minstep.validation import NotFinite, check_finite, is_finite
from minstep.weights import assemble
from tests.conftest import GOLDEN, Refused
from tests.support.tiers import cases

CONFIG = minstep.load_config(minstep.find_config("drafts"))
ODD = minstep.load_config(minstep.find_config("odd"))
TENSORS = dict(random_tensors(CONFIG, np.random.default_rng(0)))
PROMPT = [5, 1, 0, 3, 2, 6]
HOWS = [
    GREEDY,
    Sampling(1.0),
    Sampling(0.7, top_k=3),
    Sampling(1.0, top_p=0.8),
    Sampling(1.3, min_p=0.1),
    Sampling(0.8, 4, 0.9, 0.05, 1.3),
    Sampling(repetition_penalty=1.5),
]
BAD = [np.nan, np.inf, -np.inf]


def spoiled(name: str, bad: float) -> ModelWeights:
    """Random weights with one bad number in each row of the first axis of one tensor."""
    x = TENSORS[name].copy()
    x.reshape(len(x), -1)[:, -1] = bad
    return assemble(CONFIG, lambda wanted, _: x if wanted == name else TENSORS[wanted])


def text(weights: ModelWeights, how: Sampling, drafts: int | None) -> list[int]:
    rng = np.random.default_rng(1)
    new = minstep.generate(
        PROMPT, weights, CONFIG, rng, 5, how, ignore_eos=True, num_draft_tokens=drafts
    )
    return list(new)


@pytest.mark.parametrize("bad", cases(BAD[:1], BAD[1:]))
def test_a_bad_number_in_any_tensor_is_refused_and_drafts_that_do_not_run_are_not_looked_at(
    bad: float,
) -> None:
    names = [spec.name for spec in CONFIG.mtp_layers]
    with np.errstate(all="ignore"):
        for n, name in enumerate(TENSORS):
            weights, how = spoiled(name, bad), HOWS[n % len(HOWS)]
            layer = next((layer for layer in names if name.startswith(f"{layer}.")), "")
            with pytest.raises(InputError, match=f"{layer}.*finite"):
                text(weights, how, None)
            if layer:
                clean = assemble(CONFIG, lambda wanted, _: TENSORS[wanted])
                assert text(weights, how, 0) == text(clean, how, 0), name
            else:
                with pytest.raises(InputError, match="finite"):
                    text(weights, how, 0)


@pytest.mark.parametrize("how", HOWS, ids=str)
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_depth_whose_drafts_are_not_numbers_is_refused_by_its_layer(
    depth: int, how: Sampling
) -> None:
    name = CONFIG.mtp_layers[depth - 1].name
    weights = spoiled(f"{name}.transformer.shared_head.output.weight", np.nan)
    with pytest.raises(InputError, match=rf"^{name}\.transformer\.shared_head\.output is nan"):
        text(weights, how, None)
    assert len(text(weights, how, depth - 1)) == 5


E = 6


def router(dtype: str = "float32") -> tuple[Array, MoEWeights]:
    """Tokens [3, 4] and a router of E experts, whose matrices nobody looks at."""
    rng = np.random.default_rng(0)
    gate, none = rng.standard_normal((E, 4)).astype(dtype), np.empty((E, 1, 1))
    bias = rng.standard_normal(E).astype(dtype)
    return rng.standard_normal((3, 4)).astype(dtype), MoEWeights(gate, bias, none, none, none)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("expert", range(E))
def test_a_router_refuses_a_bad_number_of_any_expert_chosen_or_not(
    expert: int, bad: float, dtype: str
) -> None:
    x, weights = router(dtype)
    spec = CONFIG.layers[2].moe
    assert spec
    spec = spec._replace(experts=E, top_k=2)
    for field in ("gate", "router_bias"):
        broken = np.asarray(getattr(weights, field)).copy()
        broken[expert, ...] = bad
        with np.errstate(invalid="ignore"), pytest.raises(NotFinite, match=rf"^moe\.{field}"):
            route(x, weights._replace(**{field: broken}), spec)
    x[1, 2] = bad
    with np.errstate(invalid="ignore"), pytest.raises(NotFinite, match=r"^moe\.gate .* at \[1, 0"):
        route(x, weights, spec)


def test_numbers_that_are_large_but_finite_are_routed() -> None:
    x, weights = router()
    spec = CONFIG.layers[2].moe
    assert spec
    spec = spec._replace(experts=E, top_k=2)
    huge = np.asarray(weights.gate) * np.float32(1e30)  # logits whose squares are infinite
    never = np.array([-2, 0, 0, -2, 0, -1e30], np.float32)
    choice = route(x, weights._replace(gate=huge, router_bias=never), spec)
    assert np.isfinite(choice.weights).all() and not np.isin(choice.ids, [0, 3, 5]).any()


def test_a_bad_router_is_named_with_its_layer_on_every_path() -> None:
    name = f"{CONFIG.layers[2].name}.moe.router_bias"
    weights = spoiled(name, np.nan)
    with pytest.raises(InputError, match=rf"^{name}"):
        minstep.decoder(PROMPT, weights, CONFIG)
    with pytest.raises(InputError, match=rf"^{name}"):
        routed([PROMPT], weights, CONFIG)
    on_tape = assemble(
        CONFIG,
        lambda wanted, _: Variable(np.nan * TENSORS[wanted] if wanted == name else TENSORS[wanted]),  # type: ignore[arg-type, return-value]
    )
    with pytest.raises(InputError, match=rf"^{name}"):
        objective(PROMPT, on_tape, CONFIG, 0.3, np.float32, minstep.tap.silent)
    spec, layer = CONFIG.layers[2], weights.layers[2]
    x = np.ones((2, CONFIG.hidden_size), np.float32)
    with pytest.raises(NotFinite, match=r"^moe\.router_bias"):
        block(x, layer, spec, rotations([spec], 0, 2, np.float32)[spec.rope], 1e-5)


@pytest.fixture
def broken(tmp_path: Path) -> Any:
    """Copies of a checkpoint with a number spoiled in one tensor."""

    def copy(name: str, bad: float) -> Path:
        folder = shutil.copytree(GOLDEN / "odd" / "fp32", tmp_path / "broken")
        file = folder / "model.safetensors"
        tensors = load_file(file)
        tensors[name].reshape(-1)[0] = bad
        save_file(tensors, file, {"format": "pt"})
        return folder

    return copy


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("flags", [(), ("--temp", 1), ("--temp", 1, "--top-p", 0.9)], ids=str)
def test_the_command_line_refuses_drafts_that_are_not_numbers(
    flags: tuple[Any, ...], bad: float, broken: Any, refused: Refused
) -> None:
    layer = ODD.mtp_layers[0].name
    folder = broken(f"{layer}.transformer.shared_head.output.weight", bad)
    arguments = ("--model", folder, "--tokens", "5,1,0", "--json", *flags)
    refused("generate", *arguments, naming=(layer, "finite"))


def test_every_command_refuses_a_router_that_is_not_finite(broken: Any, refused: Refused) -> None:
    name = f"{ODD.layers[2].name}.moe.router_bias"
    folder = broken(name, np.nan)
    for arguments in (
        ("generate", "--model", folder, "--tokens", "5,1,0"),
        ("trace", "--model", folder, "--tokens", "5,1,0", "--out", folder / "trace.safetensors"),
        ("walk", "--model", folder, "--tokens", "5,1,0"),
    ):
        refused(*arguments, naming=(name, "finite"))


@pytest.mark.parametrize("bad", [[0, np.nan, 1], [np.inf, 0, 1], [-np.inf] * 3])
@pytest.mark.parametrize("how", HOWS, ids=str)
def test_no_distribution_comes_of_logits_that_are_not_finite(
    bad: list[float], how: Sampling
) -> None:
    logits, rng = np.array(bad), np.random.default_rng(0)
    for of in (
        lambda: distribution(logits, [0], how),
        lambda: log_probabilities(logits),
        lambda: verify([], [], logits[None], [0], how, rng),
        lambda: verify([1], [np.ones(3) / 3], np.array([logits, logits]), [0], how, rng),
    ):
        with pytest.raises(InputError, match="logit"):
            of()


def test_no_draft_is_kept_by_probabilities_that_are_none() -> None:
    good = np.array([0.5, 0.25, 0.25])
    for bad in BAD:
        for place in range(3):
            broken = good.copy()
            broken[place] = bad
            for q, p in ((broken, good), (good, broken), (broken, broken)):
                with pytest.raises(InputError, match="probabilities"):
                    acceptance(0, q, p)
            with pytest.raises(InputError, match="probabilities"):
                draw(broken, np.random.default_rng(0))


@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5), (2, 3, 4), (5, 0)])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_whether_an_array_is_finite_is_what_numpy_says(shape: tuple[int, ...], dtype: str) -> None:
    x = np.random.default_rng(0).standard_normal(shape).astype(dtype)
    largest = np.full(shape, np.finfo(dtype).max, dtype)
    assert is_finite(x) and is_finite(largest) and is_finite(-largest) and is_finite(x.T)
    for n in range(x.size):
        for bad in BAD:
            y = x.copy()
            y.reshape(-1)[n] = bad
            place = [int(index) for index in np.unravel_index(n, shape)]
            with pytest.raises(NotFinite) as caught:
                check_finite("the tensor", y)
            assert str(caught.value).startswith(f"the tensor is {bad} at {place}")
