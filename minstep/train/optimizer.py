"""The optimizer: Muon for matrices, AdamW for vectors, embeddings and heads; and its rate.

Muon's one idea: an update with all its singular values made 1, so that each direction counts. The
momentum of a matrix is nearly of low rank: a few directions drown the rest. Its nearest orthogonal
matrix has the same directions, all of one size. A few matrix products find it, with no singular
value decomposition.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from minstep.errors import InputError
from minstep.fast.threads import each
from minstep.tap import Array
from minstep.weights import Shape

# A row for each token of the vocabulary: most have next to no gradient, which Muon would blow up.
TABLES = ("embed_tokens.weight", "lm_head.weight", "shared_head.output.weight")
MUON, ADAMW = ("momentum",), ("first", "second")  # what each keeps of a tensor's past gradients

# a, b and c of each step's polynomial a*x + b*x^3 + c*x^5. Each is the best there is for the range
# of singular values that the one before leaves.
COEFFICIENTS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
)
SAFETY = 1.01  # as if values were 1% smaller: one that rounding lifts over the range does not grow
TINY = 1e-7  # a matrix of a smaller norm fades, instead of its noise being blown up


def rate_at(step: int, steps: int, warmup: int, floor: float = 0.1) -> float:
    """The share of the peak rate, 0 to 1, that step `step` of `steps`, counted from 0, goes at.

    Step 0 gets 1 / warmup, so that no step is wasted at rate 0; step warmup - 1 is the first at the
    peak, and the last step gets `floor`, a share of the peak. No warm-up is one of one step; steps
    after the last stay at the floor. A run of one step goes at the peak.
    Source: stage 1 of report section D: 0 to 2.5e-4 in 2,000 steps, cosine to 5e-5, a floor of 0.2.
    Checked by: tests/train/test_schedule.py
    """
    if step < warmup:
        return (step + 1) / warmup
    peak = max(warmup - 1, 0)
    if step == peak:
        return 1.0
    progress = min(1.0, (step - peak) / max(1, steps - 1 - peak))
    return floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2


def orthogonalised(update: Array, steps: int = 6) -> Array:
    """The nearest orthogonal matrix, nearly: U V^T where the update is U S V^T.

    update [O, I], or a stack [E, O, I] each matrix on its own, float32 or float64.
    Returns the same shape and dtype. `steps`, 1 to 6, of the iteration. After 6, singular values
    from 1e-3 to 1 of the matrix's Frobenius norm are within 0.993 to 1.002, those of 1e-4 at 0.18;
    after 5, within 0.84 to 1.13. A matrix of zeros stays zero.
    Source: Polar Express, arXiv 2505.16932, its coefficients and safety factor; 6 steps of it as in
        report section D, which ran them in float16. Muon, kellerjordan.github.io/posts/muon.
    Differs: Muon's first form repeats one polynomial (3.4445, -4.7750, 2.0315) 5 times, which
        leaves singular values further from 1: docs/12-training.md computes how far.
    Checked by: tests/train/test_muon.py
    """
    is_tall = update.shape[-2] > update.shape[-1]
    x = update.swapaxes(-1, -2) if is_tall else update  # x x^T is then the smaller product
    norm = np.sqrt(np.square(x).sum(axis=(-2, -1), keepdims=True))  # [..., 1, 1]
    x = x / (norm * SAFETY + TINY)
    for a, b, c in COEFFICIENTS[:steps]:
        gram = x @ x.swapaxes(-1, -2)
        higher = gram @ gram
        higher *= c / SAFETY**5
        gram *= b / SAFETY**3
        gram += higher
        added = gram @ x
        x *= a / SAFETY
        x += added
    return x.swapaxes(-1, -2) if is_tall else x


class Settings(NamedTuple):
    """What a run may choose. Rates are those of the schedule's peak."""

    matrix_rate: float = 2e-3  # of Muon
    rate: float = 2e-3  # of AdamW
    weight_decay: float = 0.1  # a share of the rate
    momentum: float = 0.95  # of Muon, Nesterov's
    betas: tuple[float, float] = (0.9, 0.95)  # of AdamW
    eps: float = 1e-8  # of AdamW
    clip: float = 1.0  # the largest norm of all gradients together; math.inf: any


def moments_of(name: str, shape: Shape) -> tuple[str, ...]:
    """The moments kept for a tensor, by hub name: MUON, ADAMW, or nothing for a router bias.

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
        self._kept = {name: moments_of(name, shape) for name, shape in shapes.items()}
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
