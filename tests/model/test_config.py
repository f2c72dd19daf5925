"""config.json: the released file as it is, and every contradiction refused by its key."""

import json
from pathlib import Path
from typing import Any

import pytest

from minstep import InputError, find_config, load_config
from minstep.config import FULL, SLIDING, Llama3Scaling, parse_config
from tests.conftest import Refused

RELEASED = load_config(find_config("step-3.5-flash"))


def raw(name: str = "tiny", **changes: Any) -> dict[str, Any]:
    """A shipped config.json with some keys changed."""
    content: dict[str, Any] = json.loads((find_config(name) / "config.json").read_text())
    return content | changes


def without(*keys: str) -> dict[str, Any]:
    return {key: value for key, value in raw().items() if key not in keys}


def refusal(content: dict[str, Any]) -> str:
    with pytest.raises(InputError) as caught:
        parse_config(content)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_released_file_loads_as_it_is() -> None:
    assert len(RELEASED.layers) == 45 and len(RELEASED.mtp_layers) == 3
    assert RELEASED.eos_token_ids == (1, 2, 128007) and RELEASED.max_positions == 262144
    for n, spec in enumerate(RELEASED.layers + RELEASED.mtp_layers):
        full = n % 4 == 0 and n < 45
        assert spec.name == f"model.layers.{n}"
        assert spec.kind == (FULL if full else SLIDING)
        assert (spec.heads, spec.groups, spec.head_dim) == (64 if full else 96, 8, 128)
        assert spec.window == (None if full else 512)
        assert (spec.rope.theta, spec.rope.rotary_dim) == ((5e6, 64) if full else (1e4, 128))
        assert spec.rope.scaling == (Llama3Scaling(2.0, 1.0, 32.0, 131072) if full else None)
        assert (spec.moe is not None) == (3 <= n <= 44)
        assert spec.swiglu_limit == {43: 7.0, 44: 7.0}.get(n)
        assert spec.swiglu_limit_shared == {44: 16.0}.get(n)
        assert spec.has_gate
        assert spec.moe in (None, (288, 8, 1280, 1280, 3.0, True))
        assert spec.moe or spec.mlp_width == 11264
    assert (RELEASED.hidden_size, RELEASED.vocab_size) == (4096, 128896)
    assert (RELEASED.rms_norm_eps, RELEASED.bos_token_id) == (1e-5, 0)
    assert (RELEASED.tie_word_embeddings, RELEASED.torch_dtype) == (False, "bfloat16")
    assert RELEASED.quantization is None


def test_sliding_layers_may_have_groups_of_their_own() -> None:
    other = raw()["attention_other_setting"] | {"num_attention_groups": 3}
    config = parse_config(raw(attention_other_setting=other))
    assert {(s.kind, s.heads, s.groups) for s in config.layers} == {(FULL, 4, 2), (SLIDING, 6, 3)}


def test_without_a_second_setting_both_kinds_share_the_head_counts() -> None:
    for content in (without("attention_other_setting"), raw(attention_other_setting=None)):
        assert {spec.heads for spec in parse_config(content).layers} == {4}


def test_scaling_reaches_the_kinds_it_is_said_for_and_all_where_none_is_said() -> None:
    def scaled(content: dict[str, Any]) -> set[str]:
        return {s.kind for s in parse_config(content).layers if s.rope.scaling}

    assert scaled(raw()) == {FULL}
    assert scaled(raw(yarn_only_types=[SLIDING])) == {SLIDING}
    assert scaled(raw(yarn_only_types=[])) == set()
    assert scaled(without("yarn_only_types")) == {FULL, SLIDING}
    assert scaled(raw(rope_scaling=None)) == set()
    assert scaled(raw(rope_scaling={"rope_type": "default"})) == set()


def test_a_scalar_stands_for_every_layer_and_null_clamps_are_none() -> None:
    config = parse_config(raw(rope_theta=7.0, partial_rotary_factors=0.25, swiglu_limits=None))
    rotations = {(s.rope.theta, s.rope.rotary_dim) for s in config.layers + config.mtp_layers}
    assert rotations == {(7.0, 4)}
    assert {spec.swiglu_limit for spec in config.layers} == {None}


@pytest.mark.parametrize("listed", ["2,3,4,5,6,7", " 2, 3,4,5,6,7,", [2, 3, 4, 5, 6, 7]])
def test_moe_layers_are_numbers_however_they_are_joined(listed: Any) -> None:
    config = parse_config(raw(moe_layers_enum=listed))
    assert [n for n, spec in enumerate(config.layers) if spec.moe] == [2, 3, 4, 5, 6, 7]
    released = raw("step-3.5-flash", moe_layers_enum="10,44")
    assert [n for n, spec in enumerate(parse_config(released).layers) if spec.moe] == [10, 44]


def test_a_model_may_have_neither_experts_nor_drafts_nor_gates() -> None:
    for listed in ("", " , ", [], None, ...):
        settings = {"use_moe": False, "moe_layers_enum": listed, "use_head_wise_attn_gate": False}
        plain = {key: x for key, x in (raw("no_extras") | settings).items() if x is not ...}
        config = parse_config(plain)
        assert not any(spec.moe or spec.has_gate for spec in config.layers)
        assert config.mtp_layers == ()


def test_a_list_of_the_wrong_length_says_what_the_length_is_made_of() -> None:
    content = raw("step-3.5-flash", rope_theta=[1e4] * 45)
    expected = "config.json: rope_theta has 45 entries, expected 48 (45 layers + 3 MTP)"
    assert refusal(content) == expected


SCALING = {
    "rope_type": "llama3",
    "factor": 2.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 32.0,
    "original_max_position_embeddings": 256,
}
OTHER = raw()["attention_other_setting"]


@pytest.mark.parametrize(
    ("changes", "naming"),
    [
        ({"layer_types": [FULL] * 10}, ["layer_types", "10", "11 (8 layers + 3 MTP)"]),
        ({"layer_types": FULL}, ["layer_types", "list"]),
        ({"layer_types": [FULL] * 10 + ["linear"]}, ["layer_types[10]", "linear", FULL]),
        ({"layer_types": [FULL] * 10 + [None]}, ["layer_types[10]", "null"]),
        ({"partial_rotary_factors": [1.0]}, ["partial_rotary_factors", "1 entries"]),
        ({"partial_rotary_factors": True}, ["partial_rotary_factors[0]", "true"]),
        ({"partial_rotary_factors": 0.19}, ["partial_rotary_factors[0]", "width 3", "even"]),
        ({"partial_rotary_factors": 0.01}, ["partial_rotary_factors[0]", "width 0"]),
        ({"partial_rotary_factors": 1.5}, ["partial_rotary_factors[0]", "1.5", "at most 1"]),
        ({"swiglu_limits": [0.0] * 8}, ["swiglu_limits", "8 entries"]),
        ({"swiglu_limits": -7}, ["swiglu_limits[0]", "-7"]),
        ({"swiglu_limits": False}, ["swiglu_limits[0]", "false"]),
        ({"swiglu_limits": float("nan")}, ["swiglu_limits[0]", "NaN"]),
        ({"swiglu_limits_shared": "seven"}, ["swiglu_limits_shared"]),
        ({"rope_theta": 0}, ["rope_theta[0]", "above 0"]),
        ({"rope_theta": float("nan")}, ["rope_theta[0]"]),
        ({"rope_theta": float("inf")}, ["rope_theta[0]"]),
        ({"rope_theta": 10**400}, ["rope_theta[0]"]),
        ({"rope_scaling": SCALING | {"rope_type": "yarn"}}, ["rope_scaling: rope_type", "yarn"]),
        ({"rope_scaling": "llama3"}, ["rope_scaling", "object"]),
        ({"rope_scaling": SCALING | {"factor": -1}}, ["rope_scaling: factor", "-1"]),
        ({"rope_scaling": {"rope_type": "llama3"}}, ["rope_scaling: low_freq_factor", "missing"]),
        ({"rope_scaling": SCALING | {"high_freq_factor": 1.0}}, ["high_freq_factor", "more than"]),
        ({"yarn_only_types": ["full"]}, ["yarn_only_types", "full"]),
        ({"yarn_only_types": FULL}, ["yarn_only_types"]),
        ({"moe_top_k": 17}, ["moe_top_k", "17", "moe_num_experts' 16"]),
        ({"moe_top_k": 0}, ["moe_top_k", "0", "at least 1"]),
        ({"moe_layers_enum": "2,x"}, ["moe_layers_enum", "2,x"]),
        ({"moe_layers_enum": "2,8"}, ["moe_layers_enum", "0 to 7"]),
        ({"moe_layers_enum": "2,-3"}, ["moe_layers_enum", "-3"]),
        ({"moe_layers_enum": "2," + "9" * 5000}, ["moe_layers_enum", "2,999"]),
        ({"moe_layers_enum": 3}, ["moe_layers_enum", "3"]),
        ({"moe_layers_enum": None}, ["moe_layers_enum", "null"]),
        ({"moe_layers_enum": {"2": 3}}, ["moe_layers_enum", "2"]),
        ({"moe_layers_enum": [2, 2.5]}, ["moe_layers_enum", "2.5"]),
        ({"moe_layers_enum": [True]}, ["moe_layers_enum", "true"]),
        ({"moe_layers_enum": [float("inf")]}, ["moe_layers_enum", "Infinity"]),
        ({"moe_layers_enum": [[2]]}, ["moe_layers_enum", "[[2]]"]),
        ({"moe_router_activation": "softmax"}, ["moe_router_activation", "softmax", "sigmoid"]),
        ({"moe_router_scaling_factor": None}, ["moe_router_scaling_factor", "null"]),
        ({"num_attention_heads": 5}, ["num_attention_heads", "5", "multiple"]),
        ({"num_attention_groups": 0}, ["num_attention_groups"]),
        ({"attention_other_setting": OTHER | {"num_attention_heads": 7}}, ["attention_other_setting: num_attention_heads", "7"]),
        ({"attention_other_setting": OTHER | {"head_dim": 8}}, ["attention_other_setting: head_dim", "8", "16"]),
        ({"attention_other_setting": OTHER | {"true_head_dim": 8}}, ["attention_other_setting: true_head_dim", "8", "16"]),
        ({"attention_other_setting": OTHER | {"attention_type": "x"}}, ["attention_type", "x"]),
        ({"attention_other_setting": {}}, ["attention_type", "missing"]),
        ({"attention_other_setting": 3}, ["attention_other_setting", "object"]),
        ({"hidden_size": True}, ["hidden_size", "true"]),
        ({"hidden_size": 64.0}, ["hidden_size", "64.0"]),
        ({"hidden_size": "64"}, ["hidden_size", '"64"']),
        ({"head_dim": 10**400}, ["head_dim", "at most 2147483647"]),
        ({"hidden_size": float("nan")}, ["hidden_size", "NaN"]),
        ({"vocab_size": -1}, ["vocab_size", "-1"]),
        ({"sliding_window": None}, ["sliding_window", "null"]),
        ({"num_nextn_predict_layers": -1}, ["num_nextn_predict_layers"]),
        ({"num_hidden_layers": 0}, ["num_hidden_layers"]),
        ({"max_seq_len": 8}, ["max_seq_len", "8"]),
        ({"rms_norm_eps": 0}, ["rms_norm_eps"]),
        ({"rms_norm_eps": True}, ["rms_norm_eps", "true"]),
        ({"rms_norm_eps": "1e-5"}, ["rms_norm_eps", '"1e-5"']),
        ({"rms_norm_eps": float("-inf")}, ["rms_norm_eps", "-Infinity"]),
        ({"use_moe": "yes"}, ["use_moe", "true or false"]),
        ({"use_moe": False}, ["moe_layers_enum", "2,3", "no layers", "use_moe is false"]),
        ({"use_moe": False, "moe_layers_enum": [3]}, ["moe_layers_enum", "[3]", "no layers"]),
        ({"use_moe": False, "moe_layers_enum": 3}, ["moe_layers_enum", "3"]),
        ({"norm_expert_weight": False}, ["norm_expert_weight", "false", "true"]),
        ({"norm_expert_weight": None}, ["norm_expert_weight", "null", "true"]),
        ({"norm_expert_weight": 1}, ["norm_expert_weight", "1", "true"]),
        ({"zero_centered": 1}, ["zero_centered", "1", "True"]),
        ({"rope_theta": 1e-300}, ["rope_theta[0]", "1e-300", "1 to 1e+30"]),
        ({"rope_theta": 0.5}, ["rope_theta[0]", "0.5", "1 to 1e+30"]),
        ({"rope_theta": 1e300}, ["rope_theta[0]", "1e+300"]),
        ({"rms_norm_eps": 1e-300}, ["rms_norm_eps", "1e-300", "1e-30 to 1"]),
        ({"rms_norm_eps": 1e30}, ["rms_norm_eps", "1e+30", "1e-30 to 1"]),
        ({"swiglu_limits": 1e39}, ["swiglu_limits[0]", "1e+39", "1e-30 to 1e+30"]),
        ({"swiglu_limits_shared": 1e-31}, ["swiglu_limits_shared[0]", "1e-31"]),
        ({"moe_router_scaling_factor": 1e7}, ["moe_router_scaling_factor", "1e-30 to 1e+06"]),
        ({"rope_scaling": SCALING | {"factor": 1e-5}}, ["rope_scaling: factor", "0.1 to 1e+30"]),
        ({"rope_scaling": SCALING | {"low_freq_factor": 1e-300}}, ["low_freq_factor", "1e-300"]),
        ({"rope_scaling": SCALING | {"high_freq_factor": 1e300}}, ["high_freq_factor", "1e+300"]),
        ({"use_head_wise_attn_gate": 1}, ["use_head_wise_attn_gate", "1"]),
        ({"tie_word_embeddings": "no"}, ["tie_word_embeddings", "true or false"]),
        ({"can_chat": 0}, ["can_chat", "true or false"]),
        ({"zero_centered": False}, ["zero_centered", "false"]),
        ({"use_qk_norm": False}, ["use_qk_norm"]),
        ({"model_type": "llama"}, ["model_type", "llama", "step3p5"]),
        ({"torch_dtype": "float16"}, ["torch_dtype", "float16"]),
        ({"eos_token_id": ["1"]}, ["eos_token_id"]),
        ({"eos_token_id": True}, ["eos_token_id", "true"]),
        ({"eos_token_id": {}}, ["eos_token_id"]),
        ({"eos_token_id": -1}, ["eos_token_id", "-1"]),
        ({"eos_token_id": [1, -2]}, ["eos_token_id", "-2"]),
    ],
)  # fmt: skip
def test_a_contradiction_is_refused_by_its_key(changes: dict[str, Any], naming: list[str]) -> None:
    message = refusal(raw(**changes))
    assert all(word in message for word in ["config.json", *naming]), message


OPTIONAL = {
    "architectures", "torch_dtype", "max_seq_len", "max_position_embeddings", "yarn_only_types",
    "attention_other_setting", "eos_token_id", "need_fp32_gate", "norm_expert_weight",
}  # fmt: skip


@pytest.mark.parametrize("key", sorted(set(raw()) - OPTIONAL))
def test_a_missing_key_is_named_and_never_guessed(key: str) -> None:
    message = refusal(without(key))
    assert key in message and "missing" in message


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "3", '{"a": 1', "\ud800", '{"a": "\\ud800"}', "[" * 100_000]
)
def test_a_file_that_is_no_json_object_is_refused(
    content: str, tmp_path: Path, refused: Refused
) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(content.encode("utf-8", "surrogatepass"))
    refused("inspect", file, naming=(str(file), "JSON"))
    refused("inspect", tmp_path, naming=(str(file), "JSON"))
    refused("make-tiny", file, "--out", tmp_path / "out", naming=(str(file), "JSON"))
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-1", "true", '"64"', "1e400", "[64]", "{}"])
@pytest.mark.parametrize("key", ["hidden_size", "rms_norm_eps", "moe_router_scaling_factor"])
def test_a_number_that_is_none_is_refused_by_the_command_line(
    key: str, value: str, tmp_path: Path, refused: Refused
) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(raw(**{key: "HERE"})).replace('"HERE"', value))
    refused("inspect", file, "--json", naming=(str(file), key, "expected"))


def test_a_missing_file_is_refused_by_its_name(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="config.json: cannot be read"):
        load_config(tmp_path)


def test_an_unknown_configuration_lists_the_shipped_ones() -> None:
    with pytest.raises(InputError, match="drafts, long, no_extras, odd, step-3.5-flash, tiny"):
        find_config("huge")
