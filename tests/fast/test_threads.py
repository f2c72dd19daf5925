"""Threads: the same results in the same order, no waiting for itself, NumPy's settings kept."""

import contextlib
import multiprocessing
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable

import numpy as np
import pytest

from minstep import linear as linear_module
from minstep import moe as moe_module
from minstep.fast import threads as parallel
from minstep.fast.bf16 import BF16Array, to_bf16
from minstep.fast.threads import each, scratch
from minstep.linear import linear
from minstep.moe import Choice, MoEWeights, experts

RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def two_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads, on a machine with one core too."""
    monkeypatch.setattr(parallel, "THREADS", max(2, parallel.THREADS))


def test_results_come_in_order_from_several_threads() -> None:
    both = threading.Barrier(2, timeout=10)
    seen = set()

    def slow(n: int) -> int:
        if n < 2:
            both.wait()  # nobody gets past this alone
        seen.add(threading.current_thread().name)
        return n * n

    assert list(each(slow, [(n,) for n in range(20)])) == [n * n for n in range(20)]
    assert len(seen) == 2 and threading.current_thread().name not in seen


def test_one_item_and_work_inside_work_run_where_they_are() -> None:
    def name(_: int) -> str:
        return threading.current_thread().name

    assert list(each(name, [(0,)])) == [threading.current_thread().name]
    inner = each(lambda n: (name(n), *each(name, [(1,), (2,)])), [(0,), (1,), (2,)])
    assert all(len(set(names)) == 1 for names in inner)


def test_an_error_reaches_the_caller_and_settings_reach_the_threads() -> None:
    with pytest.raises(ZeroDivisionError):
        list(each(lambda n: 1 // n, [(1,), (0,), (2,)]))
    with warnings.catch_warnings(), np.errstate(over="ignore"):
        warnings.simplefilter("error")
        assert list(each(np.exp, [(1e4,), (1e5,)])) == [np.inf, np.inf]
    with np.errstate(over="raise"), pytest.raises(FloatingPointError):
        list(each(np.exp, [(1.0,), (1e5,)]))


def test_scratch_is_reused_in_a_thread_and_never_shared_between_two() -> None:
    first = scratch((3, 4), np.float32)
    assert np.shares_memory(first, scratch((2, 5), np.float32))
    assert not np.shares_memory(first, scratch((2, 5), np.float64))
    assert scratch((100, 100), np.float32).shape == (100, 100)
    both = threading.Barrier(2, timeout=10)

    def mine(_: int) -> np.ndarray:
        both.wait()
        return scratch((50, 50), np.float32)

    one, other = each(mine, [(0,), (1,)])
    assert not np.shares_memory(one, other)


@pytest.mark.parametrize("stored", ["float32", "float64", "bfloat16"])
def test_no_number_of_threads_changes_a_product(
    stored: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear_module, "BLOCK", 700)
    monkeypatch.setattr(linear_module, "LARGE", 1)
    values = RNG.standard_normal((101, 33), np.float32)
    weight = BF16Array(to_bf16(values)) if stored == "bfloat16" else values.astype(stored)
    for T in (1, 7):
        x = RNG.standard_normal((T, 33), np.float32)
        several = linear(x, weight)
        monkeypatch.setattr(parallel, "THREADS", 1)
        assert np.array_equal(several, linear(x, weight))
        monkeypatch.setattr(parallel, "THREADS", 2)


def test_no_number_of_threads_changes_the_experts_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    E, F, D, T, A = 9, 10, 12, 40, 3
    gate, up, down = (
        RNG.standard_normal(shape, np.float32) for shape in ((E, F, D), (E, F, D), (E, D, F))
    )
    weights = MoEWeights(np.zeros((E, D)), None, gate, up, down)
    x = RNG.standard_normal((T, D), np.float32)
    ids = np.stack([np.sort(RNG.permutation(E)[:A]) for _ in range(T)])
    choice = Choice(ids, RNG.uniform(size=(T, A)).astype(np.float32))
    monkeypatch.setattr(moe_module, "FEW", 0)  # a loop over experts, however small
    alone = experts(x, weights, choice, 0.7)
    names = set()
    real = moe_module.swiglu

    def watched(*arguments: object) -> np.ndarray:
        names.add(threading.current_thread().name)
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(moe_module, "swiglu", watched)
    monkeypatch.setattr(moe_module, "LARGE", 1)
    for _ in range(5):
        assert np.array_equal(alone, experts(x, weights, choice, 0.7))
    assert threading.current_thread().name not in names


def in_a_fork(work: Callable[[], object], seconds: float = 60) -> bool:
    """Whether `work` ends well in a forked child; one that hangs is ended."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside other threads
        child = os.fork()
    if child == 0:
        code = 1
        with contextlib.suppress(BaseException):
            code = 0 if work() else 1
        os._exit(code)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return status == 0
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a system that forks")


@needs_fork
def test_a_fork_after_work_was_shared_out_shares_out_its_own() -> None:
    def names() -> set[str]:
        return set(each(lambda _: threading.current_thread().name, [(n,) for n in range(8)]))

    def shares() -> bool:
        return threading.current_thread().name not in names()

    weight = RNG.standard_normal((1200, 1200), np.float32)
    x = RNG.standard_normal((2, 1200), np.float32)
    stored = BF16Array(to_bf16(weight))
    expected = linear(x, stored)
    assert shares()
    assert in_a_fork(shares)
    assert in_a_fork(lambda: np.array_equal(linear(x, stored), expected))
    assert in_a_fork(lambda: in_a_fork(shares)), "a fork of a fork"
    assert shares() and np.array_equal(linear(x, stored), expected)


@needs_fork
def test_a_fork_from_a_worker_is_no_worker() -> None:
    def shares() -> bool:
        here = threading.get_ident()
        return here not in set(each(lambda _: threading.get_ident(), [(n,) for n in range(8)]))

    assert all(each(lambda _: in_a_fork(shares), [(0,), (1,)]))


@needs_fork
def test_a_pool_of_forked_processes_multiplies() -> None:
    weight = RNG.standard_normal((1200, 1200), np.float32)
    linear(np.ones((1, 1200), np.float32), BF16Array(to_bf16(weight)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        with multiprocessing.get_context("fork").Pool(2) as pool:
            sums = pool.map_async(forked_sum, [0, 1, 2]).get(timeout=60)
    assert sums == [forked_sum(n) for n in range(3)]


def forked_sum(seed: int) -> float:
    x = np.random.default_rng(seed).standard_normal((1200, 1200)).astype(np.float32)
    return float(linear(x[:2], BF16Array(to_bf16(x))).sum())
