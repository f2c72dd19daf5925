"""The commands about a model's files, inspect and make-tiny: flags, runs, what is printed."""

import fnmatch
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import numpy as np

from minstep.cli.arguments import at_least, layer_ranges, not_empty, path, seed
from minstep.cli.terminal import print_json, print_text
from minstep.errors import InputError
from minstep.store.checkpoint import open_checkpoint
from minstep.store.config_file import find_config, load_config, read_config
from minstep.store.inspect import inspect, table
from minstep.store.output import check_space
from minstep.store.random_checkpoint import Form, needed_space, save_random
from minstep.store.shards import (
    layers_report,
    layers_table,
    numbered,
    openable,
    shards_report,
    shards_table,
)
from minstep.weights import tensor_shapes


def add_commands(command: Callable[..., Any]) -> None:
    """Add inspect and make-tiny; `command` adds one: name, what runs it, help, example."""
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
