"""The flags of `minstep train`."""

from collections.abc import Callable
from typing import Any

from minstep.cli.arguments import at_least, not_empty, number, path, seed
from minstep.fast.threads import THREADS
from minstep.train.run import run_train
from minstep.train.trainer import Plan

DEFAULT = Plan()
FILES = "what to train on (the documentation inside this Python)"


def add_train(command: Callable[..., Any]) -> None:
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
