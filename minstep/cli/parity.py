"""The commands that write what a model computed and compare it: flags, runs, what is printed."""

import argparse
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import numpy as np

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
)
from minstep.cli.generate import open_model, prompt_tokens
from minstep.cli.terminal import Progress, note, print_json, print_text, wrote
from minstep.errors import InputError, shown
from minstep.generate import steps
from minstep.parity.diagnosis import (
    Checks,
    check_layers,
    checkable,
    checks_json,
    checks_table,
    not_tried,
)
from minstep.parity.diff import Report, as_json, diff, diff_table, layer_of, routers_of, verdict
from minstep.parity.engine_tensors import Recording, open_recording
from minstep.parity.facts import metadata
from minstep.parity.record import plan, record_file
from minstep.parity.trace import record, save_trace
from minstep.store.checkpoint import Checkpoint, open_checkpoint
from minstep.store.config_file import load_config
from minstep.store.output import atomic_file
from minstep.store.shards import numbered
from minstep.store.stages import split
from minstep.text.continuation import Continuation
from minstep.text.tokenizer import load_tokenizer, piece
from minstep.validation import check_prompt


def add_commands(command: Callable[..., Any]) -> None:
    """Add them all; `command` adds one: name, what runs it, help, example."""
    _add_recording(command)
    _add_comparing(command)


def _add_recording(command: Callable[..., Any]) -> None:
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


def _add_comparing(command: Callable[..., Any]) -> None:
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


def run_trace(args: Namespace) -> None:
    """Write every named tensor of a forward pass over the prompt and what greedily follows it."""
    model = open_model(args.model)
    tokens = prompt_tokens(args, model.tokenizer, "trace")
    check_prompt(tokens, model.config)
    if model.checkpoint.owns(args.out):
        raise InputError(f"{args.out}: belongs to the checkpoint, expected another file")
    dtype, rng = np.dtype(args.dtype), np.random.default_rng(0)  # greedy steps draw nothing
    with atomic_file(args.out) as temporary:  # first, so that a bad path is refused before the work
        # without drafts, MTP layers are only read where they have a position
        weights = model.load(None if args.max_tokens else len(tokens) - 1)
        config = model.config._replace(mtp_layers=model.config.mtp_layers[: len(weights.mtp)])
        text = Continuation(steps(tokens, weights, config, rng, args.max_tokens, dtype=dtype))
        for _ in text:
            pass
        tokens += text.tokens
        trace = record(tokens, weights, config, dtype)
        passes = text.passes if text.tokens else []
        pieces = None
        if model.tokenizer:
            ids = sorted({*tokens, *(draft for each in passes for draft in each.drafts)})
            pieces = {token: piece(model.tokenizer, token) for token in ids}
        save_trace(trace, tokens, metadata(model.config, pieces, passes), temporary)
    wrote(args.out)


def run_record(args: Namespace) -> None:
    """Write chosen tensors of chosen layers, a layer at a time."""
    checkpoint = open_checkpoint(args.model)
    if checkpoint.owns(args.out):
        raise InputError(f"{args.out}: belongs to the checkpoint, expected another file")
    tokens = prompt_tokens(args, load_tokenizer(args.model), "record")
    layers = numbered(args.layers, checkpoint.config, "--layers") if args.layers else None
    job = plan(checkpoint, tokens, np.dtype(args.dtype), layers, args.names, args.input)
    with Progress("", 0, "GB", 1e9) as bar:

        def progress(stage: str, done: int, total: int) -> None:
            bar.label, bar.total = stage, total
            bar(done)

        def message(text: str) -> None:
            bar.erase()
            note(f"minstep: {text}")

        record_file(job, args.out, progress, message)
    wrote(args.out)


def run_check_layer(args: Namespace) -> int:
    """Hold layers against a recording: 0 where they compute the same, 1 where a tensor departs."""
    checkpoint, theirs = open_checkpoint(args.model), open_recording(args.against)
    numbers, skipped = checkable(checkpoint, theirs) if args.all else ([], {})
    if args.layer:
        numbers = numbered(args.layer, checkpoint.config, "--layer")
    checks = _check(checkpoint, theirs, numbers, np.dtype(args.dtype), args.tolerance)
    checks = checks._replace(skipped=skipped | checks.skipped)
    print_json(checks_json(checks)) if args.json else print_text(checks_table(checks))
    return 0 if checks.is_match else 1


def _check(
    checkpoint: Checkpoint,
    theirs: Recording,
    numbers: list[int],
    dtype: np.dtype[Any],
    tolerance: float | None,
) -> Checks:
    """Check layers, under a bar for the layers, and one for the known bugs of each that departs."""
    bars: dict[str, Progress] = {}

    def progress(label: str, done: int, total: int) -> None:
        if label not in bars:
            erase()
            bars[label] = Progress(label, total, "known bugs" if bars else "layers")
        bars[label](done)

    def erase() -> None:
        for bar in bars.values():
            bar.erase()

    try:
        return check_layers(checkpoint, theirs, numbers, dtype, tolerance, progress)
    finally:
        erase()


def run_diff(args: Namespace) -> int:
    """Compare two recordings: 0 where all is the same, 1 where a tensor departs."""
    config = load_config(args.model) if args.model else None
    ours, theirs = open_recording(args.ours), open_recording(args.theirs)
    routers = routers_of(args.model) if args.model else None
    report = diff(ours, theirs, args.tolerance, config, args.names, routers)
    why = _explained(args, report) if report.departure and config else []
    rest = _continued(args, report) if config and not report.departure else None
    if args.json:
        more = {"continued": checks_json(rest)} if rest else {}
        print_json(as_json(report) | {"explained": why} | more)
    else:
        alone = ["", checks_table(rest)] if rest else []
        print_text(diff_table(report), verdict(report), *why, *alone)
    return 0 if report.departure is None and (rest is None or rest.is_match) else 1


def _continued(args: Namespace, report: Report) -> Checks | None:
    """Layers that ties left no row to compare of, each run from its recorded input."""
    try:
        checkpoint = open_checkpoint(args.model)
        numbers, _ = checkable(checkpoint, report.theirs)
    except InputError:  # nothing to run, or to run it from
        return None
    empty = {split(row.name)[0] for row in report.rows if row.is_empty}
    numbers = [n for n in numbers if n in empty]
    if not numbers:
        return None
    return _check(checkpoint, report.theirs, numbers, _dtype(report), args.tolerance)


def _dtype(report: Report) -> np.dtype[Any]:
    """What to run layers in that are held against the recording."""
    return np.dtype("float64" if report.theirs.engine_dtype == "float64" else "float32")


def _explained(args: Namespace, report: Report) -> list[str]:
    """What the layer that departs first says when it is run alone; only then is a weight read."""
    try:
        checkpoint = open_checkpoint(args.model)
        n = layer_of(report, checkpoint.config)
        checks = _check(checkpoint, report.theirs, [n], _dtype(report), args.tolerance)
    except InputError as error:  # the two still depart, which is printed, and is the exit code
        return [f"not explained: {error}"]
    ours, theirs = shown(str(args.ours)), shown(str(args.theirs))
    alone = f"layer {n}, run from the input that {theirs} has, computes what it has"
    cause = f"the cause lies before it, or in {ours}, or this minstep was edited since"
    return [*checks.explained.get(n, [f"{alone}: {cause}"]), *not_tried(checks.untried)]
