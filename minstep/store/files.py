"""Input files: opened without waiting, and read with a bound on their size."""

import os
import stat
from pathlib import Path
from typing import BinaryIO

from minstep.errors import InputError


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
