"""The training loop's state and one step of it: which numbers decide a run, and nothing else."""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from minstep.config import Config
from minstep.errors import InputError
from minstep.tap import Array
from minstep.train.balance import Counter, balance
from minstep.train.data import sequences
from minstep.train.log import LogRow
from minstep.train.optimizer import Optimizer, Settings, rate_at
from minstep.train.workers import Tensors, Workers
from minstep.weights import tensor_shapes


class Plan(NamedTuple):
    """Everything beside config, text and tokenizer that a run depends on."""

    steps: int = 2000
    sequences: int = 8  # in a step
    length: int = 512  # tokens of a sequence
    rate: float = 8e-3  # at its peak, of matrices and of all the rest
    warmup: int = 50  # steps
    floor: float = 0.05  # what is left of the rate at the end
    weight_decay: float = 0.3
    mtp_weight: float = 0.3
    balance_rate: float = 0.01  # of the router biases, a step
    seed: int = 0


class Training:
    """A run: the tensors, the optimizer, and what was seen since the last line of the log.

    `stream` [N] int32: the tokens to train on. Everything is float32, and depends on the arguments
    alone: a run that is restored goes on bit for bit.
    Source: report section 4.1 for the order of things; see optimizer and balance.
    Checked by: tests/train/test_trainer.py
    """

    def __init__(self, config: Config, plan: Plan, stream: NDArray[np.int32]) -> None:
        self.config, self.plan, self.stream = config, plan, stream
        self.tensors = initial_tensors(config, np.random.default_rng(plan.seed))
        settings = Settings(plan.rate, plan.rate, weight_decay=plan.weight_decay)
        shapes = {name: x.shape for name, x in self.tensors.items()}
        self.optimizer = Optimizer(shapes, settings)
        self.done = 0  # steps
        self.sums = np.zeros(3 + len(config.mtp_layers))  # steps, norms, losses since the last row
        self.counts = Counter(config).counts

    def step(self, workers: Workers) -> None:
        """Go down the gradient of a few sequences, then even out the experts' loads.

        Raises InputError where the loss is no longer finite.
        """
        plan = self.plan
        tokens = sequences(self.stream, self.done, plan.sequences, plan.length, plan.seed)
        result = workers.sum(tokens, self.tensors, self.config, plan.mtp_weight)
        gradients = {name: x / np.float32(plan.sequences) for name, x in result.gradients.items()}
        scale = rate_at(self.done, plan.steps, plan.warmup, plan.floor)
        try:
            norm = self.optimizer.step(self.tensors, gradients, scale)
        except FloatingPointError as error:
            message = f"at step {self.done + 1}, {error}: expected a smaller --rate"
            raise InputError(message) from error
        balance(self.tensors, result.counts, plan.balance_rate)
        self.done += 1
        self.sums += np.array([1, norm, *result.losses / plan.sequences])
        for name, count in result.counts.items():
            self.counts[name] = self.counts[name] + count

    def row(self) -> LogRow:
        """What was seen since the last row: means over the steps, and the loads of all of them."""
        steps, norm, *losses = self.sums.tolist()
        scale = rate_at(self.done - 1, self.plan.steps, self.plan.warmup, self.plan.floor)
        shares = [share for each in self.loads().values() for share in each.tolist()]
        return LogRow(
            self.done,
            tuple(loss / steps for loss in losses),
            self.plan.rate * scale,
            norm / steps,
            min(shares, default=math.nan),
            max(shares, default=math.nan),
        )

    def loads(self) -> dict[str, Array]:
        """Each layer's experts' loads [E] since the last row, 1 being the fair share."""
        return {name: count / max(1, count.mean()) for name, count in self.counts.items()}

    def begin_row(self) -> None:
        """Forget what was seen: a row has told it."""
        self.sums = np.zeros_like(self.sums)
        self.counts = {name: np.zeros_like(count) for name, count in self.counts.items()}

    def state(self) -> Tensors:
        """All that a run which goes on has to know, by name; arrays are not copied."""
        parts = {"": self.tensors, "optimizer.": self.optimizer.state(), "counts.": self.counts}
        state = {f"{part}{name}": x for part, kept in parts.items() for name, x in kept.items()}
        return state | {"sums": self.sums, "done": np.array([self.done], np.int64)}

    def restore(self, state: Tensors) -> None:
        """Go on from a state.

        Raises InputError where a tensor is missing or has another shape or dtype than here, and for
        numbers of steps or of tokens that there cannot be.
        """
        for name, here in self.state().items():
            if name.startswith("optimizer."):
                continue
            x = state.get(name)
            if x is None or (x.shape, x.dtype) != (here.shape, here.dtype):
                found = "nothing" if x is None else f"{x.dtype} {list(x.shape)}"
                expected = f"expected {here.dtype} {list(here.shape)} by the config"
                raise InputError(f"{name} is {found}, {expected}")
            is_count = name.startswith("counts.") or name == "done"
            if (is_count and x.min() < 0) or (name == "sums" and x[0] < 0):
                raise InputError(f"{name} holds {x.min()}, expected counts of 0 or more")
        if state["done"][0] > self.plan.steps:
            found = f"done is {state['done'][0]}"
            raise InputError(f"{found}, expected at most the run's {self.plan.steps} steps")
        self.tensors = {name: state[name].copy() for name in self.tensors}
        self.counts = {name: state[f"counts.{name}"] for name in self.counts}
        self.sums, self.done = state["sums"], int(state["done"][0])
        own = "optimizer."
        moments = {n.removeprefix(own): x for n, x in state.items() if n.startswith(own)}
        self.optimizer.restore(moments)


def initial_tensors(config: Config, rng: np.random.Generator) -> Tensors:
    """Every tensor before the first step, float32: norms and router biases 0, the rest normal.

    Projections have variance 1 / inputs; those that write to the residual stream are made smaller
    with depth, so that the sum of all layers stays near the size of an embedding.
    Source: GPT-2's initialisation for the residual projections; the report does not tell Step's.
    """
    tensors: Tensors = {}
    layers = len(config.layers)
    for name, shape in tensor_shapes(config).items():
        scale = 1.0 if name == "model.embed_tokens.weight" else shape[-1] ** -0.5
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            scale *= (2 * layers) ** -0.5
        drawn = np.zeros(shape, np.float32)
        if len(shape) > 1:
            drawn = rng.standard_normal(shape, np.float32) * np.float32(scale)
        tensors[name] = drawn
    return tensors
