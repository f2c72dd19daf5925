"""The whole model against its plainest form, on configurations that no golden folder holds.

Transformers' model cannot show these: thetas and rotary shares that differ layer by layer, group
counts per kind, scaling on other kinds than full attention, and the MTP depths.
"""

import json
from typing import Any

import numpy as np
import pytest

import minstep
from minstep.config import FULL, SLIDING, parse_config
from minstep.store.random_checkpoint import random_tensors
from minstep.weights import assemble
from tests.support.plain import Plain


def drawn_config(rng: np.random.Generator) -> dict[str, Any]:
    """The tiny config.json with nearly every setting drawn."""

    def pick(*choices: Any) -> Any:
        return choices[rng.integers(len(choices))]

    def each(*choices: Any) -> list[Any]:
        return [pick(*choices) for _ in range(L + M)]

    raw = json.loads((minstep.find_config("tiny") / "config.json").read_text(encoding="utf-8"))
    L, M, K, E = pick(1, 2, 3, 4), pick(0, 1, 2, 3), pick(4, 8, 12), pick(1, 3, 6)
    other = {"attention_type": pick(FULL, SLIDING, SLIDING), "num_attention_groups": pick(1, 3)}
    other["num_attention_heads"] = other["num_attention_groups"] * pick(1, 2, 3)
    scaling = raw["rope_scaling"] | {"factor": pick(0.5, 2.0, 8.0)}
    scaling |= {"original_max_position_embeddings": pick(8, 40, 500)}
    raw |= {
        "hidden_size": pick(12, 15),
        "intermediate_size": pick(7, 20),
        "num_hidden_layers": L,
        "num_nextn_predict_layers": M,
        "vocab_size": pick(5, 31),
        "rms_norm_eps": pick(1e-6, 1e-5, 1e-2),
        "tie_word_embeddings": pick(True, False),
        "num_attention_groups": pick(1, 2),
        "num_attention_heads": 2 * pick(1, 2, 3),
        "head_dim": K,
        "attention_other_setting": pick(other, other, other, None),
        "use_head_wise_attn_gate": pick(True, True, False),
        "layer_types": each(FULL, SLIDING),
        "sliding_window": pick(1, 2, 5, 30),
        "rope_theta": each(1e2, 1e4, 5e6),
        "partial_rotary_factors": each(0.5, 1.0),
        "rope_scaling": pick(scaling, scaling, None),
        "yarn_only_types": pick([FULL], [SLIDING], [FULL, SLIDING], []),
        "moe_layers_enum": ",".join(str(n) for n in range(L) if pick(True, True, False)),
        "moe_num_experts": E,
        "moe_top_k": pick(1, E, max(1, E - 1)),
        "moe_intermediate_size": 6,
        "share_expert_dim": pick(4, 9),
        "moe_router_scaling_factor": pick(1.0, 3.0),
        "use_moe_router_bias": pick(True, True, False),
        "swiglu_limits": each(0.0, None, 0.2, 0.7),
        "swiglu_limits_shared": pick(each(0.0, None, 0.3, 0.9), None, 0.5),
    }
    for key in ("yarn_only_types", "attention_other_setting"):
        if pick(True, False, False, False):
            del raw[key]
    return raw


@pytest.mark.parametrize("seed", range(60))
def test_main_and_draft_logits_are_those_of_the_plain_form(seed: int) -> None:
    rng = np.random.default_rng(seed)
    raw = drawn_config(rng)
    config = parse_config(raw)
    tensors = dict(random_tensors(config, rng))
    tokens = rng.integers(config.vocab_size, size=rng.integers(1, 14)).tolist()
    weights = assemble(config, lambda name, _: tensors[name])
    hidden = minstep.decoder(tokens, weights, config, np.float64)
    ours = [minstep.head(hidden, weights, config)]
    ours += minstep.mtp_forward(tokens, hidden, weights, config)
    theirs = Plain(raw, tensors).logits(tokens)
    for k, logits in enumerate(ours):
        np.testing.assert_allclose(logits, theirs[k], rtol=0, atol=1e-11 * abs(theirs[k]).max())
    assert len(ours) == min(len(theirs), len(tokens))
