"""Other frameworks' names for our tensors, and the order in which the model computes them.

Ours are the module paths of the released checkpoint, which the released code keeps. A fused tensor
has the names of its parts, or one name of its own where the sizes of the parts are not known.
Source: modeling_step3p7.py and conversion_mapping.py of transformers 5.24; step3p5.py and
        step3p5_mtp.py of vLLM.
Checked by: tests/parity/test_names.py
"""

import re
from collections.abc import Collection, Iterable
from typing import NamedTuple

from minstep.config import Config
from minstep.store.layouts import hub_name
from minstep.store.stages import split

# Each is tried in turn on what the one before left, and the first on what hub_name left.
RULES = (
    (r"^model\.lm_head", "lm_head"),
    (r"^model\.model\.", "model."),
    (r"^(?=(?:embed_tokens|norm)$)", "model."),
    (r"(?<!\.layers)(?<!\.experts)\.0$", ""),  # the first of several outputs
    (r"\.mtp_block(?=\.|$)", ""),
    (r"(?<=\d)\.shared_head(?=\.|$)", ".transformer.shared_head"),
    (r"\.shared_head\.head(?=\.|$)", ".shared_head.output"),
    (r"\.shared_head$", ".shared_head.norm"),  # the module returns what its norm does
    (r"\.self_attn$", ".self_attn.o_proj"),
    (r"\.self_attn\.1$", ".self_attn.probs"),
    (r"\.(?:mlp\.shared_experts|moe\.share_expert)(?=\.|$)", ".share_expert"),
    (r"\.mlp\.gate(?=\.\d|$)", ".moe.gate"),
    (r"\.moe\.gate\.1$", ".moe.weights.unscaled"),
    (r"\.moe\.gate\.2$", ".moe.ids"),
    (r"\.mlp\.experts$", ".moe.unscaled"),
    (r"\.mlp\.experts\.gate_up_proj$", ".moe.gate_up_proj.weight"),
    (r"\.moe\.experts\.(?:routed_experts\.)?w13_weight$", ".moe.gate_up_proj.weight"),
    (r"\.moe\.experts\.(?:routed_experts\.)?w2_weight$", ".moe.down_proj.weight"),
)
VLLM = re.compile(r"\.self_attn\.qkv_proj|\.moe\.experts|\.moe\.share_expert")
# Modules that return what the last of their own parts does: the part goes before where both are.
WRAPPERS = re.compile(r"\.(?:self_attn|mtp_block|shared_head|moe\.experts)(?:\.0)?$|\d\.0$")

PLACES = (
    "input enorm hnorm eh_proj input_layernorm self_attn.qkv_proj self_attn.q_proj "
    "self_attn.k_proj self_attn.v_proj self_attn.q_norm self_attn.k_norm self_attn.q_rope "
    "self_attn.k_rope self_attn.probs self_attn.g_proj self_attn.o_proj post_attention_layernorm "
    "mlp.gate_proj mlp.up_proj mlp.down_proj moe.gate moe.router_bias moe.margin moe.ids "
    "moe.weights.unscaled moe.weights moe.gate_proj moe.up_proj moe.down_proj moe.unscaled moe "
    "share_expert.gate_proj share_expert.up_proj share_expert.down_proj share_expert mlp"
).split()
ENDS = ("", "transformer.shared_head.norm", "transformer.shared_head.output")  # "": the layer
PARTS = {part: n for n, part in enumerate((*PLACES, *ENDS))}
HEADS = (".q_norm", ".k_norm", ".q_rope", ".k_rope")


class Place(NamedTuple):
    """One of our names, and which of `of` equal parts along the output axis it is."""

    name: str
    part: int = 0
    of: int = 1


def sums_experts(sources: Collection[str]) -> bool:
    """Whether a file's names are vLLM's, whose module `moe` adds the shared expert itself."""
    return any(VLLM.search(source) for source in sources)


def places(source: str, moe_is_sum: bool = False) -> list[Place]:
    """Which of our tensors a file's tensor holds; a name that no rule knows stays as it is.

    `moe_is_sum`: see sums_experts. Three names are our own for what others compute: `moe.unscaled`
    and `moe.weights.unscaled`, before the routed scaling factor, and `mlp` in a layer of experts:
    their scaled sum and the shared expert.
    """
    name = hub_name(source)
    for pattern, ours in RULES:
        name = re.sub(pattern, ours, name)
    if moe_is_sum:
        name = re.sub(r"(?<=\d)\.moe(?:\.experts)?$", ".mlp", name)
    fused = re.fullmatch(r"(.+)\.gate_up_proj(\.weight)?", name)
    if fused is None:
        return [Place(name)]
    return [Place(f"{fused[1]}.{half}_proj{fused[2] or ''}", n, 2) for n, half in enumerate(HALVES)]


HALVES = ("gate", "up")


def is_wrapper(source: str) -> bool:
    """Whether a file's tensor is the output of a module that another tensor may name better."""
    return WRAPPERS.search(source) is not None


def is_weight(name: str) -> bool:
    """Whether `name` is a weight of the checkpoint, not what a module computed."""
    return name.endswith((".weight", ".bias", ".router_bias"))


def is_known(name: str) -> bool:
    """Whether `name` is one of our activations, or a weight of a module of ours."""
    return axes(re.sub(r"\.(?:weight|bias|router_bias)$", "", name)) is not None


def axes(name: str) -> int | None:
    """How many axes our activation `name` has; None for a weight and for an unknown name."""
    layer, part = split(name)
    if is_weight(name):
        return None
    if layer is None:
        return 2 if part in ("model.embed_tokens", "model.norm", "lm_head") else None
    if part.endswith((*HEADS, ".probs")):
        return 3
    return 1 if part == "moe.margin" else 2 if part in PARTS else None


def mtp_layers(names: Iterable[str], config: Config | None = None) -> frozenset[int]:
    """The layers that predict further tokens: by the config, else by what only they have."""
    if config is not None:
        first = len(config.layers)
        return frozenset(range(first, first + len(config.mtp_layers)))
    only = ("eh_proj", "enorm", "hnorm", "transformer.shared_head")
    pairs = (split(name) for name in names)
    return frozenset(n for n, part in pairs if n is not None and part.startswith(only))


def mtp_depths(names: Iterable[str], config: Config | None = None) -> dict[int, int]:
    """The depth of each of those layers, from 1, by its number."""
    mtp = mtp_layers(names, config)
    return {n: n - min(mtp) + 1 for n in mtp}


def model_order(name: str, mtp: Collection[int] = ()) -> tuple[int, int, int, str]:
    """A key that sorts our names as the model computes them; `mtp` are the MTP layers' numbers.

    The embedding, the main layers, the final norm and the logits, then the MTP layers. Unknown
    names come last in their layer, and those of no layer last of all.
    """
    layer, part = split(name)
    stem = re.sub(r"\.(?:weight|bias)$", "", part)
    if layer is not None:
        return (4 if layer in mtp else 1, layer, PARTS.get(stem, len(PARTS)), part)
    tops = {"model.embed_tokens": 0, "model.norm": 2, "lm_head": 3}
    return (tops.get(stem, 5), 0, 0, part)


def in_model_order(names: Iterable[str]) -> list[str]:
    """Our names as the model computes them."""
    names = list(names)
    mtp = mtp_layers(names)
    return sorted(names, key=lambda name: model_order(name, mtp))
