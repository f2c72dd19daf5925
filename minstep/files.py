"""Where the maths meets the machine: one kind of error, and output that is whole or absent."""

import os
import secrets
import shutil
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import BinaryIO

resource: ModuleType | None
try:
    import resource
except ImportError:  # Windows
    resource = None

# What make-tiny writes. A folder of nothing else, with this mark in its shards, may be replaced.
MADE_BY = "minstep make-tiny"
LONGEST_MESSAGE = 2000  # characters of an InputError
OUR_FILES = ("config.json", "tokenizer.json", "model*.safetensors", "model.safetensors.index.json")


class InputError(ValueError):
    """Something handed to minstep is wrong: the message names it and says what was expected.

    Raised for a path, file, tensor, config key or token id. The command line prints the message
    as one line on stderr and exits with 2. What a terminal would act on is escaped here, so that no
    message can carry it from a file, and a message has at most LONGEST_MESSAGE characters.
    """

    def __init__(self, message: str) -> None:
        super().__init__(shown(" ".join(message.split()), LONGEST_MESSAGE))


def shown(text: str, longest: int = 120) -> str:
    """A name from a file as a message or table shows it: printable, and cut in its middle.

    Escape sequences, line ends, bidirectional controls and lone surrogates become escapes such as
    `\\x1b`. Text of more than `longest` characters keeps its two ends around an ellipsis.
    """
    if len(text) > longest:
        text = f"{text[: longest // 2]}…{text[len(text) - longest // 2 + 1 :]}"
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def open_file(path: Path) -> BinaryIO:
    """Open a file to read its bytes; what is no regular file may never end, and is refused.

    Raises InputError for what is missing, unreadable, a folder, a pipe or a device.
    """
    try:
        flags = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)
        descriptor = os.open(path, flags)  # a pipe without a writer would else keep us waiting
    except (OSError, ValueError) as error:  # a path with a zero byte is a ValueError
        raise InputError(f"{path}: cannot be read: {os_reason(error)}") from error
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe or a device"
        raise InputError(f"{path}: cannot be read: it is {kind}, expected a file")
    return os.fdopen(descriptor, "rb")


def read_file(path: Path, most: int) -> bytes:
    """The bytes of a file of at most `most` bytes. Raises InputError as open_file does, and for
    a larger one: nothing beyond is read, even where the file grows meanwhile.
    """
    with open_file(path) as opened:
        try:
            content = opened.read(most + 1)
        except OSError as error:
            raise InputError(f"{path}: cannot be read: {os_reason(error)}") from error
    if len(content) > most:
        raise InputError(f"{path}: is larger than {most:,} bytes, expected at most that many")
    return content


def os_reason(error: OSError | ValueError) -> str:
    """The short text of an operating system error, such as `Permission denied`."""
    return getattr(error, "strerror", None) or str(error)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`, and rename it to `path` when the block ends well.

    Any exception, Ctrl-C included, removes the temporary file and leaves `path` as it was. A link
    is followed. Raises InputError when the file cannot be written.
    """
    temporary: Path | None = None
    try:
        target = _target(path)
        if target.is_symlink():
            raise InputError(f"{path}: cannot be written: it is a link to itself")
        if target.is_dir():
            raise InputError(f"{path}: cannot be written: it is a directory")
        if target.exists() and not target.is_file():  # the rename would replace even /dev/null
            raise InputError(f"{path}: cannot be written: it is a device, expected a file")
        temporary = _beside(target, path.name)
        temporary.touch(mode=0o600, exist_ok=False)
        yield temporary
        temporary.chmod(0o666 & ~_umask())
        os.replace(temporary, target)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {os_reason(error)}") from error
    finally:
        if temporary is not None:
            with suppress(OSError):  # it may never have come to be
                temporary.unlink()


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
        temporary = _beside(path, path.name)
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
            shutil.rmtree(temporary, ignore_errors=True)


def _target(path: Path) -> Path:
    """Where `path` leads when links are followed; still a link where one leads back to itself."""
    return Path(os.path.realpath(path))


def _beside(target: Path, name: str) -> Path:
    """A hidden path that nothing has, known before it is made: a signal may come in between."""
    return target.with_name(f".{name}.{secrets.token_hex(4)}")


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


def abandon_stdout() -> None:
    """Where stdout cannot be written, lead it to nowhere: Python's own flush would fail too."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _umask() -> int:
    """Read the process's umask, which POSIX only lets one read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
