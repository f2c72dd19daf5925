"""What transformers writes into config.json, and its tensor names, turned into the hub's."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest

import minstep
from minstep.config import FULL, SLIDING, Config, parse_config
from minstep.errors import InputError
from minstep.store.config_file import load_config
from minstep.store.layouts import halves, hub_config, hub_name
from minstep.weights import tensor_shapes
from tests.conftest import Refused

# Of the tiny model, as Step3p7TextModel.save_pretrained writes it (transformers 5.24).
TEXT: dict[str, Any] = json.loads("""{
"architectures": ["Step3p7TextModel"], "attention_bias": false, "attention_dropout": 0.0,
"bos_token_id": 0, "dtype": "float32", "eos_token_id": [1, 2], "head_dim": 16, "hidden_act": "silu",
"hidden_size": 64, "initializer_range": 0.02, "intermediate_size": 160,
"layer_types": ["full_attention", "sliding_attention", "sliding_attention", "sliding_attention",
"full_attention", "sliding_attention", "sliding_attention", "sliding_attention"],
"max_position_embeddings": 4096, "max_seq_len": 4096, "mlp_bias": false,
"mlp_layer_types": ["dense", "dense", "sparse", "sparse", "sparse", "sparse", "sparse", "sparse"],
"model_type": "step3p5", "moe_intermediate_size": 24, "moe_router_activation": "sigmoid",
"moe_router_scaling_factor": 3.0, "mtp_layer_types": ["sliding_attention", "sliding_attention",
"sliding_attention"], "mtp_mlp_layer_types": ["dense", "dense", "dense"], "n_routed_experts": 16,
"need_fp32_gate": true, "norm_expert_weight": true, "num_attention_heads": 4,
"num_experts_per_tok": 4, "num_hidden_layers": 8, "num_key_value_heads": 2,
"num_nextn_predict_layers": 3, "num_sliding_attention_heads": 6, "output_router_logits": false,
"pad_token_id": 1, "per_layer_config": {"1": {"num_attention_heads": 6},
"2": {"num_attention_heads": 6}, "3": {"num_attention_heads": 6}, "5": {"num_attention_heads": 6},
"6": {"num_attention_heads": 6}, "7": {"num_attention_heads": 6}}, "query_pre_attn_scalar": 16,
"rms_norm_eps": 1e-05, "rope_parameters": {"full_attention": {"factor": 2.0,
"high_freq_factor": 32.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 256,
"partial_rotary_factor": 0.5, "rope_theta": 5000000.0, "rope_type": "llama3"},
"sliding_attention": {"partial_rotary_factor": 1.0, "rope_theta": 10000.0, "rope_type": "default"}},
"share_expert_dim": 32, "sliding_window": 8,
"swiglu_limits": [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.9, 0.7],
"swiglu_limits_shared": [0.0, 1.2, 0.0, 0.0, 0.0, 0.0, 1.1, 0.8], "tie_word_embeddings": false,
"transformers_version": "5.24.0", "use_cache": true, "use_head_wise_attn_gate": true,
"use_moe": true, "use_moe_router_bias": true, "use_qk_norm": true, "vocab_size": 320,
"yarn_only_types": ["full_attention"], "zero_centered": true}""")
# What a text model of few settings has: no keys of the hub's, and null where nothing was said.
SHORT = {
    key: TEXT[key]
    for key in (
        "hidden_size head_dim hidden_act intermediate_size max_position_embeddings mlp_bias "
        "model_type moe_intermediate_size moe_router_scaling_factor n_routed_experts vocab_size "
        "num_attention_heads num_experts_per_tok num_key_value_heads rms_norm_eps share_expert_dim "
        "tie_word_embeddings attention_bias query_pre_attn_scalar dtype"
    ).split()
} | {
    "bos_token_id": None,
    "eos_token_id": None,
    "num_hidden_layers": 2,
    "layer_types": [FULL, FULL],
    "mlp_layer_types": ["dense", "sparse"],
    "mtp_layer_types": None,
    "per_layer_config": {},
    "rope_parameters": {FULL: {"rope_theta": 10000.0, "rope_type": "default"}},
    "sliding_window": None,
    "swiglu_limits": None,
    "swiglu_limits_shared": None,
}


def read(raw: dict[str, Any]) -> Config:
    return parse_config(hub_config(raw))


def changed(*path: str, to: Any) -> dict[str, Any]:
    """TEXT with another value at a place, or without it: to=... ."""
    raw = inner = copy.deepcopy(TEXT)
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = to
    if to is ...:
        del inner[path[-1]]
    return raw


def test_the_text_models_config_says_what_the_hubs_says_but_for_mtp_layers() -> None:
    tiny = load_config(minstep.find_config("tiny"))
    assert read(TEXT) == tiny._replace(mtp_layers=())


def test_the_token_that_begins_a_text_is_kept_and_is_0_where_none_is_named() -> None:
    for named, expected in ((7, 7), (0, 0), (None, 0), (..., 0)):
        assert read(changed("bos_token_id", to=named)).bos_token_id == expected


def test_the_config_of_the_model_with_vision_nests_the_text() -> None:
    text = {key: TEXT[key] for key in TEXT if key != "dtype"}
    full = {"model_type": "step3p7", "dtype": "bfloat16", "text_config": text, "vision_config": {}}
    assert read(full) == read(TEXT)._replace(torch_dtype="bfloat16")
    # transformers ties by the outer flag alone
    assert read(full | {"tie_word_embeddings": True}).tie_word_embeddings
    tied = full | {"text_config": text | {"tie_word_embeddings": True}}
    assert not read(tied).tie_word_embeddings


def test_a_config_of_the_hubs_comes_back_unchanged() -> None:
    for name in ("tiny", "odd", "no_extras", "step-3.5-flash"):
        file = Path(minstep.find_config(name)) / "config.json"
        raw = json.loads(file.read_text(encoding="utf-8"))
        assert hub_config(raw) == raw
        nested = {"model_type": "step3p7", "text_config": raw, "tie_word_embeddings": False}
        assert hub_config(nested) == raw


def test_a_config_of_few_settings_is_read_as_transformers_reads_it() -> None:
    config = read(SHORT)
    dense, sparse = config.layers
    assert dense.moe is None and sparse.moe is not None and sparse.moe.has_bias
    assert (dense.heads, dense.groups, dense.window, dense.has_gate) == (4, 2, None, True)
    assert dense.rope == (10000.0, 16, None)
    assert (sparse.swiglu_limit, sparse.swiglu_limit_shared) == (None, None)
    assert (config.eos_token_ids, config.torch_dtype) == ((), "float32")


def test_every_layer_of_a_model_without_experts_is_dense() -> None:
    config = read(SHORT | {"mlp_layer_types": ["dense", "dense"]})
    assert [spec.moe for spec in config.layers] == [None, None]


def test_heads_of_sliding_layers_are_those_of_per_layer_config_or_else_their_own_key() -> None:
    def heads(raw: dict[str, Any]) -> dict[str, int]:
        return {spec.kind: spec.heads for spec in read(raw).layers}

    assert heads(changed("num_sliding_attention_heads", to=2)) == {FULL: 4, SLIDING: 6}
    assert heads(changed("per_layer_config", to=...)) == {FULL: 4, SLIDING: 6}
    assert heads(changed("per_layer_config", to={})) == {FULL: 4, SLIDING: 4}
    full = {str(n): {"num_attention_heads": 8} for n in (0, 4)}
    assert heads(changed("per_layer_config", to=full)) == {FULL: 8, SLIDING: 4}


def test_scaling_applies_to_the_kinds_that_have_it_whatever_the_hubs_own_key_says() -> None:
    scaled = TEXT["rope_parameters"][FULL]
    both = changed("rope_parameters", SLIDING, to=scaled | {"rope_theta": 1e4})
    assert all(spec.rope.scaling == (2.0, 1.0, 32.0, 256) for spec in read(both).layers)
    plain = changed("rope_parameters", FULL, to={"rope_type": "default", "rope_theta": 5e6})
    assert all(spec.rope.scaling is None for spec in read(plain).layers)
    assert read(plain).layers[0].rope.rotary_dim == 16


@pytest.mark.parametrize(
    ("path", "to", "words"),
    [
        (("attention_bias",), True, ("attention_bias is true", "False")),
        (("mlp_bias",), True, ("mlp_bias is true", "False")),
        (("hidden_act",), "gelu", ("hidden_act", "gelu", "silu")),
        (("gating",), False, ("gating is false", "True")),
        (("use_bidirectional_attention",), True, ("use_bidirectional_attention",)),
        (("query_pre_attn_scalar",), 32, ("query_pre_attn_scalar is 32", "expected 16")),
        (("num_key_value_heads",), "2", ("num_key_value_heads",)),
        (("num_hidden_layers",), ..., ("num_hidden_layers is missing",)),
        (("n_routed_experts",), ..., ("n_routed_experts is missing",)),
        (("num_experts_per_tok",), None, ("num_experts_per_tok is null",)),
        (("layer_types",), ..., ("layer_types is missing",)),
        (("layer_types",), [FULL], ("layer_types", "list of 8")),
        (("layer_types",), [FULL] * 7 + ["linear"], ("layer_types[7]", "linear")),
        (("mlp_layer_types",), ["sparse"] * 9, ("mlp_layer_types", "list of 8")),
        (("mlp_layer_types",), ["dense"] * 7 + [0], ("mlp_layer_types[7] is 0", "sparse")),
        (("swiglu_limits",), [7.0], ("swiglu_limits", "list of 8")),
        (("swiglu_limits_shared",), 7.0, ("swiglu_limits_shared is 7.0", "list of 8")),
        (("rope_parameters",), {"rope_theta": 1e4}, ("rope_parameters", FULL, "is missing")),
        (("rope_parameters", SLIDING), ..., ("rope_parameters", SLIDING, "is missing")),
        (("rope_parameters", FULL, "rope_type"), "yarn", ("rope_type", "yarn", "llama3")),
        (("rope_parameters", FULL, "beta_fast"), 32, ("beta_fast is 32",)),
        (("rope_parameters", FULL, "factor"), ..., ("factor is missing",)),
        (("rope_parameters", FULL, "rope_theta"), [1e4], ("rope_theta",)),
        (("per_layer_config",), [], ("per_layer_config", "object")),
        (("per_layer_config", "8"), {"num_attention_heads": 6}, ("per_layer_config: 8", "0 to 7")),
        (("per_layer_config", "1"), {"sliding_window": 4}, ("1: sliding_window is 4",)),
        (("per_layer_config", "1"), [6], ("per_layer_config: 1", "object")),
        (("per_layer_config", "1"), {"num_attention_heads": 8}, (SLIDING, "[6, 8]")),
        (("per_layer_config", "1"), ..., (SLIDING, "[4, 6]")),
        (("num_sliding_attention_heads",), 6.5, ("num_sliding_attention_heads is 6.5",)),
    ],
    ids=str,
)
def test_what_the_hubs_keys_cannot_say_is_refused_by_name(
    path: tuple[str, ...], to: Any, words: tuple[str, ...]
) -> None:
    with pytest.raises(InputError) as refused:
        hub_config(changed(*path, to=to), "DIR/config.json")
    message = str(refused.value)
    assert message.startswith("DIR/config.json: ") and "\n" not in message
    for word in words:
        assert word in message, message


def test_a_refusal_from_the_command_line_names_the_file(refused: Refused, tmp_path: Path) -> None:
    full = {"model_type": "step3p7", "text_config": changed("mlp_bias", to=True)}
    (tmp_path / "config.json").write_text(json.dumps(full))
    refused("inspect", tmp_path, naming=("config.json", "text_config: mlp_bias is true"))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "step3p7"}))
    refused("inspect", tmp_path, naming=("config.json", "text_config is missing"))


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("embed_tokens.weight", "model.embed_tokens.weight"),
        ("model.language_model.embed_tokens.weight", "model.embed_tokens.weight"),
        ("norm.weight", "model.norm.weight"),
        ("layers.0.input_layernorm.weight", "model.layers.0.input_layernorm.weight"),
        ("layers.12.mlp.gate_proj.weight", "model.layers.12.mlp.gate_proj.weight"),
        ("layers.2.mlp.gate.weight", "model.layers.2.moe.gate.weight"),
        ("layers.2.mlp.gate.e_score_correction_bias", "model.layers.2.moe.router_bias"),
        ("layers.2.mlp.experts.down_proj", "model.layers.2.moe.down_proj.weight"),
        (
            "model.language_model.layers.2.mlp.shared_experts.up_proj.weight",
            "model.layers.2.share_expert.up_proj.weight",
        ),
        ("language_model.layers.2.moe.up_proj.weight", "model.layers.2.moe.up_proj.weight"),
        ("vision_model.ln_pre.weight", "vision_model.ln_pre.weight"),
        ("lm_head.weight", "lm_head.weight"),
    ],
)
def test_a_tensors_name_becomes_the_hubs(theirs: str, ours: str) -> None:
    assert hub_name(theirs) == ours
    assert halves(theirs) is None


def test_every_name_of_the_hub_stays() -> None:
    for name in tensor_shapes(load_config(minstep.find_config("step-3.5-flash"))):
        assert hub_name(name) == name
        assert halves(name) is None


@pytest.mark.parametrize("prefix", ["", "language_model.", "model.language_model.", "model."])
def test_the_experts_fused_tensor_has_two_names(prefix: str) -> None:
    gate, up = "model.layers.2.moe.gate_proj.weight", "model.layers.2.moe.up_proj.weight"
    assert halves(f"{prefix}layers.2.mlp.experts.gate_up_proj") == (gate, up)
