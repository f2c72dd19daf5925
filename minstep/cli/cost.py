"""`minstep cost`: its flags, and from them to what it prints or draws."""

import argparse
from argparse import Namespace
from collections.abc import Callable
from typing import Any

from minstep.cli.arguments import at_least, not_empty, number, path
from minstep.cli.terminal import print_json, print_text, wrote
from minstep.cost.count import FORMS
from minstep.cost.hardware import HARDWARE, find_hardware, measure
from minstep.cost.report import Wanted, cost_text, report
from minstep.cost.roofline import MOST_LINES, roofline_svg
from minstep.errors import InputError
from minstep.store.config_file import find_config, load_config
from minstep.store.output import write_text


def add_commands(command: Callable[..., Any]) -> None:
    """Add it to the parser."""
    text = "parameters, FLOPs, bytes, speed and price of a token"
    add = command("cost", run_cost, text, "--context 131072 --hardware h200 --gpus 8")
    text = "a shipped configuration, a folder or a config.json (step-3.5-flash)"
    add.add_argument(
        "--config", type=not_empty, default="step-3.5-flash", metavar="NAME", help=text
    )
    text = "tokens of context; may be given several times, the first is that of all sections"
    add.add_argument("--context", type=at_least(1), action="append", metavar="N", help=text)
    text = f"may be given several times, of {', '.join(HARDWARE)} (all)"
    add.add_argument("--hardware", type=not_empty, action="append", metavar="NAME", help=text)
    text = "add this machine: time its memory and products for a moment"
    add.add_argument("--measure", action="store_true", help=text)
    add.add_argument(
        "--gpus", type=at_least(1), metavar="N", help="devices (8 in a server, else 1)"
    )
    text = "what weights are stored as; caches are bf16 (the first that fits)"
    add.add_argument("--dtype", choices=tuple(FORMS), help=text)
    text = "texts decoded at once (1)"
    add.add_argument("--batch", type=at_least(1), default=1, metavar="N", help=text)
    text = "share of drafts kept, once reached, by depth: 0.8,0.6,0.4; 0 for none (0.77 each)"
    add.add_argument("--acceptance", type=shares, metavar="SHARES", help=text)
    text = "milliseconds a token may take where texts share a pass (20)"
    above = number("above 0", lambda x: x > 0)
    add.add_argument("--latency", type=above, default=20.0, metavar="MS", help=text)
    text = "turns of a conversation whose price is asked for (20)"
    add.add_argument("--turns", type=at_least(1), default=20, metavar="N", help=text)
    text = "new input and output tokens of each turn (2000,500)"
    add.add_argument("--tokens", type=pair, default=(2000, 500), metavar="IN,OUT", help=text)
    add.add_argument("--json", action="store_true", help="print one JSON object")
    text = "draw the roofline of the hardware with the model's passes"
    add.add_argument("--out", type=path, metavar="FILE.svg", help=text)


def shares(text: str) -> tuple[float, ...]:
    """Shares from 0 to 1, joined by commas; a lone 0 means that nothing is drafted."""
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError:
        found = (-1.0,)
    if not all(0 <= share <= 1 for share in found):
        message = f"{text!r:.80}: expected shares from 0 to 1 such as 0.8,0.6,0.4"
        raise argparse.ArgumentTypeError(message)
    return () if found == (0.0,) else found


def pair(text: str) -> tuple[int, int]:
    """Two whole numbers of at least 1, joined by a comma."""
    parts = text.split(",")
    if len(parts) != 2:
        raise argparse.ArgumentTypeError(f"{text!r:.80}: expected two numbers such as 2000,500")
    new, output = (at_least(1)(part) for part in parts)
    return new, output


def run_cost(args: Namespace) -> None:
    """Print the report, and draw its roofline where a file is named."""
    devices = find_hardware(args.hardware or []) if args.hardware or not args.measure else []
    if args.measure:
        devices = [*(devices or HARDWARE.values()), measure()]
    shown = devices if args.hardware or args.measure else []
    if args.out and len(shown) > MOST_LINES:
        raise InputError(f"--out: draws at most {MOST_LINES} devices, name them with --hardware")
    wanted = Wanted(
        args.config,
        tuple(args.context or ()),
        tuple(devices),
        args.gpus,
        args.dtype,
        args.batch,
        args.acceptance,
        args.latency / 1e3,
        args.turns,
        args.tokens,
    )
    found = report(wanted)
    if args.out:
        config = load_config(find_config(args.config))
        drafts = len(found["acceptance"])
        write_text(args.out, roofline_svg(config, found["context"], shown, drafts))
    print_json(found) if args.json else print_text(cost_text(found))
    if args.out:
        wrote(args.out)
