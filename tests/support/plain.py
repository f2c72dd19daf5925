"""The model once more, written to be obviously right and nothing else: a token at a time.

It reads config.json and the checkpoint's tensors by their names, shares no code with minstep, and
says each rule in another form: rotation by complex numbers, sigmoid by tanh, softmax without a
shift, attention over a Python list of visible positions, experts one token at a time.
"""

from typing import Any

import numpy as np

Tensors = dict[str, np.ndarray[Any, Any]]
States = list[np.ndarray[Any, Any]]


def of_layer(value: Any, n: int) -> Any:
    """A per-layer setting; a scalar or null stands for every layer."""
    return value[n] if isinstance(value, list) else value


def sigmoid(x: Any) -> Any:
    return (1 + np.tanh(x / 2)) / 2


class Plain:
    """A checkpoint's tensors in float64 and its raw config."""

    def __init__(self, raw: dict[str, Any], tensors: Tensors) -> None:
        self.raw, self.tensors = raw, {name: x.astype(np.float64) for name, x in tensors.items()}

    def norm(self, x: Any, name: str) -> Any:
        length = np.sqrt((x @ x) / len(x) + self.raw["rms_norm_eps"])
        return x / length * (self.tensors[f"{name}.weight"] + 1)

    def times(self, x: Any, name: str) -> Any:
        return self.tensors[f"{name}.weight"] @ x

    def turned(self, x: Any, position: int, n: int) -> Any:
        """One head of layer n, rotated by the angles of its position."""
        raw, kind = self.raw, self.raw["layer_types"][n]
        pairs = int(len(x) * of_layer(raw["partial_rotary_factors"], n)) // 2
        theta = of_layer(raw["rope_theta"], n)
        y = x.copy()
        for i in range(pairs):
            speed = theta ** (-i / pairs)
            rule = raw["rope_scaling"]
            if rule and kind in raw.get("yarn_only_types", [kind]):
                turns = rule["original_max_position_embeddings"] * speed / (2 * np.pi)
                low, high = rule["low_freq_factor"], rule["high_freq_factor"]
                if turns < low:
                    speed /= rule["factor"]
                elif turns < high:
                    share = (turns - low) / (high - low)
                    speed *= share + (1 - share) / rule["factor"]
            z = (x[i] + 1j * x[i + pairs]) * np.exp(1j * position * speed)
            y[i], y[i + pairs] = z.real, z.imag
        return y

    def attention(self, states: States, n: int) -> States:
        raw, name, K = self.raw, f"model.layers.{n}.self_attn", self.raw["head_dim"]
        kind, other = raw["layer_types"][n], raw.get("attention_other_setting") or {}
        heads = other if other.get("attention_type") == kind else raw
        H, G = heads["num_attention_heads"], heads["num_attention_groups"]
        window = raw["sliding_window"] if kind == "sliding_attention" else len(states)
        queries, keys, values = [], [], []
        for t, x in enumerate(states):
            q, k, v = (self.times(x, f"{name}.{p}_proj").reshape(-1, K) for p in "qkv")
            queries.append([self.turned(self.norm(head, f"{name}.q_norm"), t, n) for head in q])
            keys.append([self.turned(self.norm(head, f"{name}.k_norm"), t, n) for head in k])
            values.append(v)
        outputs = []
        for t, x in enumerate(states):
            mixed = []
            for h in range(H):
                g, seen = h * G // H, range(max(0, t - window + 1), t + 1)
                weights = [np.exp(queries[t][h] @ keys[s][g] / np.sqrt(K)) for s in seen]
                parts = [w * values[s][g] for w, s in zip(weights, seen, strict=True)]
                mixed.append(np.sum(parts, axis=0) / sum(weights))
                if raw["use_head_wise_attn_gate"]:
                    mixed[h] *= sigmoid(self.times(x, f"{name}.g_proj")[h])
            outputs.append(self.times(np.concatenate(mixed), f"{name}.o_proj"))
        return outputs

    def mlp(self, x: Any, gate: Any, up: Any, down: Any, limit: float | None) -> Any:
        gate, up = gate @ x, up @ x
        gate = gate * sigmoid(gate)
        if limit:
            gate = np.where(gate > limit, limit, gate)
            up = np.sign(up) * np.minimum(abs(up), limit)
        return down @ (gate * up)

    def feed_forward(self, x: Any, n: int) -> Any:
        raw, name = self.raw, f"model.layers.{n}"
        stored = [self.tensors.get(f"{name}.moe.{p}_proj.weight") for p in ("gate", "up", "down")]
        shared = "share_expert" if stored[0] is not None else "mlp"
        own = [self.tensors[f"{name}.{shared}.{p}_proj.weight"] for p in ("gate", "up", "down")]
        y = self.mlp(x, *own, of_layer(raw["swiglu_limits_shared"], n))
        if stored[0] is None:
            return y
        scores = sigmoid(self.times(x, f"{name}.moe.gate"))
        biased = scores + self.tensors.get(f"{name}.moe.router_bias", 0)
        chosen = sorted(range(len(scores)), key=lambda e: -biased[e])[: raw["moe_top_k"]]
        for e in chosen:
            weight = raw["moe_router_scaling_factor"] * scores[e] / sum(scores[chosen])
            expert = [stack[e] for stack in stored if stack is not None]
            y = y + weight * self.mlp(x, *expert, of_layer(raw["swiglu_limits"], n))
        return y

    def layer(self, states: States, n: int) -> States:
        name = f"model.layers.{n}"
        normed = [self.norm(x, f"{name}.input_layernorm") for x in states]
        states = [x + y for x, y in zip(states, self.attention(normed, n), strict=True)]
        normed = [self.norm(x, f"{name}.post_attention_layernorm") for x in states]
        return [x + self.feed_forward(y, n) for x, y in zip(states, normed, strict=True)]

    def logits(self, tokens: list[int]) -> list[Any]:
        """Logits [T, V] of the main model, then [T-k, V] of each MTP depth k."""
        L, embeddings = self.raw["num_hidden_layers"], self.tensors["model.embed_tokens.weight"]
        states = [embeddings[token] for token in tokens]
        for n in range(L):
            states = self.layer(states, n)
        head = "model.embed_tokens" if self.raw["tie_word_embeddings"] else "lm_head"
        logits = [np.array([self.times(self.norm(x, "model.norm"), head) for x in states])]
        for k in range(1, self.raw["num_nextn_predict_layers"] + 1):
            name = f"model.layers.{L + k - 1}"
            inputs = []
            for x, token in zip(states, tokens[k:], strict=False):
                pair = self.norm(embeddings[token], f"{name}.enorm"), self.norm(x, f"{name}.hnorm")
                inputs.append(self.times(np.concatenate(pair), f"{name}.eh_proj"))
            states = self.layer(inputs, L + k - 1)
            own = f"{name}.transformer.shared_head"
            normed = [self.norm(x, f"{own}.norm") for x in states]
            logits.append(np.array([self.times(x, f"{own}.output") for x in normed]))
        return logits
