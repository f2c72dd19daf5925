"""What a bug does to a model: the first tensor that departs, perplexity, drafts and greedy text.

The variant of the package that has the bug runs whole, over a text that no model was trained on.
Where no forward pass shows a bug, the changed code runs alone, and lines say what happened.
Checked by: tests/learn/test_museum.py
"""

import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
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
from minstep.parity.decoding_bugs import IN_DRAFTER, UNSEEN
from minstep.parity.known_bugs import Footgun
from minstep.parity.trace import Recorder, Trace
from minstep.parity.variants import Variant, variant
from minstep.store.checkpoint import INDEX, Checkpoint
from minstep.store.config_file import find_config, read_config
from minstep.store.json_file import read_json
from minstep.store.random_checkpoint import Form, save_random
from minstep.store.stages import spans
from minstep.tap import Array, ScopedTap, Tap
from minstep.train.loss import surprise
from minstep.weights import Shape, tensor_shapes

TIGHTER = 8  # in tight clamps limits are divided by this
SMALL = 1 << 26  # elements of a model that is held in memory as floats
ODD = "model-00002.safetensors"  # what the released checkpoint calls one of its shards
PIECE = 4  # tokens of a pass that kept three drafts
CALL = (
    "<tool_call>\n<function=weather>\n<parameter=city>\n{}\n</parameter>\n</function>\n</tool_call>"
)
# So many words that a piece holds the end of a call and the start of the next.
ANSWER = f"I ask for two cities.\n</think>\n{CALL.format('Oslo')}{CALL.format('Rome')}"


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
            refused = self._message(error)
        try:
            loaded = loaded if refused is None else self._loaded(chain, setting, cuts=True)
            damage = self._ran(footgun, loaded, tap)
        except (InputError, ValueError, IndexError) as error:  # sizes misfit, or nothing is finite
            return Damage(np.nan, [], [], None, refused=refused or self._message(error))
        tensor, token, share = tap.found or (None, 0, 0.0)
        return damage._replace(tensor=tensor, token=token, error=share, refused=refused)

    def _message(self, error: Exception) -> str:
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


def shards(footguns: tuple[Footgun, ...]) -> list[str]:
    """A small checkpoint in two files, one with an odd name, opened with the bug and without."""
    lines = []
    with TemporaryDirectory() as folder:
        made = Path(folder) / "made"
        raw, config, _ = read_config("tiny")
        save_random(raw, config, np.random.default_rng(0), made, Form(shards=2))
        index = read_json(made / INDEX)
        usual = sorted(set(index["weight_map"].values()))
        (made / usual[1]).rename(made / ODD)
        renamed = {n: ODD if f == usual[1] else f for n, f in index["weight_map"].items()}
        (made / INDEX).write_text(json.dumps(index | {"weight_map": renamed}))
        lines.append(f"a checkpoint in two files, {usual[0]} and {ODD}")
        for footgun in (None, *footguns):
            opened = variant(footgun).checkpoint.open_checkpoint(made)
            try:
                opened.weights()
                outcome = "and the model loads"
            except InputError as error:
                outcome = str(error).replace(f"{made}: ", "")
            name = footgun.bug if footgun else "as it is"
            lines.append(f"{name}: {len(opened.tensors)} tensors found, {outcome}")
    return lines


def moe_layers(footguns: tuple[Footgun, ...]) -> list[str]:
    """Which layers of the released config have experts, and which tensors are asked for."""
    lines, stored = [], set[str]()
    for footgun in (None, *footguns):
        config = variant(footgun).config_file.load_config(find_config("step-3.5-flash"))
        layers = [n for n, spec in enumerate(config.layers) if spec.moe]
        asked = set(tensor_shapes(config))
        stored = stored or asked
        name = footgun.bug if footgun else "as it is"
        where = (
            f"experts in layers {', '.join(spans(layers))}" if layers else "no layer has experts"
        )
        missing = [tensor for tensor in tensor_shapes(config) if tensor not in stored]
        outcome = f"all {len(stored)} tensors of the checkpoint used"
        if missing:
            unused = len(stored - asked)
            outcome = f"{missing[0]} is missing, {len(missing)} in all; {unused} stored ones unused"
        lines.append(f"{name}: {where}; {outcome}")
    return lines


def tool_calls(footguns: tuple[Footgun, ...]) -> list[str]:
    """An answer with two calls, read a token at a time and in pieces as drafts bring them."""
    tokens = re.findall(r"</?\w+>|<\w+=|\w+|.|\n", ANSWER)
    lines = [f"an answer with two calls, {len(tokens)} tokens"]
    for footgun in (None, *footguns):
        for size in (1, PIECE):
            stream = variant(footgun).reply.ChatStream()
            pieces = ["".join(tokens[n : n + size]) for n in range(0, len(tokens), size)]
            events = [event for piece in pieces for event in stream.feed(piece)]
            events += stream.finish()
            calls = [e.payload.arguments["city"] for e in events if e.kind == "tool_call"]
            text = "".join(e.payload for e in events if e.kind == "content")
            name = footgun.bug if footgun else "as it is"
            given = "a token at a time" if size == 1 else f"{size} tokens at a time"
            left = f", and says {text!r}" if text else ""
            lines.append(f"{name}, {given}: calls {', '.join(calls) or 'nothing'}{left}")
    return lines


RUNNERS: dict[str, Callable[[tuple[Footgun, ...]], list[str]]] = {
    UNSEEN["shards"][0].bug: shards,
    UNSEEN["moe_layers_enum"][0].bug: moe_layers,
    UNSEEN["tool calls"][0].bug: tool_calls,
}
