"""`minstep bench`: its flags, and from them to what it prints or writes; no maths."""

import argparse
import json
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from minstep.bench.attention import attention_layer
from minstep.bench.decoding import drafts, mid, tiny, trained
from minstep.bench.moe import bench_lines, bench_moe, moe_layer
from minstep.bench.peer import Peer, PeerError, Setup, peer
from minstep.bench.reading import reading
from minstep.bench.report import (
    bench_report,
    bench_table,
    case_lines,
    charts,
    end_lines,
    head_lines,
    judged,
)
from minstep.bench.timing import Found, idle_share, memory_rates
from minstep.bench.training import training
from minstep.cli.arguments import add_model, at_least, not_empty, path, seed
from minstep.cli.terminal import Progress, print_json, print_text, wrote
from minstep.errors import InputError
from minstep.fast.threads import THREADS
from minstep.store.checkpoint import open_checkpoint
from minstep.store.config_file import find_config, load_config
from minstep.store.json_file import read_json
from minstep.store.output import check_space, owned_folder, write_text
from minstep.store.random_checkpoint import Form, needed_space, save_random

Case = Callable[[Setup], Found]
CASES: dict[str, Case] = {
    "tiny": tiny,
    "trained": trained,
    "mid": mid,
    "drafts": drafts,
    "moe": moe_layer,
    "attention": attention_layer,
    "reading": reading,
    "training": training,
}
ROUNDS, FEWER = 5, 2  # of blocks; of the quick form


def add_commands(command: Callable[..., Any]) -> None:
    """Add it to the parser; `command` adds one: name, what runs it, help, example."""
    text, example = (
        "time decoding and layers beside torch and memory",
        "--only tiny,trained --quick",
    )
    add = command("bench", run_bench, text, example)
    text = f"cases, joined by commas: {', '.join(CASES)} (all)"
    add.add_argument("--only", type=case_names, metavar="NAMES", help=text)
    text = "fewer rounds and smaller sizes"
    add.add_argument("--quick", action="store_true", help=text)
    text = "a Python that has torch and transformers (this one); without them, ours alone is timed"
    add.add_argument("--peer", type=not_empty, default=sys.executable, metavar="PYTHON", help=text)
    text = "folder for report.json, report.txt and charts"
    add.add_argument("--out", type=path, metavar="DIR", help=text)
    add.add_argument("--seed", type=seed, default=0, metavar="N", help="of weights (0)")
    add.add_argument("--json", action="store_true", help="print one JSON object")
    alone = add.add_argument_group("one MoE layer alone, warm and cold, in place of the cases")
    add_model(alone, "checkpoint in hub layout (random weights of the released sizes, 1.0 GB)")
    alone.add_argument("--layer", type=at_least(0), metavar="N", help="which (17)")


def case_names(text: str) -> list[str]:
    """Names of cases joined by commas."""
    names = [part.strip() for part in text.split(",")]
    for name in names:
        if name not in CASES:
            message = f"{name!r:.80} is no case, expected some of {', '.join(CASES)}"
            raise argparse.ArgumentTypeError(message)
    return names


def run_bench(args: Namespace) -> None:
    """Time cases side by side, or one MoE layer where a model or a layer is named."""
    if args.model is not None or args.layer is not None:
        if args.only or args.out:
            raise InputError("--model and --layer time one layer, expected no --only and no --out")
        _run_layer(args)
        return
    with owned_folder(args.out) if args.out else nullcontext():  # refused before the work
        _run_cases(args)


def _run_cases(args: Namespace) -> None:
    """Time the cases, and write what was found."""

    def show(lines: list[str]) -> None:
        """Show lines at once, for a run takes minutes."""
        if lines and not args.json:
            print_text(*lines)

    names = args.only or [*CASES]
    found: dict[str, Found] = {}
    idle = idle_share()
    with ExitStack() as stack, Progress("bench", len(names), "cases") as bar:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="minstep-bench-")))
        other: Peer | None = None
        missing = ""
        try:
            other = stack.enter_context(peer(args.peer))
        except PeerError as error:
            missing = str(error)
        machine: dict[str, Any] = {
            "threads": THREADS,
            "numpy": np.__version__,
            "idle": idle,
            "read_rates": memory_rates(),
            "peer": other.versions if other else None,
            "no_peer": missing or None,
        }
        setup = Setup(folder, other, FEWER if args.quick else ROUNDS, args.quick, args.seed)
        show(head_lines(machine))
        for done, name in enumerate(names):
            bar.label = name
            bar(done)
            found[name] = _case(CASES[name], setup)
            bar.erase()
            show(case_lines(judged(found[name])))
    report = bench_report(machine, found)
    show(end_lines(report))
    if args.out:
        table = bench_table(report) + "\n"
        texts = {"report.json": json.dumps(report, indent=1) + "\n", "report.txt": table}
        for name, text in (texts | charts(found)).items():
            write_text(args.out / name, text)
        wrote(args.out)
    if args.json:
        print_json(report)


def _case(case: Case, setup: Setup) -> Found:
    """What a case found; where the peer fails in the middle, that."""
    try:
        return case(setup)
    except PeerError as error:
        return Found([], [f"the peer: {error}"])


def _run_layer(args: Namespace) -> None:
    """Time a MoE layer: of a checkpoint, or of random weights of the released sizes."""
    rng, layer = np.random.default_rng(args.seed), 17 if args.layer is None else args.layer
    with tempfile.TemporaryDirectory() as folder:
        model = args.model
        if model is None:
            file = find_config("step-3.5-flash") / "config.json"
            config, model = load_config(file), Path(folder) / "made"
            name = f"model.layers.{layer}."
            form = Form("bfloat16", holds=lambda tensor: tensor.startswith(name), experts=24)
            check_space(model, needed_space(config, form))
            save_random(read_json(file), config, rng, model, form)
        report = bench_moe(open_checkpoint(model), layer, rng)
    print_json(report) if args.json else print_text(bench_lines(report))
