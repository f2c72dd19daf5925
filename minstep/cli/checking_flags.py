"""The flags of the commands that look at a model or compare what it computed."""

import argparse
from collections.abc import Callable
from typing import Any

from minstep.cli.arguments import (
    FLOATS,
    add_model,
    add_prompt,
    at_least,
    layer_ranges,
    model_folder,
    not_empty,
    number,
    path,
    seed,
)
from minstep.cli.checking import (
    run_check_layer,
    run_diff,
    run_inspect,
    run_make_tiny,
    run_record,
    run_trace,
)

Command = Callable[..., Any]  # adds a command to the parser: name, what runs it, help, example


def add_lab_commands(command: Command) -> None:
    """Add them all to the parser."""
    _add_looking(command)
    _add_recording(command)
    _add_comparing(command)


def _add_looking(command: Command) -> None:
    text = "show layers, shapes, bytes, parameters"
    add = command("inspect", run_inspect, text, "step-3.5-flash")
    add.add_argument(
        "model", type=not_empty, metavar="DIR", help="checkpoint, config.json, or a shipped name"
    )
    part = add.add_mutually_exclusive_group()
    text = "the files that these layers need, there or missing; may be given several times"
    part.add_argument("--layer", type=layer_ranges, action="extend", metavar="LAYERS", help=text)
    part.add_argument("--first", type=at_least(1), metavar="N", help="the same of the first N")
    part.add_argument("--shards", action="store_true", help="each file and what it holds")
    add.add_argument("--json", action="store_true")


def _add_recording(command: Command) -> None:
    example = '--prompt "The with statement" --max-tokens 24 --out trace.safetensors'
    add = command("trace", run_trace, "write every named tensor", example)
    add_model(add)
    add_prompt(add)
    text = "continue the prompt by at most N tokens, greedily and with drafts, and trace it all (0)"
    add.add_argument("--max-tokens", type=at_least(0), default=0, metavar="N", help=text)
    add.add_argument("--dtype", **FLOATS)
    add.add_argument("--out", type=path, required=True, metavar="FILE.safetensors")

    text = "write chosen tensors, layer by layer; goes on where it was ended"
    example = "--model DIR --tokens 5,17,9 --layers 0-5 --out layers.safetensors"
    add = command("record", run_record, text, example)
    text = "checkpoint in hub layout, or a shipped name such as trained"
    add.add_argument("--model", type=model_folder, required=True, metavar="DIR", help=text)
    add_prompt(add)
    text = "layers to record, such as 0-17,45 (all of the model)"
    add.add_argument("--layers", type=layer_ranges, action="extend", help=text)
    text = "tensors to record; may be given several times (all but attention probabilities)"
    add.add_argument(
        "--names", type=not_empty, action="append", default=[], metavar="GLOB", help=text
    )
    text = "a recording to take the first layer's input from"
    add.add_argument("--input", type=path, metavar="FILE", help=text)
    add.add_argument("--dtype", **FLOATS)
    add.add_argument("--out", type=path, required=True, metavar="FILE.safetensors")

    text, example = "write a random checkpoint", "tiny --out DIR --seed 1"
    add = command("make-tiny", run_make_tiny, text, example)
    add.add_argument("config", type=not_empty, metavar="CONFIG_NAME_OR_DIR")
    add.add_argument("--out", type=path, required=True, metavar="DIR")
    add.add_argument("--seed", type=seed, default=0, metavar="N")
    add.add_argument("--dtype", choices=("float32", "bfloat16", "fp8"), default="float32")
    add.add_argument("--shards", type=at_least(1), default=1, metavar="N")
    text = "write only these tensors; the others are holes that take no disk and read as zeros"
    add.add_argument("--only", action="append", default=[], metavar="GLOB", help=text)
    text = "write only the first N experts; no router chooses the others"
    add.add_argument("--experts", type=at_least(1), metavar="N", help=text)


def _add_comparing(command: Command) -> None:
    text, example = "hold layers against another engine's", "DIR --layer 17 --against FILE"
    add = command("check-layer", run_check_layer, text, example)
    text = "checkpoint in hub layout, or a shipped name such as trained"
    add.add_argument("model", type=model_folder, metavar="DIR", help=text)
    which = add.add_mutually_exclusive_group(required=True)
    text = "layers such as 3,7-9, each from its recorded input; may be given several times"
    which.add_argument("--layer", type=layer_ranges, action="extend", metavar="LAYERS", help=text)
    which.add_argument("--all", action="store_true", help="every layer that was recorded")
    text = "the recording: safetensors with the names of any engine"
    add.add_argument("--against", type=path, required=True, metavar="FILE", help=text)
    add.add_argument("--dtype", **FLOATS)
    _comparison_flags(add)

    text, example = "compare two recordings of one prompt", "ours.safetensors theirs.safetensors"
    add = command("diff", run_diff, text, example)
    add.add_argument("ours", type=path, metavar="OURS", help="the reference")
    add.add_argument("theirs", type=path, metavar="THEIRS", help="what is compared with it")
    _comparison_flags(add)
    text = "look only at these tensors; may be given several times"
    add.add_argument(
        "--names", type=not_empty, action="append", default=[], metavar="GLOB", help=text
    )
    text = "the model, for what recordings do not say and to name the bug behind a departure"
    add_model(add, text)


def _comparison_flags(add: argparse.ArgumentParser) -> None:
    text = "largest error, as a share of a tensor's largest value (by the less precise dtype)"
    add.add_argument("--tolerance", type=number("above 0", lambda x: x > 0), metavar="X", help=text)
    add.add_argument("--json", action="store_true", help="print one JSON object")
