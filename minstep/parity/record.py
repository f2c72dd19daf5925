"""Run a prompt through chosen layers of a model of any size, and write what was computed to a file.

A stage at a time: what it computed is kept on the disk, then the next one begins; memory holds the
activations of one layer. A run that was ended goes on after the last whole stage.
Checked by: tests/parity/test_record.py
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import DTypeLike

from minstep.cli.terminal import Progress
from minstep.config import Config
from minstep.errors import InputError
from minstep.parity.choice import before, choose
from minstep.parity.facts import metadata
from minstep.parity.parts import Parts, open_parts
from minstep.parity.recording import open_recording
from minstep.parity.trace import Recorder, Trace, described, finite, walk
from minstep.store.checkpoint import Checkpoint
from minstep.store.files import read_file
from minstep.store.header import CODES
from minstep.store.inspect import expected
from minstep.store.json_file import MAX_JSON
from minstep.store.stages import EMBEDDING_WEIGHT, HEAD, Stage, needs, some_weights, stages
from minstep.tap import Array
from minstep.validation import check_prompt, flaw

EXPERTS = re.compile(r"\.moe\.(gate|up|down)_proj\.weight")


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
    held = {*checkpoint.tensors, *checkpoint.absent}
    tensors = expected(config, checkpoint.has_own_heads(), held)
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


def record_file(job: Job, out: Path, tell: Callable[[str], None]) -> None:
    """Run a job and write its recording to `out`, which appears when it is whole.

    What is done lies beside it until then: the same job goes on from there, which `tell` is told.
    The file is the same, however often the work was interrupted. Raises InputError as open_parts
    does, for an `out` that is the job's own source, for parts that the job's stages do not give,
    and where a tensor is not finite.
    """
    if job.source and out.exists() and os.path.samefile(job.source, out):
        raise InputError(f"--out {out}: is the file of --input, expected another one")
    order = [stage.name for stage in job.stages]
    with open_parts(out, job.identity()) as parts:
        _check_parts(job, parts)
        if parts.done:
            tell(f"resuming after {order[parts.done - 1]}")
        try:
            _run(job, parts)
            parts.finish(out, job.names, _metadata(job))
        except KeyboardInterrupt:
            if parts.done:
                tell(f"stopped after {order[parts.done - 1]}: the same command goes on from there")
            raise


def _check_parts(job: Job, parts: Parts) -> None:
    """Raise InputError unless the parts are of the job's first stages, and the state goes on."""
    state = parts.state  # [T, D], None before the first stage
    if state is None:
        return
    done, dtype = [*job.stages][: parts.done], np.dtype(job.dtype)
    every, config = stages(job.checkpoint.config, len(job.tokens)), job.checkpoint.config
    again = f"remove {parts.folder} to begin again"
    if len(done) < parts.done:
        message = f"has {parts.done} stages, expected at most {len(done)}"
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
    said = {"dtype": np.dtype(job.dtype).name, "model": json.dumps(facts)}
    return described(job.tokens, job.names, **said, **metadata(config, None, job.tokens, []))


def _run(job: Job, parts: Parts) -> None:
    """Run the stages that are not done yet, and add each to the parts."""
    left = [*job.stages][parts.done :]
    if not left:
        return
    every, names, trace = stages(job.checkpoint.config, len(job.tokens)), {*job.names}, Trace()
    state = parts.state if parts.done else job.state  # [T, D]
    sizes = {stage: job.reads(stage) for stage in left}
    bar = Progress(left[0].name, sum(sizes.values()), "GB", 1e9)
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
            bar.label, bar.total = left[0].name, sum(sizes.values())
            bar(done)

    tap = Recorder(trace, lambda name: name in names or name.endswith(".moe.ids"), then=then)
    weights = some_weights(job.checkpoint, {n for s in left for n in job.stages[s]})
    first, end = every.index(left[0]), every.index(left[-1]) + 1
    with bar:
        walk(job.tokens, weights, job.checkpoint.config, job.dtype, tap, first, state, end)
