"""Every rule of the tape against central differences, in float64; kinks; parts that add up."""

import itertools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest

from minstep.tap import Array
from minstep.train.tape import RULES, STEPS, Part, Variable, add_part, backward

TOLERANCE = 1e-9  # of the largest slope
STEP = 2**-9


def some(*shape: int, seed: int = 0) -> Array:
    """Numbers of either sign, none near another or near 0."""
    rng, size = np.random.default_rng(seed), int(np.prod(shape))
    spread = np.linspace(-2, 2, 2 * size + 1)[1::2] + 0.013 * (seed + 1) / (size or 1)
    return np.asarray(rng.permutation(spread).reshape(shape))


def positive(*shape: int, seed: int = 0) -> Array:
    return np.asarray(np.abs(some(*shape, seed=seed)) + 0.5)


def mapped(act: Callable[[Array], Any], x: Any) -> Any:
    """Arguments with `act` of every float array in its place, in sequences too."""
    if isinstance(x, (tuple, list)):
        parts = [mapped(act, y) for y in x]
        return type(x)(*parts) if hasattr(x, "_fields") else type(x)(parts)
    return act(x) if isinstance(x, np.ndarray) and x.dtype.kind == "f" else x


def floats(x: Any) -> list[Any]:
    """The float arrays among arguments."""
    found: list[Any] = []
    mapped(found.append, x)
    return found


def taped(function: Callable[..., Any], arguments: Any, g: Array) -> tuple[Array, list[Any]]:
    """The value of a function on the tape, and the gradients of sum(g * value)."""
    variables: list[Variable] = []

    def variable(x: Array) -> Variable:
        variables.append(Variable(x))
        return variables[-1]

    y = function(*mapped(variable, arguments))
    backward((y * g).sum())
    return y.value, [variable.gradient for variable in variables]


def numerical(value: Callable[[], Array], x: Array, g: Array, step: float = STEP) -> Array:
    """The gradient of sum(g * value()) by x, an entry at a time: the error is of order step ** 4.

    Source: Richardson's extrapolation of central differences.
    """
    slopes = np.empty_like(x)
    for index in np.ndindex(x.shape):
        here = x[index]

        def central(step: float, index: Any = index, here: Any = here) -> Any:
            x[index] = here + step
            high = value().copy()  # it may be a view of x
            x[index] = here - step
            low = value().copy()
            x[index] = here
            return (g * (high - low)).sum() / (2 * step)

        slopes[index] = (4 * central(step / 2) - central(step)) / 3
    return slopes


def check(function: Callable[..., Any], arguments: Any) -> None:
    """Values on the tape are those off it, and gradients those of central differences."""
    arguments = mapped(np.copy, arguments)
    expected = np.asarray(function(*arguments))
    g = some(*expected.shape, seed=9)
    value, gradients = taped(function, arguments, g)
    assert value.dtype == expected.dtype and np.array_equal(value, expected)
    for x, gradient in zip(floats(arguments), gradients, strict=True):
        slopes = numerical(lambda: function(*arguments), x, g)
        assert gradient.shape == x.shape and gradient.dtype == x.dtype
        error = np.abs(gradient - slopes).max(initial=0)
        assert error <= TOLERANCE * np.abs(slopes).max(initial=1e-3), f"off by {error:.1e}"


class Case(NamedTuple):
    """A call of a function that has a rule. Float arrays among the arguments are variables."""

    function: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any] = {}

    def run(self, *arguments: Any) -> Any:
        return self.function(*arguments, **self.options)


UNARY = (np.negative, np.exp, np.log, np.sqrt, np.square, np.absolute)
BINARY = (np.add, np.subtract, np.multiply, np.divide, np.minimum)
PAIRS: list[tuple[Any, Any]] = [
    (some(3, 4), positive(3, 4, seed=1)),
    (some(3, 4), positive(3, 1, seed=1)),
    (some(4), positive(2, 3, 4, seed=1)),
    (some(2, 1, 4), positive(3, 1, seed=1)),
    (some(1, 1), positive(3, 4, seed=1)),
    (some(), positive(3, 4, seed=1)),
    (some(3, 4), positive(seed=1)),
    (some(), positive(seed=1)),
    (some(3, 4), 0.7),
    (0.7, positive(3, 4)),
    (3, positive(2)),
    (some(3, 4), np.float64(0.7)),
    (np.float64(0.7), positive(3, 4)),
    (some(0, 4), positive(4)),
    (some(0, 1), positive(1, 4)),
    (some(2, 0), 0.7),
]
MASK = np.array([[True, False, True, False], [False] * 4, [True] * 4])
ROWS = np.array([[2, 0, 0], [3, 3, 1]])
CASES = [
    *(Case(function, (positive(*shape),)) for function in UNARY for shape in [(3, 4), (), (0, 2)]),
    *(Case(function, (some(3, 4),)) for function in UNARY if function not in (np.log, np.sqrt)),
    *(Case(function, pair) for function in BINARY for pair in PAIRS),
    Case(np.matmul, (some(3, 4), some(4, 2, seed=1))),
    Case(np.matmul, (some(2, 3, 4), some(2, 4, 2, seed=1))),
    Case(np.matmul, (some(2, 3, 4), some(4, 2, seed=1))),
    Case(np.matmul, (some(3, 4), some(2, 4, 2, seed=1))),
    Case(np.matmul, (some(2, 1, 3, 2), some(3, 2, 2, seed=1))),
    Case(np.matmul, (some(0, 4), some(4, 2, seed=1))),
    Case(np.sum, (some(2, 3, 4),)),
    *(Case(np.sum, (some(2, 3, 4),), {"axis": axis}) for axis in (0, -1, (0, 2), (-1, 1), ())),
    *(Case(np.sum, (some(2, 3, 4),), {"axis": n, "keepdims": True}) for n in (None, 1, (0, -1))),
    *(Case(np.sum, (some(*shape),), {"axis": 0}) for shape in [(0, 3), (5,)]),
    Case(np.mean, (some(2, 3, 4),)),
    *(Case(np.mean, (some(2, 3, 4),), {"axis": axis}) for axis in (0, -1, (0, 2))),
    *(Case(np.mean, (some(2, 3, 4),), {"axis": n, "keepdims": True}) for n in (None, 1, -1)),
    *(Case(np.max, (some(2, 3, 4),), {"axis": axis}) for axis in (0, 1, -1)),
    *(Case(np.max, (some(2, 3, 4),), {"axis": n, "keepdims": True}) for n in (0, -1)),
    Case(np.max, (some(5),), {"axis": 0}),
    Case(np.take_along_axis, (some(2, 4), ROWS), {"axis": -1}),
    Case(np.take_along_axis, (some(4, 3), ROWS), {"axis": 0}),
    Case(np.take_along_axis, (some(2, 4, 3), ROWS[:, None]), {"axis": 1}),
    Case(np.take_along_axis, (some(2, 4), ROWS - 4), {"axis": 1}),
    Case(np.where, (MASK, some(3, 4), some(3, 4, seed=1))),
    Case(np.where, (MASK, some(4), some(3, 1, seed=1))),
    Case(np.where, (MASK[0], some(3, 4), some(seed=1))),
    Case(np.where, (MASK, 1, some(3, 4))),
    Case(np.where, (MASK, some(3, 4), 0.5)),
    *(Case(np.clip, (some(*shape), -0.71, 1.3)) for shape in [(3, 4), (), (0, 2)]),
    *(Case(np.concatenate, ((some(2, 3), some(2, 3, seed=1)),), {"axis": n}) for n in (0, 1, -1)),
    Case(np.concatenate, ([some(2), some(0), some(3, seed=1)],)),
    Case(np.concatenate, ((some(2, 1, 2), some(2, 4, 2, seed=1)),), {"axis": -2}),
    *(Case(np.reshape, (some(2, 3, 4), shape)) for shape in [(6, 4), (2, -1), (24,), -1]),
    Case(np.reshape, (some(1), ())),
    Case(np.transpose, (some(2, 3, 4),)),
    *(Case(np.transpose, (some(2, 3, 4), axes)) for axes in [(1, 2, 0), (2, 0, 1), (0, -1, 1)]),
    *(Case(np.swapaxes, (some(2, 3, 4), *axes)) for axes in [(0, 1), (2, 0), (-1, -2)]),
]


def name_of(case: Case) -> str:
    shapes = "-".join(str(np.shape(x)).replace(" ", "") for x in floats(case.arguments))
    return f"{case.function.__name__}{shapes}{case.options or ''}".replace(" ", "")


def test_every_rule_has_a_case() -> None:
    assert {case.function for case in CASES} == {*RULES}


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_the_gradient_is_that_of_central_differences(case: Case) -> None:
    check(case.run, case.arguments)


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_an_argument_that_is_no_variable_changes_no_other_gradient(case: Case) -> None:
    g = some(*np.shape(case.run(*case.arguments)), seed=9)
    together = taped(case.run, case.arguments, g)[1]
    for n, gradient in enumerate(together):
        number, alone = itertools.count(), Variable(floats(case.arguments)[n])
        mixed = mapped(lambda x: alone if next(number) == n else x, case.arguments)  # noqa: B023
        backward((case.run(*mixed) * g).sum())
        assert alone.gradient is not None and np.array_equal(alone.gradient, gradient)


# A scalar of NumPy's has a dtype that spreads, one of Python's has none.
SINGLE = [case for case in CASES if np.float64 not in map(type, case.arguments)]


@pytest.mark.parametrize("case", SINGLE, ids=name_of)
def test_float32_stays_float32(case: Case) -> None:
    single = mapped(lambda x: x.astype("f4"), case.arguments)
    expected = np.asarray(case.run(*single))
    g = some(*expected.shape, seed=9)
    value, gradients = taped(case.run, single, g.astype("f4"))
    assert value.dtype == expected.dtype == np.float32 and np.array_equal(value, expected)
    for got, double in zip(gradients, taped(case.run, case.arguments, g)[1], strict=True):
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, double, rtol=0, atol=1e-5 * (1 + np.abs(g).sum()))


TWICE: dict[str, Callable[..., Any]] = {
    "product": lambda x: x * x,
    "quotient": lambda x: x / (x * x + 1.0),
    "matrix": lambda x: x @ x.swapaxes(0, 1),
    "difference": lambda x: x - x,
    "itself and its row": lambda x: x * x[0] - x[1:2] * x,
    "both branches": lambda x: np.where(MASK, x, x * x),
    "concatenated": lambda x: np.concatenate((x, 2.0 * x, x)) * np.concatenate((x, x, x)),
    "centred": lambda x: x - x.mean(axis=-1, keepdims=True),
    "shifted": lambda x: np.exp(x - x.max(axis=-1, keepdims=True)),
    "three deep": lambda x: np.square(np.square(x) + x) + x,
}


@pytest.mark.parametrize("name", TWICE)
def test_what_several_uses_send_back_adds_up(name: str) -> None:
    check(TWICE[name], (some(3, 4),))


@pytest.mark.parametrize("step", sorted(STEPS, key=str), ids=lambda step: step.__name__)
def test_a_step_gives_a_plain_array(step: Any) -> None:
    a, b = some(3, 4), some(3, 4, seed=1)
    arguments = (a, b) if getattr(step, "nin", 1) == 2 else (a,)
    got = step(*map(Variable, arguments))
    assert type(got) is np.ndarray and np.array_equal(got, step(*arguments))
    if len(arguments) == 2:
        assert type(step(a, Variable(b))) is type(step(Variable(a), 0.5)) is np.ndarray


def slope(function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """The gradient of the sum of what a function gives."""
    y = function(*mapped(lambda x: x, arguments))
    return taped(function, arguments, np.ones(np.shape(y)))[1]


def test_kinks_have_the_slope_that_their_rule_states() -> None:
    zeros = np.array([0.0, -0.0])
    assert slope(np.absolute, zeros)[0].tolist() == [1, 1]
    a, b = np.array([1.0, 2, 3]), np.array([2.0, 2, 2])
    assert [x.tolist() for x in slope(np.minimum, a, b)] == [[1, 1, 0], [0, 0, 1]]
    assert slope(np.minimum, a, 2.0)[0].tolist() == [1, 1, 0]
    ties = np.array([[3.0, 1, 3, 3], [5, 5, 5, 5]])
    for keepdims in (False, True):
        first = slope(lambda x: np.max(x, axis=-1, keepdims=keepdims), ties)[0]  # noqa: B023
        assert first.tolist() == [[1, 0, 0, 0], [1, 0, 0, 0]]
    ends = np.array([-1.5, -1, 0, 2, 2.5])
    assert slope(lambda x: np.clip(x, -1.0, 2.0), ends)[0].tolist() == [0, 1, 1, 1, 0]


def test_a_branch_that_was_not_taken_sends_nothing_back_not_even_nan() -> None:
    x, y = np.array([1.0, np.inf, np.nan]), np.array([-np.inf, 2, 3])
    with np.errstate(all="raise"):
        taken = slope(lambda x, y: np.where(np.array([True, False, False]), x, y), x, y)
    assert [g.tolist() for g in taken] == [[1, 0, 0], [0, 1, 1]]


# Parts: an index reads some of an array, perhaps several times.

SHAPE = (4, 3, 2)
INDICES: dict[str, Any] = {
    "number": 2,
    "negative number": -1,
    "NumPy's number": np.int64(1),
    "array of no axes": np.array(3),
    "slice": slice(1, 3),
    "every second, backwards": slice(None, None, -2),
    "empty slice": slice(2, 2),
    "ellipsis": ...,
    "new axis": None,
    "all of it": (),
    "several": (slice(1, None), None, ..., 0),
    "one entry": (1, -1, 0),
    "rows": np.array([3, 0, 1]),
    "rows again": np.array([2, 0, 2, 2, 1, 0]),
    "rows from the end again": np.array([-1, 3, 3, 0, -4]),
    "rows of another dtype again": np.array([2, 2, 1], np.uint8),
    "no rows": np.array([], np.intp),
    "table of rows again": np.array([[0, 1, 0], [3, 3, 0]]),
    "list again": [1, 1, 2],
    "pairs again": (np.array([0, 1, 0, 3]), np.array([2, 1, 2, 0])),
    "pairs from the end again": (np.array([0, -4, 1]), np.array([2, -1, 0])),
    "lists of pairs again": ([0, 1, 0], [2, 1, 2]),
    "grid again": np.ix_([0, 2, 2], [1, 1]),
    "grid": np.ix_([0, 2], [1, 0]),
    "rows of a slice again": (slice(1, 4), np.array([1, 1, 0])),
    "rows with a number again": (np.array([1, 1, 3]), 0),
    "rows and a new axis again": (np.array([1, 1, 3]), None),
    "mask of rows": np.array([True, False, True, True]),
    "mask": some(*SHAPE) > 0.3,
}
# An assignment takes only what is surely read once.
NOT_ASSIGNED = {name for name in INDICES if "again" in name}
NOT_ASSIGNED |= {"array of no axes", "grid", "mask of rows", "mask"}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", INDICES)
def test_a_part_is_added_as_often_as_it_was_read(name: str, dtype: str) -> None:
    index, gradient = INDICES[name], some(*SHAPE).astype(dtype)
    read = np.arange(gradient.size).reshape(SHAPE)[index]
    added = some(*np.shape(read), seed=1).astype(dtype)
    expected = gradient.astype("f8")
    for place, g in zip(np.ravel(read), np.ravel(added), strict=True):
        expected.flat[place] += g
    add_part(gradient, Part(index, added))
    assert gradient.dtype == dtype
    np.testing.assert_allclose(gradient, expected, 0, 1e-6 if dtype == "float32" else 1e-15)


@pytest.mark.parametrize("name", INDICES)
def test_what_an_index_reads_has_the_gradient_of_central_differences(name: str) -> None:
    check(operator.getitem, (some(*SHAPE), INDICES[name]))


def assigned(x: Any, index: Any, y: Any) -> Any:
    """A copy of x after x[index] = y."""
    x = x * 1.0
    x[index] = y
    return x


@pytest.mark.parametrize("name", sorted(INDICES.keys() - NOT_ASSIGNED))
def test_an_assignment_takes_the_slope_from_what_was_there_before(name: str) -> None:
    index = INDICES[name]
    shape = np.shape(some(*SHAPE)[index])
    check(assigned, (some(*SHAPE), index, some(*shape, seed=1)))
    check(assigned, (some(*SHAPE), index, some(seed=1)))  # repeated to that shape
    check(assigned, (some(*SHAPE), index, 0.5))


@pytest.mark.parametrize("name", sorted(NOT_ASSIGNED))
def test_an_assignment_to_what_may_be_named_twice_is_refused(name: str) -> None:
    x = Variable(some(*SHAPE))
    with pytest.raises(TypeError, match="slices, numbers or rows that differ"):
        x[INDICES[name]] = 0.5


def test_of_several_assignments_to_one_place_only_the_last_has_a_slope() -> None:
    def twice(x: Any, y: Any) -> Any:
        x = assigned(x, np.array([1, 0]), y)
        return assigned(x, 0, y[0])

    check(twice, (some(3, 2), some(2, 2, seed=1)))
