"""The flags of `minstep bench`."""

import argparse
import sys
from collections.abc import Callable
from typing import Any

from minstep.cli.arguments import add_model, at_least, not_empty, path, seed
from minstep.cli.bench import CASES, run_bench


def add_bench(command: Callable[..., Any]) -> None:
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
