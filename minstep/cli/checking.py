"""The commands that look at a model: from their arguments to what they print or write; no maths."""

import fnmatch
from argparse import Namespace
from typing import Any

import numpy as np

from minstep.cli.generate import open_model, prompt_tokens
from minstep.cli.terminal import note, print_json, print_text, wrote
from minstep.errors import InputError, shown
from minstep.generate import steps
from minstep.parity.checks import Checks, check_layers, checkable, checks_json, checks_table
from minstep.parity.diff import Report, as_json, diff, diff_table, layer_of, verdict
from minstep.parity.explain import not_tried
from minstep.parity.facts import metadata
from minstep.parity.record import plan, record_file
from minstep.parity.recording import open_recording
from minstep.parity.router_ties import routers_of
from minstep.parity.trace import record, save_trace
from minstep.store.checkpoint import open_checkpoint
from minstep.store.config_file import find_config, load_config, read_config
from minstep.store.files import atomic_file, check_space
from minstep.store.inspect import inspect, table
from minstep.store.random_checkpoint import Form, needed_space, save_random
from minstep.store.shards import (
    layers_report,
    layers_table,
    numbered,
    openable,
    shards_report,
    shards_table,
)
from minstep.store.stages import split
from minstep.text.continuation import Continuation
from minstep.text.tokenizer import load_tokenizer
from minstep.validation import check_prompt
from minstep.weights import tensor_shapes


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
        said = Continuation(steps(tokens, weights, config, rng, args.max_tokens, dtype=dtype))
        for _ in said:
            pass
        tokens += said.tokens
        trace = record(tokens, weights, config, dtype)
        passes = said.passes if said.tokens else []
        facts = metadata(model.config, model.tokenizer, tokens, passes)
        save_trace(trace, tokens, facts, temporary)
    wrote(args.out)


def run_record(args: Namespace) -> None:
    """Write chosen tensors of chosen layers, a layer at a time."""
    checkpoint = open_checkpoint(args.model)
    if checkpoint.owns(args.out):
        raise InputError(f"{args.out}: belongs to the checkpoint, expected another file")
    tokens = prompt_tokens(args, load_tokenizer(args.model), "record")
    layers = numbered(args.layers, checkpoint.config, "--layers") if args.layers else None
    job = plan(checkpoint, tokens, np.dtype(args.dtype), layers, args.names, args.input)
    record_file(job, args.out, lambda text: note(f"minstep: {text}"))
    wrote(args.out)


def run_make_tiny(args: Namespace) -> None:
    """Write a random checkpoint in hub layout."""
    raw, config, folder = read_config(args.config)
    tokenizer = folder / "tokenizer.json"
    names = list(tensor_shapes(config))
    for glob in args.only:
        if not fnmatch.filter(names, glob):
            raise InputError(f"--only {glob}: matches no tensor, expected such as 'model.norm.*'")

    def holds(name: str) -> bool:
        return not args.only or any(fnmatch.fnmatchcase(name, glob) for glob in args.only)

    most = max((spec.moe.top_k for spec in config.layers if spec.moe), default=1)
    if args.experts is not None and args.experts < most:
        raise InputError(f"--experts {args.experts}: expected at least moe_top_k's {most}")
    form = Form(args.dtype, args.shards, holds, args.experts)
    check_space(args.out, needed_space(config, form))
    beside = tokenizer if tokenizer.exists() else None
    save_random(raw, config, np.random.default_rng(args.seed), args.out, form, beside)


def run_inspect(args: Namespace) -> None:
    """Print layers, shapes, dtypes, bytes and parameters by part; or what the files hold."""
    folder, show = find_config(args.model), table
    if args.shards:
        report, show = shards_report(open_checkpoint(folder)), shards_table
    elif args.layer or args.first:
        flag, ranges = ("--layer", args.layer) if args.layer else ("--first", [range(args.first)])
        numbers = numbered(ranges, load_config(folder), flag)
        report, show = layers_report(openable(folder, numbers), numbers), layers_table
    else:
        report = inspect(folder) | {"path": args.model}  # as given: a shipped one lies anywhere
    print_json(report) if args.json else print_text(show(report))


def run_check_layer(args: Namespace) -> int:
    """Hold layers against a recording: 0 where they compute the same, 1 where a tensor departs."""
    checkpoint, theirs = open_checkpoint(args.model), open_recording(args.against)
    numbers, skipped = checkable(checkpoint, theirs) if args.all else ([], {})
    if args.layer:
        numbers = numbered(args.layer, checkpoint.config, "--layer")
    checks = check_layers(checkpoint, theirs, numbers, np.dtype(args.dtype), args.tolerance)
    checks = checks._replace(skipped=skipped | checks.skipped)
    print_json(checks_json(checks)) if args.json else print_text(checks_table(checks))
    return 0 if checks.is_match else 1


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
    return check_layers(checkpoint, report.theirs, numbers, _dtype(report), args.tolerance)


def _dtype(report: Report) -> np.dtype[Any]:
    """What to run layers in that are held against the recording."""
    return np.dtype("float64" if report.theirs.engine_dtype == "float64" else "float32")


def _explained(args: Namespace, report: Report) -> list[str]:
    """What the layer that departs first says when it is run alone; only then is a weight read."""
    try:
        checkpoint = open_checkpoint(args.model)
        n = layer_of(report, checkpoint.config)
        checks = check_layers(checkpoint, report.theirs, [n], _dtype(report), args.tolerance)
    except InputError as error:  # the two still departed: that was said, and is the exit code
        return [f"not explained: {error}"]
    ours, theirs = shown(str(args.ours)), shown(str(args.theirs))
    alone = f"layer {n}, run from the input that {theirs} has, computes what it has"
    cause = f"the cause lies before it, or in {ours}, or this minstep was edited since"
    return [*checks.explained.get(n, [f"{alone}: {cause}"]), *not_tried(checks.untried)]
