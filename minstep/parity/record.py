"""Run a prompt through chosen layers of a model of any size, and write what was computed to a file.

A stage at a time: what it computed is kept on the disk, in `.NAME.parts` beside the output NAME,
then the next one begins; memory holds the activations of one layer. A run that was ended goes on
after the last whole stage.
Checked by: tests/parity/test_record.py
"""

import hashlib
import json
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike

from minstep.config import Config, LayerSpec, RopeSpec
from minstep.errors import InputError
from minstep.parity.engine_tensors import open_recording
from minstep.parity.facts import metadata
from minstep.parity.trace import Recorder, Trace, described, finite, walk
from minstep.store.checkpoint import Checkpoint
from minstep.store.files import open_file, os_reason, read_file
from minstep.store.header import Tensor, open_header, read_header
from minstep.store.inspect import expected
from minstep.store.json_file import MAX_JSON, strict_json
from minstep.store.output import CODES, TEMPORARY, Data, atomic_file, locked, write_tensors
from minstep.store.random_checkpoint import random_weights
from minstep.store.shards import needs, some_weights
from minstep.store.stages import EMBEDDING, EMBEDDING_WEIGHT, HEAD, Stage, stages
from minstep.tap import Array
from minstep.validation import check_prompt, flaw

ASIDE = (".probs", ".input")  # recorded only where a glob names them
EXPERTS = re.compile(r"\.moe\.(gate|up|down)_proj\.weight")
LONGEST_NAME = 200  # bytes; file systems allow 255, some fewer
PIECE = 1 << 20  # bytes copied or read at a time
# In the folder of parts.
LOCK, STATE, WHOLE = "lock", "state.safetensors", "whole.safetensors"
PART = "{:05}.safetensors"  # of the stages, from 0
# What may be removed: these, and what atomic_file had not renamed.
OURS = re.compile(rf"(\d{{5,}}|state|whole)\.safetensors|{re.escape(TEMPORARY)}\w+")
DAMAGES = (InputError, KeyError, TypeError, ValueError, RecursionError, OSError)  # as read back
NUMPY = {code: dtype for dtype, code in CODES.items()}


def names_of(config: Config, count: int) -> list[str]:
    """Every name that recording a prompt of `count` tokens can give, in order of computation.

    The model itself says them, cut down to the smallest sizes that keep its structure.
    """
    small = config._replace(
        hidden_size=1,
        vocab_size=1,
        layers=tuple(map(_smallest, config.layers)),
        mtp_layers=tuple(map(_smallest, config.mtp_layers)),
    )
    tokens, trace = [0] * min(count, len(config.mtp_layers) + 1), Trace()
    weights = random_weights(small, np.random.default_rng(0))
    walk(tokens, weights, small, np.float32, Recorder(trace))
    names: list[str] = []
    for stage in stages(config, count):
        inputs = [] if stage.name in (EMBEDDING, HEAD) else [f"{stage.name}.input"]
        names += inputs + [name for name in trace if stage.has(name)]
    return names


def _smallest(spec: LayerSpec) -> LayerSpec:
    moe = spec.moe
    if moe is not None:
        experts = 2 if moe.top_k < moe.experts else 1
        moe = moe._replace(experts=experts, top_k=1, width=1, shared_width=1)
    rope = RopeSpec(1.0, 2, None)
    return spec._replace(heads=1, groups=1, head_dim=2, rope=rope, mlp_width=1, moe=moe)


def choose(
    config: Config, count: int, layers: Sequence[int] | None, globs: Sequence[str]
) -> list[str]:
    """The names to record of a prompt of `count` tokens, in order of computation.

    Those that `globs` match, without any glob all but attention probabilities; with `layers` of
    these layers alone, and the input of each that is not the output of another one. Raises
    InputError for a glob that matches nothing, and a layer that the prompt is too short for.
    """
    every, order = stages(config, count), names_of(config, count)
    modules = [s.name for s in every] if layers is None else [f"model.layers.{n}" for n in layers]
    for module in modules:
        if module not in [stage.name for stage in every]:
            k = int(module.rpartition(".")[2]) - len(config.layers) + 1
            message = f"MTP depth {k} has no position left, expected at least {k + 1} tokens"
            raise InputError(f"{module}: in a prompt of {count} tokens {message}")
    open_to = [n for n in order if any(s.has(n) for s in every if s.name in modules)]
    for glob in globs:
        if not any(fnmatchcase(name, glob) for name in open_to):
            scope = "" if layers is None else " of the layers given"
            message = f"matches no name{scope}, expected such as {open_to[-1]}"
            raise InputError(f"--names {glob}: {message}")
    chosen = {n for n in open_to if not n.endswith(ASIDE)}
    if globs:
        chosen = {n for n in open_to if any(fnmatchcase(n, glob) for glob in globs)}
    for number, stage in enumerate(every):
        if layers is not None and stage.name in modules and before(every, number) not in chosen:
            chosen.add(f"{stage.name}.input")
    return [name for name in order if name in chosen]


def before(every: Sequence[Stage], number: int) -> str:
    """The tensor that a stage takes its state from: the output of the stage before, not the head's.

    The embedding has none: "".
    """
    return next((s.name for s in reversed(every[:number]) if s.name != HEAD), "")


class Job(NamedTuple):
    """What is recorded, and what runs for it: stages, each with the tensors of the checkpoint it
    reads, from the embedding or from a state [T, D], which the file `source` has.
    """

    checkpoint: Checkpoint
    tokens: list[int]
    dtype: DTypeLike
    names: list[str]
    stages: dict[Stage, list[str]]
    state: Array | None
    source: Path | None

    def reads(self, stage: Stage, ids: Array | None = None) -> int:
        """Bytes of weights that a stage touches; without the chosen experts' ids about how many."""
        config, total, share = self.checkpoint.config, 0, 1.0
        spec = next((s for s in config.layers + config.mtp_layers if s.name == stage.name), None)
        if spec and spec.moe:
            E = spec.moe.experts
            missed = (1 - spec.moe.top_k / E) ** len(self.tokens)  # if all are equally likely
            share = 1 - missed if ids is None else len(np.unique(ids)) / E
        for name in self.stages[stage]:
            nbytes = self.checkpoint.tensors[name].nbytes
            if EXPERTS.search(name):
                nbytes = round(nbytes * share)
            elif name == EMBEDDING_WEIGHT and stage.name != HEAD:
                nbytes = nbytes // config.vocab_size * len(self.tokens)
            total += nbytes
        return total

    def identity(self) -> dict[str, object]:
        """What must be the same for parts of a recording to go on with, as JSON values."""
        tensors, folder = self.checkpoint.tensors, self.checkpoint.path
        files = sorted({tensors[name].file for names in self.stages.values() for name in names})
        facts = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]
        model = hashlib.sha256(read_file(folder / "config.json", MAX_JSON) + repr(facts).encode())
        state = None if self.state is None else hashlib.sha256(self.state.tobytes()).hexdigest()
        dtype = np.dtype(self.dtype).name
        return {
            "tokens": self.tokens,
            "dtype": dtype,
            "names": self.names,
            "input": state,
            "model": model.hexdigest(),
        }


def plan(
    checkpoint: Checkpoint,
    tokens: Sequence[int],
    dtype: DTypeLike,
    layers: Sequence[int] | None = None,
    globs: Sequence[str] = (),
    source: Path | None = None,
) -> Job:
    """What to run so that the names of `choose` are recorded.

    With `source`, a recording, the first layer begins from its input there. Raises InputError for a
    bad prompt, as `choose` does, for a recording of another prompt or model, and for a tensor that
    is needed but missing.
    """
    config = checkpoint.config
    check_prompt(tokens, config)
    names = choose(config, len(tokens), layers, globs)
    every = stages(config, len(tokens))
    numbers = [n for n, stage in enumerate(every) if any(map(stage.has, names))]
    first, state = 0, None
    if source is not None:
        first = numbers[0]
        state = _recorded(source, every, first, tokens, config, dtype)  # [T, D]
    indexed = {*checkpoint.tensors, *checkpoint.absent}
    tensors = expected(config, checkpoint.has_own_heads(), indexed)
    run = {
        stage: list(needs(stage, config, tensors))
        for n, stage in enumerate(every)
        if first <= n <= numbers[-1] and (n in numbers or stage.name != HEAD)
    }
    some_weights(checkpoint, {name for needed in run.values() for name in needed})
    run = {s: [name for name in needed if name in checkpoint.tensors] for s, needed in run.items()}
    return Job(checkpoint, list(tokens), dtype, names, run, state, source)


def _recorded(
    path: Path,
    every: Sequence[Stage],
    number: int,
    tokens: Sequence[int],
    config: Config,
    dtype: DTypeLike,
) -> Array:
    """The state [T, D] that a stage begins from, out of a recording, in `dtype`; of an MTP depth at
    least the rows that it reads.
    """
    if number == 0:
        raise InputError("--input: the embedding has none, expected --layers as well")
    recording, stage, previous = open_recording(path), every[number], before(every, number)
    if recording.tokens is not None and recording.tokens != list(tokens):
        message = f"is of another prompt of {len(recording.tokens)} tokens, expected --tokens"
        raise InputError(f"{path}: {message}")
    name = next((n for n in (f"{stage.name}.input", previous) if n in recording.names), None)
    if name is None:
        raise InputError(f"{path}: holds neither {stage.name}.input nor {previous}, expected one")
    shape, depth = recording.shape(name), max(0, number - len(config.layers) - 1)
    rows, D = len(tokens) - depth, config.hidden_size
    if len(shape) != 2 or shape[1] != D or shape[0] < rows or (not depth and shape[0] > rows):
        message = f"has shape {list(shape)}, expected {[rows, D]} by the prompt and the config"
        raise InputError(f"{path}: tensor {name} {message}")
    if recording.array(name).dtype.kind != "f":
        raise InputError(f"{path}: tensor {name} is {recording.dtype(name)}, expected floats")
    return recording.floats(name, dtype)[: len(tokens)]


class Parts:
    """The finished stages of one recording, in a folder that this process alone writes.

    A file for each stage holds its tensors, STATE the state [T, D] after the last of them. Each
    file says in its metadata what is recorded, with which stage, and has a checksum. It is renamed
    when it is whole, STATE after the stage's own: a stage that STATE does not count is computed
    again. `done`: how many stages are finished; `state`: None before the first.
    """

    def __init__(self, folder: Path, recording: dict[str, Any]) -> None:
        self.folder, self._recording = folder, recording
        self.done = 0
        self.state: Array | None = None
        if (folder / STATE).exists():
            self._resume()
        self._tidy()

    def tensors(self) -> list[dict[str, Tensor]]:
        """What is kept of each finished stage."""
        return [read_header(self.folder / PART.format(n)) for n in range(self.done)]

    def add(self, tensors: Trace, state: Array) -> None:
        """Keep what the next stage computed, and the state [T, D] after it.

        Raises InputError when it cannot be written; then the stages before it stay as they are.
        """
        self._write(PART.format(self.done), tensors)
        self._write(STATE, {"state": state})
        self.done, self.state = self.done + 1, state
        self._tidy()

    def finish(self, out: Path, order: list[str], metadata: dict[str, str]) -> None:
        """Put all tensors into one file at `out`, a piece at a time, and forget the parts."""
        found = {name: tensor for part in self.tensors() for name, tensor in part.items()}
        tensors = {n: Data(found[n].dtype, found[n].shape, _pieces(found[n])) for n in order}
        with _naming(out):
            try:
                write_tensors(self.folder / WHOLE, tensors, metadata)
                os.replace(self.folder / WHOLE, os.path.realpath(out))
            finally:  # half of it would keep a full disk full
                (self.folder / WHOLE).unlink(missing_ok=True)
        self.done = 0

    def remove(self) -> None:
        """Remove the folder: STATE first, so that what is left counts no more, the lock last.

        Another run that waits for the lock then finds a folder that is empty or its own.
        """
        first, last = self.folder / STATE, self.folder / LOCK
        others = [file for file in self.folder.iterdir() if OURS.fullmatch(file.name)]
        with suppress(OSError):
            for file in (first, *others, last):
                file.unlink(missing_ok=True)
            self.folder.rmdir()

    def _write(self, name: str, tensors: Trace) -> None:
        """Write a file of the next stage, which says so itself."""
        data, run = {n: Data.of(x) for n, x in tensors.items()}, self._run(self.done + 1)
        facts = {"run": run, "crc32": str(_checksum(run, {n: x.pieces for n, x in data.items()}))}
        with atomic_file(self.folder / name) as temporary:
            write_tensors(temporary, data, facts)

    def _run(self, done: int) -> str:
        """What the files of the stage say with which `done` stages are finished."""
        return json.dumps({"recording": self._recording, "done": done})

    def _resume(self) -> None:
        """Go on where another run ended: what it kept is what is wanted, and is not damaged."""
        file, again = self.folder / STATE, f"remove {self.folder} to begin again"
        try:
            run = strict_json(_checked_run(file))
            before, done = run["recording"], int(run["done"])
            other = next((k for k, x in self._recording.items() if before[k] != x), None)
            if not other:
                tensor = read_header(file)["state"]
                bits = b"".join(_pieces(tensor))
                state = np.frombuffer(bits, NUMPY[tensor.dtype]).reshape(tensor.shape)  # [T, D]
            for n in range(0 if other else done):
                file = self.folder / PART.format(n)
                if _checked_run(file) != self._run(n + 1):
                    raise ValueError("it is of another stage")
        except DAMAGES as error:
            raise InputError(f"{file}: is damaged ({error}), {again}") from error
        if other:
            text = f"belongs to another recording ({other})"
            raise InputError(f"{self.folder}: {text}: remove it or choose another --out")
        self.done, self.state = done, state

    def _tidy(self) -> None:
        """Remove files that a killed run left. Raises InputError where any is not record's."""
        kept = {LOCK, STATE, *map(PART.format, range(self.done))}
        left = [file for file in self.folder.iterdir() if file.name not in kept]
        for file in left:
            if not OURS.fullmatch(file.name):
                raise InputError(f"{file}: is no part of a recording, expected none beside it")
        for file in left:
            file.unlink()


@contextmanager
def open_parts(out: Path, identity: dict[str, Any]) -> Iterator[Parts]:
    """The parts of the recording that goes to `out`; they stay when the block ends too early.

    `identity` holds JSON values that say what is recorded. Raises InputError when `out` or the
    folder cannot be written, when another run is writing there, and when the folder holds parts of
    another recording or damaged ones.
    """
    target = Path(os.path.realpath(out))
    folder = target.parent / f".{_short(target.name)}.parts"
    with _naming(out):
        if target.is_symlink() or (target.exists() and not target.is_file()):
            message = "it is a directory, a device or a link to itself, expected a file"
            raise InputError(f"{out}: cannot be written: {message}")
        if folder.is_symlink():
            raise InputError(f"{folder}: is a link, expected a folder that record has made")
        folder.mkdir(exist_ok=True)
    with locked(folder / LOCK, folder):
        parts = Parts(folder, json.loads(json.dumps(identity)))
        try:
            yield parts
        finally:
            if not parts.done:
                parts.remove()


def _short(name: str) -> str:
    """The name, or where it is so long that nothing may be added to it a checksum of it."""
    coded = os.fsencode(name)
    return name if len(coded) <= LONGEST_NAME else hashlib.sha256(coded).hexdigest()


@contextmanager
def _naming(out: Path) -> Iterator[None]:
    """Turn an error of the system into one that names the output."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{out}: cannot be written: {os_reason(error)}") from error


def _checked_run(file: Path) -> str:
    """What a part says of its run. Raises one of DAMAGES unless it is as it was written."""
    tensors, metadata, _ = open_header(file)
    checksum = _checksum(metadata["run"], {n: _pieces(x) for n, x in tensors.items()})
    if metadata["crc32"] != str(checksum):
        raise ValueError(f"its checksum is {checksum}, expected {metadata['crc32']:.20}")
    return metadata["run"]


def _checksum(run: str, tensors: Mapping[str, Iterable[Any]]) -> int:
    """CRC-32 of what a part says of its run, and of its tensors' bytes, which come in pieces."""
    checksum = zlib.crc32(run.encode())
    for name in sorted(tensors):
        for piece in tensors[name]:
            checksum = zlib.crc32(piece, checksum)
    return checksum


def _pieces(tensor: Tensor) -> Iterator[bytes]:
    """The bytes of a tensor in its file."""
    with open_file(tensor.file) as opened:
        opened.seek(tensor.offset)
        left = tensor.nbytes
        while left:
            piece = opened.read(min(PIECE, left))
            if not piece:
                raise InputError(f"{tensor.file}: was cut while it was read, expected it to stay")
            left -= len(piece)
            yield piece


def record_file(
    job: Job,
    out: Path,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
    message: Callable[[str], None] = lambda text: None,
) -> None:
    """Run a job and write its recording to `out`, which appears when it is whole.

    What is done lies beside it until then: the same job goes on from there, which is a `message`.
    The file is the same, however often the work was interrupted. `progress` takes the next stage,
    and how many bytes of weights were read, of how many. Raises InputError as open_parts does, for
    an `out` that is the job's own source, for parts that the job's stages do not give, and where a
    tensor is not finite.
    """
    if job.source and out.exists() and os.path.samefile(job.source, out):
        raise InputError(f"--out {out}: is the file of --input, expected another one")
    order = [stage.name for stage in job.stages]
    with open_parts(out, job.identity()) as parts:
        _check_parts(job, parts)
        if parts.done:
            message(f"resuming after {order[parts.done - 1]}")
        try:
            _run(job, parts, progress)
            parts.finish(out, job.names, _metadata(job))
        except KeyboardInterrupt:
            if parts.done:
                last = order[parts.done - 1]
                message(f"stopped after {last}: the same command goes on from there")
            raise


def _check_parts(job: Job, parts: Parts) -> None:
    """Raise InputError unless the parts are of the job's first stages, and the state goes on."""
    state = parts.state  # [T, D], None before the first stage
    if state is None:
        return
    done, dtype = [*job.stages][: parts.done], np.dtype(job.dtype)
    every, config = stages(job.checkpoint.config, len(job.tokens)), job.checkpoint.config
    again = f"remove {parts.folder} to begin again"
    if not 0 < len(done) == parts.done:
        message = f"has {parts.done} stages, expected 1 to {len(job.stages)}"
        raise InputError(f"{parts.folder}: {message}: {again}")
    for stage, tensors in zip(done, parts.tensors(), strict=True):
        are_same = tensors.keys() == {name for name in job.names if stage.has(name)}
        if not are_same or not {x.dtype for x in tensors.values()} <= {CODES[dtype.name], "I64"}:
            message = f"does not hold what is recorded of {stage.name}"
            raise InputError(f"{parts.folder}: {message}: {again}")
    most, D = len(job.tokens), config.hidden_size
    least = most - max(0, every.index(done[-1]) - len(config.layers))  # as in _recorded
    is_state = state.ndim == 2 and state.shape[1] == D and least <= len(state) <= most
    if not is_state or state.dtype != dtype or flaw(state):
        message = f"its state is not finite {dtype} [{most}, {D}], as after {done[-1].name}"
        raise InputError(f"{parts.folder}: {message}: {again}")


def _metadata(job: Job) -> dict[str, str]:
    config = job.checkpoint.config
    facts = {key: getattr(config, key) for key in ("hidden_size", "vocab_size", "torch_dtype")}
    facts |= {"layers": len(config.layers), "mtp_layers": len(config.mtp_layers)}
    engine = {"dtype": np.dtype(job.dtype).name, "model": json.dumps(facts)}
    return described(job.tokens, job.names, **engine, **metadata(config))


def _run(job: Job, parts: Parts, progress: Callable[[str, int, int], None]) -> None:
    """Run the stages that are not done yet, and add each to the parts."""
    left = [*job.stages][parts.done :]
    if not left:
        return
    every, names, trace = stages(job.checkpoint.config, len(job.tokens)), {*job.names}, Trace()
    state = parts.state if parts.done else job.state  # [T, D]
    sizes = {stage: job.reads(stage) for stage in left}
    done = 0

    def then(name: str, x: Array) -> None:
        nonlocal state, done
        stage = left[0]
        if name == stage.name and name != HEAD:
            if f"{name}.input" in names and state is not None:
                trace[f"{name}.input"] = state
            state = finite(name, x)
        if name != stage.last:
            return
        assert state is not None
        parts.add({n: y for n, y in trace.items() if n in names}, state)
        sizes[stage] = job.reads(stage, trace.get(f"{stage.name}.moe.ids"))
        done += sizes[stage]
        trace.clear()
        left.pop(0)
        if left:
            progress(left[0].name, done, sum(sizes.values()))

    tap = Recorder(trace, lambda name: name in names or name.endswith(".moe.ids"), then=then)
    weights = some_weights(job.checkpoint, {n for s in left for n in job.stages[s]})
    first, end = every.index(left[0]), every.index(left[-1]) + 1
    walk(job.tokens, weights, job.checkpoint.config, job.dtype, tap, first, state, end)
