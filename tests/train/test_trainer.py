"""The training loop's state: it learns, is decided by its arguments, and goes on bit for bit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import minstep
from minstep.errors import InputError
from minstep.fast.bf16 import BF16Array
from minstep.store.config_file import find_config
from minstep.train.bpe import train_tokenizer
from minstep.train.data import encode_documents, read_corpus
from minstep.train.log import read_log
from minstep.train.optimizer import rate_at
from minstep.train.run import STATE, load_state, save_state
from minstep.train.trainer import Plan, Training, initial_tensors
from minstep.train.workers import Sums, Workers, workers
from minstep.weights import tensor_shapes
from tests.support.recordings import save

CONFIG = minstep.load_config(minstep.find_config("drafts"))
STREAM = np.tile(np.array([3, 6, 5, 4, 3, 3, 6], np.int32), 60)
PLAN = Plan(steps=30, sequences=2, length=16, warmup=3, rate=0.01)
ALONE = Workers(None)


def ran(training: Training, steps: int) -> Training:
    for _ in range(steps):
        training.step(ALONE)
    return training


def same(a: Training, b: Training) -> bool:
    ours, theirs = a.state(), b.state()
    return ours.keys() == theirs.keys() and all(np.array_equal(ours[n], theirs[n]) for n in ours)


def test_it_learns() -> None:
    training = ran(Training(CONFIG, PLAN, STREAM), 2)
    first = training.row()
    training.begin_row()
    ran(training, 26)
    training.begin_row()
    last = ran(training, 2).row()
    assert last.step == 30 and all(
        b < a / 2 for a, b in zip(first.losses, last.losses, strict=True)
    )


def test_a_seed_decides_everything_and_another_one_something_else() -> None:
    assert same(ran(Training(CONFIG, PLAN, STREAM), 3), ran(Training(CONFIG, PLAN, STREAM), 3))
    other = Training(CONFIG, PLAN._replace(seed=1), STREAM)
    assert not same(ran(other, 3), ran(Training(CONFIG, PLAN, STREAM), 3))


def test_a_run_that_is_restored_goes_on_bit_for_bit(tmp_path: Path) -> None:
    whole = ran(Training(CONFIG, PLAN, STREAM), 5)
    save_state(tmp_path, ran(Training(CONFIG, PLAN, STREAM), 3).state(), {})
    again = Training(CONFIG, PLAN, STREAM)
    again.restore(load_state(tmp_path)[0])
    assert same(ran(again, 2), whole) and again.row() == whole.row()
    state = whole.state()
    del state["model.norm.weight"]
    with pytest.raises(InputError, match=r"model\.norm\.weight is nothing"):
        again.restore(state)


@pytest.mark.parametrize(
    ("part", "spoil"),
    [
        ("model.norm.weight", lambda x: x.astype(np.float64)),
        ("model.norm.weight", lambda x: x * np.float32("nan")),
        ("model.norm.weight", lambda x: BF16Array(np.zeros(x.shape, np.uint16))),
        ("optimizer.first.model.norm.weight", lambda x: x + np.float32("inf")),
        ("optimizer.step", lambda x: x - 5),
        ("done", lambda x: x - 9),
        ("done", lambda x: x + 2**40),
        ("done", lambda x: x.astype(np.float64)),
        ("sums", lambda x: x.astype(np.int64)),
        ("sums", lambda x: x - 9),
        ("counts.model.layers.2.moe", lambda x: x - 1000),
    ],
)
def test_a_state_that_no_run_leaves_is_refused(
    part: str, spoil: Callable[[Any], Any], tmp_path: Path
) -> None:
    state: dict[str, Any] = Training(CONFIG, PLAN, STREAM).state()
    save(state | {part: spoil(state[part])}, tmp_path / STATE, facts={})
    with pytest.raises(InputError, match=f"{part.split('.')[-1]}|bfloat16"):
        Training(CONFIG, PLAN, STREAM).restore(load_state(tmp_path)[0])
    save(state, tmp_path / STATE, facts={})
    Training(CONFIG, PLAN, STREAM).restore(load_state(tmp_path)[0])


@pytest.mark.parametrize("rate", [0.0, 0.04])
def test_the_balancing_rule_alone_moves_router_biases(rate: float) -> None:
    moved = ran(Training(CONFIG, PLAN._replace(balance_rate=rate), STREAM), 1)
    names = [name for name in tensor_shapes(CONFIG) if name.endswith("router_bias")]
    assert names
    for name in names:  # a step moves each by the rate, up or down, or not at all
        assert abs(moved.tensors[name]).max() == np.float32(rate)


def test_a_row_has_the_means_of_its_steps_and_the_rate_of_the_last() -> None:
    class Watched(Workers):
        seen: list[Sums] = []

        def sum(self, *arguments: Any) -> Sums:
            self.seen.append(super().sum(*arguments))
            return self.seen[-1]

    workers, training = Watched(None), Training(CONFIG, PLAN, STREAM)
    for first, count in ((0, 1), (1, 2), (3, 3)):  # rows of one, two and three steps
        for _ in range(count):
            training.step(workers)
        row, results = training.row(), workers.seen[first:]
        training.begin_row()
        losses = np.mean([result.losses for result in results], axis=0) / PLAN.sequences
        assert row.losses == pytest.approx(tuple(losses)) and row.step == first + count
        gradients = [
            [g for name, g in result.gradients.items() if not name.endswith("router_bias")]
            for result in results
        ]
        norms = [sum(float(np.square(g, dtype=float).sum()) for g in gs) ** 0.5 for gs in gradients]
        assert row.norm == pytest.approx(np.mean(norms) / PLAN.sequences, rel=1e-5)
        assert row.rate == pytest.approx(0.01 * rate_at(first + count - 1, 30, 3, PLAN.floor))
        layers = [
            np.sum([*each], axis=0)
            for each in zip(*(r.counts.values() for r in results), strict=True)
        ]
        shares = np.concatenate([counts / counts.mean() for counts in layers])
        assert (row.least, row.most) == pytest.approx((shares.min(), shares.max()))


def test_a_loss_that_is_not_finite_is_refused_by_name() -> None:
    training = Training(CONFIG, PLAN, STREAM)
    training.tensors["lm_head.weight"][:] = np.inf
    with np.errstate(all="ignore"), pytest.raises(InputError, match=r"step 1, .*--rate"):
        training.step(ALONE)


@pytest.mark.parametrize("name", ["odd", "no_extras", "tiny"])
def test_other_shapes_train_too(name: str) -> None:
    config = minstep.load_config(minstep.find_config(name))
    tied = config._replace(tie_word_embeddings=name == "no_extras")
    training = Training(tied, PLAN, STREAM)
    assert training.tensors.keys() == tensor_shapes(tied).keys()
    before = {n: x.copy() for n, x in training.tensors.items()}
    ran(training, 1)
    assert all(
        not np.array_equal(x, before[n]) for n, x in training.tensors.items() if before[n].any()
    )


@pytest.mark.parametrize("name", ["tiny", "odd"])
def test_first_weights_have_the_spread_of_their_inputs_and_depth(name: str) -> None:
    """1 / inputs is the variance of a projection, over twice the layers where it writes to the
    residual stream; an embedding has 1, norms and biases are 0."""
    config = minstep.load_config(minstep.find_config(name))
    for tensor, x in initial_tensors(config, np.random.default_rng(0)).items():
        assert x.dtype == np.float32
        if x.ndim == 1:
            assert not x.any(), tensor
            continue
        is_residual = tensor.endswith(("o_proj.weight", "down_proj.weight"))
        variance = 1.0 if "embed_tokens" in tensor else 1 / x.shape[-1]
        variance /= 2 * len(config.layers) if is_residual else 1
        error = (2 / x.size) ** 0.5  # of a variance that is measured, relatively
        assert float(np.square(x).mean()) == pytest.approx(variance, rel=6 * error), tensor
        assert abs(float(x.mean())) < 6 * (variance / x.size) ** 0.5, tensor


@pytest.mark.thorough
def test_the_first_steps_of_the_shipped_run_go_as_its_log_says() -> None:
    folder = find_config("trained")
    rows = [row for row in read_log(folder / "log.txt") if row.step <= 60]
    config, corpus = minstep.load_config(folder), read_corpus()
    tokenizer = train_tokenizer((each.text for each in corpus.train), config.vocab_size)
    stream = encode_documents(corpus.train, tokenizer)
    training = Training(config, Plan(), stream)
    # Another version of Python has other text, and learns it in about the same steps.
    tolerance = 0.03 if len(stream) == 1_306_796 else 0.3
    with workers(2) as pool:
        for row in rows:
            while training.done < row.step:
                training.step(pool)
            seen = training.row()
            training.begin_row()
            assert np.allclose(seen.losses, row.losses, atol=tolerance), row.step
    assert rows[-1].step == 60 and seen.losses[0] < 4.9 < rows[0].losses[0]
