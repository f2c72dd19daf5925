"""Exhibits that no forward pass shows: the changed code runs, and what happened is told in lines.

Checked by: tests/learn/test_museum.py
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from minstep.errors import InputError
from minstep.parity.decoding_bugs import UNSEEN
from minstep.parity.known_bugs import Footgun
from minstep.parity.variants import variant
from minstep.store.checkpoint import INDEX
from minstep.store.config_file import find_config, read_config
from minstep.store.json_file import read_json
from minstep.store.random_checkpoint import Form, save_random
from minstep.store.stages import spans
from minstep.weights import tensor_shapes

ODD = "model-00002.safetensors"  # what the released checkpoint calls one of its shards
PIECE = 4  # tokens of a pass that kept three drafts
CALL = (
    "<tool_call>\n<function=weather>\n<parameter=city>\n{}\n</parameter>\n</function>\n</tool_call>"
)
# So many words that a piece holds the end of a call and the start of the next.
ANSWER = f"I ask for two cities.\n</think>\n{CALL.format('Oslo')}{CALL.format('Rome')}"


def shards(footguns: tuple[Footgun, ...]) -> list[str]:
    """A small checkpoint in two files, one with an odd name, opened with the bug and without."""
    lines = []
    with TemporaryDirectory() as folder:
        made = Path(folder) / "made"
        raw, config, _ = read_config("tiny")
        save_random(raw, config, np.random.default_rng(0), made, Form(shards=2))
        index = read_json(made / INDEX)
        usual = sorted(set(index["weight_map"].values()))
        (made / usual[1]).rename(made / ODD)
        renamed = {n: ODD if f == usual[1] else f for n, f in index["weight_map"].items()}
        (made / INDEX).write_text(json.dumps(index | {"weight_map": renamed}))
        lines.append(f"a checkpoint in two files, {usual[0]} and {ODD}")
        for footgun in (None, *footguns):
            opened = variant(footgun).checkpoint.open_checkpoint(made)
            try:
                opened.weights()
                said = "and the model loads"
            except InputError as error:
                said = str(error).replace(f"{made}: ", "")
            name = footgun.bug if footgun else "as it is"
            lines.append(f"{name}: {len(opened.tensors)} tensors found, {said}")
    return lines


def moe_layers(footguns: tuple[Footgun, ...]) -> list[str]:
    """Which layers of the released config have experts, and which tensors are asked for."""
    lines, stored = [], set[str]()
    for footgun in (None, *footguns):
        config = variant(footgun).config_file.load_config(find_config("step-3.5-flash"))
        layers = [n for n, spec in enumerate(config.layers) if spec.moe]
        asked = set(tensor_shapes(config))
        stored = stored or asked
        name = footgun.bug if footgun else "as it is"
        where = (
            f"experts in layers {', '.join(spans(layers))}" if layers else "no layer has experts"
        )
        missing = [tensor for tensor in tensor_shapes(config) if tensor not in stored]
        said = f"all {len(stored)} tensors of the checkpoint used"
        if missing:
            unused = len(stored - asked)
            said = f"{missing[0]} is missing, {len(missing)} in all; {unused} stored ones unused"
        lines.append(f"{name}: {where}; {said}")
    return lines


def tool_calls(footguns: tuple[Footgun, ...]) -> list[str]:
    """An answer with two calls, read a token at a time and in pieces as drafts bring them."""
    tokens = re.findall(r"</?\w+>|<\w+=|\w+|.|\n", ANSWER)
    lines = [f"an answer with two calls, {len(tokens)} tokens"]
    for footgun in (None, *footguns):
        for size in (1, PIECE):
            stream = variant(footgun).reply.ChatStream()
            pieces = ["".join(tokens[n : n + size]) for n in range(0, len(tokens), size)]
            events = [event for piece in pieces for event in stream.feed(piece)]
            events += stream.finish()
            calls = [e.payload.arguments["city"] for e in events if e.kind == "tool_call"]
            text = "".join(e.payload for e in events if e.kind == "content")
            name = footgun.bug if footgun else "as it is"
            given = "a token at a time" if size == 1 else f"{size} tokens at a time"
            left = f", and says {text!r}" if text else ""
            lines.append(f"{name}, {given}: calls {', '.join(calls) or 'nothing'}{left}")
    return lines


RUNNERS: dict[str, Callable[[tuple[Footgun, ...]], list[str]]] = {
    UNSEEN["shards"][0].bug: shards,
    UNSEEN["moe_layers_enum"][0].bug: moe_layers,
    UNSEEN["tool calls"][0].bug: tool_calls,
}
