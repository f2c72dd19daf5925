"""`minstep walk`: from its arguments to the steps of one token, as text or JSON; no maths.

Checked by: tests/explore/test_walk.py
"""

import json
import re
from argparse import Namespace
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import numpy as np

from minstep.cli.arguments import FLOATS, add_model, add_prompt, at_least
from minstep.cli.generate import note_shipped, open_model, prompt_tokens
from minstep.cli.terminal import Progress, json_text, note, print_json, print_text
from minstep.errors import InputError, printable
from minstep.explore.decided import LETTERS
from minstep.explore.steps import SHOWN, Report, last_stage, take_walk, walk_report
from minstep.model import ModelWeights
from minstep.store.checkpoint import Checkpoint
from minstep.store.config_file import read_config
from minstep.store.json_file import read_json
from minstep.store.shards import needs, numbered, some_weights
from minstep.store.stages import split, stages
from minstep.validation import check_prompt

PROMPT = "The with statement"
NEAR = 12  # tokens shown on each side of the one that is followed
SOURCES = {  # who gave a token
    "prompt": "of the prompt",
    "main model": "chosen by the main model",
    "draft": "drafted by the MTP layer before",
}
LEFT, MIDDLE, WIDTH = 32, 66, 100  # where the second and third column begin, and where lines end


def add_walk(command: Callable[..., Any]) -> None:
    """Add `walk` to the parser."""
    text, example = "follow one token through the model, step by step", "--layer 4"
    add = command("walk", run_walk, text, example)
    add_model(add)
    add_prompt(add, PROMPT)
    text = "every step inside this layer; MTP layers come after the main ones"
    add.add_argument("--layer", type=at_least(0), metavar="N", help=text)
    text = "which token of the prompt to follow, from 0 (the last one)"
    add.add_argument("--position", type=at_least(0), metavar="N", help=text)
    add.add_argument("--dtype", **FLOATS, help="of every activation")
    add.add_argument("--json", action="store_true", help="print one JSON object")


def run_walk(args: Namespace) -> None:
    """Print the steps of one token, and what comes next."""
    model = open_model(args.model)
    config, folder = model.config, model.checkpoint.path
    raw, tokens = read_config(str(folder))[0], prompt_tokens(args, model.tokenizer, "walk")
    check_prompt(tokens, config)
    position = len(tokens) - 1 if args.position is None else args.position
    if position >= len(tokens):
        message = f"the prompt has {len(tokens)} tokens, expected 0 to {len(tokens) - 1}"
        raise InputError(f"--position {position}: {message}")
    if args.layer is not None:
        numbered([range(args.layer, args.layer + 1)], config, "--layer")
    weights = _weights(model.checkpoint, args.layer)
    note_shipped(args.model)
    if raw != read_json(folder / "config.json"):
        note("minstep: config.json has transformers' keys, the walk names the hub's in their place")
    with Progress("walking", last_stage(config, args.layer) + 1, "layers") as bar:
        dtype = np.dtype(args.dtype)
        walk = take_walk(tokens, weights, config, position, args.layer, dtype, bar)
    if args.layer is not None and not any(step.name.endswith(".probs") for step in walk.steps):
        note("minstep: self_attn.probs is left out: for this many tokens it is too large to hold")
    report = walk_report(walk, position, args.layer, config, raw, model.tokenizer)
    print_json(report) if args.json else print_text(walk_text(report))


def _weights(checkpoint: Checkpoint, layer: int | None) -> ModelWeights:
    """The weights that the walk reads: of a checkpoint with missing files those may be enough."""
    if layer is None:
        return checkpoint.weights()
    config, held = checkpoint.config, {*checkpoint.tensors, *checkpoint.absent}
    every = stages(config, len(config.mtp_layers) + 1)[: last_stage(config, layer) + 1]
    return some_weights(checkpoint, {name for s in every for name in needs(s, config, held)})


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
            before = keys
            keys = _packed(" " * LEFT, [f"{k} {_short(v)}" for k, v in step["decided_by"].items()])
            is_told = keys == before and len(keys) > 1
            lines += _step_lines(step, [_columns("", "the same keys")] if is_told else keys)
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
    its = layers[last][""] | {"name": f"model.layers.N, {min(layers)} to {last}", "values": []}
    its["at"] = its["at"].replace(f":{SHOWN}", f":{SHOWN - 1}")  # one makes room for the rms
    lines = _step_lines(its, _packed(" " * LEFT, list(dict.fromkeys(keys))))
    middle = "feed-forward: dense, or experts"
    lines.append(_columns("     N  attention", middle, f"{'rms':>7}  the values there"))
    for n, parts in layers.items():
        its, heads = parts[""], f"{parts['self_attn.q_norm']['shape'][1]} heads"
        window = its["decided_by"].get("sliding_window")
        kind = f"window {window}" if window else "full"
        ids = " ".join(map(str, parts["moe.ids"]["values"])) if "moe.ids" in parts else "dense"
        values = " ".join(map(_number, (its["rms"], *its["values"][: SHOWN - 1])))
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
