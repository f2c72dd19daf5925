"""config.json -> Config: every irregularity of the model becomes one LayerSpec per layer.

The released file holds lists with one entry per layer, a second head count inside a nested
setting, MoE layers as one comma-joined string, and a scaling rule whose key is named after
another one. All of that ends here: below this file no component parses or branches on an index.

Source: config.json and configuration_step3p5.py of the released checkpoint
        (huggingface.co/stepfun-ai/Step-3.5-Flash).
Differs: the class defaults of the released configuration disagree with the released config.json,
        so a missing key is an error here, never a default. These may be absent: `torch_dtype`,
        `eos_token_id`, `attention_other_setting` and `quantization_config` (there is none),
        `yarn_only_types` (all kinds), one of `max_position_embeddings` and `max_seq_len` (the other
        holds), keys that decide nothing, and `can_chat` (it can), which is minstep's own: a model
        that `train` made only continues.
Checked by: tests/model/test_config.py
"""

from typing import Any, NamedTuple

from minstep.keys import MAX_INTEGER, Keys

MOST_LAYERS = 10_000
FULL, SLIDING = "full_attention", "sliding_attention"


class Llama3Scaling(NamedTuple):
    """Llama-3 frequency scaling; lengths in positions. See rope.inverse_frequencies."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


class RopeSpec(NamedTuple):
    """What decides the angles of a layer: rotary_dim (2P) of the K dimensions rotate."""

    theta: float
    rotary_dim: int
    scaling: Llama3Scaling | None


class MoESpec(NamedTuple):
    """Experts of one layer: E experts of width F, A active, plus one shared expert."""

    experts: int
    top_k: int
    width: int
    shared_width: int
    scaling_factor: float
    has_bias: bool


class LayerSpec(NamedTuple):
    """One layer with nothing left to look up. `moe` is None in a dense layer.

    H query heads, G key-value heads, K head width, W window (None: full attention).
    `swiglu_limit` clamps routed experts, `swiglu_limit_shared` the shared expert and dense MLPs.
    """

    name: str
    kind: str
    heads: int
    groups: int
    head_dim: int
    window: int | None
    rope: RopeSpec
    has_gate: bool
    mlp_width: int
    moe: MoESpec | None
    swiglu_limit: float | None
    swiglu_limit_shared: float | None


class Quantization(NamedTuple):
    """float8_e4m3fn weights with one float32 scale for each block of rows and columns.

    `excluded`: modules that stay in the checkpoint's own dtype, by name or part of a name.
    """

    rows: int
    columns: int
    excluded: frozenset[str]

    def covers(self, tensor: str) -> bool:
        """Whether a tensor may be stored in 8 bits: a projection that no excluded module holds."""
        parts = tensor.removesuffix(".weight").split(".")
        ends = range(1, len(parts) + 1)
        modules = (".".join(parts[start:end]) for end in ends for start in range(end))
        return tensor.endswith("_proj.weight") and self.excluded.isdisjoint(modules)


class Config(NamedTuple):
    """A whole model: L main layers, M multi-token-prediction layers, and what they share."""

    hidden_size: int
    vocab_size: int
    max_positions: int
    rms_norm_eps: float
    bos_token_id: int
    eos_token_ids: tuple[int, ...]
    tie_word_embeddings: bool
    torch_dtype: str | None
    quantization: Quantization | None
    can_chat: bool
    layers: tuple[LayerSpec, ...]
    mtp_layers: tuple[LayerSpec, ...]


def parse_config(raw: dict[str, Any], source: str = "config.json") -> Config:
    """Turn the hub's keys into a Config. Raises InputError with one line that names the key."""
    keys = Keys(raw, source)
    only = {"model_type": "step3p5", "zero_centered": True, "use_qk_norm": True}
    for key, expected in only.items():
        same = type(raw.get(key)) is type(expected) and raw[key] == expected
        keys.require(key, same, f"expected {expected!r}")
    normalises = raw.get("norm_expert_weight", True) is True
    keys.require("norm_expert_weight", normalises, "expected true: engines differ on what false is")
    lengths = [keys.integer(k) for k in ("max_seq_len", "max_position_embeddings") if k in raw]
    keys.require("max_position_embeddings", bool(lengths), "expected a positive integer")
    keys.require("max_seq_len", len(set(lengths)) == 1, "expected max_position_embeddings' value")
    dtype = raw.get("torch_dtype", raw.get("dtype"))
    keys.require(
        "torch_dtype", dtype in (None, "float32", "bfloat16"), "expected float32 or bfloat16"
    )
    eos = raw.get("eos_token_id", ())
    eos = tuple(eos) if isinstance(eos, (list, tuple)) else (eos,)
    keys.require("eos_token_id", all(type(i) is int and i >= 0 for i in eos), "expected token ids")
    main = keys.integer("num_hidden_layers", maximum=MOST_LAYERS)
    depths = keys.integer("num_nextn_predict_layers", minimum=0, maximum=MOST_LAYERS)
    layers = _layers(keys, main, depths)
    return Config(
        hidden_size=keys.integer("hidden_size"),
        vocab_size=keys.integer("vocab_size"),
        max_positions=lengths[0],
        rms_norm_eps=keys.number("rms_norm_eps", most=1),
        bos_token_id=keys.integer("bos_token_id", minimum=0),
        eos_token_ids=eos,
        tie_word_embeddings=keys.boolean("tie_word_embeddings"),
        torch_dtype=dtype,
        quantization=parse_quantization(raw, source),
        can_chat="can_chat" not in raw or keys.boolean("can_chat"),
        layers=layers[:main],
        mtp_layers=layers[main:],
    )


def _layers(keys: Keys, main: int, depths: int) -> tuple[LayerSpec, ...]:
    """One LayerSpec for each of the `main` layers and then for each MTP depth."""
    count = main + depths
    expected = f"{count} ({main} layers + {depths} MTP)"
    kinds = keys.per_layer("layer_types", count, expected)
    thetas = keys.per_layer("rope_theta", count, expected)
    factors = keys.per_layer("partial_rotary_factors", count, expected)
    limits = keys.per_layer("swiglu_limits", count, expected)
    limits_shared = keys.per_layer("swiglu_limits_shared", count, expected)
    head_dim = keys.integer("head_dim")
    scaling, scaled_kinds = _scaling(keys)
    moe_layers, moe = _moe(keys, main)
    has_gate = keys.boolean("use_head_wise_attn_gate")
    mlp_width = keys.integer("intermediate_size")
    heads = _heads(keys, head_dim)
    specs = []
    for n in range(count):
        kind = kinds[n]
        keys.require(
            f"layer_types[{n}]", kind in (FULL, SLIDING), f"expected {FULL} or {SLIDING}", kind
        )
        keys.positive(f"rope_theta[{n}]", thetas[n], least=1)  # no pair turns faster than the first
        factor = keys.positive(f"partial_rotary_factors[{n}]", factors[n])
        keys.require(f"partial_rotary_factors[{n}]", factor <= 1, "expected at most 1", factor)
        rotary_dim = int(head_dim * factor)
        even = rotary_dim > 0 and rotary_dim % 2 == 0
        message = f"gives rotary width {rotary_dim}, expected an even number above 0"
        keys.require(f"partial_rotary_factors[{n}]", even, message, factor)
        specs.append(
            LayerSpec(
                name=f"model.layers.{n}",
                kind=kind,
                heads=heads[kind][0],
                groups=heads[kind][1],
                head_dim=head_dim,
                window=keys.integer("sliding_window") if kind == SLIDING else None,
                rope=RopeSpec(
                    float(thetas[n]), rotary_dim, scaling if kind in scaled_kinds else None
                ),
                has_gate=has_gate,
                mlp_width=mlp_width,
                moe=moe if n in moe_layers else None,
                swiglu_limit=keys.limit(f"swiglu_limits[{n}]", limits[n]),
                swiglu_limit_shared=keys.limit(f"swiglu_limits_shared[{n}]", limits_shared[n]),
            )
        )
    return tuple(specs)


def _heads(keys: Keys, head_dim: int) -> dict[str, tuple[int, int]]:
    """Query heads H and groups G of each layer kind; `attention_other_setting` names its kind."""
    settings = {FULL: keys, SLIDING: keys}
    if keys.raw.get("attention_other_setting") is not None:
        other = keys.inner("attention_other_setting")
        kind = other.get("attention_type")
        other.require("attention_type", kind in (FULL, SLIDING), f"expected {FULL} or {SLIDING}")
        for key in ("head_dim", "true_head_dim"):
            width = other.raw.get(key, head_dim)
            other.require(key, width == head_dim, f"expected head_dim's {head_dim}")
        settings[kind] = other
    pairs = {}
    for kind, setting in settings.items():
        heads = setting.integer("num_attention_heads")
        groups = setting.integer("num_attention_groups")
        message = f"expected a multiple of num_attention_groups' {groups}"
        setting.require("num_attention_heads", heads % groups == 0, message)
        pairs[kind] = (heads, groups)
    return pairs


def _scaling(keys: Keys) -> tuple[Llama3Scaling | None, tuple[str, ...]]:
    """The scaling rule and the layer kinds it applies to.

    Differs: where `yarn_only_types` is absent the released code scales every layer, and
    transformers' native model full-attention layers only; the released code is followed.
    """
    kinds = keys.raw.get("yarn_only_types", [FULL, SLIDING])
    known = isinstance(kinds, list) and all(kind in (FULL, SLIDING) for kind in kinds)
    keys.require("yarn_only_types", known, f"expected a list of {FULL} or {SLIDING}")
    if keys.get("rope_scaling") is None:
        return None, ()
    inner = keys.inner("rope_scaling")
    key = "rope_type" if "rope_type" in inner.raw else "type"
    rope_type = inner.raw.get(key)
    inner.require(key, rope_type in ("llama3", "default"), "expected llama3 or default")
    if rope_type == "default":
        return None, ()
    low, high = inner.number("low_freq_factor"), inner.number("high_freq_factor")
    inner.require("high_freq_factor", high > low, f"expected more than low_freq_factor's {low}")
    original = inner.integer("original_max_position_embeddings")
    factor = inner.number("factor", least=0.1)
    return Llama3Scaling(factor, low, high, original), tuple(kinds)


def _moe(keys: Keys, main: int) -> tuple[frozenset[int], MoESpec | None]:
    """The indices of MoE layers, and what those layers are."""
    use_moe = keys.boolean("use_moe")
    listed = keys.get("moe_layers_enum") if use_moe else keys.raw.get("moe_layers_enum") or []
    if isinstance(listed, str):
        parts = [part.strip() for part in listed.split(",") if part.strip()]
        listed = [int(part) if part.isdecimal() and len(part) < 10 else part for part in parts]
    known = isinstance(listed, list) and all(type(i) is int and 0 <= i < main for i in listed)
    message = f"expected comma-joined layer numbers from 0 to {main - 1}"
    keys.require("moe_layers_enum", known, message)
    if not use_moe:
        keys.require("moe_layers_enum", not listed, "expected no layers, since use_moe is false")
        return frozenset(), None
    is_sigmoid = keys.get("moe_router_activation") == "sigmoid"
    keys.require("moe_router_activation", is_sigmoid, "expected 'sigmoid'")
    experts, top_k = keys.integer("moe_num_experts"), keys.integer("moe_top_k")
    keys.require("moe_top_k", top_k <= experts, f"expected at most moe_num_experts' {experts}")
    return frozenset(listed), MoESpec(
        experts=experts,
        top_k=top_k,
        width=keys.integer("moe_intermediate_size"),
        shared_width=keys.integer("share_expert_dim"),
        scaling_factor=keys.number("moe_router_scaling_factor", most=1e6),
        has_bias=keys.boolean("use_moe_router_bias"),
    )


def parse_quantization(raw: dict[str, Any], source: str) -> Quantization | None:
    """The config's quantization_config; None where there is none.

    Raises InputError for any other scheme than fp8 e4m3 with square or other 2-D blocks.
    Source: config.json of the released FP8 checkpoint; "fp8" of transformers' quantizers.
    Differs: the scheme rounds activations to 8 bits too, each time a layer runs. Here they are not:
        what is computed is what the stored weights mean.
    Checked by: tests/fast/test_fp8.py
    """
    if raw.get("quantization_config") is None:
        return None
    keys = Keys(raw, source).inner("quantization_config")
    keys.require("quant_method", keys.get("quant_method") == "fp8", "expected fp8")
    keys.require("fmt", keys.raw.get("fmt", "e4m3") == "e4m3", "expected e4m3")
    block: Any = keys.raw.get("weight_block_size")
    good = isinstance(block, list) and len(block) == 2 and all(type(n) is int for n in block)
    good = good and 0 < min(block) and max(block) <= MAX_INTEGER
    keys.require("weight_block_size", good, "expected two sizes, as [128, 128]")
    excluded: Any = keys.raw.get("modules_to_not_convert") or []
    named = isinstance(excluded, list) and all(isinstance(name, str) for name in excluded)
    keys.require("modules_to_not_convert", named, "expected a list of module names")
    return Quantization(block[0], block[1], frozenset(excluded))
