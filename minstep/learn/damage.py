"""What a bug does to a model: the first tensor that departs, perplexity, drafts and greedy text.

The variant of the package that has the bug runs whole, over a text that no model was trained on.
Checked by: tests/learn/test_museum.py
"""

import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import DTypeLike

from minstep.config import Config, LayerSpec
from minstep.errors import InputError
from minstep.explore.acceptance import Way, draft, worth
from minstep.learn.exhibits import END, TIGHT
from minstep.linear import Weight
from minstep.model import ModelWeights
from minstep.parity.check_layer import leading
from minstep.parity.compare import TOLERANCES, compare
from minstep.parity.decoding_bugs import IN_DRAFTER
from minstep.parity.known_bugs import Footgun
from minstep.parity.trace import Recorder, Trace
from minstep.parity.variants import Variant, variant
from minstep.store.checkpoint import Checkpoint
from minstep.tap import Array, ScopedTap, Tap
from minstep.train.loss import surprise
from minstep.weights import Shape

TIGHTER = 8  # in tight clamps limits are divided by this
SMALL = 1 << 26  # elements of a model that is held in memory as floats


class Damage(NamedTuple):
    """What a bug did to a model; of the model as it is, nothing departs.

    `agreed`: for each depth, how often it guesses in the text what the main model does. `texts`:
    what greedy decoding made of the prompts, and `accepted` the drafts that were kept a pass, None
    where nothing was drafted. `tensor` departs first, at position `token`, by `error` of its
    largest value. `refused`: why the model does not run with the bug, or why it did only once
    matrices were cut to the sizes that the bug asks for.
    """

    perplexity: float
    agreed: list[float]
    texts: list[list[int]]
    accepted: float | None
    tensor: str | None = None
    token: int = 0
    error: float = 0.0
    refused: str | None = None


class Departure(ScopedTap):
    """Compares what a model computes with a recording of the right one, until a tensor departs."""

    def __init__(self, right: Trace, tolerance: float) -> None:
        self._right, self._tolerance = right, tolerance
        self._found: list[tuple[str, int, float]] = []  # shared by the taps of all scopes

    @property
    def found(self) -> tuple[str, int, float] | None:
        """The tensor, the position and the error of what departed first."""
        return self._found[0] if self._found else None

    def __call__(self, name: str, x: Array) -> Array:
        full = self._full(name)
        if not self._found and full in self._right:
            c = compare(full, self._right[full], x, self._tolerance)
            if not c.is_match:
                place = c.first.place if c.first else (0, 0)
                self._found.append((full, place[full.endswith(".probs")], c.max_error))
        return x

    def wants(self, name: str) -> bool:
        return not self._found and recorded(self._full(name))


def recorded(name: str) -> bool:
    """Whether a tensor is compared: a router's margin says less than the choice behind it."""
    return not name.endswith(".margin")


class Patient:
    """A model to try bugs on, and what it does without them, which is computed once a setting.

    `tokens`: the text whose perplexity is taken; `prompts`: what is continued greedily, by
    `max_tokens` each; all activations have `dtype`.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        tokens: Sequence[int],
        prompts: Sequence[Sequence[int]],
        max_tokens: int = 24,
        dtype: DTypeLike = np.float64,
    ) -> None:
        self.checkpoint, self.tokens, self.prompts = checkpoint, tokens, prompts
        self.max_tokens, self.dtype = max_tokens, np.dtype(dtype)
        size = sum(int(np.prod(tensor.shape)) for tensor in checkpoint.tensors.values())
        self._is_small = size <= SMALL
        self._weights: dict[tuple[str, Shape], Weight] = {}
        self._right: dict[str, tuple[Trace, Damage]] = {}

    def unspoiled(self, setting: str = "") -> Damage:
        """The model as it is. Raises InputError where it cannot run, or has not what is needed."""
        return self._as_it_is(setting)[1]

    def spoiled(self, footgun: Footgun, setting: str = "") -> Damage:
        """The model with a bug. Raises InputError as `unspoiled` does."""
        trace, _ = self._as_it_is(setting)
        tap = Departure(trace, TOLERANCES[self.dtype.name])
        chain, refused = variant(footgun), None
        try:
            loaded = self._loaded(chain, setting)
        except InputError as error:
            refused = self._said(error)
        try:
            loaded = loaded if refused is None else self._loaded(chain, setting, cuts=True)
            damage = self._ran(footgun, loaded, tap)
        except (InputError, ValueError, IndexError) as error:  # sizes misfit, or nothing is finite
            return Damage(np.nan, [], [], None, refused=refused or self._said(error))
        tensor, token, share = tap.found or (None, 0, 0.0)
        return damage._replace(tensor=tensor, token=token, error=share, refused=refused)

    def _said(self, error: Exception) -> str:
        """What an error says, without the folder that the model lies in."""
        return str(error).replace(f"{self.checkpoint.path}{os.sep}", "")

    def _as_it_is(self, setting: str) -> tuple[Trace, Damage]:
        if setting not in self._right:
            trace = Trace()
            loaded = self._loaded(variant(), setting)
            self._right[setting] = trace, self._ran(None, loaded, Recorder(trace, recorded))
        return self._right[setting]

    def _loaded(
        self, chain: Variant, setting: str, cuts: bool = False
    ) -> tuple[ModelWeights, Config]:
        """Weights and config as the chain reads them. `cuts`: smaller sizes take what is first."""
        stored = leading(self.checkpoint) if cuts else self.checkpoint.get

        def get(name: str, shape: Shape) -> Weight:
            weight = stored(name, shape)
            if not self._is_small:
                return weight
            if (name, shape) not in self._weights:
                self._weights[name, shape] = np.asarray(weight, self.dtype)
            return self._weights[name, shape]

        config: Config = chain.config_file.load_config(self.checkpoint.path)
        depths = len(self.checkpoint.config.mtp_layers)  # fewer, where no tensor is of any
        config = config._replace(mtp_layers=config.mtp_layers[:depths])
        weights = chain.weights.assemble(config, get, self.checkpoint.has_own_heads())
        if setting == TIGHT:
            config = config._replace(layers=tuple(map(_tightened, config.layers)))
        if setting == END:
            config = config._replace(eos_token_ids=(self._end_token(),))
        return weights, config

    def departs(self, footgun: Footgun) -> bool:
        """Whether any tensor departs over the text in a model without a setting, with a bug."""
        tap = Departure(self._as_it_is("")[0], TOLERANCES[self.dtype.name])
        chain = variant(footgun)
        self._read(chain, *self._loaded(chain, ""), tap)
        return tap.found is not None

    def _read(
        self, chain: Variant, weights: ModelWeights, config: Config, tap: Tap
    ) -> tuple[Array, list[Array]]:
        """Run everything over the text: logits [T, V], and those of each depth k [T-k, V]."""
        hidden = chain.model.decoder(self.tokens, weights, config, self.dtype, tap=tap)  # [T, D]
        logits = chain.model.head(hidden, weights, config, tap)
        return logits, chain.mtp.mtp_forward(self.tokens, hidden, weights, config, tap)

    def _ran(
        self, footgun: Footgun | None, loaded: tuple[ModelWeights, Config], tap: Tap
    ) -> Damage:
        """What is measured where the model runs."""
        weights, config = loaded
        logits, depths = self._read(variant(footgun), weights, config, tap)
        choice = logits.argmax(-1)  # [T], guesses at tokens 1, ...
        agreed = [float((x.argmax(-1) == choice[k:]).mean()) for k, x in enumerate(depths, start=1)]
        with np.errstate(over="ignore"):
            perplexity = float(np.exp(surprise(logits[:-1], self.tokens[1:]).mean()))
        way = Way("", IN_DRAFTER.get(footgun.bug, footgun) if footgun else None)
        drafted = draft(self.prompts, weights, config, way, self.max_tokens, self.dtype)
        accepted = worth(drafted)["mean_accepted"] if config.mtp_layers else None
        return Damage(perplexity, agreed, drafted.texts, accepted)

    def _end_token(self) -> int:
        """A token that first comes among the tokens of a pass, but not as the last of them."""
        weights, config = self._loaded(variant(), "")
        for prompt in self.prompts:
            drafted = draft([prompt], weights, config, Way(""), self.max_tokens, self.dtype)
            (text,) = drafted.texts
            for each in drafted.passes:
                for n in range(each.before, each.before + each.new - 1):
                    if text[n] not in text[:n]:
                        return text[n]
        raise InputError("no draft was kept, expected one to take for an end of the text")


def _tightened(spec: LayerSpec) -> LayerSpec:
    routed, shared = spec.swiglu_limit, spec.swiglu_limit_shared
    return spec._replace(
        swiglu_limit=routed and routed / TIGHTER, swiglu_limit_shared=shared and shared / TIGHTER
    )
