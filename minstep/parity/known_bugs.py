"""Bugs that ports of this model have had, as changes of a line of the real code.

Each is worded to follow "looks like:". One bug may stand several times, once for each way that a
port has it, where recorded tensors differ. Those of loading files and of decoding, which no layer
can show, are in decoding_bugs.py.
Checked by: tests/parity/test_known_bugs.py, tests/parity/test_mutations.py
"""

from typing import NamedTuple


class Footgun(NamedTuple):
    """One bug: the fragment of minstep/`module`.py that is right, and what a port has instead."""

    bug: str
    module: str
    right: str
    wrong: str

    @property
    def file(self) -> str:
        """Where the line stands, such as minstep/moe.py."""
        return f"minstep/{self.module.replace('.', '/')}.py"


QK_NORM = """\
q = tap("q_norm", rms_norm(q, weights.q_norm, eps))
    k = tap("k_norm", rms_norm(k, weights.k_norm, eps))"""
QK_ROPE = """\
q = tap("q_rope", rotate(q, table))
    k = tap("k_rope", rotate(k, table))"""
QK_PROJ = """\
q = tap("q_proj", linear(x, weights.q_proj)).reshape(T, H, K)  # [T, H, K]
    k = tap("k_proj", linear(x, weights.k_proj)).reshape(T, G, K)  # [T, G, K]"""
ROTATE = """\
first, second = x[..., :pairs], x[..., pairs : 2 * pairs]  # [T, N, P]
    turned = (first * cos - second * sin, second * cos + first * sin)"""
SUM = """\
routed = tap("moe", moe(normed, weights.moe, spec.moe, spec.swiglu_limit, tap.at("moe")))
    shared = swiglu(normed, weights.share_expert, spec.swiglu_limit_shared)
    return x + (routed + tap("share_expert", shared))"""
VISIBLE = """\
mask = key <= query  # [count, keys]
    return mask if window is None else mask & (query - key < window)
"""
AT_ONCE = VISIBLE + "\n\nLARGE = 64 * LARGE\n"  # blocks never look at later keys
REPEATED = "keys=np.tile(past.keys, (H // G, 1, 1)), values=np.tile(past.values, (H // G, 1, 1))"
OUT = "linear(heads.reshape(T, H * K), weights.o_proj)"
GATES = ("gate[:, np.arange(out.shape[1]) * H // out.shape[1]]", "gate.mean(-1, keepdims=True)")

# By row of what was published; the last row only seems likely.
FOOTGUNS = {
    "MTP head": (
        Footgun("MTP head replaced by lm_head", "weights", 'f"{spec.name}.transformer.shared_head.output.weight"', '"lm_head.weight"'),
        Footgun("norm before an MTP head replaced by model.norm", "weights", 'f"{spec.name}.transformer.shared_head.norm.weight"', '"model.norm.weight"'),
        Footgun("norm before an MTP head applied twice", "mtp", "logits.append(mtp_head(hidden,", "logits.append(mtp_head(rms_norm(hidden, layer.shared_head_norm, config.rms_norm_eps),"),
        Footgun("norm before an MTP head forgotten", "mtp", "rms_norm(x, weights.shared_head_norm, eps)", "x"),
    ),
    "MTP hidden": (
        Footgun("hidden passed between MTP depths after the norm", "mtp", "hidden[: T - k],", "rms_norm(hidden[: T - k], weights.norm if k == 1 else weights.mtp[k - 2].shared_head_norm, config.rms_norm_eps),"),
        Footgun("main model's state fed to every MTP depth", "mtp", "hidden[: T - k],", '(first := tap("h0", hidden) if k == 1 else first)[: T - k],'),
    ),
    "norm weight": (
        Footgun("norm weight used as w, not 1 + w", "norm", "(1 + as_float(weight, x.dtype))", "as_float(weight, x.dtype)"),
        Footgun("1 added twice to the norm weight", "norm", "(1 + as", "(2 + as"),
        Footgun("QK-norm weight used as w, not 1 + w", "attention", QK_NORM, QK_NORM.replace("weights.q_norm", "np.asarray(weights.q_norm, x.dtype) - 1").replace("weights.k_norm", "np.asarray(weights.k_norm, x.dtype) - 1")),
    ),
    "Llama-3 scaling": (
        Footgun("Llama-3 scaling applied to a sliding layer", "config", "scaling if kind in scaled_kinds else None", "scaling"),
        Footgun("Llama-3 scaling applied to no layer", "config", "scaling if kind in scaled_kinds else None", "None"),
        Footgun("every frequency slowed by the factor, not by Llama-3's rule", "rope", "keep * inv_freq + (1 - keep) * inv_freq / factor", "inv_freq / factor"),
    ),
    "rope_theta": (
        Footgun("first element of rope_theta taken for all layers", "config", "float(thetas[n])", "float(thetas[0])"),
    ),
    "head count": (
        Footgun("head count of full layers used everywhere", "config", "settings[kind] = other", "pass"),
    ),
    "rotary width": (
        Footgun("rotary exponent over head_dim, not the rotary width", "config", "float(thetas[n]),", "float(thetas[n]) ** (rotary_dim / head_dim),"),
        Footgun("whole head rotated where partial_rotary_factors says a part", "config", "int(head_dim * factor)", "head_dim"),
    ),
    "rotation": (
        Footgun("interleaved instead of half-split rotation", "rope", "x[..., :pairs], x[..., pairs : 2 * pairs]", "x[..., : 2 * pairs : 2], x[..., 1 : 2 * pairs : 2]"),
        Footgun("interleaved instead of half-split rotation", "rope", ROTATE, "first, second = x[..., : 2 * pairs : 2], x[..., 1 : 2 * pairs : 2]; turned = (np.stack((first * cos - second * sin, second * cos + first * sin), -1).reshape(*x.shape[:-1], 2 * pairs),)"),
        Footgun("rows of q_proj and k_proj permuted for interleaved rotation, but half-split is used", "attention", QK_PROJ, 'q = tap("q_proj", linear(x, weights.q_proj).reshape(T, H, 2, K // 2).swapaxes(2, 3).reshape(T, H * K)).reshape(T, H, K); k = tap("k_proj", linear(x, weights.k_proj).reshape(T, G, 2, K // 2).swapaxes(2, 3).reshape(T, G * K)).reshape(T, G, K)'),
    ),
    "QK-norm": (
        Footgun("QK-norm after the rotation", "attention", 'q = tap("q_norm", rms_norm(q, weights.q_norm, eps))', 'q, k, table = tap("q_norm", rms_norm(rotate(q, table), weights.q_norm, eps)), rotate(k, table), Rotation(table.cos**0, table.sin * 0)'),
        Footgun("QK-norm after the rotation", "attention", f"{QK_NORM}\n    {QK_ROPE}", f"{QK_ROPE}\n    {QK_NORM}"),
        Footgun("QK-norm on the queries only", "attention", "rms_norm(k, weights.k_norm, eps)", "k"),
    ),
    "gate": (
        Footgun("gate as SiLU, not sigmoid", "attention", 'gate = sigmoid(logits)', 'gate = logits * sigmoid(logits)'),
        *(Footgun("gate on the output of o_proj", "attention", "heads = heads * gate[:, :, None]", f'out = tap("o_proj", {OUT}); return out * {gate}') for gate in GATES),
        *(Footgun("gate on the output of o_proj", "attention", "heads = heads * gate[:, :, None]", f'out = {OUT}; return tap("o_proj", out * {gate})') for gate in GATES),
        Footgun("gate forgotten", "attention", "heads * gate[:, :, None]", "heads"),
    ),
    "router": (
        Footgun("biased scores used as expert weights", "moe", "chosen = scores[", "chosen = biased["),
        Footgun("router bias forgotten when experts are chosen", "moe", "biased = scores + as_float(weights.router_bias, x.dtype)", "biased = scores"),
        Footgun("router bias added to the logits", "moe", "biased = scores +", "biased = logits +"),
        Footgun("softmax router, not sigmoid", "moe", "scores = sigmoid(logits)", "scores = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)"),
        Footgun("expert weights normalised over all experts", "moe", "total = chosen.sum(", "total = scores.sum("),
        Footgun("expert weights not normalised", "moe", "chosen / total", "chosen"),
    ),
    "scaling factor": (
        Footgun("scaling factor on the shared expert too", "model", 'tap("share_expert", shared)', 'tap("share_expert", shared * spec.moe.scaling_factor)'),
        Footgun("scaling factor on the shared expert too", "model", 'tap("share_expert", shared)', 'tap("share_expert", shared) * spec.moe.scaling_factor'),
        Footgun("scaling factor on the shared expert too", "model", SUM, SUM.replace("spec.moe,", "spec.moe._replace(scaling_factor=1.0),").replace("x + (", "x + spec.moe.scaling_factor * (")),
        Footgun("scaling factor of the experts forgotten", "model", "x + (routed + tap", "x + (routed / spec.moe.scaling_factor + tap"),
        Footgun("scaling factor of the experts forgotten", "moe", "chosen / total * spec.scaling_factor", "chosen / total"),
    ),
    "clamp": (
        Footgun("clamp before SiLU", "mlp", "gate = np.minimum(gate, limit)", "gate = silu(np.minimum(linear(x, weights.gate_proj), limit))"),
        Footgun("clamp before SiLU", "mlp", "gate = np.minimum(gate, limit)", "gate = silu(np.clip(linear(x, weights.gate_proj), -limit, limit))"),
        Footgun("clamp of the routed experts used for the shared expert", "model", "weights.share_expert, spec.swiglu_limit_shared", "weights.share_expert, spec.swiglu_limit"),
        Footgun("clamp of the routed experts used for the dense MLP", "model", "weights.mlp, spec.swiglu_limit_shared", "weights.mlp, spec.swiglu_limit"),
        Footgun("clamp of the shared expert used for the routed experts", "model", "spec.moe, spec.swiglu_limit,", "spec.moe, spec.swiglu_limit_shared,"),
        Footgun("up clamped above only", "mlp", "np.clip(up, -limit, limit)", "np.minimum(up, limit)"),
        Footgun("up not clamped", "mlp", "np.clip(up, -limit, limit)", "up"),
        Footgun("clamp forgotten", "mlp", "if limit is not None", "if False"),
    ),
    "window": (
        Footgun("window one too long", "attention", "spec.window, tap)", "spec.window and spec.window + 1, tap)"),
        Footgun("window one too short", "attention", "spec.window, tap)", "spec.window and spec.window - 1, tap)"),
        Footgun("window forgotten", "attention", "spec.window, tap)", "None, tap)"),
    ),
    "beyond the list": (
        Footgun("norm subtracts the mean", "norm", "mean_square = np.square(x)", "x = x - x.mean(axis=-1, keepdims=True); mean_square = np.square(x)"),
        Footgun("rotation the other way round", "rope", "np.sin(angles)", "-np.sin(angles)"),
        Footgun("next token visible", "attention", VISIBLE, AT_ONCE.replace("query  #", "query + 1  #")),
        Footgun("causal mask missing", "attention", VISIBLE, AT_ONCE.replace("query  #", "query + count  #")),
        Footgun("key-value heads repeated in stripes", "attention", "attend(q, past,", f"attend(q, past._replace({REPEATED}),"),
        Footgun("scores scaled by 1/K", "attention", "attend(q, past,", "attend(q * K**-0.5, past,"),
        Footgun("shared expert dropped", "model", 'routed + tap("share_expert", shared)', 'routed + 0 * tap("share_expert", shared)'),
        Footgun("enorm and hnorm halves swapped before eh_proj", "mtp", "(embedding, state)", "(state, embedding)"),
        Footgun("MTP depth fed the token before", "mtp", "tokens[k:],", "tokens[k - 1 : T - 1],"),
    ),
}  # fmt: skip
ALL = [footgun for row in FOOTGUNS.values() for footgun in row]
