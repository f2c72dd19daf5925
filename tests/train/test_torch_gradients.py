"""The gradient of the whole loss by every tensor, against torch's autograd, in float64.

The model there is transformers' own, and its MTP layers are those of the port. Both compute parts
of the model in float32 whatever the weights are; here these parts are float64 too.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import minstep
from minstep.config import Config, parse_config
from minstep.store.checkpoint import Checkpoint
from minstep.store.random_checkpoint import save_random
from minstep.tap import Array, silent
from minstep.train.loss import objective
from minstep.train.tape import Variable, backward
from minstep.weights import assemble, tensor_shapes
from tests.parity.test_transformers import redrawn, step, torch, torch_name
from tests.support.torch_port import F, Port, build, heads_of

rope_utils: Any = pytest.importorskip("transformers.modeling_rope_utils")
pytestmark = pytest.mark.torch

T = 41  # tokens: more than every window
TOLERANCE = 1e-10  # of the largest entry of a gradient
CASES = [(name, 0) for name in ("tiny", "odd", "no_extras", "drafts")]
CASES += [("drawn", seed) for seed in range(12)]


class Wide:
    """torch, whose float32 is float64."""

    float = float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> Checkpoint:
    """A random checkpoint, of a tiny configuration or of one that is drawn."""
    name, seed = request.param
    file = minstep.find_config("tiny" if name == "drawn" else name) / "config.json"
    raw, rng = json.loads(file.read_text(encoding="utf-8")), np.random.default_rng(seed)
    raw = redrawn(raw, rng) if name == "drawn" else raw
    save_random(raw, parse_config(raw), rng, tmp_path)
    return minstep.open_checkpoint(tmp_path)


@pytest.fixture
def port(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> Port:
    """The checkpoint in torch, with nothing in float32."""
    monkeypatch.setattr(step, "torch", Wide())
    monkeypatch.setattr(rope_utils, "torch", Wide())
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    port = build(checkpoint, "float64")
    port.model.embed_tokens.padding_idx = None  # a token that would learn nothing
    return port


def torch_losses(port: Port, tokens: list[int]) -> list[Any]:
    """The cross-entropy of the main head and of each depth."""
    logits: list[Any] = []
    heads = [head["output"] for head in heads_of(port)]
    for head in (port.lm_head, *heads):
        head.register_forward_hook(lambda _, inputs, output: logits.append(output[0]))
    ids = torch.tensor([tokens])
    port(ids)
    return [F.cross_entropy(x[:-1], ids[0, k + 1 :]) for k, x in enumerate(logits)]


def torch_gradients(port: Port, config: Config) -> dict[str, Array]:
    """What autograd left, by the hub's names: the way back of torch_state."""
    left = {name: parameter.grad for name, parameter in port.named_parameters()}
    found: dict[str, Array] = {}
    for name in tensor_shapes(config):
        its = name if name == "lm_head.weight" else f"model.{torch_name(name)}"
        gate_up = its.rpartition(".moe.")[0] + ".mlp.experts.gate_up_proj"
        if name.endswith((".moe.gate_proj.weight", ".moe.up_proj.weight")):
            gradient = left[gate_up].chunk(2, dim=1)[".moe.up_proj." in name]
        elif not name.endswith("router_bias"):
            gradient = left[its]
        else:
            continue
        found[name] = gradient.numpy()
    for spec in config.layers + config.mtp_layers:
        if not spec.has_gate:  # there its matrix is twice ours
            found[f"{spec.name}.self_attn.o_proj.weight"] *= 2
    if config.tie_word_embeddings:
        found["model.embed_tokens.weight"] += left["lm_head.weight"].numpy()
    return found


def test_every_gradient_is_that_of_autograd(checkpoint: Checkpoint, port: Port) -> None:
    config = checkpoint.config
    tokens = np.random.default_rng(1).integers(config.vocab_size, size=T).tolist()
    main, *depths = torch_losses(port, tokens)
    expected = main + (0.3 * sum(depths) / len(depths) if depths else 0)
    expected.backward()
    theirs = torch_gradients(port, config)

    shapes = tensor_shapes(config).items()
    ours = {name: Variable(np.array(checkpoint.get(name, s), np.float64)) for name, s in shapes}
    weights = assemble(config, lambda name, shape: ours[name])
    losses = objective(tokens, weights, config, 0.3, np.float64, silent)
    for got, its in zip((losses.main, *losses.depths), (main, *depths), strict=True):
        assert float(got.value) == pytest.approx(its.item(), rel=1e-12)
    backward(losses.total)

    assert {name for name, x in ours.items() if x.gradient is None} == ours.keys() - theirs.keys()
    least = 1e-6 * max(np.abs(gradient).max() for gradient in theirs.values())
    for name, gradient in theirs.items():
        got = ours[name].gradient
        # A router that chooses one expert, and scores in a window of one, have no slope at all.
        error = np.abs(got - gradient).max() / max(np.abs(gradient).max(), least)
        assert got.shape == gradient.shape and error < TOLERANCE, f"{name}: {error:.1e}"
