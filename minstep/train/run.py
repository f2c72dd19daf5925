"""A training run in a folder: what it reads, what it writes down, and how it goes on from there."""

import hashlib
import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer

from minstep.config import Config, parse_config
from minstep.draw.charts import line_chart, load_chart
from minstep.errors import InputError
from minstep.fast.bf16 import to_bf16
from minstep.store.files import open_file, os_reason
from minstep.store.output import OWNED, Data, atomic_file, write_tensors, write_text
from minstep.tap import Array
from minstep.train.bpe import train_tokenizer
from minstep.train.data import encode_documents, read_corpus
from minstep.train.log import LogRow, header, line
from minstep.train.loss import bits_per_byte
from minstep.train.trainer import Plan, Training
from minstep.train.workers import WorkerEnded, Workers
from minstep.validation import flaw
from minstep.weights import assemble

STATE = "training.state"  # a safetensors file; the ending keeps it apart from a model's tensors
# What a damaged file raises; a dtype that NumPy lacks is a TypeError or an AttributeError.
DAMAGES = (SafetensorError, KeyError, TypeError, ValueError, AttributeError, RecursionError)


class Every(NamedTuple):
    """After how many steps what is done."""

    row: int  # a line of the log
    check: int  # the held-out text is measured
    save: int  # everything is written


class Run:
    """A training run: a new one in an empty folder, or the one that was ended there.

    `raw`: the JSON of its config; `files`: its text, none for Python's documentation. Raises
    InputError for a folder that holds anything else, for text that cannot be trained on, and for a
    run to go on with that was begun with another plan, config or text.
    Checked by: tests/train/test_run.py, tests/cli/test_train.py
    """

    def __init__(
        self,
        folder: Path,
        raw: dict[str, Any],
        plan: Plan,
        files: Sequence[Path],
        every: Every,
        resumes: bool,
    ) -> None:
        file = folder / STATE
        state, begun = load_state(folder) if resumes else ({}, {})
        _check_folder(folder, resumes)
        config, self.folder, self.every = parse_config(raw), folder, every
        self.corpus = read_corpus(files)
        texts = (each.text for each in self.corpus.train)
        self.tokenizer = train_tokenizer(texts, config.vocab_size)
        stream = encode_documents(self.corpus.train, self.tokenizer)  # [N]
        digest = hashlib.sha256(stream.tobytes()).hexdigest()
        self.facts: dict[str, Any] = {"plan": plan._asdict(), "config": raw, "text": digest}
        self.training = Training(config, plan, stream)
        self.rows: list[LogRow] = []
        if resumes:
            _check_facts(file, begun, self.facts)
            try:
                self.training.restore(state)
            except InputError as error:
                raise InputError(f"{file}: {error}") from error
            self.rows = read_rows(file, begun, config)
        self.head = [*self._title(), header(len(config.mtp_layers))]  # of the log
        self.loads: dict[str, Array] = {}  # of the experts, between the last two rows

    def go(
        self,
        pool: Workers,
        is_stopped: Callable[[], bool],
        show: Callable[[str], None],
        progress: Callable[[int], None],
    ) -> bool:
        """Train to the last step, or to the end of the step in which `is_stopped` became true.

        Either way all is written; returns whether it was the last step. `show` gets the lines of
        the log as they come, `progress` the number of steps done.
        """
        training, steps = self.training, self.training.plan.steps
        show("\n".join(self.head))
        while training.done < steps:
            try:
                training.step(pool)
            except WorkerEnded:
                if not is_stopped():
                    raise
                break  # the signal to stop went to all processes, and has ended that one too
            done = training.done
            is_last = done == steps
            if done % self.every.row == 0 or is_last:
                show(self._row(is_last or done % self.every.check == 0))
            progress(done)
            if is_stopped():
                break
            if done % self.every.save == 0 and not is_last:
                self.save()
        else:
            self.save()
            (self.folder / STATE).unlink(missing_ok=True)
            return True
        self.save()
        return False

    def _row(self, measures: bool) -> str:
        """Add a row to the log: its line."""
        row = self.training.row()
        if measures:
            row = row._replace(held_out=self.held_out())
        self.loads = self.training.loads()
        self.training.begin_row()
        self.rows.append(row)
        return line(row)

    def held_out(self) -> float:
        """Bits a byte of the text that is not trained on."""
        training, documents = self.training, self.corpus.held_out
        weights = assemble(training.config, lambda name, _: training.tensors[name])
        length = training.plan.length
        return bits_per_byte(documents, self.tokenizer, weights, training.config, length)

    def save(self) -> None:
        """Write the checkpoint, the log and the charts, and last the state to go on from."""
        training, folder = self.training, self.folder
        save_checkpoint(folder, training.tensors, self.facts["config"], self.tokenizer)
        write_text(folder / "log.txt", "\n".join([*self.head, *map(line, self.rows)]) + "\n")
        if self.rows:
            write_text(folder / "loss.svg", self._losses())
        if self.loads:
            chart = load_chart("Tokens of each expert", {f"to step {training.done}": self.loads})
            write_text(folder / "loads.svg", chart)
        save_state(folder, training.state(), self.facts | {"rows": self.rows})

    def _title(self) -> tuple[str, str]:
        plan = ", ".join(f"{name} {value}" for name, value in self.facts["plan"].items())
        sizes = [sum(each.nbytes for each in part) for part in self.corpus]
        tokens = len(self.training.stream)
        text = f"text: {sizes[0]:,} bytes, {tokens:,} tokens; held out {sizes[1]:,} bytes"
        count = sum(x.size for x in self.training.tensors.values())
        return plan, f"{count:,} parameters; {text}"

    def _losses(self) -> str:
        names = ["main", *(f"MTP {k}" for k in range(1, len(self.rows[0].losses)))]
        series = {
            name: [(float(row.step), row.losses[k]) for row in self.rows]
            for k, name in enumerate(names)
        }
        return line_chart("Training loss", series, "step", "nats a token")


def _check_folder(folder: Path, resumes: bool) -> None:
    """Raise InputError unless a new run may write into `folder`, before hours go into it."""
    entries = sorted(entry for entry in folder.iterdir() if entry.name != OWNED)
    if entries and not resumes:
        reason = f"holds {entries[0].name}, expected a new or empty folder"
        if folder / STATE in entries:
            reason = "an unfinished run, --resume goes on with it"
        raise InputError(f"{folder}: {reason}")


def _check_facts(file: Path, facts: dict[str, Any], expected: dict[str, Any]) -> None:
    """Raise InputError where a run to go on with was begun with other flags, config or text."""
    plan, begun = expected["plan"], facts.get("plan", {})
    for name, value in plan.items():
        if begun.get(name) != value:
            flag = f"--{name.replace('_', '-')}"
            message = f"was begun with {flag} {begun.get(name)}, expected the same"
            raise InputError(f"{file}: {message}, not {value}")
    for name in ("config", "text"):
        if facts.get(name) != expected[name]:
            raise InputError(f"{file}: was begun with another {name}, expected the same")


def read_rows(file: Path, facts: dict[str, Any], config: Config) -> list[LogRow]:
    """The rows of the log so far. Raises InputError unless they are as Run.save wrote them.

    Checked by: tests/train/test_run.py
    """
    try:
        rows = [LogRow(step, tuple(losses), *others) for step, losses, *others in facts["rows"]]
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


def save_checkpoint(
    folder: Path, tensors: dict[str, Array], raw: dict[str, Any], tokenizer: Tokenizer
) -> None:
    """Write config.json, tokenizer.json and model.safetensors into `folder`, each whole.

    Tensors are bfloat16, router biases float32, as on the hub. `raw` is the config's JSON. Raises
    InputError where a file cannot be written.
    Checked by: tests/train/test_run.py
    """
    data = {
        name: Data.of(x)
        if name.endswith("router_bias")
        else Data("BF16", x.shape, [to_bf16(x).data])
        for name, x in tensors.items()
    }
    with atomic_file(folder / "model.safetensors") as temporary:
        write_tensors(temporary, data, {"format": "pt"})
    written = json.dumps(raw | {"torch_dtype": "bfloat16", "can_chat": False}, indent=1)
    write_text(folder / "config.json", written + "\n")
    write_text(folder / "tokenizer.json", tokenizer.to_str(pretty=False) + "\n")


def save_state(folder: Path, state: dict[str, Array], facts: dict[str, Any]) -> None:
    """Write a run's arrays, and the JSON `facts` that they go with, bit for bit."""
    data = {name: Data.of(np.asarray(x)) for name, x in state.items()}
    with atomic_file(folder / STATE) as temporary:
        write_tensors(temporary, data, {"facts": json.dumps(facts)})


def load_state(folder: Path) -> tuple[dict[str, Array], dict[str, Any]]:
    """What save_state wrote, all of it finite. Raises InputError where it is missing or damaged."""
    file = folder / STATE
    if not os.path.exists(file):
        raise InputError(f"{file}: is missing, expected what an unfinished run leaves")
    open_file(file).close()  # the package would wait for a pipe
    try:
        with safe_open(file, framework="numpy") as opened:
            facts = json.loads((opened.metadata() or {})["facts"])
            if not isinstance(facts, dict) or not isinstance(facts.get("plan", {}), dict):
                raise ValueError("its facts are no object with a plan")
            state = {name: opened.get_tensor(name) for name in opened.keys()}
        for name, x in state.items():
            if what := flaw(x):
                raise ValueError(f"{name} {what}")
        return state, facts
    except DAMAGES as error:
        message = f"is damaged: {error}, expected what an unfinished run leaves"
        raise InputError(f"{file}: {message}") from error
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {os_reason(error)}") from error
