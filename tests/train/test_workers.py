"""Sequences shared out to processes: the same sums whoever computes them."""

from multiprocessing import active_children

import numpy as np
import pytest

import minstep
from minstep.train.balance import Counter
from minstep.train.loss import objective
from minstep.train.trainer import initial_tensors
from minstep.train.workers import SHARE, WorkerEnded, Workers, share, workers
from minstep.weights import assemble

CONFIG = minstep.load_config(minstep.find_config("drafts"))
TENSORS = initial_tensors(CONFIG, np.random.default_rng(0))
TOKENS = np.random.default_rng(1).integers(0, 7, (SHARE + 2, 12)).astype(np.int32)


def test_any_number_of_processes_gives_the_same_bits() -> None:
    alone = Workers(None).sum(TOKENS, TENSORS, CONFIG, 0.3)
    with workers(2) as pool:
        shared = pool.sum(TOKENS, TENSORS, CONFIG, 0.3)
    assert np.array_equal(alone.losses, shared.losses)
    for name, gradient in alone.gradients.items():
        assert np.array_equal(gradient, shared.gradients[name]), name
    for name, count in alone.counts.items():
        assert np.array_equal(count, shared.counts[name])


def test_a_process_that_was_ended_is_told_of_in_each_sum_from_then_on() -> None:
    with workers(2) as pool:
        pool.sum(TOKENS, TENSORS, CONFIG, 0.3)
        process = active_children()[0]
        process.kill()
        process.join()
        for _ in range(2):
            with pytest.raises(WorkerEnded, match="fewer --processes"):
                pool.sum(TOKENS, TENSORS, CONFIG, 0.3)


def test_a_share_is_the_sum_over_its_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minstep.moe.FEW", 0)  # as on the tape, where experts run one by one
    both, first, second = (
        share(TOKENS[a:b], TENSORS, CONFIG, 0.3) for a, b in ((0, 2), (0, 1), (1, 2))
    )
    assert np.allclose(both.losses, first.losses + second.losses, rtol=1e-12)
    for name, gradient in both.gradients.items():
        assert gradient.shape == TENSORS[name].shape and gradient.dtype == np.float32
        assert np.array_equal(gradient, first.gradients[name] + second.gradients[name])
    moe = [spec for spec in CONFIG.layers if spec.moe]
    assert all(both.counts[f"{s.name}.moe"].sum() == 24 * s.moe.top_k for s in moe if s.moe)
    weights = assemble(CONFIG, lambda name, _: TENSORS[name])
    plain = objective(TOKENS[0].tolist(), weights, CONFIG, 0.3, np.float32, Counter(CONFIG))
    assert np.array_equal(first.losses, [float(x) for x in (plain.main, *plain.depths)])


def test_an_expert_that_nobody_chose_has_a_gradient_of_zeros() -> None:
    result = share(TOKENS[:1, :6], TENSORS, CONFIG, 0.3)
    unused = [(n, e) for n, count in result.counts.items() for e in np.flatnonzero(count == 0)]
    assert unused or all(count.min() > 0 for count in result.counts.values())
    for name, expert in unused:
        assert not result.gradients[f"{name}.up_proj.weight"][expert].any()
    used = next((n, int(np.argmax(count))) for n, count in result.counts.items())
    assert result.gradients[f"{used[0]}.up_proj.weight"][used[1]].any()
