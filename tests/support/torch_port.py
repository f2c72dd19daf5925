"""A port of the model to torch, for tests of recording: transformers' own model with MTP layers.

Transformers' model has no MTP layers of Step's kind, so they are built here from its parts. `BUGS`
are those that ports have had, planted in a port at test time.
"""

import json
import runpy
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from minstep.store.checkpoint import Checkpoint
from minstep.weights import tensor_shapes
from tests.parity.test_transformers import step, torch, torch_state

torch.set_num_threads(1)
nn, F = torch.nn, torch.nn.functional
RECIPE = Path(__file__).parents[2] / "docs" / "recipes" / "record_torch.py"
recording = runpy.run_path(str(RECIPE))["recording"]
FULL, SLIDING = "full_attention", "sliding_attention"
apply_rotary_pos_emb = step.apply_rotary_pos_emb  # of this file, as every port has its own


class MTPLayer(step.Step3p7DecoderLayer):
    """A block with what feeds it and its own head; modules have the checkpoint's paths."""

    def __init__(self, config: Any, n: int) -> None:
        super().__init__(config, n)
        D, eps = config.hidden_size, config.rms_norm_eps
        self.enorm, self.hnorm = step.Step3p7RMSNorm(D, eps), step.Step3p7RMSNorm(D, eps)
        self.eh_proj = nn.Linear(2 * D, D, bias=False)
        output = nn.Linear(D, config.vocab_size, bias=False)
        head = nn.ModuleDict({"norm": step.Step3p7RMSNorm(D, eps), "output": output})
        self.transformer = nn.ModuleDict({"shared_head": head})

    def forward(self, embedding: Any, state: Any, **how: Any) -> Any:
        """h^(k-1) and the embedding of the next token, [1, T, D] each -> h^k [1, T, D]."""
        pair = [self.enorm(embedding), self.hnorm(state)]
        if self.swaps_halves:
            pair.reverse()
        return super().forward(self.eh_proj(torch.cat(pair, dim=-1)), **how)

    swaps_halves = False


class Port(nn.Module):
    """The main model, lm_head and the MTP layers, which follow the main ones in `model.layers`."""

    def __init__(self, config: Any, deep: Any) -> None:
        super().__init__()
        self.model = step.Step3p7TextModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        for n in range(config.num_hidden_layers, deep.num_hidden_layers):
            self.model.layers.append(MTPLayer(deep, n))
        self.deep, self.count = deep, config.num_hidden_layers
        self.passed_on: Callable[..., Any] = lambda k, states: states[-1]
        self.late = 0

    def forward(self, ids: Any) -> None:
        """Run everything over ids [1, T]; depth k sees the true next tokens, T - k of them."""
        states: list[Any] = []  # of the main model, then of each depth: [1, T, D]
        with self.model.norm.register_forward_pre_hook(lambda _, args: states.append(args[0])):
            self.lm_head(self.model(input_ids=ids, use_cache=False).last_hidden_state)
        for k, layer in enumerate(self.model.layers[self.count :], start=1):
            T = ids.shape[1] - k
            embedding = self.model.embed_tokens(ids[:, k - self.late : T + k - self.late])
            positions = torch.arange(T)[None]
            state = self.passed_on(k, states)[:, :T]
            kind = self.deep.layer_types[self.count + k - 1]
            masked = {"config": self.deep, "inputs_embeds": embedding, "attention_mask": None}
            masks = {
                FULL: step.create_causal_mask,
                SLIDING: step.create_sliding_window_causal_mask,
            }
            how = {
                "attention_mask": masks[kind](**masked, cache=None, position_ids=positions),
                "position_embeddings": self.model.rotary_emb(embedding, positions, kind),
            }
            states.append(layer(embedding, state, **how))
            head = layer.transformer["shared_head"]
            head["output"](head["norm"](states[-1]))


Alter = Callable[[Any], None]


def build(
    checkpoint: Checkpoint, dtype: str = "float32", alter: Alter = lambda config: None
) -> Port:
    """The port with a checkpoint's weights; `alter` changes transformers' config before."""
    raw = json.loads((checkpoint.path / "config.json").read_text(encoding="utf-8"))
    settings = {key: raw[key] for key in raw if key not in ("model_type", "torch_dtype")}
    main, depths = len(checkpoint.config.layers), len(checkpoint.config.mtp_layers)
    all_main = {"num_hidden_layers": main + depths, "num_nextn_predict_layers": 0} if depths else {}
    configs = [
        step.Step3p7TextConfig(**(settings | other), attn_implementation="eager")
        for other in ({}, all_main)
    ]
    for config in configs:
        alter(config)
    port = Port(*configs).eval()
    shapes = tensor_shapes(checkpoint.config)
    hub = {name: torch.tensor(np.array(checkpoint.get(name, s))) for name, s in shapes.items()}
    lm_head = hub.pop("lm_head.weight", hub["model.embed_tokens.weight"])
    port.lm_head.load_state_dict({"weight": lm_head})
    layers = checkpoint.config.layers + checkpoint.config.mtp_layers
    port.model.load_state_dict(torch_state(hub, checkpoint.config._replace(layers=layers)))
    for parameter in port.parameters():  # buffers, as rotary frequencies, stay float32
        parameter.data = parameter.data.to(getattr(torch, dtype))
    return port


def record(port: Any, file: Path, layers: Sequence[int], tokens: list[int], **how: Any) -> Path:
    """Run the recipe on a port."""
    with torch.no_grad(), recording(port, file, layers=layers, tokens=tokens, **how):
        port(torch.tensor([tokens]))
    return file


class ReleasedMoE(nn.Module):
    """The released code's module: it routes by its gate's weight alone, and scales the weights."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        E, D = block.gate.weight.shape
        self.gate = nn.Linear(D, E, bias=False)
        self.gate.weight = block.gate.weight
        self.router_bias, self.top_k = block.gate.e_score_correction_bias, block.gate.top_k
        self.experts, self.routed_scaling_factor = block.experts, block.routed_scaling_factor
        self.custom_routing_function = self.router_bias_func

    def router_bias_func(self, logits: Any, topk: int, renormalize: bool) -> tuple[Any, Any]:
        scores = logits.sigmoid()
        ids = torch.topk(scores + self.router_bias, k=topk, dim=1).indices
        return normed(scores, ids), ids

    def forward(self, x: Any) -> Any:
        flat = x.flatten(0, 1)
        logits = flat.float() @ self.gate.weight.float().T
        weights, ids = self.custom_routing_function(logits, self.top_k, renormalize=True)
        return self.experts(flat, ids, weights * self.routed_scaling_factor).view(x.shape)


class ReleasedLayer(step.Step3p7DecoderLayer):
    """The released code's block: the shared expert stands beside the others, not in them."""

    def forward(self, hidden_states: Any, **how: Any) -> Any:
        x = hidden_states
        x = x + self.self_attn(hidden_states=self.input_layernorm(x), **how)[0]
        normed = self.post_attention_layernorm(x)
        return x + (self.moe(normed) + self.share_expert(normed))


def released(port: Port) -> Port:
    """The port with the released code's modules where those of transformers differ."""
    for layer in port.model.layers[: port.count]:
        block = layer.mlp
        if isinstance(block, step.Step3p7SparseMoeBlock):
            layer.__class__ = ReleasedLayer
            layer.moe, layer.share_expert = ReleasedMoE(block), block.shared_experts
            del layer.mlp
    return port


class Attention(step.Step3p7Attention):
    """transformers' attention in parts that a bug may replace."""

    def projected(self, proj: Any, x: Any) -> Any:
        return proj(x)

    def turned(self, q: Any, k: Any, cos: Any, sin: Any) -> tuple[Any, Any]:
        """Normed and rotated: [1, H, T, K] each."""
        return apply_rotary_pos_emb(self.q_norm(q), self.k_norm(k), cos, sin)

    def opened(self, heads: Any, gate: Any) -> Any:
        """The output [1, T, D] of the heads [1, T, H, K] and their gates [1, T, H]."""
        return self.o_proj((heads * gate.sigmoid()[..., None]).flatten(2))

    def forward(
        self, hidden_states: Any, position_embeddings: Any, attention_mask: Any, **how: Any
    ) -> Any:
        x, shape = hidden_states, (*hidden_states.shape[:-1], -1, self.head_dim)
        q, k, v = (
            self.projected(proj, x).view(shape).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = self.turned(q, k, *position_embeddings)
        heads, _ = step.eager_attention_forward(self, q, k, v, attention_mask, self.scaling)
        return self.opened(heads, self.g_proj(x)), None


class Copies(Attention):
    def turned(self, q: Any, k: Any, cos: Any, sin: Any) -> tuple[Any, Any]:
        return super().turned(q.contiguous(), k.contiguous(), cos, sin)


class SkipsModules(Attention):
    """As where one matrix has all projections: those of queries and keys are no modules."""

    def projected(self, proj: Any, x: Any) -> Any:
        return F.linear(x, proj.weight)


class TurnsByToken(Attention):
    def turned(self, q: Any, k: Any, cos: Any, sin: Any) -> tuple[Any, Any]:
        q, k = self.q_norm(q.transpose(1, 2)), self.k_norm(k.transpose(1, 2))
        q, k = apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=2)
        return q.transpose(1, 2), k.transpose(1, 2)


LAYOUTS = (step.Step3p7Attention, Attention, Copies, SkipsModules, TurnsByToken)  # all are right


class NormsAfterRotating(Attention):
    def turned(self, q: Any, k: Any, cos: Any, sin: Any) -> tuple[Any, Any]:
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
        return self.q_norm(q), self.k_norm(k)


class OpensWithSiLU(Attention):
    def opened(self, heads: Any, gate: Any) -> Any:
        return self.o_proj((heads * F.silu(gate)[..., None]).flatten(2))


class OpensItsOutput(Attention):
    def opened(self, heads: Any, gate: Any) -> Any:
        out = self.o_proj(heads.flatten(2))
        D, H = out.shape[-1], gate.shape[-1]
        return out * gate.sigmoid()[..., torch.arange(D) * H // D]


class OpensByMean(Attention):
    def opened(self, heads: Any, gate: Any) -> Any:
        return self.o_proj(heads.flatten(2)) * gate.sigmoid().mean(-1, keepdim=True)


class GatedLinear(nn.Linear):
    """What a hook on o_proj sees where the gate is inside: `gate` [1, T, 1] of the tokens."""

    def forward(self, x: Any) -> Any:
        return super().forward(x) * self.gate


class OpensItsOutputInside(Attention):
    def opened(self, heads: Any, gate: Any) -> Any:
        self.o_proj.__class__ = GatedLinear
        self.o_proj.gate = gate.sigmoid().mean(-1, keepdim=True)
        return self.o_proj(heads.flatten(2))


class StaysOpen(Attention):
    def opened(self, heads: Any, gate: Any) -> Any:
        return self.o_proj(heads.flatten(2))


def interleaved(q: Any, k: Any, cos: Any, sin: Any, unsqueeze_dim: int = 1) -> tuple[Any, Any]:
    """Rotate the pairs (0, 1), (2, 3), ... where the model rotates a half against the other."""
    width = cos.shape[-1]
    cos, sin = (angles[:, None, :, : width // 2] for angles in (cos, sin))

    def turn(x: Any) -> Any:
        one, other = x[..., 0:width:2], x[..., 1:width:2]
        pairs = torch.stack((one * cos - other * sin, other * cos + one * sin), dim=-1)
        return torch.cat((pairs.flatten(-2), x[..., width:]), dim=-1)

    return turn(q), turn(k)


def unclamped(gate: Any, up: Any, limit: float) -> Any:
    return F.silu(gate) * up


def clamped_before(gate: Any, up: Any, limit: float) -> Any:
    return F.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)


def clamped_above(gate: Any, up: Any, limit: float) -> Any:
    return F.silu(gate).clamp(max=limit) * up.clamp(max=limit)


def clamped_gate(gate: Any, up: Any, limit: float) -> Any:
    return F.silu(gate).clamp(max=limit) * up


def every(port: Port, kind: type) -> Iterator[Any]:
    return (module for module in port.modules() if isinstance(module, kind))


Patch = Callable[[Any, str, Any], None]  # as monkeypatch.setattr


class Bug(NamedTuple):
    """A bug of ports: planted by a changed config and then in the port; where it first shows.

    `layer`: the one to check; `first`: its first wrong tensor, "" for its output.
    """

    looks_like: str
    layer: int
    first: str
    alter: Alter = lambda config: None
    plant: Callable[[Port, Patch], None] = lambda port, patch: None


def attends(kind: type) -> Callable[[Port, Patch], None]:
    def plant(port: Port, patch: Patch) -> None:
        for attention in every(port, step.Step3p7Attention):
            attention.__class__ = kind

    return plant


def norms(
    scaled: Callable[[Any, Any], Any], parts: tuple[str, ...] = ("norm",)
) -> Callable[[Port, Patch], None]:
    """Every norm, or only some, as `scaled` of what is normed and the weight."""

    def plant(port: Port, patch: Patch) -> None:
        for name, norm in port.named_modules():
            if isinstance(norm, step.Step3p7RMSNorm) and name.endswith(parts):
                norm.forward = lambda x, norm=norm: scaled(norm._norm(x), norm.weight)

    return plant


def centred(port: Port, patch: Patch) -> None:
    """LayerNorms where the model has RMSNorms."""
    for norm in every(port, step.Step3p7RMSNorm):
        norm.forward = lambda x, norm=norm: F.layer_norm(
            x, x.shape[-1:], 1 + norm.weight, eps=norm.eps
        )


def unnormed_keys(port: Port, patch: Patch) -> None:
    for attention in every(port, step.Step3p7Attention):
        attention.k_norm.forward = lambda x: x


def activates(act: Callable[..., Any]) -> Callable[[Port, Patch], None]:
    """`act` of gate, up and limit in every MLP and expert."""

    def plant(port: Port, patch: Patch) -> None:
        for mlp in every(port, step.Step3p7MLP):
            mlp.forward = lambda x, mlp=mlp: mlp.down_proj(
                act(mlp.gate_proj(x), mlp.up_proj(x), mlp.limit)
            )
        for experts in every(port, step.Step3p7Experts):
            experts._apply_gate = lambda pair, experts=experts: act(
                *pair.chunk(2, dim=-1), experts.limit
            )

    return plant


def routes(pick: Callable[..., Any]) -> Callable[[Port, Patch], None]:
    """`pick` gives scores to choose by and weights of all experts, from logits, scores, bias."""

    def route(gate: Any, x: Any) -> Any:
        logits = F.linear(x.reshape(-1, gate.hidden_dim), gate.weight)
        by, weights = pick(logits, logits.sigmoid(), gate.e_score_correction_bias)
        ids = by.topk(gate.top_k, dim=-1).indices
        return logits, weights(ids) if callable(weights) else normed(weights, ids), ids

    def plant(port: Port, patch: Patch) -> None:
        for gate in every(port, step.Step3p7TopKRouter):
            gate.forward = partial(route, gate)

    return plant


def normed(weights: Any, ids: Any) -> Any:
    chosen = weights.gather(-1, ids)
    return chosen / chosen.sum(dim=-1, keepdim=True)


def blocks(act: Callable[[Any], None]) -> Callable[[Port, Patch], None]:
    """`act` on every block of experts."""

    def plant(port: Port, patch: Patch) -> None:
        for block in every(port, step.Step3p7SparseMoeBlock):
            act(block)

    return plant


def scales_shared(block: Any) -> None:
    real = block.shared_experts.forward
    block.shared_experts.forward = lambda x: real(x) * block.routed_scaling_factor


def scales_sum(block: Any) -> None:
    def forward(x: Any) -> Any:
        flat = x.flatten(0, 1)
        shared, (_, weights, ids) = block.shared_experts(flat), block.gate(flat)
        both = block.experts(flat, ids, weights) + shared
        return (both * block.routed_scaling_factor).view(x.shape)

    block.forward = forward


def forgets_shared(block: Any) -> None:
    def forward(x: Any) -> Any:
        flat = x.flatten(0, 1)
        block.shared_experts(flat)
        _, weights, ids = block.gate(flat)
        return (block.experts(flat, ids, weights) * block.routed_scaling_factor).view(x.shape)

    block.forward = forward


def scales_nothing(block: Any) -> None:
    block.routed_scaling_factor = 1.0


def clamps_shared_as_routed(block: Any) -> None:
    block.shared_experts.limit = block.experts.limit


def clamps_routed_as_shared(block: Any) -> None:
    block.experts.limit = block.shared_experts.limit


def rope(kind: str, **settings: Any) -> Alter:
    """Other rotary settings for a kind of layers."""

    def alter(config: Any) -> None:
        config.rope_parameters[kind] = config.rope_parameters[kind] | settings

    return alter


def scales_all(config: Any) -> None:
    full, sliding = config.rope_parameters[FULL], config.rope_parameters[SLIDING]
    of_kind = ("rope_theta", "partial_rotary_factor")
    config.rope_parameters[SLIDING] = full | {key: sliding[key] for key in of_kind}


def first_theta(config: Any) -> None:
    rope(SLIDING, rope_theta=config.rope_parameters[FULL]["rope_theta"])(config)


def exponent_over_head_dim(config: Any) -> None:
    theta, share = (
        config.rope_parameters[FULL][key] for key in ("rope_theta", "partial_rotary_factor")
    )
    rope(FULL, rope_theta=theta**share)(config)


def window(change: int) -> Alter:
    def alter(config: Any) -> None:
        config.sliding_window += change

    return alter


def permutes_rows(port: Port, patch: Patch) -> None:
    """As converters store q_proj and k_proj for engines that rotate in pairs."""
    for attention in every(port, step.Step3p7Attention):
        for weight in (attention.q_proj.weight, attention.k_proj.weight):
            halves = weight.data.unflatten(0, (-1, 2, attention.head_dim // 2))
            weight.data = halves.transpose(1, 2).flatten(0, 2)


def rotates_in_pairs(port: Port, patch: Patch) -> None:
    patch(step, "apply_rotary_pos_emb", interleaved)


def rotates_back(port: Port, patch: Patch) -> None:
    real = step.apply_rotary_pos_emb
    patch(step, "apply_rotary_pos_emb", lambda q, k, cos, sin: real(q, k, cos, -sin))


def repeats_in_stripes(port: Port, patch: Patch) -> None:
    patch(step, "repeat_kv", lambda x, times: x.repeat(1, times, 1, 1))


def scales_by_width(port: Port, patch: Patch) -> None:
    for attention in every(port, step.Step3p7Attention):
        attention.scaling = 1 / attention.head_dim


def heads_of(port: Port) -> list[Any]:
    return [layer.transformer["shared_head"] for layer in port.model.layers[port.count :]]


def takes_lm_head(port: Port, patch: Patch) -> None:
    for head in heads_of(port):
        head["output"].load_state_dict(port.lm_head.state_dict())


def takes_model_norm(port: Port, patch: Patch) -> None:
    for head in heads_of(port):
        head["norm"].load_state_dict(port.model.norm.state_dict())


def forgets_head_norm(port: Port, patch: Patch) -> None:
    for head in heads_of(port):
        head["norm"].forward = lambda x: x


def passes_on_normed(port: Port, patch: Patch) -> None:
    norms = [deepcopy(norm) for norm in (port.model.norm, *(h["norm"] for h in heads_of(port)))]
    port.passed_on = lambda k, states: norms[k - 1](states[-1])


def passes_on_main(port: Port, patch: Patch) -> None:
    port.passed_on = lambda k, states: states[0]


def swaps_halves(port: Port, patch: Patch) -> None:
    for layer in every(port, MTPLayer):
        layer.swaps_halves = True


def embeds_late(port: Port, patch: Patch) -> None:
    port.late = 1


HEAD = "transformer.shared_head"
BUGS = [  # of the tiny model, whose layer 0 is full, 1 sliding, 7 clamped experts, 8 and 9 MTP
    Bug("norm weight used as w, not 1 + w", 3, "input_layernorm", plant=norms(lambda x, w: x * w)),
    Bug("1 added twice to the norm weight", 0, "input_layernorm", plant=norms(lambda x, w: x * (2 + w))),
    Bug("QK-norm weight used as w, not 1 + w", 1, "self_attn.q_norm", plant=norms(lambda x, w: x * w, ("q_norm", "k_norm"))),
    Bug("norm subtracts the mean", 3, "input_layernorm", plant=centred),
    Bug("QK-norm on the queries only", 1, "self_attn.k_norm", plant=unnormed_keys),
    Bug("Llama-3 scaling applied to a sliding layer", 1, "self_attn.q_rope", alter=scales_all),
    Bug("Llama-3 scaling applied to no layer", 0, "self_attn.q_rope", alter=rope(FULL, rope_type="default")),
    Bug("first element of rope_theta taken for all layers", 2, "self_attn.q_rope", alter=first_theta),
    Bug("rotary exponent over head_dim, not the rotary width", 4, "self_attn.q_rope", alter=exponent_over_head_dim),
    Bug("whole head rotated where partial_rotary_factors says a part", 4, "self_attn.q_rope", alter=rope(FULL, partial_rotary_factor=1.0)),
    Bug("interleaved instead of half-split rotation", 0, "self_attn.q_rope", plant=rotates_in_pairs),
    Bug("interleaved instead of half-split rotation", 1, "self_attn.q_rope", plant=rotates_in_pairs),
    Bug("rotation the other way round", 1, "self_attn.q_rope", plant=rotates_back),
    Bug("rows of q_proj and k_proj permuted for interleaved rotation, but half-split is used", 1, "self_attn.q_proj", plant=permutes_rows),
    Bug("QK-norm after the rotation", 1, "self_attn.q_norm", plant=attends(NormsAfterRotating)),
    Bug("gate as SiLU, not sigmoid", 0, "self_attn.o_proj", plant=attends(OpensWithSiLU)),
    Bug("gate on the output of o_proj", 0, "self_attn.o_proj", plant=attends(OpensItsOutput)),
    Bug("gate on the output of o_proj", 1, "self_attn.o_proj", plant=attends(OpensByMean)),
    Bug("gate on the output of o_proj", 2, "self_attn.o_proj", plant=attends(OpensItsOutputInside)),
    Bug("gate forgotten", 1, "self_attn.o_proj", plant=attends(StaysOpen)),
    Bug("key-value heads repeated in stripes", 0, "self_attn.o_proj", plant=repeats_in_stripes),
    Bug("scores scaled by 1/K", 0, "self_attn.o_proj", plant=scales_by_width),
    Bug("window one too long", 1, "self_attn.o_proj", alter=window(1)),
    Bug("window one too short", 2, "self_attn.o_proj", alter=window(-1)),
    Bug("window forgotten", 3, "self_attn.o_proj", alter=window(1000)),
    Bug("biased scores used as expert weights", 2, "moe.weights", plant=routes(lambda z, s, bias: (s + bias, s + bias))),
    Bug("router bias forgotten when experts are chosen", 3, "moe.ids", plant=routes(lambda z, s, bias: (s, s))),
    Bug("router bias added to the logits", 4, "moe.ids", plant=routes(lambda z, s, bias: (z + bias, s))),
    Bug("softmax router, not sigmoid", 2, "moe.ids", plant=routes(lambda z, s, bias: (z.softmax(-1) + bias, z.softmax(-1)))),
    Bug("expert weights not normalised", 2, "moe.weights", plant=routes(lambda z, s, bias: (s + bias, partial(s.gather, -1)))),
    Bug("expert weights normalised over all experts", 2, "moe.weights", plant=routes(lambda z, s, bias: (s + bias, partial((s / s.sum(-1, True)).gather, -1)))),
    Bug("scaling factor of the experts forgotten", 3, "moe.weights", plant=blocks(scales_nothing)),
    Bug("scaling factor on the shared expert too", 3, "share_expert", plant=blocks(scales_shared)),
    Bug("scaling factor on the shared expert too", 3, "", plant=blocks(scales_sum)),
    Bug("shared expert dropped", 3, "", plant=blocks(forgets_shared)),
    Bug("clamp before SiLU", 7, "moe", plant=activates(clamped_before)),
    Bug("clamp before SiLU", 1, "mlp", plant=activates(clamped_before)),
    Bug("up clamped above only", 7, "moe", plant=activates(clamped_above)),
    Bug("up not clamped", 7, "moe", plant=activates(clamped_gate)),
    Bug("clamp forgotten", 7, "moe", plant=activates(unclamped)),
    Bug("clamp of the routed experts used for the shared expert", 6, "share_expert", plant=blocks(clamps_shared_as_routed)),
    Bug("clamp of the shared expert used for the routed experts", 6, "moe", plant=blocks(clamps_routed_as_shared)),
    Bug("MTP head replaced by lm_head", 8, f"{HEAD}.output", plant=takes_lm_head),
    Bug("norm before an MTP head replaced by model.norm", 9, f"{HEAD}.norm", plant=takes_model_norm),
    Bug("norm before an MTP head forgotten", 8, f"{HEAD}.norm", plant=forgets_head_norm),
    Bug("hidden passed between MTP depths after the norm", 8, "eh_proj", plant=passes_on_normed),
    Bug("hidden passed between MTP depths after the norm", 9, "eh_proj", plant=passes_on_normed),
    Bug("main model's state fed to every MTP depth", 9, "eh_proj", plant=passes_on_main),
    Bug("enorm and hnorm halves swapped before eh_proj", 8, "eh_proj", plant=swaps_halves),
    Bug("MTP depth fed the token before", 8, "eh_proj", plant=embeds_late),
]  # fmt: skip
