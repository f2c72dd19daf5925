"""`minstep train`: its flags, its signals, and what it shows meanwhile."""

import math
import signal
import threading
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from minstep.cli.arguments import at_least, not_empty, number, path, seed
from minstep.cli.terminal import Progress, note, print_text
from minstep.config import Config
from minstep.errors import InputError
from minstep.fast.threads import THREADS
from minstep.store.config_file import read_config
from minstep.store.output import owned_folder
from minstep.train.run import Every, Run
from minstep.train.trainer import Plan
from minstep.train.workers import MOST_PROCESSES, SHARE, workers

MOST_TOKENS = 1 << 24  # of a step: their places alone take 8 bytes each, several times over
DEFAULT = Plan()
FILES = "what to train on (the documentation inside this Python)"


def add_commands(command: Callable[..., Any]) -> None:
    """Add it to the parser; `command` adds one: name, what runs it, help, example."""
    text, example = "train a model from scratch", "--out my-model --text notes/*.txt"
    add = command("train", run_train, text, example)
    text = "configuration: a shipped name, a folder or a config.json (trained)"
    add.add_argument("--config", type=not_empty, default="trained", metavar="NAME", help=text)
    add.add_argument("--text", type=path, nargs="+", default=[], metavar="FILE", help=FILES)
    text = "new folder for checkpoint, tokenizer, log and charts"
    add.add_argument("--out", type=path, required=True, metavar="DIR", help=text)
    text = "go on with the run that was ended in --out; all other flags as it was begun with"
    add.add_argument("--resume", action="store_true", help=text)
    text = "sequences at a time are computed by this many processes; changes no number"
    add.add_argument("--processes", type=at_least(1), default=THREADS, metavar="N", help=text)

    size = add.add_argument_group("how much")
    _whole(size, "steps", 1, "optimizer steps")
    _whole(size, "sequences", 1, "sequences in a step")
    _whole(size, "length", 3, "tokens of a sequence")
    how = add.add_argument_group("how")
    _real(how, "rate", "of Muon and AdamW, at its peak")
    _whole(how, "warmup", 0, "steps until then")
    _real(how, "floor", "share of the rate at the last step", 1)
    _real(how, "weight_decay", "share of the rate by which tensors shrink")
    _real(how, "mtp_weight", "weight of the drafts' loss; the report has 0.3, later 0.1")
    _real(how, "balance_rate", "by which router biases move in a step; 0 leaves loads alone")
    text = f"of the first weights and the order of the text ({DEFAULT.seed})"
    how.add_argument("--seed", type=seed, default=DEFAULT.seed, metavar="N", help=text)
    when = add.add_argument_group("when, in steps")
    for name, default, text in (
        ("log-every", 20, "a line of the log"),
        ("check-every", 200, "the held-out text is measured"),
        ("save-every", 100, "everything is written"),
    ):
        text = f"{text} ({default})"
        when.add_argument(f"--{name}", type=at_least(1), default=default, metavar="N", help=text)


def _whole(group: Any, name: str, least: int, text: str) -> None:
    """A whole number of the Plan."""
    default = getattr(DEFAULT, name)
    kind, text = at_least(least), f"{text} ({default})"
    group.add_argument(f"--{name}", type=kind, default=default, metavar="N", help=text)


def _real(group: Any, name: str, text: str, most: float = 100) -> None:
    """A real number of the Plan."""
    default = getattr(DEFAULT, name)
    kind = number(f"from 0 to {most:g}", lambda x: 0 <= x <= most)
    flag, text = f"--{name.replace('_', '-')}", f"{text} ({default:g})"
    group.add_argument(flag, type=kind, default=default, metavar="X", help=text)


def run_train(args: Namespace) -> None:
    """Train, and write config, weights, tokenizer, log and charts into a folder.

    A signal that asks to end lets the step under way end, saves, and is raised again.
    """
    raw, config, _ = read_config(args.config)
    plan = Plan(**{name: getattr(args, name) for name in Plan._fields})
    _check(plan, config)
    processes = min(args.processes, math.ceil(plan.sequences / SHARE), MOST_PROCESSES)
    every = Every(args.log_every, args.check_every, args.save_every)
    with owned_folder(args.out):
        run = Run(args.out, raw, plan, args.text, every, args.resume)
        with (
            _asked_to_stop() as asked,
            workers(processes) as pool,
            Progress("training", plan.steps, "steps") as bar,
        ):

            def show(text: str) -> None:
                bar.erase()
                print_text(text)

            if run.go(pool, lambda: bool(asked), show, bar):
                return
            bar.erase()
            saved = f"saved after step {run.training.done} of {plan.steps}"
            with suppress(OSError):  # after SIGHUP there is no terminal
                note(f"minstep: {saved}: --resume goes on from there")
            signal.raise_signal(asked[0])


def _check(plan: Plan, config: Config) -> None:
    """Raise InputError where a flag does not fit the model."""
    most, least = config.max_positions, len(config.mtp_layers) + 2
    if not least <= plan.length <= most:
        raise InputError(f"--length {plan.length}: expected {least} to {most} for this model")
    if plan.sequences * plan.length > MOST_TOKENS:
        message = f"of {plan.length} tokens each, expected at most {MOST_TOKENS:,} tokens in a step"
        raise InputError(f"--sequences {plan.sequences}: {message}")


@contextmanager
def _asked_to_stop() -> Iterator[list[signal.Signals]]:
    """While a step runs a signal that ends only leaves word here; a second one ends at once."""
    asked: list[signal.Signals] = []
    numbers = [getattr(signal, n) for n in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, n)]
    is_main = threading.current_thread() is threading.main_thread()
    handlers = {s: signal.getsignal(s) for s in numbers if is_main}
    # What a shell's background job was told to ignore stays ignored.
    before = {s: handler for s, handler in handlers.items() if handler is not signal.SIG_IGN}

    def note(number: int, _: Any) -> None:
        asked.append(signal.Signals(number))
        signal.signal(number, before[signal.Signals(number)])

    for each in before:
        signal.signal(each, note)
    try:
        yield asked
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
