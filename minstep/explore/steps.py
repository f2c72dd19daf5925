"""A walk of one token through the model: every step that the tap is shown, and the line it is from.

The model runs once over the whole prompt, and each MTP depth after it as in decoding. What is kept
of a tensor is a few of its values at one position.
Checked by: tests/explore/test_walk.py
"""

import sys
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike
from tokenizers import Tokenizer

from minstep.config import Config
from minstep.explore.decided import deciding, point_of, sizes
from minstep.model import ModelWeights
from minstep.parity.record import before
from minstep.parity.trace import MOST_PROBS, finite, walk
from minstep.sampling import Sampling, distribution
from minstep.store.stages import split, stages
from minstep.tap import Array, ScopedTap
from minstep.text.tokenizer import text_of
from minstep.validation import check_prompt

SHOWN = 4  # values kept of a step
LIKELY = 5  # tokens kept of those that may come next
AS_IT_IS = Sampling(temperature=1.0)
Report = dict[str, Any]


class Step(NamedTuple):
    """A tensor that the tap was shown; `values` is what it has at the NumPy index `at`.

    `rms` is the root mean square of all its numbers at the position; None for whole numbers. `file`
    and `line` are those of the code that showed it.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    at: str
    values: list[float]
    rms: float | None
    file: str
    line: int


class Walk(NamedTuple):
    """The steps of one position, in order; and what was computed of the tokens that come next.

    `text`: the prompt, the main model's choice after it, and each MTP depth's draft. `logits`:
    those at the position [V], of the main model and then of each depth that ran, by tensor name.
    """

    steps: list[Step]
    text: list[int]
    logits: dict[str, Array]


class Walker(ScopedTap):
    """Keeps a Step of every tensor that `shows` accepts, and whole those that `ends` names.

    `holds` says which may be held at once. `then` hears of each that is kept whole. Raises
    InputError for what is not finite.
    """

    def __init__(
        self,
        position: int,
        shows: Callable[[str], bool],
        holds: Callable[[str], bool],
        ends: Collection[str],
        then: Callable[[str], None],
    ) -> None:
        self.steps: list[Step] = []
        self.kept: dict[str, Array] = {}
        self._position, self._shows, self._holds = position, shows, holds
        self._ends, self._then = ends, then

    def __call__(self, name: str, x: Array) -> Array:
        caller, full = sys._getframe(1), self._full(name)
        finite(full, x)
        if self._shows(full):
            file = caller.f_globals["__name__"].replace(".", "/") + ".py"
            self.steps.append(_step(full, x, self._position, file, caller.f_lineno))
        if full in self._ends:
            self.kept[full] = x
            self._then(full)
        return x

    def wants(self, name: str) -> bool:
        full = self._full(name)
        return full in self._ends or (self._shows(full) and self._holds(full))


def _step(name: str, x: Array, position: int, file: str, line: int) -> Step:
    """The values of x that a reader sees: of the first head, of the last positions looked at."""
    axes = point_of(name).axes
    index = tuple(position if axis == "T" else 0 for axis in axes[:-1] or axes)
    at, values = ", ".join(map(str, index)), np.atleast_1d(x[index])
    if len(axes) > 1:
        start = max(0, position + 1 - SHOWN) if axes[-1] == "S" else 0  # a window hides the first
        end = len(values) if axes[-1] == "A" else min(start + SHOWN, len(values))
        at, values = f"{at}, {start or ''}:{end}", values[start:end]
    row = x.take(position, axes.index("T"))
    rms = float(np.sqrt(np.square(row, dtype=np.float64).mean())) if x.dtype.kind == "f" else None
    return Step(name, x.shape, x.dtype.name, f"[{at}]", values.tolist(), rms, file, line)


def take_walk(
    tokens: Sequence[int],
    weights: ModelWeights,
    config: Config,
    position: int,
    layer: int | None = None,
    dtype: DTypeLike = np.float32,
    progress: Callable[[int], object] = lambda done: None,
) -> Walk:
    """Follow the token at `position` through the model, or through one layer of it.

    Without `layer` the main model, its head and all MTP depths run; with one, what it needs: the
    layers before it, and before an MTP depth the head. Depth k at position i is given token i + k:
    the prompt's own where it is long enough, then the one that the main model chose after it, then
    the drafts of the depths before, as in greedy decoding. `progress` is told of stages that ran.
    Attention probabilities are left out where [H, T, T] is too large to hold. Raises InputError for
    a bad prompt, and for a tensor that is not finite.
    Checked by: tests/explore/test_walk.py
    """
    check_prompt(tokens, config)
    L, specs = len(config.layers), (*config.layers, *config.mtp_layers)
    every = stages(config, len(specs) + 1)  # a depth has a position in a prompt of any length
    end = last_stage(config, layer) + 1

    def shows(name: str) -> bool:
        return layer in (None, split(name)[0])

    def holds(name: str) -> bool:
        number, part = split(name)
        if number is None or part != "self_attn.probs":
            return True
        return layer is not None and specs[number].heads * len(tokens) ** 2 <= MOST_PROBS

    def then(name: str) -> None:
        if name in lasts:
            progress(lasts.index(name) + 1)

    lasts = [stage.last for stage in every[:end]]
    ends = {*lasts, *(stage.name for stage in every[:end])}
    walker = Walker(position, shows, holds, ends, then)
    walk(tokens, weights, config, dtype, walker, end=min(end, L + 2))
    text, logits = list(tokens), {}
    for number in range(L + 1, end):  # the head, then each depth
        if number > L + 1:
            state = walker.kept[before(every, number)]  # [T, D]
            walk(text, weights, config, dtype, walker, number, state, number + 1)
        output = walker.kept[lasts[number]]  # [T, V]
        logits[lasts[number]] = output[position]
        text.append(likeliest(output[-1], 1)[0][0])
    return Walk(walker.steps, text, logits)


def last_stage(config: Config, layer: int | None) -> int:
    """The number of the last stage that runs: that of a layer, or of the whole model."""
    L, M = len(config.layers), len(config.mtp_layers)
    return L + M + 1 if layer is None else layer + 1 if layer < L else layer + 2


def likeliest(logits: Array, count: int) -> list[tuple[int, float]]:
    """The `count` likeliest tokens of logits [V] with their probabilities, the likeliest first."""
    probs = distribution(logits, [], AS_IT_IS)  # [V]
    order = np.argsort(-probs, kind="stable")[:count]
    return [(int(token), float(probs[token])) for token in order]


def walk_report(
    walk: Walk,
    position: int,
    layer: int | None,
    config: Config,
    raw: dict[str, Any],
    tokenizer: Tokenizer | None = None,
) -> Report:
    """The walk as JSON values: each step with its letters, its code and the keys that decided it.

    raw: config.json in hub layout. A token is its id and its text, which is None without a
    tokenizer, and for what is no whole character. In `next` are the likeliest tokens after the
    position, by the main model and by each MTP depth; `layer` is None for the main model.
    """

    def token(number: int) -> Report:
        return {"token": number, "text": text_of(tokenizer, number)}

    specs = (*config.layers, *config.mtp_layers)
    count = len(walk.text) - len(walk.logits)
    sources = ["prompt"] * count + ["main model"] + ["draft"] * len(config.mtp_layers)
    steps = []
    for step in walk.steps:
        number, _ = split(step.name)
        spec, point = None if number is None else specs[number], point_of(step.name)
        about = {"layer": number, "axes": list(point.axes), "what": point.what}
        steps.append(step._asdict() | about | {"decided_by": deciding(step.name, spec, raw)})
    after = []
    for depth, (name, logits) in enumerate(walk.logits.items()):
        given = token(walk.text[position + depth]) | {"from": sources[position + depth]}
        likely = [token(n) | {"probability": p} for n, p in likeliest(logits, LIKELY)]
        place = {"layer": split(name)[0], "position": position + depth + 1, "given": given}
        after.append(place | {"likely": likely})
    return {
        "prompt": [token(number) for number in walk.text[:count]],
        "position": position,
        "layer": layer,
        "letters": sizes(config, None if layer is None else specs[layer], count),
        "steps": steps,
        "next": after,
    }
