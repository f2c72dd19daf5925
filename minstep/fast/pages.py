"""The pages of mapped files: asked for ahead of use, and let go of so that memory stays bounded.

A mapped weight costs memory once it is read: the process counts every page that it has touched. The
pages are clean, so letting go of them loses nothing; what the system still has in its cache comes
back without the disk.

A file that somebody cuts while it is mapped loses pages: touching one of them ends the process with
a bus error, which Python cannot catch. So small tensors are copied at once, and the size of a file
is looked at before it is copied from and before each product with a mapped weight, which costs
microseconds. A file cut during a copy or a product still ends the process.
Checked by: tests/fast/test_pages.py
"""

import math
import mmap
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from minstep.errors import InputError

resource: ModuleType | None
try:
    import resource
except ImportError:  # Windows
    resource = None

LIMIT = 1 << 30  # bytes of maps that stay resident: 1 GB, about two layers at one token
SMALL = 1 << 18  # elements of a tensor that is copied, 1 MB of float32: larger ones stay mapped
OFTEN = LIMIT // 8  # bytes touched between two looks at how much is resident
STATM = Path("/proc/self/statm")  # on Linux: sizes of this process in pages, mapped files third
HAS_STATM = STATM.exists()
DONTNEED: int | None = getattr(mmap, "MADV_DONTNEED", None)  # None: no such thing on Windows
WILLNEED: int | None = getattr(mmap, "MADV_WILLNEED", None)


class Pages:
    """The mapped files of one checkpoint, and how much of them has been touched."""

    def __init__(self) -> None:
        self.maps: list[Map] = []
        self.touched = 0  # bytes since the last look
        self.asks = True  # whether weights are asked for ahead of use
        self.read: int | None = None  # blocks this process had read from disk at the last request

    def add(self, mapped: "Map", file: Path) -> None:
        """Count a new map of `file` among these."""
        mapped.pages, mapped.file = self, file
        mapped.address = np.frombuffer(mapped, np.uint8).__array_interface__["data"][0]
        self.maps.append(mapped)


class Map(mmap.mmap):
    """One mapped file, which knows where it begins in memory and what it belongs to."""

    pages: Pages
    file: Path
    address: int

    def check(self) -> None:
        """Raise InputError where the file has become shorter since it was mapped."""
        size = self.size()
        if size < len(self):
            message = f"has {size} bytes, expected {len(self)}: it was cut while it was in use"
            raise InputError(f"{self.file}: {message}")


def check(weight: Any) -> None:
    """Raise InputError where the mapped file of a weight has become shorter.

    A weight of at most SMALL elements is a copy (see `Checkpoint.get`), and is not looked at.
    """
    if math.prod(weight.shape) > SMALL and (place := _place(weight)) is not None:
        place[0].check()


def used(weight: Any) -> None:
    """Say that a weight, an array or a stored one, has been read; in a map or not.

    When more than LIMIT bytes of maps are resident, the pages of its checkpoint leave the process.
    Bringing them back costs time even without the disk, so not before.
    """
    place = _place(weight)
    if place is None or DONTNEED is None:
        return
    pages = place[0].pages
    pages.touched += place[2]
    if pages.touched > (OFTEN if HAS_STATM else LIMIT):
        pages.touched = 0
        if not HAS_STATM or int(STATM.read_text().split()[2]) * mmap.PAGESIZE > LIMIT:
            for mapped in pages.maps:
                mapped.madvise(DONTNEED)


def will_need(*weights: Any) -> None:
    """Ask the system to read the weights from disk now, while others are computed with.

    Asking costs a look at every page, so it is left out while nothing comes from disk.
    """
    for weight in weights:
        place = _place(weight)
        if place is None or WILLNEED is None:
            continue
        mapped, start, nbytes = place
        start -= start % mmap.PAGESIZE
        mapped.madvise(WILLNEED, start, min(nbytes + mmap.PAGESIZE, len(mapped) - start))


def reads_disk(weight: Any) -> bool:
    """Whether this process has read from disk since the last question about weight's checkpoint.

    At the first question, and where the system does not tell, the answer is yes; where its pages
    shall not be asked for, it is no.
    """
    place = _place(weight)
    if place is None or resource is None or not place[0].pages.asks:
        return place is not None and place[0].pages.asks
    pages, before = place[0].pages, place[0].pages.read
    pages.read = resource.getrusage(resource.RUSAGE_SELF).ru_inblock
    return pages.read != before


def _place(weight: Any) -> tuple[Map, int, int] | None:
    """The map a weight lies in, its first byte there, and how many bytes it spans."""
    array = getattr(weight, "bits", weight)
    base = array
    while isinstance(base, np.ndarray):
        base = base.base
    mapped = base.obj if isinstance(base, memoryview) else base
    if not isinstance(mapped, Map):
        return None
    return mapped, array.__array_interface__["data"][0] - mapped.address, array.nbytes
