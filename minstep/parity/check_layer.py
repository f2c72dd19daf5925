"""One layer run alone from the input that another engine recorded, and held against its recording.

The code that runs is the model's own, or a variant of it that has a porting bug.
Checked by: tests/parity/test_check_layer.py
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike

from minstep.config import LayerSpec
from minstep.errors import InputError, shown
from minstep.linear import Weight
from minstep.model import BlockWeights, ModelWeights
from minstep.parity.compare import TOLERANCES, Comparison, compare_all, fitted
from minstep.parity.engine_tensors import Recording, align, check_forms, config_widths, derived
from minstep.parity.names import is_weight, mtp_layers
from minstep.parity.router_ties import Choice, Choose, are_experts, choice, chooser
from minstep.parity.variants import Variant, variant
from minstep.store.checkpoint import Checkpoint
from minstep.store.stages import EMBEDDING, HEAD, split
from minstep.tap import Array, ScopedTap
from minstep.weights import Get, Shape

NORM, MAIN_STATE = "model.norm", "h0"


class Rerun:
    """One run of a layer against a recording: the tensors it `wants` are kept in `tensors`.

    It goes on with the experts that they chose, where only rounding parts them from ours, so that
    what follows compares for every token; `ties` counts those. `then` hears of each tensor kept,
    and may end the run with an exception. `main` is the name of the main model's last state.
    """

    def __init__(
        self,
        theirs: Recording,
        wants: Callable[[str], bool],
        tolerance: float,
        then: Callable[[str], None] = lambda name: None,
        main: str = "",
    ) -> None:
        self.theirs, self.wants, self.tolerance = theirs, wants, tolerance
        self.then, self.main = then, main
        self.tensors: dict[str, Array] = {}
        self.ties = 0
        self.gate: Array = np.zeros((0, 0))  # [T, E], the router's logits
        self.choose: Choose
        self.choice: Choice | None = None

    def see(self, name: str, x: Array) -> Array:
        """Keep a tensor of any shape if it is wanted; returns what the layer goes on with."""
        if name == MAIN_STATE:  # only a variant asks for it
            main = self._recorded(self.main)
            return x if main is None else main.astype(x.dtype)
        if name.endswith(".moe.gate"):
            self.gate = x
        if name.endswith(".moe.ids"):
            x = self._their_choice(name, x)
        if self.wants(name):
            self.tensors[name] = x
            self.then(name)
        return x

    def block(self, weights: BlockWeights, spec: LayerSpec, chain: Variant) -> None:
        """Take the router of the block that will run, if it has one."""
        if weights.moe and spec.moe:
            self.choose = chooser(weights.moe, spec.moe, chain.moe)

    def judge(self, layer: int, tolerance: float) -> Choice | None:
        """What compare_all is to know of their experts: of ties nothing is left to say."""
        return self.choice and self.choice._replace(tied=self.choice.tied & False)

    def _their_choice(self, name: str, ids: Array) -> Array:
        """The experts [T, A] that they went on with, where only rounding parts those from ours."""
        theirs, E = self._recorded(name, ids), self.gate.shape[1]
        other = self._recorded(name.replace("ids", "gate"), self.gate)
        if theirs is not None and not are_experts(theirs, ids.shape[1], self.gate):
            message = f"holds other numbers than those of experts, expected 0 to {E - 1}"
            source = shown(self.theirs.source(name))
            raise InputError(f"{self.theirs.path}: tensor {source} {message}")
        self.choice = choice(self.choose, ids, self.gate, other, theirs, self.tolerance)
        self.ties = int(self.choice.tied.sum())
        return self.choice.ids

    def _recorded(self, name: str, like: Array | None = None) -> Array | None:
        """What they have by a name, if it is finite; in the shape of ours, if that is given."""
        x = self.theirs.if_any(name)
        return x if x is None or like is None else fitted(x[: len(like)], like.shape)


class LayerTap(ScopedTap):
    """Shows every tensor of the layer to a Rerun."""

    def __init__(self, run: Rerun) -> None:
        self._run = run

    def __call__(self, name: str, x: Array) -> Array:
        return self._run.see(self._full(name), x)

    def wants(self, name: str) -> bool:
        return self._run.wants(self._full(name))


def input_names(n: int) -> list[str]:
    """Where a recording may have the input of layer n, in the order of choice."""
    return [f"model.layers.{n}.input", f"model.layers.{n - 1}" if n else EMBEDDING]


def layer_input(checkpoint: Checkpoint, n: int, theirs: Recording, dtype: DTypeLike) -> Array:
    """What the recorded engine fed layer n: [T, D] in `dtype`, for MTP depth k [T-k, D].

    Raises InputError where the recording lacks it, or it cannot be of this model and prompt.
    """
    config, tokens = checkpoint.config, theirs.tokens
    L, D, V = len(config.layers), config.hidden_size, config.vocab_size
    count = L + len(config.mtp_layers)
    if not 0 <= n < count:
        raise InputError(f"{checkpoint.path}: has no layer {n}, expected 0 to {count - 1}")
    if tokens and max(tokens) >= V:
        message = f"holds {max(tokens)}, expected 0 to {V - 1}: it is of another model"
        raise InputError(f"{theirs.path}: metadata tokens {message}")
    k = max(0, n + 1 - L)
    if k and (tokens is None or len(tokens) <= k):
        found = "is missing" if tokens is None else f"holds {len(tokens)} ids"
        message = f"expected {k + 1} or more ids of the prompt, for MTP layer {n}"
        raise InputError(f"{theirs.path}: metadata tokens {found}, {message}")
    names = input_names(n)
    name = next((name for name in names if name in theirs.forms), None)
    if name is None and n == 0 and tokens:
        table = checkpoint.get(f"{EMBEDDING}.weight", (V, D))
        return np.asarray(variant().model.embed(tokens, table, dtype))
    if name is None:
        message = f"lacks the input of layer {n}, expected {' or '.join(names)}"
        raise InputError(f"{theirs.path}: {message}")
    where, shape = f"{theirs.path}: tensor {shown(theirs.source(name))}", theirs.shape(name)
    if len(shape) != 2 or shape[1] != D or not shape[0]:
        message = f"has shape {list(shape)}, expected [positions, {D}]: it is of another model"
        raise InputError(f"{where} {message}")
    rows = shape[0] if tokens is None else len(tokens) - k
    if shape[0] < rows or (shape[0] > rows and not k):
        message = f"has {shape[0]} positions, expected {rows} by the tokens in the metadata"
        raise InputError(f"{where} {message}")
    return theirs.floats(name, dtype)[:rows]


def run_layer(
    chain: Variant, checkpoint: Checkpoint, n: int, state: Array, run: Rerun, get: Get | None = None
) -> None:
    """Run layer n of a chain of modules from its input [T, D]; `run` sees what it computes.

    Layer 0 brings the embedding, the last main layer the final norm and the head, where they are
    wanted. `get` is where weights come from, if not the checkpoint. Raises InputError as it does.
    """
    get = get or checkpoint.get
    config = chain.config_file.load_config(checkpoint.path)
    L, D, V = len(config.layers), config.hidden_size, config.vocab_size
    spec, tokens = (*config.layers, *config.mtp_layers)[n], run.theirs.tokens
    tap = LayerTap(run)
    nothing: Any = np.empty((0, D), state.dtype)  # in the place of weights that nobody wants

    def rooted(module: str, shape: Shape) -> Any:
        name = weight_of(module, config.tie_word_embeddings)
        return get(name, shape) if name in checkpoint.tensors else nothing

    if n >= L and tokens:
        output = f"{spec.name}.transformer.shared_head.output"
        matrix: Any = (V, D) if checkpoint.has_own_heads() else rooted(HEAD, (V, D))
        layer = chain.weights.mtp_weights(spec, D, get, matrix if run.wants(output) else nothing)
        run.block(layer.block, spec, chain)
        before = NORM if n == L else f"model.layers.{n - 1}.transformer.shared_head.norm"
        embedding = get(f"{EMBEDDING}.weight", (V, D))
        weights = ModelWeights(embedding, (), rooted(before, (D,)), nothing, (layer,))
        config = config._replace(mtp_layers=(spec,))
        chain.mtp.mtp_forward(tokens[n - L :], state, weights, config, tap)  # depth 1 of the rest
        return
    if n == 0 and tokens and run.wants(EMBEDDING):
        tap(EMBEDDING, chain.model.embed(tokens, get(f"{EMBEDDING}.weight", (V, D)), state.dtype))
    layer = chain.weights.block_weights(spec, D, get)
    run.block(layer, spec, chain)
    x = chain.model.run_layers(state, (layer,), (spec,), 0, config.rms_norm_eps, tap=tap)  # [T, D]
    if n == L - 1 and (run.wants(NORM) or run.wants(HEAD)):
        matrix = rooted(HEAD, (V, D)) if run.wants(HEAD) else nothing
        chain.model.head(x, ModelWeights(nothing, (), rooted(NORM, (D,)), matrix, ()), config, tap)


def weight_of(module: str, is_tied: bool) -> str:
    """The weight of `module`, which stands before or after the layers."""
    return f"{EMBEDDING if module == HEAD and is_tied else module}.weight"


def leading(checkpoint: Checkpoint) -> Get:
    """Where weights come from when a bug asks for fewer heads than there are: the first of them."""

    def get(name: str, shape: Shape) -> Weight:
        tensor = checkpoint.tensors.get(name)
        stored = tensor.shape if tensor else shape
        weight = checkpoint.get(name, stored)
        return weight if stored == shape else weight[tuple(slice(size) for size in shape)]

    return get


class Checked(NamedTuple):
    """What came of one layer: a comparison for each tensor, in the model's order.

    `ties`: how many of the `tokens` went on with the recorded experts, which only a tie parts from
    ours. `others`: what the recording has of the layer and nothing here computes.
    """

    layer: int
    tolerance: float
    comparisons: list[Comparison]
    tokens: int
    ties: int
    others: list[str]

    @property
    def first(self) -> Comparison | None:
        """The first tensor that departs."""
        return next((c for c in self.comparisons if not c.is_match), None)


@np.errstate(over="ignore", invalid="ignore")  # what is not finite is refused by name
def check_layer(
    checkpoint: Checkpoint,
    n: int,
    theirs: Recording,
    dtype: DTypeLike = np.float32,
    tolerance: float | None = None,
) -> Checked:
    """Run layer n from its recorded input, and compare every tensor that the recording has of it.

    The recording is taken to be of a whole prompt. Only this layer's weights are read, and for an
    MTP layer the embedding; what stands before and after the layers is compared where its weights
    are there. `tolerance`: in place of the one of the less precise engine's dtype. Raises
    InputError where the recording lacks the input or every output, or is of another model or
    prompt, and as check_forms does.
    """
    check_forms((theirs,), checkpoint.config, {n})
    state = layer_input(checkpoint, n, theirs, dtype)
    if tolerance is None:
        tolerance = max(TOLERANCES[np.dtype(dtype).name], TOLERANCES[theirs.engine_dtype])
    run = Rerun(theirs, wanted(checkpoint, theirs), tolerance)
    run_layer(variant(), checkpoint, n, state, run)
    names, ours = comparable(checkpoint, run, np.dtype(dtype).name)
    if not names:
        at = f"model.layers.{n}"
        raise InputError(f"{theirs.path}: has no tensor of layer {n}, expected such as {at}")
    mtp = mtp_layers((), checkpoint.config)
    found = list(compare_all(ours, theirs, names, tolerance, mtp, judge=run.judge))
    used = {term.source for name in names for term in theirs.forms[name]}
    there = [name for name in theirs.names if split(name)[0] == n and not is_weight(name)]
    others = {theirs.source(name) for name in there if split(name)[1] != "input"}
    return Checked(n, tolerance, found, len(state), run.ties, sorted(others - used))


def comparable(checkpoint: Checkpoint, run: Rerun, dtype: str) -> tuple[list[str], Recording]:
    """The names of what compares of a run, in the model's order; what it kept, as a recording."""
    ours = Recording("minstep", run.tensors, engine_dtype=dtype)
    return align(ours, run.theirs, checkpoint.config), ours


def wanted(checkpoint: Checkpoint, theirs: Recording) -> Callable[[str], bool]:
    """Which of our tensors to keep: what the recording has, and what comparing that takes."""
    config = checkpoint.config
    widths = config_widths(config)
    factor = next((spec.moe.scaling_factor for spec in config.layers if spec.moe), None)
    weights = {m: weight_of(m, config.tie_word_embeddings) for m in (EMBEDDING, NORM, HEAD)}

    def wants(name: str) -> bool:
        part = split(name)[1]
        if part in ("moe", "share_expert") and name.replace(part, "mlp") in theirs.forms:
            return True
        module = HEAD if part.endswith("head.output") and not checkpoint.has_own_heads() else name
        if module in weights and weights[module] not in checkpoint.tensors:
            return False
        return derived(name, theirs.forms, factor, widths) is not None

    return wants
