"""The main stack against transformers' own Step text model: random checkpoints and the shipped.

Golden data pins four configurations; here most settings are drawn. What transformers' model does
otherwise is left out: it has one theta and one rotary share per layer kind, scales full layers
only, gives both kinds the same key-value heads, and has no MTP head of its own.
"""

import json
from typing import Any, NamedTuple

import numpy as np
import pytest

import minstep
from minstep.config import FULL, SLIDING, Config, parse_config
from minstep.parity.trace import Trace, record
from minstep.store.checkpoint import Checkpoint
from minstep.store.random_checkpoint import save_random
from minstep.weights import tensor_shapes
from tests.model.test_golden import TOLERANCE, departures

REASON = "the comparison with transformers needs: pip install -e '.[oracle]'"
torch: Any = pytest.importorskip("torch", reason=REASON)
step: Any = pytest.importorskip("transformers.models.step3p7.modeling_step3p7", reason=REASON)
pytestmark = pytest.mark.torch

PROMPT, NEW = 40, 24  # tokens given, more than every window; tokens continued
CASES = [(name, seed) for name in ("tiny", "odd", "no_extras") for seed in (0, 1)]
CASES += [("drawn", seed) for seed in range(16)] + [("trained", 0)]
RENAMED = {  # the hub's: transformers'
    ".moe.gate.": ".mlp.gate.",
    ".moe.router_bias": ".mlp.gate.e_score_correction_bias",
    ".moe.down_proj.weight": ".mlp.experts.down_proj",
    ".share_expert.": ".mlp.shared_experts.",
}


def redrawn(tiny: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    """Tiny's config.json with other settings, which both models read alike."""

    def pick(*choices: Any) -> Any:
        return choices[rng.integers(len(choices))]

    L, G, K, E = pick(2, 3, 5, 7), pick(1, 2, 3), pick(8, 12, 16), pick(2, 7, 12)
    kinds = [pick(FULL, SLIDING, SLIDING) for _ in range(L)] + [SLIDING] * 3  # and MTP's
    theta = {kind: pick(1e2, 1e4, 5e5, 5e6) for kind in (FULL, SLIDING)}
    share = {kind: pick(0.5, 1.0, 1 / 6 if K == 12 else 0.25) for kind in (FULL, SLIDING)}
    sliding = {"attention_type": SLIDING, "num_attention_groups": G}
    scaling = tiny["rope_scaling"] | {"factor": pick(2.0, 8.0), "high_freq_factor": pick(4.0, 32.0)}
    scaling |= {"original_max_position_embeddings": pick(24, 64, 512)}
    return tiny | {
        "hidden_size": pick(24, 32, 50),
        "num_hidden_layers": L,
        "rms_norm_eps": pick(1e-6, 1e-5, 1e-2),
        "tie_word_embeddings": pick(True, False),
        "num_attention_heads": G * pick(1, 2, 5),
        "num_attention_groups": G,
        "head_dim": K,
        "attention_other_setting": sliding | {"num_attention_heads": G * pick(1, 3, 4)},
        "use_head_wise_attn_gate": pick(True, True, False),
        "layer_types": kinds,
        "sliding_window": pick(1, 2, 7, 16, 39),
        "rope_theta": [theta[kind] for kind in kinds],
        "partial_rotary_factors": [share[kind] for kind in kinds],
        "rope_scaling": pick(scaling, scaling, None),
        "moe_layers_enum": ",".join(str(n) for n in range(L) if pick(True, True, False)),
        "moe_num_experts": E,
        "moe_top_k": pick(1, 2, min(5, E), E),
        "moe_router_scaling_factor": pick(1.0, 2.5, 3.0),
        "use_moe_router_bias": pick(True, True, False),
        "swiglu_limits": [pick(0.0, None, 0.2, 0.7) for _ in kinds],
        "swiglu_limits_shared": [pick(0.0, None, 0.3, 0.9) for _ in kinds],
    }


class Pair(NamedTuple):
    """One checkpoint in both models, and a prompt."""

    ours: Checkpoint
    theirs: Any
    lm_head: Any
    prompt: list[int]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A random checkpoint, or the shipped one, opened; and its tensors in transformers' model."""
    (name, seed), folder = request.param, tmp_path_factory.mktemp("checkpoint")
    rng = np.random.default_rng(seed)
    file = minstep.find_config("tiny" if name == "drawn" else name) / "config.json"
    raw = json.loads(file.read_text(encoding="utf-8"))
    raw = redrawn(raw, rng) if name == "drawn" else raw
    if name == "trained":
        folder = file.parent
    else:
        save_random(raw, parse_config(raw), rng, folder)
    ours = minstep.open_checkpoint(folder)
    shapes = tensor_shapes(ours.config._replace(mtp_layers=()))
    hub = {name: torch.tensor(np.array(ours.get(name, shape))) for name, shape in shapes.items()}
    lm_head = hub.pop("lm_head.weight", hub["model.embed_tokens.weight"])
    settings = {key: raw[key] for key in raw if key not in ("model_type", "torch_dtype")}
    config = step.Step3p7TextConfig(**settings, attn_implementation="eager")
    theirs = step.Step3p7TextModel(config).eval()
    state = torch_state(hub, ours.config)
    assert state.keys() == theirs.state_dict().keys()
    theirs.load_state_dict(state)
    return Pair(ours, theirs, lm_head, rng.integers(ours.config.vocab_size, size=PROMPT).tolist())


def torch_name(hub_name: str) -> str:
    """What transformers calls a tensor of the hub."""
    for hub_part, torch_part in RENAMED.items():
        hub_name = hub_name.replace(hub_part, torch_part)
    return hub_name.removeprefix("model.")


def torch_state(hub: dict[str, Any], config: Config) -> dict[str, Any]:
    """The hub's tensors as transformers stores them, and what stands for those that are absent."""
    state = {torch_name(name): x for name, x in hub.items()}
    for n, spec in enumerate(config.layers):
        attn, moe, mlp = (f"layers.{n}.{part}" for part in ("self_attn", "moe", "mlp"))
        if not spec.has_gate:  # it always has one: sigmoid(0) halves every head, o_proj doubles
            state[f"{attn}.g_proj.weight"] = torch.zeros(spec.heads, config.hidden_size)
            state[f"{attn}.o_proj.weight"] *= 2
        if spec.moe:
            halves = [state.pop(f"{moe}.{half}_proj.weight") for half in ("gate", "up")]
            state[f"{mlp}.experts.gate_up_proj"] = torch.cat(halves, dim=1)
            state.setdefault(f"{mlp}.gate.e_score_correction_bias", torch.zeros(spec.moe.experts))
    return state


def logits(both: Pair, tokens: list[int]) -> Any:
    """Transformers' logits [T, V], from the whole sequence and no cache."""
    with torch.no_grad():
        states = both.theirs(input_ids=torch.tensor([tokens]), use_cache=False).last_hidden_state
        return states[0] @ both.lm_head.T


def torch_trace(both: Pair, ours: Trace) -> Trace:
    """Those of our named outputs that transformers' model has too, over the prompt."""
    trace: Trace = {}

    def keep(name: str, output: Any) -> None:
        if name.endswith(".moe.gate"):  # logits, weights, ids
            trace[name.replace("gate", "ids")] = np.sort(output[2].numpy())
            output = output[0]
        trace[name] = (output[0] if output.dim() > 2 else output).numpy()  # without the batch

    for name in ours:
        module = dict(both.theirs.named_modules()).get(torch_name(f"{name}.").removesuffix("."))
        if module is not None:
            module.register_forward_hook(lambda _, inputs, output, name=name: keep(name, output))
    trace["lm_head"] = logits(both, both.prompt).numpy()
    return trace


def test_every_output_that_transformers_has_too_is_the_same(both: Pair) -> None:
    trace = record(both.prompt, both.ours.weights(), both.ours.config)
    theirs = torch_trace(both, trace)
    blocks = {spec.name for spec in both.ours.config.layers}
    assert blocks | {"model.embed_tokens", "model.norm", "lm_head"} <= set(theirs)
    lines = departures(trace, theirs, TOLERANCE["float32"])
    assert not lines, f"{len(lines)} of {len(theirs)} depart; first: {lines[0]}"


def test_greedy_tokens_are_those_of_transformers(both: Pair) -> None:
    weights, rng = both.ours.weights(), np.random.default_rng(0)
    ours = minstep.generate(both.prompt, weights, both.ours.config, rng, NEW, ignore_eos=True)
    theirs = list(both.prompt)
    for _ in range(NEW):
        theirs.append(int(logits(both, theirs)[-1].argmax()))
    assert list(ours) == theirs[PROMPT:]
