"""A walk of one token through the model: every step that the tap is shown, and the line it is from.

The model runs once over the whole prompt, and each MTP depth after it as in decoding. What is kept
of a tensor is a few of its values at one position. A table gives the shape of each step in letters,
those of the docstrings, and the keys of a config.json in hub layout that decide it.
Checked by: tests/explore/test_walk.py
"""

import json
import re
import sys
from collections.abc import Callable, Collection, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike
from tokenizers import Tokenizer

from minstep.config import Config, LayerSpec
from minstep.errors import printable
from minstep.model import ModelWeights
from minstep.parity.record import before
from minstep.parity.trace import MOST_PROBS, finite, walk
from minstep.sampling import Sampling, distribution
from minstep.store.checkpoint import Checkpoint
from minstep.store.json_file import json_text
from minstep.store.shards import needs, some_weights
from minstep.store.stages import split, stages
from minstep.tap import Array, ScopedTap
from minstep.text.tokenizer import text_of
from minstep.validation import check_prompt

SHOWN = 4  # values kept of a step
LIKELY = 5  # tokens kept of those that may come next
AS_IT_IS = Sampling(temperature=1.0)
Report = dict[str, Any]
NEAR = 12  # tokens shown on each side of the one that is followed
SOURCES = {  # who gave a token
    "prompt": "of the prompt",
    "main model": "chosen by the main model",
    "draft": "drafted by the MTP layer before",
}
LEFT, MIDDLE, WIDTH = 32, 66, 100  # where the second and third column begin, and where lines end

# The letters of shapes, and what each counts.
LETTERS = {
    "T": "tokens of the prompt",
    "S": "positions looked at",
    "D": "numbers of a state",
    "H": "query heads",
    "G": "key-value heads",
    "K": "numbers of a head",
    "E": "experts",
    "A": "experts chosen",
    "V": "tokens of the vocabulary",
}
HEADS, GROUPS = "num_attention_heads", "num_attention_groups"
OTHER = "attention_other_setting"  # has HEADS and GROUPS of the layer kind that it names
EACH = "layer_types rope_theta partial_rotary_factors swiglu_limits swiglu_limits_shared".split()


class Point(NamedTuple):
    """A step: the axes of its tensor, what it is in a few words, and the keys that decide it."""

    axes: tuple[str, ...]
    what: str
    keys: tuple[str, ...]


def _point(axes: str, what: str, keys: str) -> Point:
    return Point(tuple(axes.split()), what, tuple(keys.split()))


NORM = "zero_centered rms_norm_eps"
ROPE = "rope_theta partial_rotary_factors yarn_only_types rope_scaling"
# By the part of the name that follows the layer's; "" is the layer itself.
POINTS = {
    "model.embed_tokens": _point("T D", "the token's row of the table", "vocab_size hidden_size"),
    "eh_proj": _point(
        "T D", "next token and state, mixed", f"num_nextn_predict_layers hidden_size {NORM}"
    ),
    "input_layernorm": _point("T D", "the state at unit size, rescaled", NORM),
    "self_attn.q_proj": _point("T H*K", "queries: what each head seeks", f"{HEADS} head_dim"),
    "self_attn.k_proj": _point("T G*K", "keys: what it is found by", f"{GROUPS} head_dim"),
    "self_attn.v_proj": _point("T G*K", "values: what it hands over", f"{GROUPS} head_dim"),
    "self_attn.q_norm": _point("T H K", "queries at unit size, rescaled", f"use_qk_norm {NORM}"),
    "self_attn.k_norm": _point("T G K", "keys at unit size, rescaled", f"use_qk_norm {NORM}"),
    "self_attn.q_rope": _point("T H K", "queries turned by position", ROPE),
    "self_attn.k_rope": _point("T G K", "keys turned by position", ROPE),
    "self_attn.probs": _point(
        "H T S", "how much each position counts", f"layer_types sliding_window {GROUPS}"
    ),
    "self_attn.g_proj": _point(
        "T H", "a gate a head, before sigmoid", f"use_head_wise_attn_gate {HEADS}"
    ),
    "self_attn.o_proj": _point("T D", "all heads joined, to be added", "hidden_size"),
    "post_attention_layernorm": _point("T D", "the new state, again unit size", NORM),
    "mlp": _point(
        "T D",
        "dense MLP, to be added",
        "use_moe moe_layers_enum intermediate_size swiglu_limits_shared",
    ),
    "moe.gate": _point(
        "T E",
        "the router's logits",
        "use_moe moe_layers_enum moe_num_experts moe_router_activation",
    ),
    "moe.margin": _point("T", "last chosen over first rejected", "moe_top_k use_moe_router_bias"),
    "moe.ids": _point("T A", "the experts chosen", "moe_top_k use_moe_router_bias"),
    "moe.weights": _point("T A", "how much each of them counts", "moe_router_scaling_factor"),
    "moe": _point("T D", "their weighted sum, to be added", "moe_intermediate_size swiglu_limits"),
    "share_expert": _point(
        "T D", "every token's expert, to be added", "share_expert_dim swiglu_limits_shared"
    ),
    "": _point(
        "T D",
        "the state as it leaves the layer",
        "layer_types sliding_window use_moe moe_layers_enum",
    ),
    "model.norm": _point("T D", "the last state at unit size", f"num_hidden_layers {NORM}"),
    "lm_head": _point("T V", "a logit for each token", "tie_word_embeddings vocab_size"),
    "transformer.shared_head.norm": _point("T D", "the state at unit size, rescaled", NORM),
    "transformer.shared_head.output": _point(
        "T V", "logits for the token after next", "vocab_size"
    ),
}


class WalkStep(NamedTuple):
    """A tensor that the tap was shown; `values` is what it has at the NumPy index `at`.

    `rms` is the root mean square of all its numbers at the position; None for whole numbers. `file`
    and `line` are those of the code that showed it.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    at: str
    values: list[float]
    rms: float | None
    file: str
    line: int


class Walk(NamedTuple):
    """The steps of one position, in order; and what was computed of the tokens that come next.

    `text`: the prompt, the main model's choice after it, and each MTP depth's draft. `logits`:
    those at the position [V], of the main model and then of each depth that ran, by tensor name.
    """

    steps: list[WalkStep]
    text: list[int]
    logits: dict[str, Array]


class Walker(ScopedTap):
    """Keeps a WalkStep of every tensor of a layer, None for all, and whole those that `ends` names.

    `probs_fit`: whether attention probabilities [H, T, T] are small enough to be computed at once.
    `then` is called with the name of each tensor that is kept whole. Raises InputError for what is
    not finite.
    """

    def __init__(
        self,
        position: int,
        layer: int | None,
        probs_fit: bool,
        ends: Collection[str],
        then: Callable[[str], None],
    ) -> None:
        self.steps: list[WalkStep] = []
        self.kept: dict[str, Array] = {}
        self._position, self._layer, self._probs_fit = position, layer, probs_fit
        self._ends, self._then = ends, then

    def __call__(self, name: str, x: Array) -> Array:
        caller, full = sys._getframe(1), self._full(name)
        finite(full, x)
        if self._is_shown(full):
            file = caller.f_globals["__name__"].replace(".", "/") + ".py"
            self.steps.append(_step(full, x, self._position, file, caller.f_lineno))
        if full in self._ends:
            self.kept[full] = x
            self._then(full)
        return x

    def wants(self, name: str) -> bool:
        full = self._full(name)
        fits = self._probs_fit or not full.endswith(".self_attn.probs")
        return full in self._ends or (fits and self._is_shown(full))

    def _is_shown(self, name: str) -> bool:
        return self._layer in (None, split(name)[0])


def _step(name: str, x: Array, position: int, file: str, line: int) -> WalkStep:
    """The values of x that a reader sees: of the first head, of the last positions looked at."""
    axes = point_of(name).axes
    index = tuple(position if axis == "T" else 0 for axis in axes[:-1] or axes)
    at, values = ", ".join(map(str, index)), np.atleast_1d(x[index])
    if len(axes) > 1:
        start = max(0, position + 1 - SHOWN) if axes[-1] == "S" else 0  # a window hides the first
        end = len(values) if axes[-1] == "A" else min(start + SHOWN, len(values))
        at, values = f"{at}, {start or ''}:{end}", values[start:end]
    row = x.take(position, axes.index("T"))
    rms = float(np.sqrt(np.square(row, dtype=np.float64).mean())) if x.dtype.kind == "f" else None
    return WalkStep(name, x.shape, x.dtype.name, f"[{at}]", values.tolist(), rms, file, line)


def take_walk(
    tokens: Sequence[int],
    weights: ModelWeights,
    config: Config,
    position: int,
    layer: int | None = None,
    dtype: DTypeLike = np.float32,
    progress: Callable[[int], object] = lambda done: None,
) -> Walk:
    """Follow the token at `position` through the model, or through one layer of it.

    Without `layer` the main model, its head and all MTP depths run; with one, what it needs: the
    layers before it, and before an MTP depth the head. Depth k at position i is given token i + k:
    the prompt's own where it is long enough, then the one that the main model chose after it, then
    the drafts of the depths before, as in greedy decoding. `progress` gets the stages done.
    Attention probabilities are left out where [H, T, T] is too large to hold. Raises InputError for
    a bad prompt, and for a tensor that is not finite.
    Checked by: tests/explore/test_walk.py
    """
    check_prompt(tokens, config)
    L, specs = len(config.layers), (*config.layers, *config.mtp_layers)
    every = stages(config, len(specs) + 1)  # a depth has a position in a prompt of any length
    end = last_stage(config, layer) + 1

    def then(name: str) -> None:
        if name in lasts:
            progress(lasts.index(name) + 1)

    lasts = [stage.last for stage in every[:end]]
    ends = {*lasts, *(stage.name for stage in every[:end])}
    fits = layer is not None and specs[layer].heads * len(tokens) ** 2 <= MOST_PROBS
    walker = Walker(position, layer, fits, ends, then)
    walk(tokens, weights, config, dtype, walker, end=min(end, L + 2))
    text, logits = list(tokens), {}
    for number in range(L + 1, end):  # the head, then each depth
        if number > L + 1:
            state = walker.kept[before(every, number)]  # [T, D]
            walk(text, weights, config, dtype, walker, number, state, number + 1)
        output = walker.kept[lasts[number]]  # [T, V]
        logits[lasts[number]] = output[position]
        text.append(likeliest(output[-1], 1)[0][0])
    return Walk(walker.steps, text, logits)


def walk_weights(checkpoint: Checkpoint, layer: int | None) -> ModelWeights:
    """The weights that a walk reads: in a checkpoint with missing files, those may be all there."""
    if layer is None:
        return checkpoint.weights()
    config, stored = checkpoint.config, {*checkpoint.tensors, *checkpoint.absent}
    every = stages(config, len(config.mtp_layers) + 1)[: last_stage(config, layer) + 1]
    return some_weights(checkpoint, {name for s in every for name in needs(s, config, stored)})


def last_stage(config: Config, layer: int | None) -> int:
    """The number of the last stage that runs: that of a layer, or of the whole model."""
    L, M = len(config.layers), len(config.mtp_layers)
    return L + M + 1 if layer is None else layer + 1 if layer < L else layer + 2


def likeliest(logits: Array, count: int) -> list[tuple[int, float]]:
    """The `count` likeliest tokens of logits [V] with their probabilities, the likeliest first."""
    probs = distribution(logits, [], AS_IT_IS)  # [V]
    order = np.argsort(-probs, kind="stable")[:count]
    return [(int(token), float(probs[token])) for token in order]


def walk_report(
    walk: Walk,
    position: int,
    layer: int | None,
    config: Config,
    raw: dict[str, Any],
    tokenizer: Tokenizer | None = None,
) -> Report:
    """The walk as JSON values: each step with its letters, its code and the keys that decided it.

    raw: config.json in hub layout. A token is its id and its text, which is None without a
    tokenizer, and for what is no whole character. In `next` are the likeliest tokens after the
    position, by the main model and by each MTP depth; `layer` is None for the main model.
    """

    def token(number: int) -> Report:
        return {"token": number, "text": text_of(tokenizer, number)}

    specs = (*config.layers, *config.mtp_layers)
    count = len(walk.text) - len(walk.logits)
    sources = ["prompt"] * count + ["main model"] + ["draft"] * len(config.mtp_layers)
    steps = []
    for step in walk.steps:
        number, _ = split(step.name)
        spec, point = None if number is None else specs[number], point_of(step.name)
        about = {"layer": number, "axes": list(point.axes), "what": point.what}
        steps.append(step._asdict() | about | {"decided_by": deciding(step.name, spec, raw)})
    after = []
    for depth, (name, logits) in enumerate(walk.logits.items()):
        given = token(walk.text[position + depth]) | {"from": sources[position + depth]}
        likely = [token(n) | {"probability": p} for n, p in likeliest(logits, LIKELY)]
        place = {"layer": split(name)[0], "position": position + depth + 1, "given": given}
        after.append(place | {"likely": likely})
    return {
        "prompt": [token(number) for number in walk.text[:count]],
        "position": position,
        "layer": layer,
        "letters": sizes(config, None if layer is None else specs[layer], count),
        "steps": steps,
        "next": after,
    }


def point_of(name: str) -> Point:
    """What is known of a step by the tap's full name. Raises KeyError for one that is unknown."""
    return POINTS[split(name)[1]]


def sizes(config: Config, spec: LayerSpec | None, count: int) -> dict[str, int]:
    """How many each letter stands for, in a layer or outside of all, over `count` tokens."""
    found = {"T": count, "S": count, "D": config.hidden_size, "V": config.vocab_size}
    if spec is not None:
        found |= {"H": spec.heads, "G": spec.groups, "K": spec.head_dim}
        if spec.moe:
            found |= {"E": spec.moe.experts, "A": spec.moe.top_k}
    return {letter: found[letter] for letter in LETTERS if letter in found}


def deciding(name: str, spec: LayerSpec | None, raw: dict[str, Any]) -> dict[str, Any]:
    """The keys that decided a step, with their values: `rope_theta[4]` for layer 4's of a list.

    spec: the layer's, None outside of all; raw: config.json, in hub layout. A key in a nested
    object is dotted. Left out is what is not looked at: a window where there is none, a scaling
    that is not applied, and a key that may be absent and is.
    """
    number, _ = split(name)
    found: dict[str, Any] = {}
    other = raw.get(OTHER) or {}
    for key in point_of(name).keys:
        if not _is_looked_at(key, number, spec, raw):
            continue
        if key in (HEADS, GROUPS) and spec and other.get("attention_type") == spec.kind:
            found[f"{OTHER}.{key}"] = other[key]
        elif key in EACH and isinstance(raw[key], list):
            found[f"{key}[{number}]"] = raw[key][number]
        elif isinstance(raw[key], dict):
            is_applied = spec is not None and spec.rope.scaling is not None
            inner = [k for k in raw[key] if is_applied or k in ("rope_type", "type")]
            found |= {f"{key}.{k}": raw[key][k] for k in inner}
        else:
            found[key] = raw[key]
    return found


def _is_looked_at(
    key: str, number: int | None, spec: LayerSpec | None, raw: dict[str, Any]
) -> bool:
    """Whether a key decides anything here; a number and a spec are those of a layer."""
    if spec is None or number is None:
        return True
    if key == "sliding_window":
        return spec.window is not None
    if key == "yarn_only_types":
        return key in raw and raw["rope_scaling"] is not None
    if key == "rope_scaling":
        return spec.kind in raw.get("yarn_only_types", [spec.kind])
    if number >= raw["num_hidden_layers"] and key in ("use_moe", "moe_layers_enum"):
        return False  # an MTP layer is dense whatever they say
    if key == "use_moe":
        return spec.moe is not None or not raw[key]
    return key != "moe_layers_enum" or raw["use_moe"]


def walk_text(report: Report) -> str:
    """The report for a terminal, in three columns of 100 in all."""
    prompt, position, layer = report["prompt"], report["position"], report["layer"]
    where = "the model" if layer is None else f"layer {layer}"
    lines = [f"Token {position} of the prompt, {_word(prompt[position])}, through {where}", ""]
    near = list(enumerate(prompt))[max(0, position - NEAR) : position + NEAR + 1]
    lines += _packed("Prompt: ", [f"{n} {_word(token)}" for n, token in near])
    shown = [s for s in report["steps"] if layer is not None or s["layer"] is None]
    axes = {axis for step in shown for axis in "*".join(step["axes"]).split("*")}
    letters = [(letter, n) for letter, n in report["letters"].items() if letter in axes]
    lines += _packed("Letters: ", [f"{letter} {n:,} {LETTERS[letter]}" for letter, n in letters])
    lines += [
        "",
        _columns("Step", "[axes] = [shape] dtype", "what it is"),
        _columns("  line of code that ran", "[index] of some values", "the values there"),
        _columns("", "keys of config.json that decided it, and their values"),
        "",
    ]
    keys: list[str] = []
    for is_outside, run in groupby(report["steps"], lambda step: step["layer"] is None):
        if not is_outside and layer is None:
            lines += _layer_rows([*run])
            continue
        for step in run:
            keys_before = keys
            keys = _packed(" " * LEFT, [f"{k} {_short(v)}" for k, v in step["decided_by"].items()])
            is_repeated = keys == keys_before and len(keys) > 1
            lines += _step_lines(step, [_columns("", "the same keys")] if is_repeated else keys)
    return "\n".join([*lines, "", *_next_lines(report)])


def _columns(first: str, second: str, third: str = "") -> str:
    """A line of up to three columns; one that is too wide pushes the next ones on."""
    line = f"{first:{LEFT - 1}} {second}"
    return f"{line:{MIDDLE - 1}} {third}" if third else line


def _packed(start: str, items: Sequence[str]) -> list[str]:
    """Lines that begin with `start`, or as many spaces, and hold as many whole items as fit."""
    lines, joint = [start], ""
    for item in items:
        if joint and len(lines[-1] + joint + item) >= WIDTH:
            lines[-1] += ","
            lines.append(" " * len(start))
            joint = ""
        lines[-1] += joint + item
        joint = ", "
    return lines


def _step_lines(step: Report, keys: list[str]) -> list[str]:
    """One step: name, shape and meaning; code and values; config keys."""
    shape = f"[{', '.join(step['axes'])}] = {list(step['shape'])} {step['dtype']}"
    values = " ".join(map(_number, step["values"]))
    name = split(step["name"])[1] or step["name"]
    code = _columns(f"  {step['file']}:{step['line']}", step["at"], values)
    return [_columns(name, shape, step["what"]), code, *keys]


def _layer_rows(steps: list[Report]) -> list[str]:
    """Layers that follow each other, a line for each: what they are, and the state after them."""
    layers: dict[int, dict[str, Report]] = {}
    for step in steps:
        layers.setdefault(step["layer"], {})[split(step["name"])[1]] = step
    keys = [
        re.sub(r"\[\d+\]", "[N]", k) for each in layers.values() for k in each[""]["decided_by"]
    ]
    last = steps[-1]["layer"]
    heading = layers[last][""] | {"name": f"model.layers.N, {min(layers)} to {last}", "values": []}
    heading["at"] = heading["at"].replace(f":{SHOWN}", f":{SHOWN - 1}")  # room for the rms
    lines = _step_lines(heading, _packed(" " * LEFT, list(dict.fromkeys(keys))))
    middle = "feed-forward: dense, or experts"
    lines.append(_columns("     N  attention", middle, f"{'rms':>7}  the values there"))
    for n, parts in layers.items():
        state, heads = parts[""], f"{parts['self_attn.q_norm']['shape'][1]} heads"
        window = state["decided_by"].get("sliding_window")
        kind = f"window {window}" if window else "full"
        ids = " ".join(map(str, parts["moe.ids"]["values"])) if "moe.ids" in parts else "dense"
        values = " ".join(map(_number, (state["rms"], *state["values"][: SHOWN - 1])))
        lines.append(_columns(f"{n:6}  {kind}, {heads}", _cut(ids, MIDDLE - LEFT - 2), values))
    return lines


def _next_lines(report: Report) -> list[str]:
    """What may come after the token: by the main model, and further on by each depth."""
    if not report["next"]:
        return ["The walk ends here; without --layer it goes on to the tokens that come next."]
    lines = [_columns("Comes next", "the likeliest tokens after the one that was given")]
    for depth, after in enumerate(report["next"]):
        by = f"MTP layer {after['layer']}" if depth else "main model"
        given, position, prompt = after["given"], after["position"], report["prompt"]
        text = f"after {_word(given)}, {SOURCES[given['from']]}"
        if position < len(prompt):
            text += f", where {_word(prompt[position])} follows"
        lines.append(_columns(f"  at {position}, by the {by}", text))
        likely = [f"{token['probability']:.1%} {_word(token)}" for token in after["likely"]]
        lines += _packed(" " * LEFT, likely)
    return lines


def _number(x: float) -> str:
    """A value, of a float in 7 columns."""
    if isinstance(x, int):
        return f"{x}"
    return f"{x:7.3f}" if x == 0 or 0.001 <= abs(x) < 100 else f"{x:7.0e}"


def _short(value: Any) -> str:
    """A config value as JSON, cut where it is long."""
    return _cut(printable(value if isinstance(value, str) else json.dumps(value)), 24)


def _word(token: Report) -> str:
    """A token's text in quotes, or its number."""
    text = token["text"]
    return f"token {token['token']}" if text is None else json_text(text)


def _cut(text: str, most: int) -> str:
    """The text, its middle left out where it has more than `most` columns."""
    start = most // 2
    return text if len(text) <= most else f"{text[:start]}...{text[start + 3 - most :]}"
