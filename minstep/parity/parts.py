"""A recording on its way to one file: what each stage computed is kept as soon as it is done.

`.NAME.parts` beside the output NAME holds a safetensors file for each finished stage, the state
after the last one, and run.json, which says what is recorded and has a checksum of each file. A
file without one does not count, so a stage is there whole or not at all. The names of the files
follow from how many there are, so that a damaged run.json cannot mix up stages.
Checked by: tests/parity/test_record.py
"""

import hashlib
import json
import os
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.numpy import load_file

from minstep.errors import InputError
from minstep.parity.trace import Trace
from minstep.store.files import (
    TEMPORARY,
    atomic_file,
    locked,
    open_file,
    os_reason,
    read_file,
)
from minstep.store.header import Data, Tensor, read_header, write_tensors
from minstep.store.json_file import MAX_JSON, strict_json
from minstep.tap import Array

LONGEST_NAME = 200  # bytes; file systems allow 255, some fewer
PIECE = 1 << 20  # bytes copied or read at a time
JOURNAL, LOCK, WHOLE = "run.json", "lock", "whole.safetensors"
PART, STATE = "{:05}.safetensors", "state-{:05}.safetensors"  # of the stages, from 0
# What a damaged journal or state raises; a dtype that NumPy lacks is an AttributeError.
DAMAGES = (
    KeyError,
    TypeError,
    ValueError,
    AttributeError,
    RecursionError,
    OSError,
    SafetensorError,
)
# What may be removed: these, and what atomic_file had not renamed.
NAMES = r"(((state-)?\d{5,}|whole)\.safetensors|run\.json)"
OURS = re.compile(rf"{NAMES}|{re.escape(TEMPORARY)}\w+")


class Parts:
    """The finished stages of one recording, in a folder that this process alone writes.

    `done` is how many there are, `state` [T, D] that after the last of them, None before the first.
    """

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        self.folder = folder
        self.state: Array | None = None
        self._run: dict[str, Any] = {"recording": identity, "done": [], "state": None}  # CRC-32
        if (folder / JOURNAL).exists():
            self._resume(identity)
        self._tidy()

    @property
    def done(self) -> int:
        """How many stages are finished."""
        return len(self._run["done"])

    def tensors(self) -> list[dict[str, Tensor]]:
        """What is kept of each finished stage."""
        return [read_header(self.folder / PART.format(n)) for n in range(self.done)]

    def add(self, tensors: Trace, state: Array) -> None:
        """Keep what the next stage computed, and the state [T, D] after it.

        Raises InputError when it cannot be written; then the stages before it stay as they are.
        """
        part = self._write(PART.format(self.done), tensors)
        after = self._write(STATE.format(self.done), {"state": state})
        run = self._run | {"done": [*self._run["done"], part], "state": after}
        with atomic_file(self.folder / JOURNAL) as temporary:
            temporary.write_text(json.dumps(run), encoding="utf-8")
        self._run, self.state = run, state
        self._tidy()  # of the state before

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
        self._run = self._run | {"done": []}

    def remove(self) -> None:
        """Remove the folder: the journal first, so that what is left counts no more, the lock last.

        Another run that waits for the lock then finds a folder that is empty or its own.
        """
        first, last = self.folder / JOURNAL, self.folder / LOCK
        others = [file for file in self.folder.iterdir() if OURS.fullmatch(file.name)]
        with suppress(OSError):
            for file in (first, *others, last):
                file.unlink(missing_ok=True)
            self.folder.rmdir()

    def _write(self, name: str, tensors: Trace) -> int:
        with atomic_file(self.folder / name) as temporary:
            write_tensors(temporary, {n: Data.of(x) for n, x in tensors.items()}, {})
        return _checksum(self.folder / name)

    def _resume(self, identity: dict[str, Any]) -> None:
        """Go on where another run ended: what it kept is what is wanted, and is not damaged."""
        journal, again = self.folder / JOURNAL, f"remove {self.folder} to begin again"
        try:
            run = strict_json(read_file(journal, MAX_JSON).decode("utf-8"))
            other = next((k for k in identity if run["recording"][k] != identity[k]), None)
            after = self.folder / STATE.format(len(run["done"]) - 1)
            sums = {self.folder / PART.format(n): crc for n, crc in enumerate(run["done"])}
            sums[after] = run["state"]
            damaged = [] if other else [f for f, crc in sums.items() if _checksum(f) != crc]
            state = None if other or damaged else load_file(after)["state"]  # [T, D]
        except DAMAGES as error:
            raise InputError(f"{journal}: is not as record left it ({error}), {again}") from error
        if other:
            message = f"belongs to another recording ({other})"
            raise InputError(f"{self.folder}: {message}: remove it or choose another --out")
        if damaged:
            raise InputError(f"{damaged[0]}: is damaged, {again}")
        self._run, self.state = run, state

    def _tidy(self) -> None:
        """Remove files that a killed run left, and the state before the last."""
        kept = {LOCK, JOURNAL, STATE.format(self.done - 1), *map(PART.format, range(self.done))}
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


def _checksum(file: Path) -> int:
    """CRC-32 of a whole file."""
    checksum = 0
    with open_file(file) as opened:
        while piece := opened.read(PIECE):
            checksum = zlib.crc32(piece, checksum)
    return checksum


def _pieces(tensor: Tensor) -> Iterator[bytes]:
    """The bytes of a tensor in its file."""
    with open_file(tensor.file) as opened:
        opened.seek(tensor.offset)
        left = tensor.nbytes
        while left:
            piece = opened.read(min(PIECE, left))
            left -= len(piece)
            yield piece
