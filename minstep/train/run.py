"""`minstep train`: from a configuration and text to a checkpoint, with a log that can be read."""

import hashlib
import math
import signal
import threading
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from minstep.cli.terminal import Progress, note, print_text
from minstep.config import Config
from minstep.draw.charts import line_chart, load_chart
from minstep.errors import InputError
from minstep.store.config_file import read_config
from minstep.store.files import OWNED, owned_folder
from minstep.tap import Array
from minstep.train.bpe import train_tokenizer
from minstep.train.data import Corpus, encode_documents, read_corpus
from minstep.train.log import Row, header, line
from minstep.train.loss import bits_per_byte
from minstep.train.saved import STATE, load_state, save_checkpoint, save_state, write_text
from minstep.train.trainer import Plan, Training
from minstep.train.workers import MOST_PROCESSES, SHARE, WorkerEnded, Workers, workers
from minstep.weights import assemble

MOST_TOKENS = 1 << 24  # of a step: their places alone take 8 bytes each, several times over


class Text(NamedTuple):
    """What a run reads."""

    corpus: Corpus
    tokenizer: Tokenizer
    stream: NDArray[np.int32]  # [N] the tokens to train on


class Every(NamedTuple):
    """After how many steps what is done."""

    row: int  # a line of the log
    check: int  # the held-out text is measured
    save: int  # everything is written


def run_train(args: Namespace) -> None:
    """Train, and write config, weights, tokenizer, log and charts into a folder."""
    raw, config, _ = read_config(args.config)
    plan = Plan(**{name: getattr(args, name) for name in Plan._fields})
    _check(plan, config)
    processes = min(args.processes, math.ceil(plan.sequences / SHARE), MOST_PROCESSES)
    with owned_folder(args.out):
        run = _prepared(args, plan, raw, config)
        with _asked_to_stop() as asked, workers(processes) as pool:
            run.go(pool, asked)


def _prepared(args: Namespace, plan: Plan, raw: dict[str, Any], config: Config) -> "Run":
    """A new run, or the one that was ended in --out."""
    folder: Path = args.out
    state, facts = load_state(folder) if args.resume else ({}, {})
    _check_folder(folder, args.resume)
    text = _read_text(args.text, config)
    its_facts = {
        "plan": plan._asdict(),
        "config": raw,
        "text": hashlib.sha256(text.stream.tobytes()).hexdigest(),
    }
    training = Training(config, plan, text.stream)
    rows: list[Row] = []
    if args.resume:
        _check_facts(folder / STATE, facts, its_facts)
        try:
            training.restore(state)
        except InputError as error:
            raise InputError(f"{folder / STATE}: {error}") from error
        rows = read_rows(folder / STATE, facts, config)
    every = Every(args.log_every, args.check_every, args.save_every)
    return Run(training, text, folder, rows, its_facts, every)


def _check(plan: Plan, config: Config) -> None:
    """Raise InputError where a flag does not fit the model."""
    most, least = config.max_positions, len(config.mtp_layers) + 2
    if not least <= plan.length <= most:
        raise InputError(f"--length {plan.length}: expected {least} to {most} for this model")
    if plan.sequences * plan.length > MOST_TOKENS:
        message = f"of {plan.length} tokens each, expected at most {MOST_TOKENS:,} tokens in a step"
        raise InputError(f"--sequences {plan.sequences}: {message}")


def _check_folder(folder: Path, resumes: bool) -> None:
    """Raise InputError unless a new run may write into `folder`, before hours go into it."""
    entries = sorted(entry for entry in folder.iterdir() if entry.name != OWNED)
    if entries and not resumes:
        its = "an unfinished run, --resume goes on with it" if folder / STATE in entries else ""
        holds = its or f"holds {entries[0].name}, expected a new or empty folder"
        raise InputError(f"{folder}: {holds}")


def _read_text(files: list[Path], config: Config) -> Text:
    """The documents, the tokenizer that is made for them, and the tokens to train on."""
    corpus = read_corpus(files)
    tokenizer = train_tokenizer((each.text for each in corpus.train), config.vocab_size)
    return Text(corpus, tokenizer, encode_documents(corpus.train, tokenizer))


def _check_facts(file: Path, facts: dict[str, Any], expected: dict[str, Any]) -> None:
    """Raise InputError where a run to go on with was begun with other flags, config or text."""
    plan, its_plan = expected["plan"], facts.get("plan", {})
    for name, value in plan.items():
        if its_plan.get(name) != value:
            flag = f"--{name.replace('_', '-')}"
            message = f"was begun with {flag} {its_plan.get(name)}, expected the same"
            raise InputError(f"{file}: {message}, not {value}")
    for name in ("config", "text"):
        if facts.get(name) != expected[name]:
            raise InputError(f"{file}: was begun with another {name}, expected the same")


def read_rows(file: Path, facts: dict[str, Any], config: Config) -> list[Row]:
    """The rows of the log so far. Raises InputError unless they are as Run.save wrote them.

    Checked by: tests/train/test_command.py
    """
    try:
        rows = [Row(step, tuple(losses), *others) for step, losses, *others in facts["rows"]]
        depths = {len(row.losses) - 1 for row in rows}
        numbers = [x for row in rows for x in (row.step, *row.losses, row.rate, row.norm)]
        numbers += [row.held_out for row in rows if row.held_out is not None]
        loads = [load for row in rows for load in (row.least, row.most)]  # nan without experts
        are_good = all(map(math.isfinite, numbers)) and not any(map(math.isinf, loads))
        are_good &= depths <= {len(config.mtp_layers)}
    except (KeyError, TypeError, ValueError, OverflowError):
        are_good = False
    if not are_good:
        message = "its rows are not those of the log, expected what an unfinished run leaves"
        raise InputError(f"{file}: is damaged: {message}")
    return rows


class Run:
    """A training run under way: what it writes down, and when."""

    def __init__(
        self,
        training: Training,
        text: Text,
        folder: Path,
        rows: list[Row],
        facts: dict[str, Any],
        every: Every,
    ) -> None:
        self.training, self.text, self.folder = training, text, folder
        self.rows, self.facts, self.every = rows, facts, every
        self.head = [*self._title(), header(len(training.config.mtp_layers))]  # of the log
        self.loads: dict[str, Array] = {}  # of the experts, between the last two rows

    def go(self, pool: Workers, asked: Sequence[signal.Signals]) -> None:
        """Train to the last step. A signal that was `asked` ends the step under way, saves, and is
        raised again.
        """
        training, steps = self.training, self.training.plan.steps
        print_text(*self.head)
        with Progress("training", steps, "steps") as bar:
            while training.done < steps:
                try:
                    training.step(pool)
                except WorkerEnded:
                    if not asked:
                        raise
                    self._stop(asked[0], bar)  # a signal to all processes has ended that one too
                done = training.done
                is_last = done == steps
                if done % self.every.row == 0 or is_last:
                    self._note(is_last or done % self.every.check == 0, bar)
                bar(done)
                if asked:
                    self._stop(asked[0], bar)
                elif done % self.every.save == 0 and not is_last:
                    self.save()
        self.save()
        (self.folder / STATE).unlink(missing_ok=True)

    def _stop(self, asked: signal.Signals, bar: Progress) -> None:
        """Save, and raise the signal again that asked for it."""
        self.save()
        bar.erase()
        done, steps = self.training.done, self.training.plan.steps
        with suppress(OSError):  # after SIGHUP there is no terminal
            note(f"minstep: saved after step {done} of {steps}: --resume goes on from there")
        signal.raise_signal(asked)

    def _note(self, measures: bool, bar: Progress) -> None:
        """Add a row to the log, and print it."""
        row = self.training.row()
        if measures:
            row = row._replace(held_out=self.held_out())
        self.loads = self.training.loads()
        self.training.begin_row()
        self.rows.append(row)
        bar.erase()
        print_text(line(row))

    def held_out(self) -> float:
        """Bits a byte of the text that is not trained on."""
        training = self.training
        weights = assemble(training.config, lambda name, _: training.tensors[name])
        documents, length = self.text.corpus.held_out, training.plan.length
        return bits_per_byte(documents, self.text.tokenizer, weights, training.config, length)

    def save(self) -> None:
        """Write the checkpoint, the log and the charts, and last the state to go on from."""
        training, folder = self.training, self.folder
        save_checkpoint(folder, training.tensors, self.facts["config"], self.text.tokenizer)
        write_text(folder / "log.txt", "\n".join([*self.head, *map(line, self.rows)]) + "\n")
        if self.rows:
            write_text(folder / "loss.svg", self._losses())
        if self.loads:
            chart = load_chart("Tokens of each expert", {f"to step {training.done}": self.loads})
            write_text(folder / "loads.svg", chart)
        facts = self.facts | {"rows": self.rows}
        save_state(folder, training.state(), facts)

    def _title(self) -> tuple[str, str]:
        plan = ", ".join(f"{name} {value}" for name, value in self.facts["plan"].items())
        corpus, stream = self.text.corpus, self.text.stream
        sizes = [sum(each.nbytes for each in part) for part in corpus]
        text = f"text: {sizes[0]:,} bytes, {len(stream):,} tokens; held out {sizes[1]:,} bytes"
        count = sum(x.size for x in self.training.tensors.values())
        return plan, f"{count:,} parameters; {text}"

    def _losses(self) -> str:
        names = ["main", *(f"MTP {k}" for k in range(1, len(self.rows[0].losses)))]
        series = {
            name: [(float(row.step), row.losses[k]) for row in self.rows]
            for k, name in enumerate(names)
        }
        return line_chart("Training loss", series, "step", "nats a token")


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
