"""The commands that look at a model: from their arguments to what they print or write; no maths."""

import fnmatch
import json
from argparse import Namespace

import numpy as np

from minstep.checkpoint import open_checkpoint
from minstep.config import parse_config
from minstep.configs import find_config
from minstep.files import InputError, atomic_file, check_space, is_of_checkpoint
from minstep.generate import check_prompt
from minstep.keys import read_json
from minstep.lab.inspect import inspect, table
from minstep.lab.trace import record, save_trace
from minstep.native import hub_config
from minstep.save import Form, needed_space, save_random
from minstep.weights import tensor_shapes


def run_trace(args: Namespace) -> None:
    """Write every named tensor of a forward pass."""
    checkpoint = open_checkpoint(args.model)
    check_prompt(args.tokens, checkpoint.config)
    if is_of_checkpoint(args.out, args.model):
        raise InputError(f"{args.out}: belongs to the checkpoint, expected another file")
    with atomic_file(args.out) as temporary:  # first, so that a bad path is refused before the work
        trace = record(args.tokens, checkpoint.weights(), checkpoint.config, np.dtype(args.dtype))
        save_trace(trace, args.tokens, temporary)


def run_make_tiny(args: Namespace) -> None:
    """Write a random checkpoint in hub layout."""
    source = find_config(args.config)
    file = source / "config.json" if source.is_dir() else source
    raw = hub_config(read_json(file), str(file))
    tokenizer = file.parent / "tokenizer.json"
    config = parse_config(raw, str(file))
    names = list(tensor_shapes(config))
    for glob in args.only:
        if not fnmatch.filter(names, glob):
            raise InputError(f"--only {glob}: matches no tensor, expected such as 'model.norm.*'")

    def holds(name: str) -> bool:
        return not args.only or any(fnmatch.fnmatchcase(name, glob) for glob in args.only)

    form = Form(args.dtype, args.shards, holds, args.experts)
    check_space(args.out, needed_space(config, form))
    beside = tokenizer if tokenizer.exists() else None
    save_random(raw, config, np.random.default_rng(args.seed), args.out, form, beside)


def run_inspect(args: Namespace) -> None:
    """Print layers, shapes, dtypes, bytes and parameters by part."""
    report = inspect(find_config(args.model))
    print(json.dumps(report) if args.json else table(report))
