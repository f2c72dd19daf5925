"""A recording on its way to one file: what each stage computed is kept as soon as it is done.

`.NAME.parts` beside the output NAME holds a safetensors file for each finished stage, the state
after the last one, and run.json, which says what is recorded and lists the files with their
checksums. A file that it does not list does not count, so a stage is there whole or not at all.
Checked by: tests/test_record.py
"""

import json
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any

from safetensors.numpy import load_file

from minstep.files import InputError, atomic_file, os_reason
from minstep.header import Tensor, read_header
from minstep.keys import read_json
from minstep.lab.trace import Data, Trace, write_tensors
from minstep.tap import Array

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # Windows: two runs at once are not noticed
    fcntl = None

PIECE = 1 << 20  # bytes copied or read at a time
JOURNAL, LOCK, WHOLE = "run.json", "lock", "whole.safetensors"
OURS = ("*.safetensors", ".*.safetensors.*", f".{JOURNAL}.*")  # with what a killed run leaves


class Parts:
    """The finished stages of one recording, in a folder that this process alone writes.

    `done` are the stages' names, `state` [T, D] is that after the last of them, None before the
    first.
    """

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        self.folder = folder
        self.state: Array | None = None
        self._run: dict[str, Any] = {"recording": identity, "done": [], "state": None}
        if (folder / JOURNAL).exists():
            self._resume(identity)
        self._tidy()

    @property
    def done(self) -> list[str]:
        """The names of the finished stages, in order."""
        return [part["stage"] for part in self._run["done"]]

    def add(self, stage: str, tensors: Trace, state: Array) -> None:
        """Keep what a stage computed, and the state [T, D] after it.

        Raises InputError when it cannot be written; then the stages before it stay as they are.
        """
        n = len(self._run["done"])
        part = {"stage": stage} | self._write(f"{n:05}.safetensors", tensors)
        after = self._write(f"state-{n:05}.safetensors", {"state": state})
        run = self._run | {"done": [*self._run["done"], part], "state": after}
        with atomic_file(self.folder / JOURNAL) as temporary:
            temporary.write_text(json.dumps(run), encoding="utf-8")
        self._run, self.state = run, state
        self._tidy()  # of the state before

    def finish(self, out: Path, order: list[str], metadata: dict[str, str]) -> None:
        """Put all tensors into one file at `out`, a piece at a time, and forget the parts."""
        found: dict[str, Tensor] = {}
        for part in self._run["done"]:
            found |= read_header(self.folder / part["file"])
        tensors = {n: Data(found[n].dtype, found[n].shape, _pieces(found[n])) for n in order}
        with _naming(out):
            write_tensors(self.folder / WHOLE, tensors, metadata)
            os.replace(self.folder / WHOLE, os.path.realpath(out))
        self._run = self._run | {"done": []}

    def remove(self) -> None:
        """Remove the folder: the journal first, so that what is left counts no more, the lock last.

        Another run that waits for the lock then finds a folder that is empty or its own.
        """
        first, last = self.folder / JOURNAL, self.folder / LOCK
        others = [file for file in self.folder.iterdir() if file not in (first, last)]
        with suppress(OSError):
            for file in (first, *others, last):
                file.unlink(missing_ok=True)
            self.folder.rmdir()

    def _write(self, name: str, tensors: Trace) -> dict[str, Any]:
        with atomic_file(self.folder / name) as temporary:
            write_tensors(temporary, {n: Data.of(x) for n, x in tensors.items()}, {})
        return {"file": name, "crc32": _checksum(self.folder / name)}

    def _resume(self, identity: dict[str, Any]) -> None:
        """Go on where another run ended: what it kept is what is wanted, and is not damaged."""
        run = read_json(self.folder / JOURNAL)
        again = f"remove {self.folder} to begin again"
        try:
            other = [key for key in identity if run["recording"][key] != identity[key]]
            if other:
                message = f"belongs to another recording ({', '.join(other)})"
                raise InputError(f"{self.folder}: {message}: remove it or choose another --out")
            for part in ({"stage": ""} | run["state"], *run["done"]):
                file, _ = self.folder / part["file"], part["stage"]
                if _checksum(file) != part["crc32"]:
                    raise InputError(f"{file}: is damaged, {again}")
        except (KeyError, TypeError, OSError) as error:
            message = f"is not as record left it ({error}), {again}"
            raise InputError(f"{self.folder / JOURNAL}: {message}") from error
        self._run = run
        self.state = load_file(self.folder / run["state"]["file"])["state"]  # [T, D]

    def _tidy(self) -> None:
        """Remove files that a killed run left, and the state before the last."""
        kept = {LOCK, JOURNAL, *(part["file"] for part in self._run["done"])}
        kept |= {self._run["state"]["file"]} if self._run["state"] else set()
        for file in self.folder.iterdir():
            if file.name not in kept:
                if not any(file.match(pattern) for pattern in OURS):
                    raise InputError(f"{file}: is no part of a recording, expected none beside it")
                file.unlink()


@contextmanager
def open_parts(out: Path, identity: dict[str, Any]) -> Iterator[Parts]:
    """The parts of the recording that goes to `out`; they stay when the block ends too early.

    `identity` holds JSON values that say what is recorded. Raises InputError when `out` or the
    folder cannot be written, when another run is writing there, and when the folder holds parts of
    another recording or damaged ones.
    """
    target = Path(os.path.realpath(out))
    folder = target.parent / f".{target.name}.parts"
    with _naming(out):
        if target.is_symlink() or (target.exists() and not target.is_file()):
            message = "it is a directory, a device or a link to itself, expected a file"
            raise InputError(f"{out}: cannot be written: {message}")
        folder.mkdir(exist_ok=True)
    with _locked(folder):
        parts = Parts(folder, json.loads(json.dumps(identity)))
        try:
            yield parts
        finally:
            if not parts.done:
                parts.remove()


@contextmanager
def _naming(out: Path) -> Iterator[None]:
    """Turn an error of the system into one that names the output."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{out}: cannot be written: {os_reason(error)}") from error


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, which goes with the process however it ends."""
    if fcntl is None:
        yield
        return
    with (folder / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_free = os.fstat(lock.fileno()).st_nlink > 0  # else a run has ended just now
        except BlockingIOError:
            is_free = False
        if not is_free:
            raise InputError(f"{folder}: another run is writing there, expected one for an --out")
        yield


def _checksum(file: Path) -> int:
    """CRC-32 of a whole file."""
    checksum = 0
    with file.open("rb") as opened:
        while piece := opened.read(PIECE):
            checksum = zlib.crc32(piece, checksum)
    return checksum


def _pieces(tensor: Tensor) -> Iterator[bytes]:
    """The bytes of a tensor in its file."""
    with tensor.file.open("rb") as opened:
        opened.seek(tensor.offset)
        left = tensor.nbytes
        while left:
            piece = opened.read(min(PIECE, left))
            left -= len(piece)
            yield piece
