"""Output that is whole or absent, as files, folders and safetensors files; locks of folders."""

import json
import math
import os
import secrets
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from minstep.errors import InputError
from minstep.store.files import os_reason
from minstep.store.header import BYTES
from minstep.tap import Array

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
resource: ModuleType | None
try:
    import resource
except ImportError:  # Windows
    resource = None

# What make-tiny writes. A folder of nothing else, with this mark in its shards, may be replaced.
MADE_BY = "minstep make-tiny"
OWNED = ".lock"  # in a folder that one process writes into over time
TEMPORARY = ".minstep."  # how a name begins that is renamed when all is written
CODES = {"float32": "F32", "float64": "F64", "int64": "I64"}  # of the dtypes that arrays have
OUR_FILES = ("config.json", "tokenizer.json", "model*.safetensors", "model.safetensors.index.json")


def check_output(out: Path | None, inputs: Iterable[Path]) -> None:
    """Raise InputError where `out` is one of the inputs, or a file in one that is a folder.

    Names do not matter: a link, another spelling and a hard link are the same file.
    """
    if out is None:
        return
    for path in inputs:
        files, whose = [path], "is an input of the command"
        if os.path.isdir(path) and not os.path.isdir(out):
            files, whose = [*path.iterdir()], "belongs to the checkpoint or configuration"
        if any(_is_same(each, out) for each in files):
            raise InputError(f"--out {out}: {whose} {path}, expected another path")


def _is_same(path: Path, other: Path) -> bool:
    """Whether both are there and are one file."""
    try:
        return path.samefile(other)
    except (OSError, ValueError):
        return False


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`, and rename it to `path` when the block ends well.

    Any exception, Ctrl-C included, removes the temporary file and leaves `path` as it was. A link
    is followed. Raises InputError when the file cannot be written.
    """
    temporary: Path | None = None
    target = _target(path)
    try:
        if target.is_symlink():
            raise InputError(f"{path}: cannot be written: it is a link to itself")
        if target.is_dir():
            raise InputError(f"{path}: cannot be written: it is a directory")
        if target.exists() and not target.is_file():  # the rename would replace even /dev/null
            raise InputError(f"{path}: cannot be written: it is a device, expected a file")
        temporary = _beside(target)
        temporary.touch(mode=0o600, exist_ok=False)
        yield temporary
        temporary.chmod(0o666 & ~_umask())
        os.replace(temporary, target)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {os_reason(error)}") from error
    finally:
        if temporary is not None:
            _remove(temporary, Path.unlink)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole. Raises InputError where it cannot be written."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Give a temporary folder beside `path`, and rename it to `path` when the block ends well.

    A folder that is already at `path` is replaced only if it is empty or make-tiny has made it. A
    link is followed. Raises InputError when it holds anything else or cannot be written.
    """
    temporary: Path | None = None
    name, path = str(path), _target(path)
    try:
        if path.exists() and not path.is_dir():
            raise InputError(f"{name}: cannot be written: it is a file, expected a new folder")
        entries = sorted(path.iterdir()) if path.exists() else []
        foreign = [entry for entry in entries if not _is_ours(entry)]
        if not any(entry.suffix == ".safetensors" for entry in entries):
            foreign += entries  # a config alone is somebody's own
        if foreign:
            message = f"{foreign[0].name}, which make-tiny did not write"
            raise InputError(f"{name}: holds {message}, expected a new or empty folder")
        temporary = _beside(path)
        temporary.mkdir(mode=0o700)
        new = temporary / "new"
        new.mkdir()
        yield new
        if path.exists():
            path.rename(temporary / "old")
        try:
            new.rename(path)
        except BaseException:  # the old folder lies where it would be removed: put it back
            if (temporary / "old").exists():
                (temporary / "old").rename(path)
            raise
    except OSError as error:
        raise InputError(f"{name}: cannot be written: {os_reason(error)}") from error
    finally:
        if temporary is not None:
            _remove(temporary, shutil.rmtree)


@contextmanager
def owned_folder(folder: Path) -> Iterator[None]:
    """Make a folder into which this process alone writes until the block ends.

    What is made here and left empty is removed. Raises InputError where the folder cannot be
    written, and where another process writes there.
    """
    made = [each for each in (folder, *folder.parents) if not os.path.lexists(each)]
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except FileExistsError as error:
            message = "cannot be written: it is a file, a device or a link to nothing"
            raise InputError(f"{folder}: {message}, expected a folder") from error
        except (OSError, ValueError) as error:
            raise InputError(f"{folder}: cannot be written: {os_reason(error)}") from error
        with locked(folder / OWNED, folder):
            try:
                yield
            finally:
                (folder / OWNED).unlink(missing_ok=True)
    finally:
        with suppress(OSError):
            for each in made:
                each.rmdir()


@contextmanager
def locked(file: Path, folder: Path) -> Iterator[None]:
    """Hold the lock `file` of a folder: it goes with the process, however that ends.

    Raises InputError where another process holds it. Without locks, as on Windows and some network
    drives, two runs at once are not noticed.
    """
    if fcntl is None:
        yield
        return
    try:
        lock = os.fdopen(os.open(file, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
    except OSError as error:
        raise InputError(f"{folder}: cannot be written: {os_reason(error)}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_free = os.fstat(lock.fileno()).st_nlink > 0  # else a run has ended just now
        except BlockingIOError:
            is_free = False
        except OSError:
            is_free = True
        if not is_free:
            raise InputError(f"{folder}: another run is writing there, expected one for an --out")
        yield


def _target(path: Path) -> Path:
    """Where `path` leads when links are followed; still a link where one leads back to itself."""
    try:
        return Path(os.path.realpath(path))
    except (OSError, ValueError) as error:  # a zero byte, or what is no character of a name
        raise InputError(f"{path}: cannot be written: {os_reason(error)}") from error


def _beside(target: Path) -> Path:
    """A hidden path that nothing has, known before it is made: a signal may come in between.

    Short, for the name of the target may be as long as a name can be.
    """
    return target.parent / f"{TEMPORARY}{secrets.token_hex(8)}"


def _remove(temporary: Path, remove: Callable[[Path], None]) -> None:
    """Remove what may never have come to be, in spite of a second Ctrl-C meanwhile."""
    try:
        with suppress(OSError):
            remove(temporary)
    except BaseException:
        with suppress(OSError):
            remove(temporary)
        raise


def _is_ours(entry: Path) -> bool:
    """Whether make-tiny may have written a file: its name fits, and a shard says so itself."""
    if not entry.is_file() or not any(entry.match(pattern) for pattern in OUR_FILES):
        return False
    with entry.open("rb") as opened:
        return entry.suffix != ".safetensors" or MADE_BY.encode() in opened.read(200)


def check_space(path: Path, needed: int) -> None:
    """Raise InputError when a folder at `path` would need more bytes than its disk has free."""
    try:
        free = shutil.disk_usage(_target(path).parent).free
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {os_reason(error)}") from error
    if needed > free:
        raise InputError(f"{path}: needs {needed} bytes, but only {free} are free there")


def peak_memory() -> int | None:
    """The most bytes this process has had resident; None where the system does not tell."""
    if resource is None:
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(most) * (1 if sys.platform == "darwin" else 1024)


def _umask() -> int:
    """Read the process's umask, which POSIX only lets one read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def laid_out(
    tensors: dict[str, tuple[str, tuple[int, ...]]], metadata: dict[str, str]
) -> tuple[bytes, dict[str, int]]:
    """How a new file begins, and where in it each tensor lies, widest dtypes first.

    `tensors`: dtype code and shape by name. Returns all bytes before the first tensor, and the
    first byte of each tensor in the order of the file. So laid out, every tensor is aligned.
    """
    header: dict[str, Any] = {"__metadata__": metadata}
    reached = 0
    for name, (dtype, shape) in sorted(tensors.items(), key=lambda item: -BYTES[item[1][0]]):
        end = reached + math.prod(shape) * BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [reached, end]}
        reached = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    del header["__metadata__"]
    data = 8 + len(text)
    places = {name: data + entry["data_offsets"][0] for name, entry in header.items()}
    return len(text).to_bytes(8, "little") + text, places


class Data(NamedTuple):
    """A tensor to be written: its dtype code, its shape, and its bytes piece by piece."""

    dtype: str
    shape: tuple[int, ...]
    pieces: Iterable[Any]

    @classmethod
    def of(cls, x: Array) -> "Data":
        """An array of a dtype that activations have."""
        return cls(CODES[x.dtype.name], x.shape, [np.ascontiguousarray(x).data])


def write_tensors(file: Path, tensors: dict[str, Data], metadata: dict[str, str]) -> None:
    """Write a safetensors file, a piece at a time. Wider dtypes lie first: all are aligned.

    The package's own writer wants a whole file in memory. Raises OSError.
    """
    start, places = laid_out({name: x[:2] for name, x in tensors.items()}, metadata)
    with file.open("wb") as opened:
        opened.write(start)
        for name in places:
            opened.writelines(tensors[name].pieces)
