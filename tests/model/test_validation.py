"""Every public function refuses what it cannot mean, by name, as the command line does."""

import random
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import minstep
from minstep import InputError, Sampling
from minstep.cache import FullCache, WindowCache, check_caches, new_caches
from minstep.cli.main import main
from minstep.generate import prefill
from minstep.moe import Choice, experts
from minstep.mtp import Drafter
from minstep.sampling import LIMITS, acceptance, distribution, draw, log_probabilities, verify
from minstep.text.continuation import Continuation
from minstep.validation import check_number, check_prompt

CONFIG = minstep.load_config(minstep.find_config("drafts"))
WEIGHTS = minstep.random_weights(CONFIG, np.random.default_rng(0))
PROMPT = [5, 1, 0, 3, 2, 6]
HIDDEN = minstep.decoder(PROMPT, WEIGHTS, CONFIG)
LOGITS = np.array([1.0, 0.0, 2.0])
RNG = np.random.default_rng(0)
HUGE = 10**5000  # more digits than Python writes
NAN, INF = float("nan"), float("inf")

NO_TOKENS: list[Any] = [
    [], (), None, 5, "5,1", "", b"51", {5, 1}, {5: 1}, iter([5, 1]), [[5, 1]], [[5], [1, 2]],
    [5.0, 1.0], ["5", "1"], [None], [5, None], [True, False], [5, True], [5, 1.5], [NAN], [-1],
    [5, -1], [7], [5, 7], [2**31], [2**63], [2**64], [HUGE], [-HUGE], [5, HUGE], [5, 1j], [[]],
    object(), np.array([]), np.array(5), np.array([[5, 1]]), np.array([5.0, 1.0]), np.array([True]),
    np.array(["5"]), np.array([5, None]), np.array([7], np.uint64), np.array([-1], np.int8),
    np.array([2**64 - 1], np.uint64), np.empty((0, 3), int), np.zeros((2, 0), int),
]  # fmt: skip
TOKENS: list[Any] = [
    PROMPT, tuple(PROMPT), range(1, 7), np.array(PROMPT), np.array(PROMPT, np.uint8),
    np.array(PROMPT, np.uint64), [np.int32(5), 1], [np.uint8(5)], np.array(PROMPT * 2)[::2],
    np.array(PROMPT, ">i4"), [5],
]  # fmt: skip
NO_COUNTS: list[Any] = [
    -1,
    -2,
    1.0,
    1.5,
    NAN,
    INF,
    "1",
    True,
    [1],
    -HUGE,
    np.float64(1),
    np.array([1, 2]),
]
NO_FLOATS: list[Any] = [
    None, "", "f8x", int, bool, np.float16, "float16", np.int32, np.complex64, ">f4", object,
    3, [], np.longdouble if np.longdouble(1).dtype != np.float64 else "U3",
]  # fmt: skip


def steps(**changes: Any) -> list[int]:
    arguments: dict[str, Any] = {"rng": np.random.default_rng(0), "max_tokens": 2, "prompt": PROMPT}
    arguments |= {"weights": WEIGHTS, "config": CONFIG} | changes
    tokens = [token for step in minstep.steps(**arguments) for token in step.tokens]
    assert list(minstep.generate(**arguments | {"rng": np.random.default_rng(0)})) == tokens
    return tokens


def prefilled(**changes: Any) -> None:
    chunk, tokens = changes.get("chunk"), changes.get("tokens", PROMPT)
    caches = new_caches(CONFIG.layers, np.float32, 3, 9)
    prefill(
        tokens,
        WEIGHTS,
        CONFIG,
        caches,
        Drafter(WEIGHTS, CONFIG, 3, np.float32, 9),
        np.float32,
        chunk,
    )


def limited(name: str) -> list[Any]:
    """Numbers outside the limits of one of Sampling's, and what is no number."""
    _, holds = LIMITS[name]
    numbers = (-HUGE, -INF, -1e308, -1, -1e-9, -5e-324, 0, 0.009, 1.0001, 2, 100.1, HUGE, INF, NAN)
    return [x for x in numbers if x != x or abs(x) == INF or abs(x) > 1e308 or not holds(x)]


NO_NUMBERS: list[Any] = [None, "1", "", True, False, [1.0], 1j, np.array([1.0, 2.0]), object()]
NO_GENERATORS: list[Any] = [
    None, 0, "0", np.random, np.random.default_rng, np.random.Generator, np.random.PCG64(0),
    np.random.RandomState(0), random, random.Random(0),
]  # fmt: skip


def other_weights() -> Iterator[Any]:
    """Weights with a part cut off, left out or added: NumPy would stretch some of them."""
    layer = WEIGHTS.layers[0]
    attention, moe = layer.self_attn, WEIGHTS.layers[2].moe
    assert moe
    for tensor in (WEIGHTS.norm, np.asarray(WEIGHTS.norm)[None]):
        yield WEIGHTS._replace(norm=tensor[:1])
    yield WEIGHTS._replace(norm=np.asarray(WEIGHTS.norm).tolist())
    yield WEIGHTS._replace(embed_tokens=np.asarray(WEIGHTS.embed_tokens)[:, :1])
    yield WEIGHTS._replace(lm_head=WEIGHTS.lm_head[:-1])
    for layers in ((), WEIGHTS.layers[:-1], (*WEIGHTS.layers, layer), [*WEIGHTS.layers]):
        yield WEIGHTS._replace(layers=layers)
    yield WEIGHTS._replace(mtp=(*WEIGHTS.mtp, WEIGHTS.mtp[0]))
    for change in (
        layer._replace(input_layernorm=layer.input_layernorm[:1]),
        layer._replace(self_attn=attention._replace(q_norm=attention.q_norm[:1])),
        layer._replace(self_attn=attention._replace(g_proj=None)),
        layer._replace(mlp=None),
        layer._replace(moe=moe),
    ):
        yield WEIGHTS._replace(layers=(change, *WEIGHTS.layers[1:]))
    yield WEIGHTS._replace(
        mtp=(WEIGHTS.mtp[0]._replace(enorm=WEIGHTS.mtp[0].enorm[:1]), *WEIGHTS.mtp[1:])
    )


def other_configs() -> list[Any]:
    """Configs that the weights are not of."""
    gateless = tuple(spec._replace(has_gate=False) for spec in CONFIG.layers)
    return [
        *(CONFIG._replace(**{size: 40}) for size in ("hidden_size", "vocab_size")),
        CONFIG._replace(layers=CONFIG.layers[:-1]),
        CONFIG._replace(layers=CONFIG.layers[::-1]),
        CONFIG._replace(layers=gateless),
        CONFIG._replace(mtp_layers=()),
    ]


BAD_STATES: list[Any] = [
    None, 5, "x", [[0.0] * 32], HIDDEN[0], HIDDEN[None], HIDDEN[:, :-1], HIDDEN.astype(int),
    HIDDEN.astype(np.float16), HIDDEN.astype(bool), HIDDEN.astype(complex), HIDDEN.astype(str),
    HIDDEN.astype(">f4"), HIDDEN.astype(object),
]  # fmt: skip
BAD_LOGITS: list[Any] = [
    None, 5, "x", [1.0, 2.0], np.array(1.0), np.array([]), LOGITS[None], LOGITS.astype(str),
    LOGITS.astype(complex), LOGITS.astype(bool), LOGITS.astype(object), LOGITS * NAN, LOGITS - INF,
    np.array([1, INF]), np.array([NAN, 1]),
]  # fmt: skip
Case = tuple[str, Callable[[Any], Any], list[Any]]
CASES: list[Case] = [
    ("decoder", lambda x: minstep.decoder(x, WEIGHTS, CONFIG), NO_TOKENS),
    ("steps", lambda x: steps(prompt=x), NO_TOKENS),
    ("prompt", lambda x: check_prompt(x, CONFIG), NO_TOKENS),
    ("prefill", lambda x: prefilled(tokens=x), NO_TOKENS),
    ("mtp_forward", lambda x: minstep.mtp_forward(x, HIDDEN, WEIGHTS, CONFIG), NO_TOKENS),
    ("max_tokens", lambda x: steps(max_tokens=x), [*NO_COUNTS, None]),
    ("chunk", lambda x: steps(chunk=x), [*NO_COUNTS, 0]),
    ("prefill, chunk", lambda x: prefilled(chunk=x), [*NO_COUNTS, 0]),
    ("num_draft_tokens", lambda x: steps(num_draft_tokens=x), [*NO_COUNTS, 4, HUGE]),
    ("rng", lambda x: steps(rng=x), NO_GENERATORS),
    ("how", lambda x: steps(how=x), [None, 1.0, "greedy", (1.0, 0, 1.0, 0.0, 1.0), {}]),
    ("dtype", lambda x: steps(dtype=x), NO_FLOATS),
    ("decoder, dtype", lambda x: minstep.decoder(PROMPT, WEIGHTS, CONFIG, x), NO_FLOATS),
    ("slack", lambda x: new_caches(CONFIG.layers, "f4", x, 1), [*NO_COUNTS, None]),
    ("longest", lambda x: new_caches(CONFIG.layers, "f4", 0, x), [*NO_COUNTS, None, 0]),
    ("room", lambda x: new_caches(CONFIG.layers, "f4", 0, 1, x), [*NO_COUNTS, None]),
    ("logprobs", lambda x: Continuation(iter(()), None, x), [*NO_COUNTS, None]),
    ("random_weights", lambda x: minstep.random_weights(CONFIG, x), NO_GENERATORS),
    ("weights", lambda x: steps(weights=x), [None, WEIGHTS.layers, *other_weights()]),
    ("config of others", lambda x: steps(config=x), other_configs()),
    ("config", minstep.load_config, [None, 5, 1.5, b"x", [], "", "nowhere"]),
    ("head", lambda x: minstep.head(x, WEIGHTS, CONFIG), BAD_STATES),
    (
        "mtp_forward, states",
        lambda x: minstep.mtp_forward(PROMPT, x, WEIGHTS, CONFIG),
        [*BAD_STATES, HIDDEN[:3], np.concatenate([HIDDEN, HIDDEN]), HIDDEN[:0]],
    ),
    ("distribution", lambda x: distribution(x, [], Sampling(1.0)), BAD_LOGITS),
    ("greedy distribution", lambda x: distribution(x, [], Sampling()), BAD_LOGITS),
    ("log_probabilities", log_probabilities, BAD_LOGITS),
    (
        "seen",
        lambda x: distribution(LOGITS, x, Sampling(1.0, repetition_penalty=2.0)),
        [[3], [-1], [0, 3], ["0"], [0.0], [[0, 1]], [None], [True], [HUGE], "01"],
    ),
    (
        "draw",
        lambda x: draw(np.array(x), np.random.default_rng(0)),
        [[], [0.0, 0.0], [NAN, 1.0], [1.0, NAN], [INF, 1.0], [-0.5, 1.5], [-1.0], [1.5, -0.5]],
    ),
    (
        "acceptance",
        lambda x: acceptance(x[0], np.array(x[1]), np.array(x[2])),
        [
            (0, [0.0, 1.0], [0.5, 0.5]), (2, [0.5, 0.5], [0.5, 0.5]), (-1, [0.5, 0.5], [0.5, 0.5]),
            (0, [1.0], [0.5, 0.5]), (0, [0.5, 0.5], [1.0]), (0, [-0.5, 1.5], [0.5, 0.5]),
        ],
    ),
    (
        "verify",
        lambda x: verify(x[0], x[1], np.array([LOGITS] * x[2]), [], Sampling(1.0), RNG),
        [([], [], 0), ([1], [], 2), ([], [LOGITS], 1), ([1], [np.eye(3)[1]], 1)],
    ),
    ("top_k", lambda x: Sampling(top_k=x), [*NO_COUNTS, None]),
    *(
        (name, lambda x, name=name: Sampling(**{name: x}), [*limited(name), *NO_NUMBERS])  # type: ignore[misc]
        for name in LIMITS
    ),
]  # fmt: skip


def each_case() -> Iterator[Any]:
    for name, function, values in CASES:
        for n, value in enumerate(values):
            yield pytest.param(function, value, id=f"{name} {n}")


@pytest.mark.parametrize(("function", "value"), [*each_case()])
def test_what_cannot_be_meant_is_refused(function: Callable[[Any], Any], value: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(InputError) as caught:
            function(value)
    assert "expected" in str(caught.value) or "cannot be read" in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("tokens", TOKENS, ids=repr)
def test_any_row_of_integers_is_a_prompt(tokens: Any) -> None:
    plain = [int(token) for token in tokens]
    assert check_prompt(tokens, CONFIG) == plain
    assert all(type(token) is int for token in check_prompt(tokens, CONFIG))
    assert steps(prompt=tokens) == steps(prompt=plain)
    hidden = minstep.decoder(tokens, WEIGHTS, CONFIG)
    assert np.array_equal(hidden, minstep.decoder(plain, WEIGHTS, CONFIG))
    for ours, theirs in zip(
        minstep.mtp_forward(tokens, hidden, WEIGHTS, CONFIG),
        minstep.mtp_forward(plain, hidden, WEIGHTS, CONFIG),
        strict=True,
    ):
        assert np.array_equal(ours, theirs)


def test_numbers_of_numpy_are_numbers() -> None:
    how = Sampling(np.float32(0.5), np.int64(3), np.float64(0.9), np.float16(0.25), np.int8(2))  # type: ignore[arg-type]
    options = {"max_tokens": np.int64(3), "chunk": np.uint8(2), "num_draft_tokens": np.int16(1)}
    assert steps(how=how, **options) == steps(
        how=Sampling(0.5, 3, 0.9, 0.25, 2), max_tokens=3, chunk=2, num_draft_tokens=1
    )
    assert steps(max_tokens=np.int64(0)) == [] and Sampling(1, top_k=HUGE).top_k == HUGE
    assert steps(how=Sampling(1.0, top_k=HUGE)) == steps(how=Sampling(1.0))
    assert steps(dtype="float64") == steps(dtype=np.dtype("f8"))


FLAGS = {"temperature": "temp", "top_p": "top-p", "min_p": "min-p"}


@pytest.mark.parametrize("name", LIMITS)
@pytest.mark.parametrize(
    "value", [-1, -1e-9, 0, 0.009, 0.01, 0.5, 1, 1.0001, 2, 100, 101, INF, NAN]
)
def test_the_command_line_and_python_have_the_same_limits(
    name: str, value: float, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        check_number(name, value, LIMITS[name])
        good = True
    except InputError:
        good = False
    flag = f"--{FLAGS.get(name, name.replace('_', '-'))}"
    arguments = ["generate", "--tokens", "5", "--max-tokens", "0", f"{flag}={value}"]
    try:
        code = main(arguments)
    except SystemExit as exit:
        code = int(exit.code or 0)
    assert code == (0 if good else 2), capsys.readouterr().err


def test_caches_of_another_dtype_another_layer_or_unequal_ends_are_refused() -> None:
    def fresh(dtype: str = "float32") -> list[FullCache]:
        return new_caches(CONFIG.layers, dtype, 0, 9)

    def refused(caches: Any, expected: str, dtype: str = "float32") -> None:
        with pytest.raises(InputError, match=expected):
            minstep.decoder(PROMPT, WEIGHTS, CONFIG, dtype, caches)

    refused(fresh("float64"), "model.layers.0 holds 0 positions in float64, expected 0 in float32")
    refused(fresh(), "in float32, expected 0 in float64", "float64")
    refused(fresh()[:-1], "3 caches, expected one for each of 4")
    refused([*fresh(), *fresh()], "8 caches")
    refused(fresh()[::-1], "another kind of layer")
    uneven = fresh()
    minstep.decoder(PROMPT, WEIGHTS, CONFIG, caches=uneven)
    uneven[2].truncate(3)
    refused(uneven, "model.layers.2 holds 3 positions in float32, expected 6")
    for n, spec in enumerate(CONFIG.layers):
        narrow = fresh()
        narrow[n] = WindowCache(spec.groups, spec.head_dim, "f4", (spec.window or 9) - 1)
        refused(narrow, f"model.layers.{n} is of another kind of layer")
        heads = fresh()
        heads[n] = FullCache(spec.groups + 1, spec.head_dim, "f4")
        refused(heads, f"model.layers.{n} is of another kind of layer")
    every = [FullCache(spec.groups, spec.head_dim, "f4") for spec in CONFIG.layers]
    check_caches(every, CONFIG.layers, np.float32)  # one that forgets nothing suits any layer
    assert np.allclose(minstep.decoder(PROMPT, WEIGHTS, CONFIG, caches=every), HIDDEN, atol=1e-5)


def test_the_context_is_the_end_with_caches_and_without() -> None:
    short = CONFIG._replace(max_positions=len(PROMPT))
    caches = new_caches(short.layers, "f4", 0, 9)
    assert len(minstep.decoder(PROMPT, WEIGHTS, short, caches=caches)) == len(PROMPT)
    with pytest.raises(InputError, match="7 positions, expected at most 6"):
        minstep.decoder([1], WEIGHTS, short, caches=caches)
    with pytest.raises(InputError, match="7 positions, expected at most 6"):
        minstep.decoder([*PROMPT, 1], WEIGHTS, short)


@pytest.mark.parametrize("few", [0, 1 << 30])
@pytest.mark.parametrize("bad", [[[0, 8]], [[-1, 3]], [[0, 1], [2, 1000]], [[2**40, 2**41]]])
def test_an_expert_that_there_is_not_is_refused_however_experts_run(
    bad: list[list[int]], few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minstep.moe.FEW", few)
    moe = WEIGHTS.layers[2].moe
    assert moe
    x = np.ones((len(bad), CONFIG.hidden_size), np.float32)
    choice = Choice(np.array(bad), np.ones((len(bad), 2), np.float32))
    with pytest.raises(InputError, match="are chosen, expected 0 to 7"):
        experts(x, moe, choice, None)
