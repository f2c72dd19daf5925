"""Which layer a tensor belongs to by its name, and what each stage of the forward pass reads."""

import re
from collections.abc import Collection
from typing import NamedTuple

import numpy as np

from minstep.config import Config
from minstep.linear import Weight
from minstep.model import ModelWeights
from minstep.store.checkpoint import Checkpoint
from minstep.weights import Shape, assemble

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
EMBEDDING_WEIGHT, HEAD_WEIGHT = f"{EMBEDDING}.weight", f"{HEAD}.weight"
LAYER = re.compile(r"model\.layers\.(0|[1-9][0-9]{0,5})(?:\.(.+))?")
AS_NEXT = "embeds the next tokens"
AS_HEAD = "predicts the layer's token, which has no output matrix of its own"
AS_LOGITS = "no layer needs it"


def split(name: str) -> tuple[int | None, str]:
    """`model.layers.3.moe.gate` -> 3, `moe.gate`; no layer: None and the name.

    A number that no model has, of more than six digits or with zeros in front, is no layer.
    """
    found = LAYER.fullmatch(name)
    return (int(found[1]), found[2] or "") if found else (None, name)


def layer_number(name: str) -> int:
    """The layer a tensor belongs to; -1 outside the layers."""
    number, part = split(name)
    return -1 if number is None or not part else number


def spans(numbers: Collection[int]) -> list[str]:
    """Layer numbers in increasing order as runs: `0-2`, `5` of 0, 1, 2, 5."""
    starts = [n for n in numbers if n - 1 not in numbers]
    ends = [n for n in numbers if n + 1 not in numbers]
    return [str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True)]


class Stage(NamedTuple):
    """A part of the forward pass that can begin from the state before it.

    `name`: its module; `last`: the last tensor that it computes.
    """

    name: str
    last: str

    def has(self, tensor: str) -> bool:
        """Whether a tensor of the trace, or of the checkpoint, is this stage's own."""
        scopes = ("model.norm", HEAD) if self.name == HEAD else (self.name,)
        return tensor in scopes or tensor.startswith(tuple(f"{scope}." for scope in scopes))


def stages(config: Config, count: int) -> list[Stage]:
    """The stages over `count` tokens, in order: embedding, main layers, head, MTP depths.

    A depth that has no position left is left out. The state after a stage is its module's output;
    the head leaves the state as it is.
    """
    main = [Stage(spec.name, spec.name) for spec in config.layers]
    output = "transformer.shared_head.output"
    depths = [Stage(s.name, f"{s.name}.{output}") for s in config.mtp_layers[: count - 1]]
    return [Stage(EMBEDDING, EMBEDDING), *main, Stage(HEAD, HEAD), *depths]


def needs(stage: Stage, config: Config, names: Collection[str]) -> dict[str, str]:
    """The tensors that a stage reads, of those that the checkpoint names: each with what it is for.

    Its own have "". Layers are stages whether or not a prompt is long enough to reach them.
    """
    needed = {name: "" for name in names if stage.has(name)}
    if stage.name == HEAD and config.tie_word_embeddings:
        needed[EMBEDDING_WEIGHT] = AS_LOGITS
    if stage.name in {spec.name for spec in config.mtp_layers}:
        needed[EMBEDDING_WEIGHT] = AS_NEXT
        if f"{stage.last}.weight" not in needed:
            tied = config.tie_word_embeddings
            needed.setdefault(EMBEDDING_WEIGHT if tied else HEAD_WEIGHT, AS_HEAD)
    return needed


def some_weights(checkpoint: Checkpoint, names: Collection[str]) -> ModelWeights:
    """The weights with these tensors in their places, and empty arrays in all others.

    Raises InputError where one of them is missing or does not fit the config.
    """

    def get(name: str, shape: Shape) -> Weight:
        return checkpoint.get(name, shape) if name in names else np.empty(0)

    return assemble(checkpoint.config, get, checkpoint.has_own_heads())
