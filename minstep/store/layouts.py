"""Configs and tensor names as transformers writes them -> as the hub has them.

`save_pretrained` of transformers' native model leaves two kinds of folder. The text model alone
writes its own keys and tensor names, with the experts' gate_proj and up_proj in one tensor; the
model with vision nests the text's config and writes the hub's tensor names. Neither holds an MTP
layer, and their clamps are not in the config: the MTP layers that it counts are left out.
Source: configuration_step3p7.py and conversion_mapping.py of transformers 5.24.
Differs: transformers fills in what is absent with its class defaults. Here a key that decides what
    is computed must be there, as in every config that it writes.
Checked by: tests/store/test_layouts.py, tests/parity/test_recipe.py
"""

from typing import Any

from minstep.config import FULL, SLIDING
from minstep.errors import InputError
from minstep.keys import Keys

MLPS = ("dense", "sparse")
SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
SAME = (  # keys that both have
    "model_type hidden_size intermediate_size num_hidden_layers vocab_size rms_norm_eps head_dim "
    "max_position_embeddings max_seq_len tie_word_embeddings sliding_window moe_intermediate_size "
    "share_expert_dim moe_router_scaling_factor quantization_config"
).split()
ALLOWED: dict[str, tuple[Any, ...]] = {  # what would change the maths; the first where absent
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "hidden_act": ("silu",),
    "use_bidirectional_attention": (False,),
    "gating": (True, "per-head"),
    "norm_expert_weight": (True,),
}
RENAMED = (  # transformers' part of a tensor's name, the hub's
    ("model.language_model.", "model."),
    (".mlp.gate.weight", ".moe.gate.weight"),
    (".mlp.gate.e_score_correction_bias", ".moe.router_bias"),
    (".mlp.experts.down_proj", ".moe.down_proj.weight"),
    (".mlp.shared_experts.", ".share_expert."),
)
FUSED = ".mlp.experts.gate_up_proj"


def hub_config(raw: dict[str, Any], source: str = "config.json") -> dict[str, Any]:
    """The config's keys as parse_config reads them; a config of the hub's comes back unchanged.

    Raises InputError, naming the file and the key, for settings that the hub's keys cannot say.
    """
    if raw.get("model_type") == "step3p7":
        outer, text = raw, Keys(raw, source).inner("text_config")
        # which matrix is the head is said outside: the text's own flag is not read
        raw = text.raw | {"tie_word_embeddings": outer.get("tie_word_embeddings", False)}
        raw |= {key: outer[key] for key in ("dtype", "quantization_config") if key in outer}
        source = text.source
    if "num_attention_groups" in raw or "num_key_value_heads" not in raw:
        return raw
    keys = Keys(raw, source)
    for key, allowed in ALLOWED.items():
        good = raw.get(key, allowed[0]) in allowed
        keys.require(key, good, f"expected {allowed[0]!r}")
    head_dim, groups = keys.integer("head_dim"), keys.integer("num_key_value_heads")
    scaled_by = raw.get("query_pre_attn_scalar")
    keys.require("query_pre_attn_scalar", scaled_by in (None, head_dim), f"expected {head_dim}")
    main = keys.integer("num_hidden_layers")
    kinds = _listed(keys, "layer_types", main, (FULL, SLIDING))
    thetas, shares, rope_scaling, scaled_kinds = _rotations(keys, sorted(set(kinds)))
    heads = _heads(keys, kinds)
    mlps = _listed(keys, "mlp_layer_types", main, MLPS)
    moe_layers = ",".join(str(n) for n, mlp in enumerate(mlps) if mlp == "sparse")
    sliding = {"attention_type": SLIDING, "num_attention_heads": heads[SLIDING]}
    hub = {key: raw[key] for key in SAME if key in raw}
    if raw.get("eos_token_id") is not None:
        hub["eos_token_id"] = raw["eos_token_id"]
    return hub | {
        "torch_dtype": raw.get("dtype", raw.get("torch_dtype")),
        "bos_token_id": raw.get("bos_token_id") or 0,  # may be null; no component reads it
        "num_nextn_predict_layers": 0,
        "num_attention_heads": heads[FULL],
        "num_attention_groups": groups,
        "attention_other_setting": sliding | {"num_attention_groups": groups},
        "layer_types": kinds,
        "rope_theta": [thetas[kind] for kind in kinds],
        "partial_rotary_factors": [shares[kind] for kind in kinds],
        "rope_scaling": rope_scaling,
        "yarn_only_types": scaled_kinds,
        "zero_centered": True,  # this and what follows has no key: transformers' model is so
        "use_qk_norm": True,
        "use_head_wise_attn_gate": True,
        "use_moe": bool(moe_layers),
        "use_moe_router_bias": True,
        "moe_router_activation": "sigmoid",
        "moe_layers_enum": moe_layers,
        "moe_num_experts": keys.integer("n_routed_experts"),
        "moe_top_k": keys.integer("num_experts_per_tok"),
        "swiglu_limits": _limits(keys, "swiglu_limits", main),
        "swiglu_limits_shared": _limits(keys, "swiglu_limits_shared", main),
    }


def hub_name(name: str) -> str:
    """What the hub calls a tensor that transformers wrote under `name`; its own names stay."""
    for theirs, ours in RENAMED:
        name = name.replace(theirs, ours)
    if name.startswith("language_model."):
        name = name.removeprefix("language_model.")
    rooted = name.startswith(("layers.", "embed_tokens.", "norm."))
    return f"model.{name}" if rooted else name


def halves(name: str) -> tuple[str, str] | None:
    """The hub names of the two tensors that transformers stores as one; None for any other tensor.

    `name` holds [E, 2*F, D]: of each expert the first F rows are gate_proj's, the others up_proj's.
    """
    if not name.endswith(FUSED):
        return None
    moe = f"{hub_name(name).removesuffix(FUSED)}.moe"
    return f"{moe}.gate_proj.weight", f"{moe}.up_proj.weight"


def _listed(keys: Keys, key: str, count: int, known: tuple[str, ...]) -> list[str]:
    """The list at `key`, which says of each of `count` layers which of the `known` kinds it is."""
    kinds = keys.get(key)
    good = isinstance(kinds, list) and len(kinds) == count
    keys.require(key, good, f"expected a list of {count} layer kinds")
    for n, kind in enumerate(kinds):
        keys.require(f"{key}[{n}]", kind in known, f"expected {' or '.join(known)}", kind)
    return list(kinds)


def _rotations(
    keys: Keys, kinds: list[str]
) -> tuple[dict[str, float], dict[str, Any], dict[str, Any] | None, list[str]]:
    """Theta and rotating share of each layer kind; the scaling, and the kinds it applies to."""
    parameters = keys.inner("rope_parameters")
    thetas, shares, scalings = {}, {}, {}
    known = ("rope_type", "rope_theta", "partial_rotary_factor", *SCALING)
    for kind in kinds:
        rope = parameters.inner(kind)
        for key in rope.raw:
            rope.require(key, key in known, "expected none: it is not known what it does")
        thetas[kind] = rope.number("rope_theta")
        shares[kind] = rope.raw.get("partial_rotary_factor", 1.0)
        is_known = rope.get("rope_type") in ("default", "llama3")
        rope.require("rope_type", is_known, "expected default or llama3")
        if rope.raw["rope_type"] == "llama3":
            scalings[kind] = {"rope_type": "llama3"} | {key: rope.get(key) for key in SCALING}
    first = next(iter(scalings.values()), None)
    same = all(scaling == first for scaling in scalings.values())
    keys.require("rope_parameters", same, "expected one scaling for all layer kinds that have any")
    return thetas, shares, first, list(scalings)


def _heads(keys: Keys, kinds: list[str]) -> dict[str, int]:
    """Query heads of each layer kind; `per_layer_config` may give them layer by layer."""
    base = keys.integer("num_attention_heads")
    has_wide = keys.raw.get("num_sliding_attention_heads") is not None
    wide = keys.integer("num_sliding_attention_heads") if has_wide else base
    heads = {FULL: base, SLIDING: wide}
    if keys.raw.get("per_layer_config") is None:  # as transformers fills it in
        return heads
    layers, numbers = keys.inner("per_layer_config"), [str(n) for n in range(len(kinds))]
    known = {*numbers}
    for n in layers.raw:
        layers.require(n, n in known, f"expected layer numbers from 0 to {numbers[-1]}")
    found: dict[str, set[int]] = {kind: set() for kind in (FULL, SLIDING)}
    for n, kind in zip(numbers, kinds, strict=True):
        own = base
        if layers.raw.get(n, {}) != {}:
            layer = layers.inner(n)
            for key in layer.raw:
                expected = "expected num_attention_heads and nothing else"
                layer.require(key, key == "num_attention_heads", expected)
            own = layer.integer("num_attention_heads")
        found[kind].add(own)
    for kind, counts in found.items():
        if len(counts) > 1:
            message = f"gives {kind} layers {sorted(counts)} query heads, expected one number"
            raise InputError(f"{keys.source}: per_layer_config {message}")
        heads[kind] = next(iter(counts), heads[kind])
    return heads


def _limits(keys: Keys, key: str, count: int) -> list[Any]:
    """One clamp for each of `count` layers; there may be none at all."""
    limits = keys.raw.get(key)
    if limits is None:
        return [None] * count
    good = isinstance(limits, list) and len(limits) == count
    keys.require(key, good, f"expected a list of {count} clamps")
    return list(limits)
