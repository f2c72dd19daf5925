"""Other frameworks' names, and the model's order."""

import numpy as np
import pytest

import minstep
from minstep.parity.names import axes, in_model_order, is_weight, mtp_layers, places
from minstep.store.stages import split
from minstep.weights import tensor_shapes
from tests.model.test_golden import GOLDEN, WEIGHTS, meta
from tests.support.recordings import as_transformers, as_vllm

L3 = "model.layers.3"
NAMES = {
    # transformers' native model: with vision, as its text model alone, and as a bare text model
    "model.language_model.layers.3.self_attn.q_proj": f"{L3}.self_attn.q_proj",
    "language_model.model.layers.3": L3,
    "language_model.layers.12.mlp.down_proj.weight": "model.layers.12.mlp.down_proj.weight",
    "layers.3.input_layernorm": f"{L3}.input_layernorm",
    "layers.0": "model.layers.0",
    "model.layers.0": "model.layers.0",
    "embed_tokens": "model.embed_tokens",
    "norm": "model.norm",
    "norm.weight": "model.norm.weight",
    "model.language_model.norm": "model.norm",
    "lm_head": "lm_head",
    "language_model.lm_head": "lm_head",
    "model.language_model.lm_head.weight": "lm_head.weight",
    "layers.3.0": L3,
    "layers.3.self_attn": f"{L3}.self_attn.o_proj",
    "layers.3.self_attn.0": f"{L3}.self_attn.o_proj",
    "layers.3.self_attn.1": f"{L3}.self_attn.probs",
    "layers.3.mlp": f"{L3}.mlp",
    "layers.3.mlp.gate": f"{L3}.moe.gate",
    "layers.3.mlp.gate.0": f"{L3}.moe.gate",
    "layers.3.mlp.gate.1": f"{L3}.moe.weights.unscaled",
    "layers.3.mlp.gate.2": f"{L3}.moe.ids",
    "layers.3.mlp.gate.weight": f"{L3}.moe.gate.weight",
    "layers.3.mlp.gate.e_score_correction_bias": f"{L3}.moe.router_bias",
    "layers.3.mlp.gate_proj": f"{L3}.mlp.gate_proj",
    "layers.3.mlp.gate_proj.weight": f"{L3}.mlp.gate_proj.weight",
    "layers.3.mlp.experts": f"{L3}.moe.unscaled",
    "layers.3.mlp.experts.0": f"{L3}.mlp.experts.0",
    "layers.3.mlp.experts.down_proj": f"{L3}.moe.down_proj.weight",
    "layers.3.mlp.shared_experts": f"{L3}.share_expert",
    "layers.3.mlp.shared_experts.up_proj.weight": f"{L3}.share_expert.up_proj.weight",
    # the released remote code has ours
    f"{L3}.moe": f"{L3}.moe",
    f"{L3}.moe.gate": f"{L3}.moe.gate",
    f"{L3}.share_expert": f"{L3}.share_expert",
    # vLLM
    f"{L3}.moe.share_expert": f"{L3}.share_expert",
    f"{L3}.self_attn.qkv_proj.0": f"{L3}.self_attn.qkv_proj",
    f"{L3}.moe.experts.w2_weight": f"{L3}.moe.down_proj.weight",
    f"{L3}.moe.experts.routed_experts.w2_weight": f"{L3}.moe.down_proj.weight",
    "model.layers.45.mtp_block": "model.layers.45",
    "model.layers.45.mtp_block.self_attn.o_proj": "model.layers.45.self_attn.o_proj",
    "model.layers.45.shared_head": "model.layers.45.transformer.shared_head.norm",
    "model.layers.45.shared_head.norm": "model.layers.45.transformer.shared_head.norm",
    "model.layers.45.shared_head.head": "model.layers.45.transformer.shared_head.output",
    "model.layers.45.shared_head.head.weight": (
        "model.layers.45.transformer.shared_head.output.weight"
    ),
    "model.layers.45.transformer.shared_head.norm": "model.layers.45.transformer.shared_head.norm",
    "model.layers.45.eh_proj": "model.layers.45.eh_proj",
    # nobody's
    "vision_model.patch.7": "vision_model.patch.7",
}
FUSED = {
    "model.layers.3.moe.experts.w13_weight": f"{L3}.moe.{{}}_proj.weight",
    "layers.3.mlp.experts.gate_up_proj": f"{L3}.moe.{{}}_proj.weight",
    "model.layers.3.mlp.gate_up_proj": f"{L3}.mlp.{{}}_proj",
    "model.layers.3.moe.share_expert.gate_up_proj.weight": f"{L3}.share_expert.{{}}_proj.weight",
}


@pytest.mark.parametrize("theirs, ours", NAMES.items(), ids=NAMES)
def test_a_name_of_another_framework_is_one_of_ours(theirs: str, ours: str) -> None:
    assert [place.name for place in places(theirs)] == [ours]


@pytest.mark.parametrize("theirs, ours", FUSED.items(), ids=FUSED)
def test_a_fused_projection_is_two_of_ours(theirs: str, ours: str) -> None:
    halves = places(theirs)
    assert [(place.name, place.part, place.of) for place in halves] == [
        (ours.format("gate"), 0, 2),
        (ours.format("up"), 1, 2),
    ]


def test_in_vllm_the_module_of_experts_adds_the_shared_one() -> None:
    assert places(f"{L3}.moe", moe_is_sum=True)[0].name == f"{L3}.mlp"
    assert places(f"{L3}.moe.experts", moe_is_sum=True)[0].name == f"{L3}.mlp"
    assert places(f"{L3}.moe.gate", moe_is_sum=True)[0].name == f"{L3}.moe.gate"


def test_our_own_names_and_the_checkpoints_stay_as_they_are() -> None:
    config = minstep.load_config(GOLDEN / "tiny" / "bf16")
    for name in (*tensor_shapes(config), *trace_of_tiny()):
        assert [place.name for place in places(name)] == [name]


def trace_of_tiny() -> minstep.parity.trace.Trace:
    folder = GOLDEN / "tiny" / "bf16"
    return minstep.parity.trace.record(
        meta(folder)["prompt"], WEIGHTS[folder], minstep.load_config(folder)
    )


def test_the_order_is_that_in_which_the_model_computes() -> None:
    trace = trace_of_tiny()
    names = list(trace)
    shuffled = np.random.default_rng(0).permutation(names).tolist()
    assert in_model_order(shuffled) == names


def test_other_frameworks_names_come_in_the_order_of_ours() -> None:
    trace = trace_of_tiny()
    for theirs in (as_transformers(trace, 3.0, np.random.default_rng(0)), as_vllm(trace)):
        ours = {place.name for name in theirs for place in places(name)}
        known = [name for name in in_model_order(ours) if name in trace]
        assert known == [name for name in trace if name in ours]


def test_layers_come_by_number_and_mtp_layers_after_the_logits() -> None:
    names = [
        *("zebra", "model.layers.11.eh_proj", "model.layers.11", "lm_head", "model.layers.10"),
        *("model.layers.2.zebra", "model.layers.2", "model.norm", "model.layers.2.input"),
        *("model.layers.2.moe.weights", "model.layers.2.moe.ids", "model.layers.2.moe.gate"),
        *("model.layers.2.mlp", "model.layers.2.share_expert", "model.embed_tokens"),
        *("model.layers.11.transformer.shared_head.norm", "model.layers.2.moe.router_bias"),
    ]
    assert in_model_order(names) == [
        *("model.embed_tokens", "model.layers.2.input", "model.layers.2.moe.gate"),
        *("model.layers.2.moe.router_bias", "model.layers.2.moe.ids", "model.layers.2.moe.weights"),
        *("model.layers.2.share_expert", "model.layers.2.mlp", "model.layers.2"),
        *("model.layers.2.zebra", "model.layers.10", "model.norm", "lm_head"),
        *("model.layers.11.eh_proj", "model.layers.11"),
        *("model.layers.11.transformer.shared_head.norm", "zebra"),
    ]


def test_mtp_layers_are_those_of_the_config_or_those_with_tensors_of_their_own() -> None:
    config = minstep.load_config(GOLDEN / "tiny" / "bf16")
    assert mtp_layers([], config) == {8, 9, 10}
    assert mtp_layers(["model.layers.7", "model.layers.9.eh_proj", "lm_head"]) == {9}
    assert mtp_layers(["model.layers.8.transformer.shared_head.output.weight"]) == {8}


def test_axes_are_those_of_a_trace() -> None:
    for name, x in trace_of_tiny().items():
        assert axes(name) == x.ndim, name
    assert axes("model.layers.3.self_attn.q_norm.weight") is None
    assert axes("model.layers.3.moe.router_bias") is None
    for part in ("weight", "bias"):  # other engines' projections may have biases
        assert axes(f"model.layers.3.self_attn.q_proj.{part}") is None
        assert is_weight(f"model.layers.3.self_attn.q_proj.{part}")
    assert not is_weight("model.layers.3.moe.weights") and not is_weight("lm_head")
    assert axes("model.layers.3.zebra") is None


def test_a_name_is_split_at_its_layer() -> None:
    assert split("model.layers.12.moe.gate") == (12, "moe.gate")
    assert split("model.layers.12") == (12, "")
    assert split("lm_head") == (None, "lm_head")
