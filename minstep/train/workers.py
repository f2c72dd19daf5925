"""The sequences of a step, shared out to processes: losses, gradients and expert counts.

Threads would wait for each other here: a tape makes thousands of small calls, between which only
one of them may run.
"""

import os
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import reduce
from itertools import repeat
from multiprocessing import get_context, parent_process, resource_tracker
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from minstep.config import Config
from minstep.errors import InputError
from minstep.tap import Array
from minstep.train.balance import Counter, Counts
from minstep.train.loss import objective
from minstep.train.tape import Variable, backward
from minstep.weights import assemble

SHARE = 4  # sequences that one task sums up: the order of all sums, whoever computes them
MOST_PROCESSES = 61  # that Windows can wait for
Tensors = dict[str, Array]  # by hub name


class Sums(NamedTuple):
    """Sums over sequences; divided by their number they are what a step works with."""

    losses: Array  # [1 + M] nats a token of the main model and of each depth, float64
    gradients: Tensors  # of the total loss, in each tensor's shape and dtype
    counts: Counts


def share(
    sequences: NDArray[np.int32], tensors: Tensors, config: Config, mtp_weight: float
) -> Sums:
    """Loss, gradients and counts of `sequences` [N, T], one after the other, summed.

    Checked by: tests/train/test_workers.py
    """
    return reduce(
        added, (learned(each.tolist(), tensors, config, mtp_weight) for each in sequences)
    )


def learned(tokens: Sequence[int], tensors: Tensors, config: Config, mtp_weight: float) -> Sums:
    """Loss, gradients and counts of one sequence of T ids.

    Activations have the dtype of the tensors. What had no part in the loss, as an expert that
    nobody chose, has a gradient of zeros.
    """
    variables = {name: Variable(x) for name, x in tensors.items()}
    weights = assemble(config, lambda name, _: cast(Array, variables[name]))
    dtype, counter = tensors["model.embed_tokens.weight"].dtype, Counter(config)
    losses = objective(tokens, weights, config, mtp_weight, dtype, counter)
    backward(cast(Variable, losses.total))
    parts = [cast(Variable, part).value for part in (losses.main, *losses.depths)]
    gradients = {
        name: np.zeros_like(x.value) if x.gradient is None else x.gradient
        for name, x in variables.items()
    }
    return Sums(np.array(parts, np.float64), gradients, counter.counts)


def added(a: Sums, b: Sums) -> Sums:
    """The sum of two results."""
    gradients = {name: x + b.gradients[name] for name, x in a.gradients.items()}
    counts = {name: count + b.counts[name] for name, count in a.counts.items()}
    return Sums(a.losses + b.losses, gradients, counts)


class WorkerEnded(InputError):
    """A process that computes gradients was ended from outside; nothing has been changed."""


class Workers:
    """Runs shares in other processes, or in this one where there is only one."""

    def __init__(self, executor: Executor | None) -> None:
        self._map: Any = executor.map if executor else map

    def sum(
        self, sequences: NDArray[np.int32], tensors: Tensors, config: Config, mtp_weight: float
    ) -> Sums:
        """The sum over `sequences` [N, T]: the same bits for any number of processes.

        Raises WorkerEnded where a process has ended, now or since the last sum.
        """
        parts = [sequences[n : n + SHARE] for n in range(0, len(sequences), SHARE)]
        with _refusing_without_a_process():
            results: Iterator[Sums] = self._map(
                share, parts, repeat(tensors), repeat(config), repeat(mtp_weight)
            )
            return reduce(added, results)


@contextmanager
def workers(count: int) -> Iterator[Workers]:
    """`count` processes; they end with this one, however it ends, and leave Ctrl-C to it."""
    if count < 2:
        yield Workers(None)
        return
    with _begun(count) as executor:
        try:
            yield Workers(executor)
        except BaseException:
            executor.shutdown(wait=False, cancel_futures=True)
            raise


def _begun(count: int) -> Executor:
    """The processes, begun with signals of a terminal blocked: until _start has run, Ctrl-C would
    print a traceback in each.
    """
    is_posix = hasattr(signal, "pthread_sigmask")
    if is_posix:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _of_a_terminal())
        resource_tracker.ensure_running()  # which unblocks what it ignores itself
        signal.pthread_sigmask(signal.SIG_BLOCK, _of_a_terminal())
    try:
        # Not forked: this process has threads.
        executor = ProcessPoolExecutor(count, get_context("spawn"), _start)
        with _refusing_without_a_process():
            for _ in range(count):
                executor.submit(int)
        return executor
    finally:
        if is_posix:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _refusing_without_a_process() -> Iterator[None]:
    try:
        yield
    except BrokenProcessPool as error:
        message = "a process that computes gradients was ended, expected memory for it"
        raise WorkerEnded(f"{message} (fewer --processes need less)") from error


def _of_a_terminal() -> list[signal.Signals]:
    """What a terminal sends to all processes of a command: Ctrl-C, and its own end."""
    return [getattr(signal, name) for name in ("SIGINT", "SIGHUP") if hasattr(signal, name)]


def _start() -> None:
    for each in _of_a_terminal():
        signal.signal(each, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
