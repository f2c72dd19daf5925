"""The optimizer: against plain forms and torch; which rule is whose, clip, decay, resume."""

import math
import re
from typing import Any

import numpy as np
import pytest

import minstep
from minstep.errors import InputError
from minstep.fast import threads as parallel
from minstep.tap import Array
from minstep.train.optimizer import ADAMW, MUON, Optimizer, Settings, moments_of
from minstep.weights import tensor_shapes

NORM, MATRIX = "model.norm.weight", "model.layers.0.self_attn.q_proj.weight"
EXPERTS, BIAS = "model.layers.4.moe.up_proj.weight", "model.layers.4.moe.router_bias"
EMBED = "model.embed_tokens.weight"
SHAPES = {NORM: (6,), MATRIX: (8, 6), EXPERTS: (3, 4, 6), BIAS: (3,), EMBED: (10, 6)}
LOOSE = Settings(clip=math.inf)
Tensors = dict[str, Array]


def drawn(seed: int, size: float = 1.0) -> Tensors:
    rng = np.random.default_rng(seed)
    return {
        name: (rng.standard_normal(shape) * size).astype(np.float32)
        for name, shape in SHAPES.items()
    }


def run(optimizer: Optimizer, tensors: Tensors, first: int, last: int) -> Tensors:
    for n in range(first, last):
        optimizer.step(tensors, drawn(100 + n, 0.1), scale=1 / (1 + n))
    return tensors


def test_every_tensor_of_a_model_has_the_rule_it_should() -> None:
    config = minstep.load_config(minstep.find_config("tiny"))
    named: dict[tuple[str, ...], set[str]] = {MUON: set(), ADAMW: set(), (): set()}
    for name, shape in tensor_shapes(config).items():
        named[moments_of(name, shape)].add(re.sub(r"model\.layers\.\d+\.", "", name))
    assert named[()] == {"moe.router_bias"}
    tables = "model.embed_tokens lm_head transformer.shared_head.output"
    norms = "model.norm enorm hnorm input_layernorm post_attention_layernorm"
    norms += " self_attn.q_norm self_attn.k_norm transformer.shared_head.norm"
    assert named[ADAMW] == {f"{name}.weight" for name in f"{tables} {norms}".split()}
    some = "eh_proj moe.gate moe.up_proj mlp.down_proj share_expert.gate_proj self_attn.g_proj"
    assert {f"{name}.weight" for name in some.split()} < named[MUON]


def plain_adamw(w: Array, gradients: list[Array], scales: list[float], how: Settings) -> Array:
    """AdamW as in its paper, in float64."""
    m, v = np.zeros(w.shape), np.zeros(w.shape)
    w = w.astype(np.float64)
    for t, (g, scale) in enumerate(zip(gradients, scales, strict=True), start=1):
        m = how.betas[0] * m + (1 - how.betas[0]) * g
        v = how.betas[1] * v + (1 - how.betas[1]) * g**2
        m_hat, v_hat = m / (1 - how.betas[0] ** t), v / (1 - how.betas[1] ** t)
        change = m_hat / (np.sqrt(v_hat) + how.eps) + how.weight_decay * w
        w = w - how.rate * scale * change
    return w


@pytest.mark.parametrize("name", [NORM, EMBED])
def test_adamw_is_its_paper(name: str) -> None:
    how = LOOSE._replace(rate=0.01, betas=(0.8, 0.9), eps=1e-3, weight_decay=0.3)
    before = drawn(0)[name]
    after = run(Optimizer(SHAPES, how), drawn(0), 0, 20)[name]
    gradients = [drawn(100 + n, 0.1)[name].astype(np.float64) for n in range(20)]
    expected = plain_adamw(before, gradients, [1 / (1 + n) for n in range(20)], how)
    np.testing.assert_allclose(after, expected, rtol=1e-5, atol=1e-6)
    assert np.abs(expected - before).max() > 0.01


@pytest.mark.torch
def test_adamw_is_torchs() -> None:
    torch: Any = pytest.importorskip("torch", reason="needs: pip install -e '.[oracle]'")
    how = LOOSE._replace(rate=0.01)
    names = [NORM, EMBED]
    theirs = [torch.nn.Parameter(torch.tensor(drawn(0)[name])) for name in names]
    their = torch.optim.AdamW(theirs, 0.01, how.betas, how.eps, how.weight_decay)
    for n in range(20):
        for parameter, name in zip(theirs, names, strict=True):
            parameter.grad = torch.tensor(drawn(100 + n, 0.1)[name])
        their.param_groups[0]["lr"] = 0.01 / (1 + n)
        their.step()
    ours = run(Optimizer(SHAPES, how), drawn(0), 0, 20)
    for parameter, name in zip(theirs, names, strict=True):
        np.testing.assert_allclose(ours[name], parameter.detach().numpy(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", [MATRIX, EXPERTS])
def test_muon_is_momentum_made_orthogonal(name: str) -> None:
    how = LOOSE._replace(matrix_rate=0.01, momentum=0.9, weight_decay=0.3)
    after = run(Optimizer(SHAPES, how), drawn(0), 0, 5)[name]
    expected, momentum = drawn(0)[name].astype(np.float64), np.zeros(SHAPES[name])
    for n in range(5):
        gradient = drawn(100 + n, 0.1)[name].astype(np.float64)
        momentum = 0.9 * momentum + gradient
        u, _, v = np.linalg.svd(gradient + 0.9 * momentum, full_matrices=False)
        rate = 0.01 / (1 + n)
        expected = (1 - rate * 0.3) * expected - rate * 0.2 * max(SHAPES[name][-2:]) ** 0.5 * u @ v
    np.testing.assert_allclose(after, expected, atol=1e-4)
    assert np.abs(after - drawn(0)[name]).max() > 5e-3


@pytest.mark.parametrize("name", [MATRIX, EXPERTS])
def test_an_update_of_muon_has_an_rms_of_a_fifth_of_the_rate(name: str) -> None:
    tensors = {key: np.zeros_like(x) for key, x in drawn(0).items()}
    Optimizer(SHAPES, Settings(matrix_rate=0.5)).step(tensors, drawn(1), 0.5)
    rms = np.sqrt(np.square(tensors[name]).mean())
    assert rms == pytest.approx(0.2 * 0.5 * 0.5, rel=0.01)


def test_it_finds_the_bottom_of_a_bowl() -> None:
    """The loss is half the distance to a target, squared; some directions are far steeper."""
    target, tensors = drawn(0), drawn(1)
    steep = {name: np.geomspace(1, 30, SHAPES[name][-1]) for name in SHAPES}
    optimizer = Optimizer(SHAPES, Settings(0.1, 0.1, weight_decay=0))
    for n in range(400):
        gradients = {name: (tensors[name] - target[name]) * steep[name] for name in SHAPES}
        optimizer.step(tensors, gradients, 1 - n / 400)
    for name in SHAPES.keys() - {BIAS}:
        np.testing.assert_allclose(tensors[name], target[name], atol=0.01)


def test_a_router_bias_is_never_touched_and_its_gradient_is_not_counted() -> None:
    tensors, gradients = drawn(0), drawn(1)
    gradients[BIAS] = np.full(3, 1e6, np.float32)
    norm = Optimizer(SHAPES).step(tensors, gradients)
    np.testing.assert_array_equal(tensors[BIAS], drawn(0)[BIAS])
    assert norm < 100


def test_what_has_no_gradient_stays_and_what_has_one_of_zeros_decays() -> None:
    tensors, gradients = drawn(0), {MATRIX: np.zeros((8, 6), np.float32)}
    optimizer = Optimizer(SHAPES, Settings(0.5, 0.5, weight_decay=0.1))
    assert optimizer.step(tensors, gradients, 0.5) == 0
    np.testing.assert_array_equal(tensors[EMBED], drawn(0)[EMBED])
    np.testing.assert_allclose(tensors[MATRIX], drawn(0)[MATRIX] * 0.975, rtol=1e-6)


def test_norms_embeddings_and_experts_decay_too() -> None:
    tensors = drawn(0)
    zeros = {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}
    Optimizer(SHAPES, Settings(0.5, 0.1, weight_decay=0.1)).step(tensors, zeros)
    for name, share in ((NORM, 0.99), (EMBED, 0.99), (EXPERTS, 0.95), (BIAS, 1)):
        np.testing.assert_allclose(tensors[name], drawn(0)[name] * share, rtol=1e-6)


def test_gradients_are_clipped_all_together() -> None:
    gradients = drawn(1)
    own = {name: gradients[name] for name in SHAPES.keys() - {BIAS}}
    norm = math.sqrt(sum(float(np.square(g.astype(np.float64)).sum()) for g in own.values()))
    clipped = {name: g / np.float32(norm / 0.5) for name, g in gradients.items()}
    # Both rules forget the size of a first gradient: only a second step shows it.
    after = []
    for settings, given in ((Settings(clip=0.5), gradients), (LOOSE, clipped)):
        tensors, optimizer = drawn(0), Optimizer(SHAPES, settings)
        first = optimizer.step(tensors, given)
        optimizer.step(tensors, drawn(2, 0.001))
        after.append(tensors)
        assert first == pytest.approx(norm if given is gradients else 0.5)
    for name in SHAPES:
        np.testing.assert_allclose(after[0][name], after[1][name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [1e-3, 0.02, 1.0, 300.0])
def test_a_clipped_gradient_has_the_limit_as_its_norm(size: float) -> None:
    """Moments begin at zero, so the first ones say what gradient a rule was given."""
    gradients, optimizer = drawn(1, size), Optimizer(SHAPES, Settings(clip=0.01))
    norm = optimizer.step(drawn(0), gradients)
    state = optimizer.state()
    given = {name: state.get(f"momentum.{name}") for name in (MATRIX, EXPERTS)}
    given |= {name: state[f"first.{name}"] / np.float32(0.1) for name in (NORM, EMBED)}
    for name, x in given.items():
        np.testing.assert_allclose(x, gradients[name] * min(1, 0.01 / norm), rtol=1e-5)
    squares = sum(float(np.square(x, dtype=np.float64).sum()) for x in given.values())
    assert math.sqrt(squares) == pytest.approx(min(norm, 0.01), rel=1e-5)


def test_gradients_within_the_limit_are_left_as_they_are() -> None:
    given, kept_as = drawn(1, 1e-3), drawn(1, 1e-3)
    free, held = drawn(0), drawn(0)
    Optimizer(SHAPES, LOOSE).step(free, given)
    Optimizer(SHAPES, Settings(clip=1.0)).step(held, given)
    for name in SHAPES:
        np.testing.assert_array_equal(free[name], held[name])
        np.testing.assert_array_equal(given[name], kept_as[name])  # nor written to


@pytest.mark.parametrize("flaw", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_is_named_before_anything_changes(flaw: float) -> None:
    tensors, gradients, optimizer = drawn(0), drawn(1), Optimizer(SHAPES)
    optimizer.step(tensors, gradients)
    before, held = {name: x.copy() for name, x in tensors.items()}, optimizer.state()
    gradients[NORM][2] = gradients[EXPERTS][1, 0, 0] = flaw
    with pytest.raises(FloatingPointError, match=EXPERTS):  # by name it is the first of the two
        optimizer.step(tensors, gradients)
    for name, x in before.items():
        np.testing.assert_array_equal(tensors[name], x)
    for name, x in optimizer.state().items():
        np.testing.assert_array_equal(held[name], x)


def test_finite_gradients_whose_squares_pass_float32_are_clipped() -> None:
    tensors = drawn(0)
    norm = Optimizer(SHAPES).step(tensors, drawn(1, 1e25))
    assert math.isfinite(norm) and norm > 1e25
    assert all(np.isfinite(x).all() for x in tensors.values())


def test_a_run_that_is_restored_goes_on_bit_for_bit() -> None:
    whole = run(Optimizer(SHAPES), drawn(0), 0, 7)
    first, second = Optimizer(SHAPES), Optimizer(SHAPES)
    tensors = run(first, drawn(0), 0, 4)
    state = first.state()
    run(first, drawn(0), 4, 6)  # what was handed out is a copy
    second.restore(state | {"tokens": np.zeros(3)})  # and may lie beside what is not its own
    run(second, tensors, 4, 7)
    for name in SHAPES:
        np.testing.assert_array_equal(tensors[name], whole[name])
    assert second.steps == 7


def test_the_state_names_what_is_kept_of_each_tensor() -> None:
    optimizer = Optimizer(SHAPES)
    run(optimizer, drawn(0), 0, 3)
    state = optimizer.state()
    kinds = {f"momentum.{name}" for name in (MATRIX, EXPERTS)}
    kinds |= {f"{kind}.{name}" for name in (NORM, EMBED) for kind in ADAMW}
    assert state.keys() == kinds | {"step"}
    assert state["step"] == 3 and state["step"].dtype == np.int64
    assert all(x.dtype == np.float32 and x.any() for name, x in state.items() if name != "step")


def spoilt(name: str, x: Array | None) -> Tensors:
    state = {**Optimizer(SHAPES).state(), "step": np.array(5)}
    state.pop(name)
    return state if x is None else state | {name: x}


@pytest.mark.parametrize(
    ("name", "x", "words"),
    [
        ("step", None, "step is missing, expected int64 []"),
        (f"second.{EMBED}", None, f"second.{EMBED} is missing, expected float32 [10, 6]"),
        (f"momentum.{MATRIX}", np.zeros((6, 8), np.float32), "float32 [6, 8], expected float32 [8"),
        (f"first.{NORM}", np.zeros(6), "is float64 [6], expected float32 [6]"),
    ],
)
def test_a_state_of_another_model_is_refused(name: str, x: Array | None, words: str) -> None:
    optimizer = Optimizer(SHAPES)
    with pytest.raises(InputError, match=re.escape(words)):
        optimizer.restore(spoilt(name, x))
    assert optimizer.steps == 0


def test_the_number_of_threads_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    after = []
    for threads in (1, 4):
        monkeypatch.setattr(parallel, "THREADS", threads)
        after.append(run(Optimizer(SHAPES), drawn(0), 0, 3))
    for name in SHAPES:
        np.testing.assert_array_equal(after[0][name], after[1][name])


def test_tensors_keep_their_place_and_dtype() -> None:
    tensors = drawn(0)
    before = dict(tensors)
    Optimizer(SHAPES).step(tensors, drawn(1), np.float64(0.5))
    for name, x in tensors.items():
        assert x is before[name] and x.dtype == np.float32
