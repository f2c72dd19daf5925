"""Names of tensors: which layer, stage and part of the model each belongs to.

Checked by: tests/store/test_shards.py, tests/store/test_inspect.py
"""

import re
from collections.abc import Collection
from typing import NamedTuple

from minstep.config import Config

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
EMBEDDING_WEIGHT, HEAD_WEIGHT = f"{EMBEDDING}.weight", f"{HEAD}.weight"
LAYER = re.compile(r"model\.layers\.(0|[1-9][0-9]{0,5})(?:\.(.+))?")
PARTS = {  # what of a tensor's name says which part of the model it belongs to; the first that fits
    "self_attn": "attention",
    "moe.gate.weight": "router",
    "router_bias": "router",
    ".moe.": "routed experts",
    "share_expert": "shared experts",
    ".mlp.": "dense MLPs",
    "eh_proj": "MTP inputs",
    "embed_tokens": "embedding",
    "lm_head": "output matrix",
    "shared_head.output": "output matrix",
}


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


def part_of(name: str) -> str:
    """The part of the model that a weight belongs to, or "norms"."""
    return next((part for piece, part in PARTS.items() if piece in name), "norms")


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
