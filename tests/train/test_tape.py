"""The model's own functions on the tape: their values, their gradients, and what is refused."""

import itertools
import operator
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import pytest

import minstep
from minstep import attention, linear, mlp, moe
from minstep.activations import sigmoid, silu, softmax
from minstep.attention import attend, self_attention, whole
from minstep.config import Config, LayerSpec
from minstep.fast import threads as parallel
from minstep.fast.bf16 import BF16Array, to_bf16
from minstep.mlp import swiglu
from minstep.model import block, embed, rotations
from minstep.mtp import mtp_depth, mtp_forward, mtp_head
from minstep.norm import rms_norm
from minstep.rope import Rotation, rotate
from minstep.store.random_checkpoint import random_tensors
from minstep.tap import Array, ScopedTap, silent
from minstep.train.tape import Variable, backward
from minstep.weights import assemble
from tests.support.tiers import cases
from tests.train.test_gradients import floats, mapped, some, taped


@pytest.fixture(autouse=True)
def experts_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Off the tape too: it never runs them at once, and the two round differently."""
    monkeypatch.setattr(moe, "FEW", 0)


CONFIGS = ("tiny", "odd", "no_extras", "drafts")
TOLERANCE = 1e-8  # of the root mean square of a gradient's entries
T = 11  # tokens: more than every window of CONFIGS
STEP = 1e-4


class Keep(ScopedTap):
    """Keeps every named tensor, as an array, and wants those that only a tap would look at."""

    def __init__(self) -> None:
        self.seen = dict[str, Array]()

    def __call__(self, name: str, x: Array) -> Array:
        self.seen[self._full(name)] = getattr(x, "value", x)
        return x

    def wants(self, name: str) -> bool:
        return True

    def ids(self) -> list[Any]:
        return [x.tolist() for name, x in self.seen.items() if name.endswith("ids")]


class Model(NamedTuple):
    """A random model, its tensors by their hub names, and a text with tokens that come again."""

    config: Config
    tensors: dict[str, Array]
    tokens: list[int]

    def run(self, *tensors: Any, tap: Any = silent) -> Any:
        """Every logit that the model computes, of the main head and of each depth: [N]."""
        named = dict(zip(self.tensors, tensors, strict=True))
        weights = assemble(self.config, lambda name, shape: named[name])
        dtype = named["model.embed_tokens.weight"].dtype
        hidden = minstep.decoder(self.tokens, weights, self.config, dtype, tap=tap)
        main = minstep.head(hidden, weights, self.config, tap)
        depths = mtp_forward(self.tokens, hidden, weights, self.config, tap)
        return np.concatenate([logits.reshape(-1) for logits in (main, *depths)])


@cache
def model(name: str, dtype: str = "float64") -> Model:
    config, rng = minstep.load_config(minstep.find_config(name)), np.random.default_rng(0)
    tensors = {name: x.astype(dtype) for name, x in random_tensors(config, rng)}
    while True:
        tokens = rng.integers(config.vocab_size, size=T).tolist()
        tokens[7:9] = tokens[2:4]
        its, tap = Model(config, tensors, tokens), Keep()
        its.run(*tensors.values(), tap=tap)
        margins = [x.min() for name, x in tap.seen.items() if name.endswith("margin")]
        if min(margins) > 10 * STEP:  # no small step changes who is chosen
            return its


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_named_tensor_is_the_same_bit_for_bit(name: str, dtype: str) -> None:
    its = model(name, dtype)
    off, on = Keep(), Keep()
    expected = its.run(*its.tensors.values(), tap=off)
    got = its.run(*map(Variable, its.tensors.values()), tap=on)
    assert got.dtype == dtype and np.array_equal(got.value, expected)
    assert list(on.seen) == list(off.seen) and len(off.seen) > 20 * len(its.config.layers) / 2
    for tensor, x in off.seen.items():
        assert on.seen[tensor].dtype == x.dtype and np.array_equal(on.seen[tensor], x), tensor


def along(value: Callable[[], Array], x: Array, way: Array, g: Array) -> tuple[Any, Any]:
    """The slope of sum(g * value()) when x moves along `way`, and whether there is no kink there.

    Differences over two steps agree but where a clamp of a ReLU's kind opens or closes.
    """
    here = x.copy()

    def central(step: float) -> Any:
        x[...] = here + step * way
        high = value().copy()  # it may be a view of x
        x[...] = here - step * way
        low = value().copy()
        x[...] = here
        return (g * (high - low)).sum() / (2 * step)

    far, near = central(2 * STEP), central(STEP)
    return (4 * near - far) / 3, abs(far - near)


def check(
    function: Callable[..., Any], arguments: Any, directions: int = 2, entries: int = 2
) -> list[Any]:
    """Values are the same bits in both precisions, and every gradient is that of differences.

    Each array is moved along random directions and by single entries. Returns the gradients.
    """
    single = mapped(lambda x: x.astype("f4"), arguments)
    g = np.random.default_rng(9).standard_normal(function(*single).shape)
    value, low = taped(function, single, g.astype("f4"))
    assert value.dtype == np.float32 and np.array_equal(value, function(*single))
    assert {x.dtype for x in low if x is not None} == {np.dtype("f4")}
    arguments = mapped(lambda x: x.astype("f8"), arguments)
    value, gradients = taped(function, arguments, g)
    assert value.dtype == np.float64 and np.array_equal(value, function(*arguments))
    for rough, gradient in zip(low, gradients, strict=True):
        size = np.abs(gradient).max() if gradient is not None else 0
        assert size == 0 or np.abs(rough - gradient).max() < 1e-4 * size
    for n, (x, gradient) in enumerate(zip(floats(arguments), gradients, strict=True)):
        differs(n, lambda: function(*arguments), x, gradient, g, directions, entries)
    return gradients


def differs(
    n: int,
    value: Callable[[], Array],
    x: Array,
    gradient: Array | None,
    g: Array,
    directions: int,
    entries: int,
) -> None:
    """Fail unless the gradient of sum(g * value()) by x, argument n, is that of differences."""
    rng = np.random.default_rng(n)
    size = 0.0 if gradient is None else float(np.sqrt(np.square(gradient).mean()))
    for number in range(directions + entries):
        for _ in range(20):
            way = np.zeros(x.shape)
            if number < directions:
                way = rng.standard_normal(x.shape)
                way /= np.linalg.norm(way)
            else:
                way.flat[rng.integers(way.size)] = 1
            slope, kink = along(value, x, way, g)
            if kink <= 1e-6 * max(size, abs(slope)):
                break
        else:
            raise AssertionError(f"argument {n}: a kink everywhere")
        got = 0.0 if gradient is None else (gradient * way).sum()
        error = abs(got - slope) / (max(size, abs(slope)) or 1)
        assert error <= TOLERANCE, f"argument {n}, way {number}: {got} is not {slope} ({error:.1e})"


@pytest.mark.parametrize("name", cases(["drafts"], ["tiny", "odd", "no_extras"]))
def test_every_tensor_of_a_model_has_the_gradient_of_differences(name: str) -> None:
    its, base = model(name), Keep()
    tensors = [x.copy() for x in its.tensors.values()]
    its.run(*tensors, tap=base)

    def value() -> Array:
        tap = Keep()
        logits = its.run(*tensors, tap=tap)
        assert tap.ids() == base.ids()
        return logits

    g = np.random.default_rng(9).standard_normal(its.run(*tensors).shape)
    gradients = taped(its.run, tuple(tensors), g)[1]
    for n, (tensor, x, gradient) in enumerate(zip(its.tensors, tensors, gradients, strict=True)):
        assert (gradient is None) == tensor.endswith("router_bias"), tensor
        differs(n, value, x, gradient, g, directions=1, entries=1)


# Components, each by itself: more directions, and single entries. Rotation tables are varied too.


def weights_of(name: str) -> Any:
    its = model(name)
    return assemble(its.config, lambda tensor, shape: its.tensors[tensor])


def table_of(spec: LayerSpec, count: int = T) -> Rotation:
    return rotations([spec], 0, count, "f8")[spec.rope]


FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "rms_norm": (lambda x, w: rms_norm(x, w, 1e-5), some(T, 8), some(8, seed=1)),
    "rms_norm of heads": (lambda x, w: rms_norm(x, w, 1e-2), some(T, 3, 4), some(4, seed=1)),
    "sigmoid": (sigmoid, 5 * some(T, 7)),
    "silu": (silu, 5 * some(T, 7)),
    "softmax": (softmax, 3 * some(2, T, 5)),
    "linear": (linear.linear, some(2, T, 5), some(3, 5, seed=1)),
    "embed": (lambda w: embed([3, 0, 3, 3, 1], w, w.dtype), some(4, 5)),
    "rotate": (lambda x, cos, sin: rotate(x, Rotation(cos, sin)), some(5, 3, 8), *some(2, 5, 4)),
    "rotate a part": (lambda x, *t: rotate(x, Rotation(*t)), some(5, 3, 8), *some(2, 5, 2)),
    "attend": (lambda q, k, v: attend(q, whole(k, v), 0, None), *some(3, T, 2, 4)),
    "attend in a window": (lambda q, k, v: attend(q, whole(k, v), 0, 3), *some(3, T, 2, 4)),
    "attend in groups": (
        lambda q, k, v: attend(q, whole(k, v), 0, 3),
        some(T, 6, 4),
        *some(2, T, 2, 4, seed=1),
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradients_of_a_function(name: str) -> None:
    function, *arguments = FUNCTIONS[name]
    check(function, tuple(arguments), directions=4, entries=8)


def test_at_zero_sigmoid_and_silu_have_their_own_slope() -> None:
    zeros, ones = np.array([0.0, -0.0]), np.ones(2)
    assert taped(sigmoid, (zeros,), ones)[1][0].tolist() == [0.25, 0.25]
    assert taped(silu, (zeros,), ones)[1][0].tolist() == [0.5, 0.5]


def test_a_score_that_is_masked_has_a_gradient_of_zero() -> None:
    x = np.array([[1.0, 2, 3], [4, 5, 6]])
    mask = np.array([[True, False, True], [False, True, False]])
    with np.errstate(all="raise"):
        gradient = taped(
            lambda x: softmax(np.where(mask, x, -np.inf)), (x,), np.array([[1.0, 2, 3]] * 2)
        )[1][0]
    assert not gradient[~mask].any() and gradient[0, [0, 2]].all() and not gradient[1].any()


@pytest.mark.parametrize("limit", [None, 0.7])
def test_gradients_of_swiglu(limit: float | None) -> None:
    x, weights = some(T, 6), mlp.MLPWeights(some(7, 6), some(7, 6, seed=1), some(6, 7))
    gate, up = silu(x @ weights.gate_proj.T), x @ weights.up_proj.T
    for held in (gate > 0.7, up > 0.7, up < -0.7, (gate < 0.7) & (abs(up) < 0.7)):
        assert held.any()
    check(lambda x, w: swiglu(x, w, limit), (x, weights), directions=4, entries=8)


@pytest.mark.parametrize("has_gate", [True, False])
@pytest.mark.parametrize("name, n", [("tiny", 0), ("tiny", 1), ("odd", 1), ("no_extras", 0)])
def test_gradients_of_attention(name: str, n: int, has_gate: bool) -> None:
    spec, own = model(name).config.layers[n], weights_of(name).layers[n].self_attn
    assert spec.has_gate and (spec.window is None) == (n == 0) and T > (spec.window or 0)
    own = own if has_gate else own._replace(g_proj=None)
    x = some(T, model(name).config.hidden_size)
    check(lambda x, w, table: self_attention(x, w, spec, table, 1e-5), (x, own, table_of(spec)))


MOE = [("tiny", 2), ("tiny", 7), ("odd", 2), ("no_extras", 1), ("drafts", 3)]


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("name, n", MOE)
def test_gradients_of_routed_experts(name: str, n: int, has_bias: bool) -> None:
    spec, own = model(name).config.layers[n], weights_of(name).layers[n].moe
    own = own if has_bias else own._replace(router_bias=None)
    x, seen = clear(lambda x, tap: moe.moe(x, own, spec.moe, spec.swiglu_limit, tap), name)
    chosen = np.bincount(seen["ids"].ravel(), minlength=spec.moe.experts)

    def run(x: Any, w: Any) -> Any:
        tap = Keep()
        y = moe.moe(x, w, spec.moe, spec.swiglu_limit, tap)
        assert np.array_equal(tap.seen["ids"], seen["ids"])
        return y

    gradients = check(run, (x, own), directions=3, entries=4)
    assert (gradients[2] is None) if has_bias else len(gradients) == 5
    for stack in gradients[-3:]:  # an expert that nobody chose has nothing to learn from
        assert np.array_equal(np.abs(stack).max(axis=(1, 2)) > 0, chosen > 0)
    assert chosen.min() < chosen.max()


def clear(run: Callable[[Array, Keep], Any], name: str) -> tuple[Array, dict[str, Array]]:
    """States where no small step changes who is chosen, and what a tap has seen there."""
    rng = np.random.default_rng(0)
    while True:
        x, tap = rng.standard_normal((T, model(name).config.hidden_size)), Keep()
        run(x, tap)
        margins = [x.min() for tensor, x in tap.seen.items() if tensor.endswith("margin")]
        if min(margins, default=1) > 10 * STEP:
            return x, tap.seen


BLOCKS = [("tiny", n) for n in (0, 1, 4, 6, 7)] + [("odd", 0), ("odd", 2), ("drafts", 1)]


@pytest.mark.parametrize("name, n", BLOCKS)
def test_gradients_of_a_block(name: str, n: int) -> None:
    spec, own = model(name).config.layers[n], weights_of(name).layers[n]
    table = table_of(spec)
    x, seen = clear(lambda x, tap: block(x, own, spec, table, 1e-5, tap=tap), name)

    def run(x: Any, w: Any, table: Any) -> Any:
        tap = Keep()
        y = block(x, w, spec, table, 1e-5, tap=tap)
        assert spec.moe is None or np.array_equal(tap.seen["moe.ids"], seen["moe.ids"])
        return y

    check(run, (x, own, table), directions=1, entries=2)


def test_gradients_of_a_draft_layer() -> None:
    its, all_of_it = model("tiny"), weights_of("tiny")
    spec, own = its.config.mtp_layers[1], all_of_it.mtp[1]

    def run(x: Any, embed_tokens: Any, w: Any, table: Any) -> Any:
        hidden = mtp_depth(its.tokens, x, w, embed_tokens, spec, table, 1e-5)
        return np.concatenate((hidden, mtp_head(hidden, w, 1e-5)), axis=-1)

    x = some(T, its.config.hidden_size)
    check(run, (x, all_of_it.embed_tokens, own, table_of(spec)), directions=2, entries=2)


def test_one_array_in_two_places_has_the_sum_of_both_gradients() -> None:
    its = model("no_extras")
    tied, apart = dict(its.tensors), dict(its.tensors)
    del tied["lm_head.weight"]
    apart["lm_head.weight"] = apart["model.embed_tokens.weight"]
    config = its.config._replace(tie_word_embeddings=True)
    g = some(*its.run(*its.tensors.values()).shape)
    got = taped(its._replace(config=config, tensors=tied).run, tuple(tied.values()), g)[1]
    both = dict(zip(apart, taped(its.run, tuple(apart.values()), g)[1], strict=True))
    names = ("model.embed_tokens.weight", "lm_head.weight")
    expected = sum(both.pop(name) for name in names)
    np.testing.assert_allclose(got[0], expected, rtol=0, atol=1e-12 * np.abs(expected).max())


# What is refused: nothing may lose a gradient and say nothing.

PLAIN = np.array([[1.0, -2, 3, 0.5], [0.25, 4, -1, 2], [-3, 1.5, 0.75, -0.5]])
REFUSED: dict[str, Callable[[Any], Any]] = {
    "cumsum": np.cumsum,
    "linalg.norm": np.linalg.norm,
    "stack": lambda v: np.stack([v, v]),
    "copyto": lambda v: np.copyto(PLAIN.copy(), v),
    "einsum": lambda v: np.einsum("ij,ij", v, v),
    "dot": lambda v: np.dot(v, v.T),
    "sort": np.sort,
    "argmax": np.argmax,
    "empty_like": np.empty_like,
    "power": lambda v: v**2,
    "tanh": np.tanh,
    "maximum": lambda v: np.maximum(v, 0.0),
    "not equal": lambda v: v != v,
    "isnan": np.isnan,
    "astype": lambda v: v.astype("f4"),
    "copy": lambda v: v.copy(),
    "flat": lambda v: v.flat,
    "matmul of vectors": lambda v: v[0] @ v[1],
    "asarray": np.asarray,
    "asarray of a dtype": lambda v: np.asarray(v, np.float32),
    "array": np.array,
    "array of several": lambda v: np.array([v, v]),
    "array of numbers": lambda v: np.array([v[0, 0], v[1, 1]]),
    "float": lambda v: float(v[0, 0]),
    "assignment into an array": lambda v: PLAIN.copy().__setitem__(slice(None), v),
    "assignment of a number into an array": lambda v: PLAIN.copy().__setitem__((0, 0), v[0, 0]),
    "array += variable": lambda v: operator.iadd(PLAIN.copy(), v),
    "array *= variable": lambda v: operator.imul(PLAIN.copy(), v),
    "array @= variable": lambda v: operator.imatmul(PLAIN.copy(), v[:, :3].T),
    "out": lambda v: np.exp(v, out=PLAIN.copy()),
    "out of two": lambda v: np.add(v, 1.0, out=PLAIN.copy()),
    "out of matmul": lambda v: np.matmul(v, v.T, out=np.zeros((3, 3))),
    "out of sum": lambda v: np.sum(v, axis=0, out=np.zeros(4)),
    "out of concatenate": lambda v: np.concatenate((v, v), out=np.zeros((6, 4))),
    "reduce": np.add.reduce,
    "accumulate": np.add.accumulate,
    "outer": lambda v: np.multiply.outer(v, v),
    "at": lambda v: np.add.at(PLAIN.copy(), [0], v[0]),
    "where in a sum": lambda v: np.sum(v, where=PLAIN > 0),
    "dtype of a sum": lambda v: np.sum(v, dtype=np.float32),
    "where in a ufunc": lambda v: np.exp(v, where=PLAIN > 0),
    "dtype of a ufunc": lambda v: np.add(v, 1.0, dtype=np.float32),
    "max of all": np.max,
    "a clip's end": lambda v: np.clip(PLAIN, -1.0, v),
    "both ends of a clip": lambda v: np.clip(v, v - 1.0, v + 1.0),
    "a condition": lambda v: np.where(v, v, 0.0),
    "a sum in place of another shape": lambda v: operator.iadd(v[0], v),
    "a sum in place of another dtype": lambda v: operator.iadd(Variable(PLAIN.astype("f4")), v),
    "truth": lambda v: 1.0 if v else 0.0,
    "BF16 weight": lambda v: linear.linear(v, BF16Array(to_bf16(PLAIN.astype("f4")))),
    "weight of another dtype": lambda v: linear.linear(v, PLAIN.astype("f4")),
    "states of another dtype": lambda v: linear.linear(PLAIN.astype("f4"), v),
    "norm weight of another dtype": lambda v: rms_norm(PLAIN.astype("f4"), v[0], 1e-5),
    "attention in blocks": lambda v: attention.attend_in_blocks(
        v[:, None], whole(v[:, None], v[:, None]), 0, None
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_lose_a_gradient_is_refused_at_once(name: str) -> None:
    with pytest.raises((TypeError, ValueError, AttributeError)):
        REFUSED[name](Variable(PLAIN))


@pytest.mark.parametrize("shape", [(2,), (1, 3), (0,)])
def test_only_one_number_goes_back(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="expected one number"):
        backward(Variable(np.ones(shape)) * 2.0)


def test_what_went_back_once_does_not_go_back_again() -> None:
    x = Variable(PLAIN)
    shared = np.exp(x)
    first, second = shared.sum(), np.square(shared).sum()
    backward(first)
    for loss in (first, second):  # the way from `shared` to x is gone
        with pytest.raises(ValueError):
            backward(loss)
    assert np.array_equal(x.gradient, np.exp(PLAIN))


def test_methods_are_those_of_an_array() -> None:
    x = some(2, 3, 4)
    calls: list[Callable[[Any], Any]] = [
        lambda x: x.sum(),
        lambda x: x.sum(axis=1),
        lambda x: x.sum(axis=(0, 2), keepdims=True),
        lambda x: x.mean(axis=-1, keepdims=True),
        lambda x: x.max(axis=0),
        lambda x: x.reshape(6, 4),
        lambda x: x.reshape((4, -1)),
        lambda x: x.reshape(-1),
        lambda x: x.transpose(1, 2, 0),
        lambda x: x.transpose(),
        lambda x: x.swapaxes(0, 2),
        lambda x: x.T,
        lambda x: -x + 2.0 * x - x / 3.0,
        lambda x: 1.0 - np.float64(2) / x,
    ]
    for call in calls:
        got, expected = call(Variable(x)), call(x)
        assert got.shape == expected.shape and got.dtype == expected.dtype
        assert got.size == expected.size and np.array_equal(got.value, expected)
    assert len(Variable(x)) == 2
    made = np.zeros_like(Variable(x))
    assert isinstance(made, Variable) and not made.value.any() and made.shape == x.shape


# Assignment: a Variable's name may come to hold another value, but no value ever changes.


def test_a_changed_row_leaves_what_it_was_read_from() -> None:
    x, z = Variable(PLAIN.copy()), Variable(np.array([1.0, 2, 3, 4]))
    y = x[1]
    y += z
    y *= 2.0
    assert np.array_equal(x.value, PLAIN) and np.array_equal(y.value, 2 * (PLAIN[1] + z.value))
    backward((np.square(y) + x[1] * 10.0).sum())
    expected = np.zeros_like(PLAIN)
    expected[1] = 8 * (PLAIN[1] + z.value) + 10
    assert np.array_equal(x.gradient, expected)
    assert np.array_equal(z.gradient, 8 * (PLAIN[1] + z.value))


def test_an_assignment_does_not_reach_what_was_computed_before() -> None:
    x, row = Variable(PLAIN.copy()), Variable(np.array([1.0, 2, 3, 4]))
    y = x * 2.0
    before, view = np.square(y), y[1:]
    y[1] = row
    y[2] = 0.5
    assert np.array_equal(before.value, np.square(2 * PLAIN))
    assert np.array_equal(view.value, 2 * PLAIN[1:])
    assert np.array_equal(y.value[1], row.value) and (y.value[2] == 0.5).all()
    backward((before + y * 3.0).sum() + (view * 5.0).sum())
    expected = 8 * PLAIN
    expected[0] += 6  # the others were replaced before they were read
    expected[1:] += 10
    np.testing.assert_allclose(x.gradient, expected, rtol=1e-15)
    assert row.gradient is not None and row.gradient.tolist() == [3, 3, 3, 3]


def test_rows_that_are_added_to_again_and_again_collect_each_addition() -> None:
    rows = [np.array([0, 2]), np.array([2, 1]), np.array([2, 0])]

    def run(start: Any, *added: Any) -> Any:
        out = np.zeros_like(start)
        out[:] = start * 2.0
        for index, y in zip(rows, added, strict=True):
            out[index] += y
            out[1] += y[0] * out[2]
        return out

    arguments = (some(3, 4), *(some(2, 4, seed=n) for n in (1, 2, 3)))
    check(run, arguments, directions=4, entries=8)


def test_a_sum_under_an_old_name_differs_as_one_under_a_new_name() -> None:
    def inplace(x: Any, z: Any) -> Any:
        y = x * 1.0
        y += z
        y -= 0.5
        y /= z
        y *= y
        return y

    arguments = (some(3, 4), some(3, 4, seed=1) + 3)
    g = some(3, 4, seed=2)
    value, gradients = taped(inplace, arguments, g)
    other, expected = taped(lambda x, z: np.square((x + z - 0.5) / z), arguments, g)
    np.testing.assert_allclose(value, other, rtol=1e-14)
    for got, known in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(got, known, rtol=1e-13)


# Around the model: large weights, threads, memory, several losses.


def test_large_weights_differentiate_too(monkeypatch: pytest.MonkeyPatch) -> None:
    its = model("odd")
    tensors = tuple(its.tensors.values())
    g = some(*its.run(*tensors).shape)
    expected = taped(its.run, tensors, g)
    for module in (linear, moe):
        assert module.LARGE == parallel.LARGE
        monkeypatch.setattr(module, "LARGE", 1)
    value, gradients = taped(its.run, tensors, g)
    assert np.array_equal(value, expected[0])
    for got, known in zip(gradients, expected[1], strict=True):
        assert (got is None and known is None) or np.array_equal(got, known)
    np.testing.assert_allclose(value, its.run(*tensors), rtol=0, atol=1e-12 * np.abs(value).max())


def test_many_scores_are_held_at_once_for_a_tap_that_wants_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    its = model("odd")
    expected = its.run(*its.tensors.values())
    monkeypatch.setattr(attention, "LARGE", 1)
    got = its.run(*map(Variable, its.tensors.values()), tap=Keep())
    assert np.array_equal(got.value, expected)
    with pytest.raises(TypeError):
        its.run(*map(Variable, its.tensors.values()))


def test_threads_with_a_text_each_give_what_one_alone_gives() -> None:
    its = model("drafts")
    tensors, rng = tuple(its.tensors.values()), np.random.default_rng(0)
    texts = [rng.integers(its.config.vocab_size, size=T).tolist() for _ in range(8)]
    g = some(*its.run(*tensors).shape)

    def gradients(text: list[int]) -> list[Any]:
        return taped(its._replace(tokens=text).run, tensors, g)[1]

    alone = [gradients(text) for text in texts]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(gradients, texts))
    assert not np.array_equal(alone[0][0], alone[1][0])
    for one, other in zip(alone, together, strict=True):
        for x, y in zip(one, other, strict=True):
            assert (x is None and y is None) or np.array_equal(x, y)


def test_what_lies_between_is_let_go_of() -> None:
    x = Variable(PLAIN)
    between = [np.exp(x)]
    between.append(between[0] @ between[0].T)
    between.append(np.square(between[1]))
    kept = [weakref.ref(y.value) for y in between]
    loss, nodes = between[2].sum(), [y.node for y in between]
    backward(loss)
    assert [node.gradient for node in nodes] == [None] * 3
    assert x.gradient is not None and loss.gradient is None
    del between, nodes
    assert [y() for y in kept] == [None] * 3  # nothing that still lives holds their values


def test_losses_of_their_own_add_up_and_what_had_no_part_has_no_gradient() -> None:
    x, y, z = Variable(PLAIN), Variable(PLAIN), Variable(PLAIN)
    backward((x * 2.0).sum())
    backward((x * y).sum())
    assert np.array_equal(x.gradient, 2 + PLAIN) and np.array_equal(y.gradient, PLAIN)
    assert z.gradient is None
    assert np.array_equal(x.value, y.value)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_a_gradient_that_two_receive_is_changed_for_neither(order: tuple[int, ...]) -> None:
    x, y, z = Variable(PLAIN), Variable(PLAIN), Variable(PLAIN)
    terms = ((x + y) * z, x * 5.0, x[0] * 1.0)  # of the first, one array goes back to x and y
    one, two, three = (terms[n].sum() for n in order)
    backward(one + two + three)
    expected = PLAIN + 5
    expected[0] += 1
    assert np.array_equal(x.gradient, expected)
    assert np.array_equal(y.gradient, PLAIN) and np.array_equal(z.gradient, 2 * PLAIN)


def test_gradients_are_the_same_bit_for_bit_each_time() -> None:
    its = model("drafts")
    tensors, kept = tuple(its.tensors.values()), list[Any]()
    g = some(*its.run(*tensors).shape)
    first = taped(its.run, tensors, g)[1]
    for _ in range(3):  # with memory laid out otherwise
        kept.append([Variable(x) for x in tensors[: 7 * len(kept)]])
        for one, other in zip(first, taped(its.run, tensors, g)[1], strict=True):
            assert (one is None and other is None) or np.array_equal(one, other)
