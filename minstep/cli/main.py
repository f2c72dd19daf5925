"""The command line: arguments in, one function per command, results on stdout; no maths."""

import argparse
import difflib
import io
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from minstep import __version__
from minstep.cli.arguments import add_command
from minstep.cli.terminal import note
from minstep.errors import LONGEST_MESSAGE, InputError, shown
from minstep.store.files import os_reason
from minstep.store.output import check_output

# The file of cli/ that has a command, which is imported when the command is asked for.
FAMILIES = {
    "generate": "generate",
    "chat": "chat",
    "train": "train",
    "trace": "parity",
    "record": "parity",
    "make-tiny": "store",
    "inspect": "store",
    "check-layer": "parity",
    "diff": "parity",
    "bench": "bench",
    "cost": "cost",
    "lab": "explore",
    "footgun": "learn",
    "view": "explore",
    "exercise": "learn",
    "walk": "explore",
}
GROUPS = {  # of commands, as the help lists them
    "run": "generate chat",
    "look inside": "walk trace view inspect lab bench cost",
    "compare with another engine": "record check-layer diff",
    "learn": "exercise footgun",
    "make a model": "make-tiny train",
}


class _Parser(argparse.ArgumentParser):
    """argparse's, with refusals of one line that say what may have been meant."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Refuse what is left over here: argparse would in the name of the whole program."""
        known, rest = super().parse_known_args(args, namespace)
        if rest:
            meant = _meant(rest[0].split("=")[0], self._option_string_actions)
            self.error(f"unrecognized arguments: {' '.join(rest)}{meant}")
        return known, rest

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Of a wrong command say the nearest one; of another wrong choice what argparse says."""
        if isinstance(action, argparse._SubParsersAction) and value not in action.choices:
            known = ", ".join(sorted(action.choices, key=[*FAMILIES, *action.choices].index))
            meant = _meant(value, action.choices) or f", expected one of {known}"
            self.error(f"{value}: no such command{meant}")
        super()._check_value(action, value)

    def _print_message(self, message: str, file: Any = None) -> None:
        """Print help, version or a refusal; argparse alone would hide that a disk is full."""
        (file or sys.stderr).write(message or "")

    def error(self, message: str) -> NoReturn:
        """Refuse wrong use in one line; argparse alone would print the whole usage."""
        text = shown(" ".join(message.split()), LONGEST_MESSAGE)
        self.exit(2, f"{self.prog}: {text} (see {self.prog} --help)\n")


def _meant(given: str, known: Iterable[str]) -> str:
    """The nearest of the `known` words as a question, nothing where none is near."""
    near = difflib.get_close_matches(given, [*known], 1, cutoff=0.7)
    return f", did you mean {near[0]}?" if near else ""


def main(argv: list[str] | None = None) -> int:
    """Run one command: 0 fine, 1 a mismatch, 2 wrong use or bad input, 130 after Ctrl-C.

    As argparse does, --help, --version and wrong use raise SystemExit; so do SIGTERM and SIGHUP,
    with 143 and 129. Signal handlers, streams and the way of warnings are then as before.
    """
    try:
        with _streams(), _signals():
            return _run(argv)
    except KeyboardInterrupt:
        return 130


def _run(argv: list[str] | None) -> int:
    """Parse the arguments, run their command, and turn what it raises into one line and a code."""
    try:
        try:
            argv = sys.argv[1:] if argv is None else argv
            args = _parser(argv[0] if argv else "").parse_args(argv)
            if sys.stdout is None:
                raise InputError("stdout is closed, expected somewhere to write to")
            check_output(getattr(args, "out", None), _inputs(args))
            with np.errstate(over="ignore", invalid="ignore"):  # not finite is refused by name
                code: int | None = args.run(args)
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except BrokenPipeError:  # the reader has gone; nothing more can be said
        return 141
    except (InputError, OSError, MemoryError) as error:
        text = str(error) or "out of memory"
        if isinstance(error, OSError):
            text = f"{error.filename or 'stdout'}: {os_reason(error)}"
        with suppress(OSError):  # stderr may be what is full
            note(f"minstep: {' '.join(text.split())}")
        return 2
    return code or 0


def _inputs(args: argparse.Namespace) -> list[Path]:
    """The files and folders that the arguments name, but for --out."""
    named = [value for name, value in vars(args).items() if name != "out"]
    values = [x for value in named for x in (value if isinstance(value, list) else [value])]
    if isinstance(config := getattr(args, "config", None), str):
        values.append(Path(config))
    return [value for value in values if isinstance(value, Path)]


@contextmanager
def _streams() -> Iterator[None]:
    """Warnings as lines of ours, no line on stdout that belongs on a closed stderr, and no failure
    for a character that the encoding of stdout lacks. Then all is as before.
    """
    out, err, showwarning = sys.stdout, sys.stderr, warnings.showwarning
    errors = getattr(out, "errors", None)
    try:
        if sys.stderr is None:
            sys.stderr = open(os.devnull, "w", encoding="utf-8", errors="replace")
        warnings.showwarning = lambda message, *_: note(f"minstep: {message}")
        if isinstance(out, io.TextIOWrapper):
            out.reconfigure(errors="replace")
        yield
    finally:
        warnings.showwarning = showwarning
        if err is None and sys.stderr is not None:
            sys.stderr.close()
        sys.stderr = err
        if isinstance(out, io.TextIOWrapper):
            with suppress(OSError):  # it flushes what stdout could not take
                out.reconfigure(errors=errors)


@contextmanager
def _signals() -> Iterator[None]:
    """Signals that end a process end the command first, which tidies up; then all is as before.

    A signal that is ignored, as by a job under nohup, stays ignored. Only the main thread can be
    told of signals.
    """

    def end(number: int, _: Any) -> NoReturn:
        for each in handlers:  # what tidies up is not to be interrupted in turn
            signal.signal(each, signal.SIG_IGN)
        raise SystemExit(128 + number)

    ours = {"SIGINT": signal.default_int_handler, "SIGTERM": end, "SIGHUP": end}
    numbers = {getattr(signal, name): ours[name] for name in ours if hasattr(signal, name)}
    is_main = threading.current_thread() is threading.main_thread()
    before = {each: signal.getsignal(each) for each in numbers if is_main}
    handlers = {each: h for each, h in before.items() if h not in (signal.SIG_IGN, None)}
    try:
        for each in handlers:
            signal.signal(each, numbers[each])
        yield
    finally:
        for each, handler in handlers.items():
            signal.signal(each, handler)


def _parser(first: str = "") -> argparse.ArgumentParser:
    """The parser of all commands, or of those in one file with the command `first`."""
    parser = _Parser(
        prog="minstep",
        usage="minstep [-h] [--version] COMMAND ...",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="start with: minstep walk\nflags and an example of each: minstep COMMAND --help",
    )
    version = f"minstep {__version__}"
    parser.add_argument("--version", action="version", version=version)
    parser.set_defaults(run=lambda _: parser.print_help())
    listed = parser.add_subparsers(prog="minstep", metavar="COMMAND", help=argparse.SUPPRESS)
    texts: dict[str, str] = {}

    def command(name: str, run: Callable[..., int | None], text: str, example: str) -> Any:
        texts[name] = text
        return add_command(listed, name, run, text, f"{name} {example}")

    families = [FAMILIES[first]] if first in FAMILIES else dict.fromkeys(FAMILIES.values())
    for family in families if first != "--version" else ():
        import_module(f"minstep.cli.{family}").add_commands(command)
    if len(texts) == len(FAMILIES):
        parser.description = _listing(texts)
    return parser


def _listing(texts: dict[str, str]) -> str:
    """What the commands are for, by group."""
    lines = ["Step 3.5 Flash in plain NumPy."]
    for group, names in GROUPS.items():
        lines += ["", f"{group}:", *(f"  {name:13}{texts[name]}" for name in names.split())]
    return "\n".join(lines)
