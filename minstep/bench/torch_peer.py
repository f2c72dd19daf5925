"""The other side of `minstep bench`: torch and transformers, in a process of their own.

Run by path, with a Python that may not have minstep. Each line of stdin is a JSON request {"do":
name, ...}, each line of stdout its answer; what does not work is answered {"error": text}. The
first line is {"versions": ...}, or {"missing": ...} where a package is not there. The only file in
minstep/ that imports torch.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

Answer = dict[str, Any]
RENAMED = {  # the hub's: transformers'
    ".moe.gate.": ".mlp.gate.",
    ".moe.router_bias": ".mlp.gate.e_score_correction_bias",
    ".moe.down_proj.weight": ".mlp.experts.down_proj",
    ".share_expert.": ".mlp.shared_experts.",
}


class TorchPeer:
    """Torch, transformers' Step model, and what was loaded, by name."""

    def __init__(self) -> None:
        self.torch: Any = import_module("torch")
        self.step: Any = import_module("transformers.models.step3p7.modeling_step3p7")
        self.open: Any = import_module("safetensors").safe_open
        self.loaded: dict[str, Any] = {}

    def versions(self) -> Answer:
        """What runs here."""
        names = ("torch", "transformers")
        versions = {name: import_module(name).__version__ for name in names}
        return {"versions": versions, "threads": self.torch.get_num_threads()}

    def drop(self) -> Answer:
        """Let go of everything that was loaded."""
        self.loaded.clear()
        return {}

    def text(self, name: str, folder: str, dtype: str) -> Answer:
        """Load the main layers of a hub-layout checkpoint as Step3p7TextModel, eager attention."""
        config = self._config(Path(folder))
        wanted = getattr(self.torch, dtype)
        self.torch.set_default_dtype(wanted)  # not model.to, which would round angles too
        model = self.step.Step3p7TextModel(config).eval()
        self.torch.set_default_dtype(self.torch.float32)
        state = self._state(Path(folder), config.num_hidden_layers)
        head = state.pop("lm_head.weight", state["embed_tokens.weight"]).to(wanted)
        for key in model.state_dict().keys() - state.keys():
            if not key.endswith("e_score_correction_bias"):
                raise ValueError(f"{folder}: has no {key}")
            state[key] = self.torch.zeros(model.state_dict()[key].shape)
        model.load_state_dict(state)
        self.loaded[name] = model, head
        return {}

    def _config(self, folder: Path, changed: Answer | None = None) -> Any:
        """Its config.json, with some keys changed, as transformers' configuration."""
        raw = json.loads((folder / "config.json").read_text(encoding="utf-8")) | (changed or {})
        settings = {key: x for key, x in raw.items() if key not in ("model_type", "torch_dtype")}
        return self.step.Step3p7TextConfig(**settings, attn_implementation="eager")

    def _state(self, folder: Path, layers: int) -> dict[str, Any]:
        """The checkpoint's tensors as transformers names them, without MTP layers."""
        state: dict[str, Any] = {}
        for file in sorted(folder.glob("*.safetensors")):
            with self.open(file, "pt") as opened:
                for name in opened.keys():
                    parts = name.split(".")
                    if parts[1] == "layers" and int(parts[2]) >= layers:
                        continue
                    tensor = opened.get_tensor(name)
                    for hub, theirs in RENAMED.items():
                        name = name.replace(hub, theirs)
                    state[name.removeprefix("model.")] = tensor
        for gate in [name for name in state if name.endswith(".moe.gate_proj.weight")]:
            layer = gate.removesuffix(".moe.gate_proj.weight")
            halves = state.pop(gate), state.pop(f"{layer}.moe.up_proj.weight")
            state[f"{layer}.mlp.experts.gate_up_proj"] = self.torch.cat(halves, dim=1)
        return state

    def decode(self, name: str, prompt: list[int], count: int) -> Answer:
        """Seconds of a token: greedy, a token at a time with caches."""
        self._continued(name, prompt[:64], 8)  # warms up
        took, _, tokens = self._continued(name, prompt, count)
        return {"seconds": took / count, "tokens": tokens}

    def prefill(self, name: str, prompt: list[int]) -> Answer:
        """Seconds from a prompt to its next token."""
        self._continued(name, prompt[:64], 8)
        _, first, tokens = self._continued(name, prompt, 0)
        return {"seconds": first, "tokens": tokens}

    def _continued(
        self, name: str, prompt: list[int], count: int
    ) -> tuple[float, float, list[int]]:
        """The seconds of all tokens after the first, those of the first, and the tokens."""
        torch, (model, head) = self.torch, self.loaded[name]
        cache_kind = import_module("transformers.cache_utils").DynamicCache
        with torch.inference_mode():
            cache = cache_kind(config=model.config)
            began = time.perf_counter()
            tokens = [self._next(model, head, prompt, cache)]
            started = time.perf_counter()
            for _ in range(count):
                tokens.append(self._next(model, head, tokens[-1:], cache))
            return time.perf_counter() - started, started - began, tokens

    def _next(self, model: Any, head: Any, tokens: list[int], cache: Any) -> int:
        """The likeliest token after these, which the cache takes in."""
        ids = self.torch.tensor([tokens])
        states = model(input_ids=ids, cache=cache, use_cache=True).last_hidden_state
        return int((states[0, -1:] @ head.T).argmax())

    def train(self, name: str, sequences: list[list[int]], calls: int) -> Answer:
        """Seconds of forward and backward over all sequences at once; the fastest call."""
        torch, (model, head) = self.torch, self.loaded[name]
        ids, times, loss = torch.tensor(sequences), list[float](), 0.0
        head = head.clone().requires_grad_()
        for _ in range(1 + calls):  # the first warms up
            model.zero_grad()
            started = time.perf_counter()
            logits = model(input_ids=ids, use_cache=False).last_hidden_state @ head.T
            mean = torch.nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
            )
            mean.backward()
            times.append(time.perf_counter() - started)
            loss = mean.item()
        slope = float(model.embed_tokens.weight.grad.norm())
        return {"seconds": min(times[1:]), "loss": loss, "slope": slope}

    def layer(self, name: str, folder: str, layer: int, dtype: str, experts: int) -> Answer:
        """Hold a Step3p7SparseMoeBlock that chooses only the first `experts`.

        Bfloat16 stays in the mapped file; float32 is a copy of these experts. The router is
        float32 in both, as in the release.
        """
        torch, path = self.torch, Path(folder)
        fewer = {"moe_num_experts": experts} if dtype == "float32" else {}
        config = self._config(path, fewer)
        with torch.device("meta"):
            block = self.step.Step3p7SparseMoeBlock(config, layer).eval()
        with self.open(path / "model.safetensors", "pt") as opened:
            start = f"model.layers.{layer}.mlp."
            state = {key.removeprefix(start): opened.get_tensor(key) for key in opened.keys()}
        bias = "gate.e_score_correction_bias"
        state[bias] = state[bias].clone()
        state[bias][experts:] = -2  # below every sigmoid
        if dtype == "float32":
            for key, tensor in state.items():
                of_experts = key.startswith(("gate.", "experts."))
                state[key] = (tensor[:experts] if of_experts else tensor).float()
        block.load_state_dict(state, assign=True)
        self.loaded[name] = block, getattr(torch, dtype), config.hidden_size
        return {}

    def run_layer(self, name: str, tokens: int, calls: int, warm_up: int) -> Answer:
        """Seconds of the fastest call over tokens drawn anew, and the last row of the first."""
        torch, (block, dtype, size) = self.torch, self.loaded[name]
        times, row = list[float](), list[float]()
        with torch.inference_mode():
            for n in range(warm_up + calls):
                drawn = np.random.default_rng(n).standard_normal((1, tokens, size), np.float32)
                x = torch.from_numpy(drawn).to(torch.bfloat16).to(dtype)
                started = time.perf_counter()
                y = block(x)
                times.append(time.perf_counter() - started)
                row = row or y[0, -1].float().tolist()
        return {"seconds": min(times[warm_up:]), "row": row}

    def attention(self, query: list[int], keys: list[int], seed: int) -> Answer:
        """Hold a query [H, K], keys and values [G, S, K]: 4096 positions drawn, and repeated."""
        rng, (G, S, K) = np.random.default_rng(seed), keys
        drawn = [rng.standard_normal((G, min(S, 4096), K), np.float32) for _ in range(2)]
        filled = [self.torch.from_numpy(np.tile(x, (1, -(-S // 4096), 1))) for x in drawn]
        q = rng.standard_normal(query, np.float32)
        self.loaded["attention"] = self.torch.from_numpy(q), *filled
        return {}

    def attend(self, way: str, positions: int, calls: int) -> Answer:
        """Seconds of the fastest call over so many positions, and the first head's output."""
        torch, (q, k, v) = self.torch, self.loaded["attention"]
        k, v, (G, _, K) = k[:, :positions], v[:, :positions], k.shape

        def call() -> Any:
            if way == "sdpa":
                heads = q[None, :, None], k[None], v[None]
                whole = torch.nn.functional.scaled_dot_product_attention(*heads, enable_gqa=True)
                return whole[0, :, 0]
            scores = q.view(G, -1, K) @ k.mT * K**-0.5
            return (torch.softmax(scores, -1) @ v).view(q.shape)

        times, row = list[float](), list[float]()
        with torch.inference_mode():
            for _ in range(1 + calls):
                started = time.perf_counter()
                y = call()
                times.append(time.perf_counter() - started)
                row = y[0].tolist()
        return {"seconds": min(times[1:]), "row": row}


def main() -> None:
    """Answer requests until stdin ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints is no answer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever started this ends it
    try:
        peer = TorchPeer()
        print(json.dumps(peer.versions()), file=answers, flush=True)
    except ImportError as error:
        print(json.dumps({"missing": str(error)}), file=answers, flush=True)
        return
    for line in sys.stdin:
        request = json.loads(line)
        do: Callable[..., Answer] = getattr(peer, request.pop("do"))
        try:
            answer = do(**request)
        except Exception as error:  # of whatever kind: the other process tells it
            answer = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:300]}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
