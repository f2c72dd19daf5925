"""Learning by doing: `exercise` writes a chapter's functions to fill in, `footgun` runs known bugs.

Checked by: tests/learn/test_exercise.py, tests/learn/test_museum.py
"""

import shlex
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from minstep.cli.arguments import FLOATS, add_command, add_model, at_least, not_empty, path, seed
from minstep.cli.explore import text_tokenizer
from minstep.cli.generate import note_shipped, open_model
from minstep.cli.terminal import Progress, print_json, print_text, wrote
from minstep.errors import InputError, printable
from minstep.learn.damage import RUNNERS
from minstep.learn.exercise import bugged, file_of, listed, mark, stubs, write
from minstep.learn.exhibits import EXHIBITS
from minstep.learn.lessons import EXERCISES, PLANT
from minstep.learn.museum import (
    changes,
    exhibit_text,
    find_exhibit,
    measured,
    patient,
    report_text,
    ways,
)
from minstep.store.output import atomic_folder


def add_commands(command: Callable[..., Any]) -> None:
    """Add `exercise` and `footgun`; `command` adds one: name, what runs it, help, example."""
    _add_exercise(command)
    _add_footgun(command)


def _add_exercise(command: Callable[..., Any]) -> None:
    """Add `exercise` to the parser."""
    text = "a chapter's code with functions left out, and tests to turn green"
    add = command("exercise", run_exercise, text, "4 --out ch04")
    text = "the chapter; without it, all exercises are listed"
    add.add_argument("number", type=at_least(0), nargs="?", metavar="N", help=text)
    add.add_argument("--out", type=path, metavar="DIR", help="a new folder to write it to")
    text = f"which bug exercise {PLANT} plants (0)"
    add.add_argument("--seed", type=seed, metavar="N", help=text)


def run_exercise(args: Namespace) -> None:
    """Print the exercises, or write one."""
    number, out = args.number, args.out
    if args.seed is not None and number != PLANT:
        raise InputError(f"--seed {args.seed}: only exercise {PLANT} has a bug to choose")
    if number is None:
        if out:
            raise InputError(f"--out {out}: expected the number of an exercise before it")
        print_text(listed())
        return
    if number not in EXERCISES:
        last = max(EXERCISES)
        listing = "minstep exercise lists them"
        raise InputError(f"exercise {number}: expected one of 0 to {last} ({listing})")
    if out is None:
        raise InputError(f"exercise {number}: expected --out DIR, a new folder to write it to")
    if there := sorted(out.iterdir()) if out.is_dir() else []:
        raise InputError(f"{out}: holds {there[0].name}, expected a new or empty folder")
    files = stubs(number) if number != PLANT else bugged(args.seed or 0)
    with atomic_folder(out) as folder:
        write(number, files, folder)
    wrote(out)
    folder_name = printable(str(out))
    print_text(
        f"{folder_name}: {', '.join(map(file_of, files))}, a README and the checks",
        f"now: pytest -m {mark(number)} {shlex.quote(folder_name)}",
    )


def run_list(args: Namespace) -> None:
    """Print names and titles, by group."""
    wide = max(len(exhibit.name) for exhibit in EXHIBITS) + 2
    group = ""
    for exhibit in EXHIBITS:
        if exhibit.group != group:
            print_text(*([""] if group else []), exhibit.group)
            group = exhibit.group
        print_text(f"  {exhibit.name:{wide}}{exhibit.title}")


def run_show(args: Namespace) -> None:
    """Print an exhibit: the story, the changed lines, who met it."""
    print_text(exhibit_text(find_exhibit(args.name)))


def run_run(args: Namespace) -> None:
    """Run a model with the bugs of an exhibit, and print what they do."""
    exhibit = find_exhibit(args.name)
    for bug in exhibit.bugs:
        changes(ways(bug)[0])  # a line that was edited is refused before anything runs
    model = open_model(args.model)
    tokenizer = text_tokenizer(args, model)
    tried = patient(model.checkpoint, tokenizer, args.tokens, np.dtype(args.dtype))
    if exhibit.bugs[0] not in RUNNERS:
        note_shipped(args.model)
    with Progress(exhibit.name, len(exhibit.bugs), "bugs") as bar:
        report = measured(exhibit, tried, tokenizer, bar)
    print_json(report) if args.json else print_text(report_text(report))


def _add_footgun(command: Callable[..., Any]) -> None:
    """Add `footgun` and its own commands to the parser."""
    text = "known bugs of ports: the changed line, and what it does"
    commands = command("footgun", run_list, text, "list").add_subparsers(
        required=True, metavar="WHAT"
    )

    add, name = partial(add_command, commands), "window-off-by-one"
    add("list", run_list, "their names", "footgun list")
    show = add("show", run_show, "what it is, and who met it", f"footgun show {name}")
    show.add_argument("name", type=not_empty, metavar="NAME")
    run = add("run", run_run, "run a model with it", f"footgun run {name}")
    run.add_argument("name", type=not_empty, metavar="NAME")
    add_model(run)
    text = "of the held-out text (all)"
    run.add_argument("--tokens", type=at_least(2), metavar="N", help=text)
    text = "of every activation (float64: the same figures on every machine)"
    run.add_argument("--dtype", **FLOATS | {"default": "float64"}, help=text)
    run.add_argument("--json", action="store_true", help="print one JSON object")
