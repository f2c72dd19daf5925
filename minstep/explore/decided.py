"""What decides each named step of the forward pass: its shape in letters, and its config keys.

The letters are those of the docstrings; the keys those of a config.json in hub layout. The table is
data: what runs is the model, which knows nothing of it.
Checked by: tests/explore/test_walk.py
"""

from typing import Any, NamedTuple

from minstep.config import Config, LayerSpec
from minstep.store.stages import split

# The letters of shapes, and what each counts.
LETTERS = {
    "T": "tokens of the prompt",
    "S": "positions looked at",
    "D": "numbers of a state",
    "H": "query heads",
    "G": "key-value heads",
    "K": "numbers of a head",
    "E": "experts",
    "A": "experts chosen",
    "V": "tokens of the vocabulary",
}
HEADS, GROUPS = "num_attention_heads", "num_attention_groups"
OTHER = "attention_other_setting"  # has HEADS and GROUPS of the layer kind that it names
EACH = "layer_types rope_theta partial_rotary_factors swiglu_limits swiglu_limits_shared".split()


class Point(NamedTuple):
    """A step: the axes of its tensor, what it is in a few words, and the keys that decide it."""

    axes: tuple[str, ...]
    what: str
    keys: tuple[str, ...]


def _point(axes: str, what: str, keys: str) -> Point:
    return Point(tuple(axes.split()), what, tuple(keys.split()))


NORM = "zero_centered rms_norm_eps"
ROPE = "rope_theta partial_rotary_factors yarn_only_types rope_scaling"
# By the part of the name that follows the layer's; "" is the layer itself.
POINTS = {
    "model.embed_tokens": _point("T D", "the token's row of the table", "vocab_size hidden_size"),
    "eh_proj": _point(
        "T D", "next token and state, mixed", f"num_nextn_predict_layers hidden_size {NORM}"
    ),
    "input_layernorm": _point("T D", "the state at unit size, rescaled", NORM),
    "self_attn.q_proj": _point("T H*K", "queries: what each head seeks", f"{HEADS} head_dim"),
    "self_attn.k_proj": _point("T G*K", "keys: what it is found by", f"{GROUPS} head_dim"),
    "self_attn.v_proj": _point("T G*K", "values: what it hands over", f"{GROUPS} head_dim"),
    "self_attn.q_norm": _point("T H K", "queries at unit size, rescaled", f"use_qk_norm {NORM}"),
    "self_attn.k_norm": _point("T G K", "keys at unit size, rescaled", f"use_qk_norm {NORM}"),
    "self_attn.q_rope": _point("T H K", "queries turned by position", ROPE),
    "self_attn.k_rope": _point("T G K", "keys turned by position", ROPE),
    "self_attn.probs": _point(
        "H T S", "how much each position counts", f"layer_types sliding_window {GROUPS}"
    ),
    "self_attn.g_proj": _point(
        "T H", "a gate a head, before sigmoid", f"use_head_wise_attn_gate {HEADS}"
    ),
    "self_attn.o_proj": _point("T D", "all heads joined, to be added", "hidden_size"),
    "post_attention_layernorm": _point("T D", "the new state, again unit size", NORM),
    "mlp": _point(
        "T D",
        "dense MLP, to be added",
        "use_moe moe_layers_enum intermediate_size swiglu_limits_shared",
    ),
    "moe.gate": _point(
        "T E",
        "the router's logits",
        "use_moe moe_layers_enum moe_num_experts moe_router_activation",
    ),
    "moe.margin": _point("T", "last chosen over first rejected", "moe_top_k use_moe_router_bias"),
    "moe.ids": _point("T A", "the experts chosen", "moe_top_k use_moe_router_bias"),
    "moe.weights": _point("T A", "how much each of them counts", "moe_router_scaling_factor"),
    "moe": _point("T D", "their weighted sum, to be added", "moe_intermediate_size swiglu_limits"),
    "share_expert": _point(
        "T D", "every token's expert, to be added", "share_expert_dim swiglu_limits_shared"
    ),
    "": _point(
        "T D",
        "the state as it leaves the layer",
        "layer_types sliding_window use_moe moe_layers_enum",
    ),
    "model.norm": _point("T D", "the last state at unit size", f"num_hidden_layers {NORM}"),
    "lm_head": _point("T V", "a logit for each token", "tie_word_embeddings vocab_size"),
    "transformer.shared_head.norm": _point("T D", "the state at unit size, rescaled", NORM),
    "transformer.shared_head.output": _point(
        "T V", "logits for the token after next", "vocab_size"
    ),
}


def point_of(name: str) -> Point:
    """What is known of a step by the tap's full name. Raises KeyError for one that is unknown."""
    return POINTS[split(name)[1]]


def sizes(config: Config, spec: LayerSpec | None, count: int) -> dict[str, int]:
    """How many each letter stands for, in a layer or outside of all, over `count` tokens."""
    found = {"T": count, "S": count, "D": config.hidden_size, "V": config.vocab_size}
    if spec is not None:
        found |= {"H": spec.heads, "G": spec.groups, "K": spec.head_dim}
        if spec.moe:
            found |= {"E": spec.moe.experts, "A": spec.moe.top_k}
    return {letter: found[letter] for letter in LETTERS if letter in found}


def deciding(name: str, spec: LayerSpec | None, raw: dict[str, Any]) -> dict[str, Any]:
    """The keys that decided a step, with their values: `rope_theta[4]` for layer 4's of a list.

    spec: the layer's, None outside of all; raw: config.json, in hub layout. A key in a nested
    object is dotted. Left out is what is not looked at: a window where there is none, a scaling
    that is not applied, and a key that may be absent and is.
    """
    number, _ = split(name)
    found: dict[str, Any] = {}
    other = raw.get(OTHER) or {}
    for key in point_of(name).keys:
        if not _is_looked_at(key, number, spec, raw):
            continue
        if key in (HEADS, GROUPS) and spec and other.get("attention_type") == spec.kind:
            found[f"{OTHER}.{key}"] = other[key]
        elif key in EACH and isinstance(raw[key], list):
            found[f"{key}[{number}]"] = raw[key][number]
        elif isinstance(raw[key], dict):
            is_applied = spec is not None and spec.rope.scaling is not None
            inner = [k for k in raw[key] if is_applied or k in ("rope_type", "type")]
            found |= {f"{key}.{k}": raw[key][k] for k in inner}
        else:
            found[key] = raw[key]
    return found


def _is_looked_at(
    key: str, number: int | None, spec: LayerSpec | None, raw: dict[str, Any]
) -> bool:
    """Whether a key decides anything here; a number and a spec are those of a layer."""
    if spec is None or number is None:
        return True
    if key == "sliding_window":
        return spec.window is not None
    if key == "yarn_only_types":
        return key in raw and raw["rope_scaling"] is not None
    if key == "rope_scaling":
        return spec.kind in raw.get("yarn_only_types", [spec.kind])
    if number >= raw["num_hidden_layers"] and key in ("use_moe", "moe_layers_enum"):
        return False  # an MTP layer is dense whatever they say
    if key == "use_moe":
        return spec.moe is not None or not raw[key]
    return key != "moe_layers_enum" or raw["use_moe"]
