"""The optimizer: Muon for matrices, AdamW for vectors, embeddings and heads."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from minstep.errors import InputError
from minstep.fast.threads import each
from minstep.tap import Array
from minstep.train.muon import orthogonalised
from minstep.weights import Shape

# A row for each token of the vocabulary: most have next to no gradient, which Muon would blow up.
TABLES = ("embed_tokens.weight", "lm_head.weight", "shared_head.output.weight")
MUON, ADAMW = ("momentum",), ("first", "second")  # what each keeps of a tensor's past gradients


class Settings(NamedTuple):
    """What a run may choose. Rates are those of the schedule's peak."""

    matrix_rate: float = 2e-3  # of Muon
    rate: float = 2e-3  # of AdamW
    weight_decay: float = 0.1  # a share of the rate
    momentum: float = 0.95  # of Muon, Nesterov's
    betas: tuple[float, float] = (0.9, 0.95)  # of AdamW
    eps: float = 1e-8  # of AdamW
    clip: float = 1.0  # the largest norm of all gradients together; math.inf: any


def kept(name: str, shape: Shape) -> tuple[str, ...]:
    """What is kept for a tensor, by hub name: MUON, ADAMW, or nothing for a router bias.

    The router's gate and stacked experts are matrices as any other.
    """
    if name.endswith(".router_bias"):  # the balancing rule alone moves it
        return ()
    return MUON if len(shape) > 1 and not name.endswith(TABLES) else ADAMW


class Optimizer:
    """Updates the tensors of a model in place, and keeps the moments of their gradients.

    `shapes`: each tensor's hub name and shape. Every tensor decays, norms too: they are stored
    around 0, so decay draws the factor they stand for to 1.
    Source: Muon throughout with decay 0.1, clip 1.0 and Polar Express, report section D; an RMS of
        0.2 for each update, near AdamW's own, arXiv 2502.16982; AdamW, arXiv 1711.05101.
    Differs: the report names no optimizer for embeddings, heads and norms; AdamW is the custom. Its
        orthogonalisation ran in float16, here in float32.
    Checked by: tests/train/test_optimizer.py
    """

    def __init__(self, shapes: Mapping[str, Shape], settings: Settings | None = None) -> None:
        self.settings = settings or Settings()
        self.steps = 0  # taken so far
        self._kept = {name: kept(name, shape) for name, shape in shapes.items()}
        self._moments: dict[str, Array] = {
            f"{kind}.{name}": np.zeros(shapes[name], np.float32)
            for name, kinds in self._kept.items()
            for kind in kinds
        }

    def step(
        self, tensors: Mapping[str, Array], gradients: Mapping[str, Array], scale: float = 1.0
    ) -> float:
        """Update float32 `tensors` in place, at `scale` (0 to 1) of the rates.

        A tensor without a gradient stays as it is. Returns the norm of all gradients together,
        before they are clipped. Raises FloatingPointError, with nothing changed, where a gradient
        is not finite; it names the first, by name.
        """
        names = [name for name, kinds in self._kept.items() if kinds and name in gradients]
        squares = (np.square(gradients[name], dtype=np.float64).sum() for name in names)
        norm = math.sqrt(sum(map(float, squares)))
        if not math.isfinite(norm):
            bad = next(name for name in sorted(names) if not np.isfinite(gradients[name]).all())
            raise FloatingPointError(f"the gradient of {bad} is not finite")
        share = min(1.0, self.settings.clip / norm) if norm else 1.0
        self.steps += 1

        def update(name: str) -> None:
            rule = self._muon if self._kept[name] == MUON else self._adamw
            rule(name, tensors[name], gradients[name] * share, float(scale))

        for _ in each(update, ((name,) for name in names)):
            pass
        return norm

    def _muon(self, name: str, tensor: Array, gradient: Array, scale: float) -> None:
        """Momentum, one step ahead, made orthogonal; tensor [..., O, I]."""
        settings = self.settings
        momentum = self._moments[f"momentum.{name}"]
        momentum *= settings.momentum
        momentum += gradient
        gradient += settings.momentum * momentum
        change = orthogonalised(gradient)
        rate = settings.matrix_rate * scale
        change *= rate * 0.2 * math.sqrt(max(tensor.shape[-2:]))  # its RMS is at most 0.2 * rate
        tensor *= 1 - rate * settings.weight_decay
        tensor -= change

    def _adamw(self, name: str, tensor: Array, gradient: Array, scale: float) -> None:
        """The mean gradient over the root of its mean square; tensor of any shape."""
        settings = self.settings
        first, second = (self._moments[f"{kind}.{name}"] for kind in ADAMW)
        beta, beta2 = settings.betas
        first *= beta
        first += (1 - beta) * gradient
        second *= beta2
        second += (1 - beta2) * np.square(gradient)
        root = np.sqrt(second / (1 - beta2**self.steps))  # as if all steps had been averaged
        root += settings.eps
        rate = settings.rate * scale
        tensor *= 1 - rate * settings.weight_decay
        tensor -= first * (rate / (1 - beta**self.steps)) / root

    def state(self) -> dict[str, Array]:
        """All that the next step depends on, as copies: `step`, [] int64, and float32 moments.

        Their names are "momentum.", "first." or "second." and the tensor's name.
        """
        return {
            "step": np.array(self.steps, np.int64),
            **{name: moment.copy() for name, moment in self._moments.items()},
        }

    def restore(self, state: Mapping[str, Array]) -> None:
        """Go on from a `state`, bit for bit; other names in it are left alone.

        Raises InputError, with nothing changed, for one that is missing or of another shape or
        dtype, and for a negative number of steps.
        """
        expected = {"step": np.zeros((), np.int64), **self._moments}
        for name, moment in expected.items():
            want = f"expected {moment.dtype} {list(moment.shape)}"
            if name not in state:
                raise InputError(f"the optimizer's {name} is missing, {want}")
            found = state[name]
            if found.shape != moment.shape or found.dtype != moment.dtype:
                is_now = f"{found.dtype} {list(found.shape)}"
                raise InputError(f"the optimizer's {name} is {is_now}, {want}")
        if state["step"] < 0:
            raise InputError(f"the optimizer's step is {state['step']}, expected 0 or more")
        self.steps = int(state["step"])
        for name, moment in self._moments.items():
            moment[...] = state[name]
