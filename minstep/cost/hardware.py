"""What machines can do: bytes and FLOPs a second, as published or as measured here.

Checked by: tests/cost/test_roofline.py
"""

import os
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from minstep.errors import InputError
from minstep.fast.threads import THREADS, each

# What of a device's figures a decoder reaches, one value for all models and devices:
READS = 0.9  # of the bandwidth: 3000 of 3350 GB/s, FlashMLA's README
MULTIPLIES = 0.41  # of the FLOPs: 410 of 989 TFLOPS decoding from an 8-bit cache, the same README
ROOM = 0.9  # of the memory, vLLM's default: the rest is for activations and the system
LAYER = 100e-6  # seconds a layer waits for other devices of its node: see Assumed in serving.py
KEPT = 0.77  # of the drafts that are reached: 2.8 tokens of 3 drafts, vllm-ascend pull 10556


class Hardware(NamedTuple):
    """One device: its figures at full speed, without sparsity, and how many one has.

    `bandwidth` in bytes/s; `bf16` and `fp8` in FLOP/s of matrix products, fp8 the same as bf16
    where it has no such unit; `memory` in bytes; `usual`: devices of a node. `source`: where the
    figures stand.
    """

    label: str
    bandwidth: float
    bf16: float
    fp8: float
    memory: float
    usual: int
    source: str

    @property
    def ridge(self) -> float:
        """FLOPs a byte from which on multiplying takes longer than reading, in bfloat16."""
        return self.bf16 / self.bandwidth

    @property
    def reached(self) -> tuple[float, float]:
        """Shares of bandwidth and of FLOPs that are expected: all of what was measured."""
        return (1.0, 1.0) if self.source.startswith("measured") else (READS, MULTIPLIES)


HOPPER = "glennklockwood.com/garden/processors/h100; FP8 half of NVIDIA's sparse 3958e12"
STEP3 = "as H100, but for links between GPUs; FP8 ridge of 591: arXiv 2507.19427"
H20 = "huggingface.co/hardware/h20; FP8 ridge of 74: arXiv 2507.19427"
HARDWARE = {
    "h800": Hardware("H800", 3.35e12, 989.4e12, 1979e12, 80e9, 8, STEP3),
    "h100": Hardware("H100", 3.35e12, 989.4e12, 1979e12, 80e9, 8, HOPPER),
    "h200": Hardware("H200", 4.8e12, 989.4e12, 1979e12, 141e9, 8, "as H100; NVIDIA's H200 page"),
    "h20": Hardware("H20", 4.0e12, 148e12, 296e12, 96e9, 8, H20),
    "dgx-spark": Hardware(
        "DGX Spark", 273e9, 125e12, 250e12, 128e9, 1, "NVIDIA; an 8th, a 4th of sparse FP4's 1e15"
    ),
    "m4-max": Hardware(
        "M4 Max", 546e9, 34e12, 34e12, 128e9, 1, "Apple; FP16: gpuhunter.io/gpu/m4-max"
    ),
}


def find_hardware(names: list[str]) -> list[Hardware]:
    """The devices of these names; all that are known where none is named.

    Raises InputError for a name that is not known.
    """
    for name in names:
        if name not in HARDWARE:
            known = ", ".join(HARDWARE)
            raise InputError(f"--hardware {name}: is not known, expected one of {known}")
    return [HARDWARE[name] for name in names or HARDWARE]


def measure(seconds: float = 0.1, elements: int = 1 << 25, side: int = 1024) -> Hardware:
    """This machine, measured as the model here would use it: threads that read, and multiply.

    Bandwidth: the fastest of several rounds in which all threads read float32 memory of `elements`
    numbers, more than caches hold, and do nothing else. FLOPs: a product [side, side] in each
    thread, in float32, which is what minstep computes in. Rounds go on for `seconds` each.
    """
    memory = np.ones((THREADS, elements // THREADS), np.float32).view(np.uint64)
    squares = np.ones((THREADS, side, side), np.float32)
    reading = _fastest(lambda: list(each(np.max, [(part,) for part in memory])), seconds)
    multiplying = _fastest(lambda: list(each(np.matmul, [(x, x) for x in squares])), seconds)
    rate = THREADS * 2 * side**3 / multiplying
    label, source = f"here, {THREADS} threads", "measured, float32"
    return Hardware(label, memory.nbytes / reading, rate, rate, _memory(), 1, source)


def _fastest(work: Callable[[], object], seconds: float) -> float:
    """Seconds of the fastest of several calls."""
    best, end = float("inf"), time.perf_counter() + seconds
    for n in range(1000):
        started = time.perf_counter()
        work()
        stopped = time.perf_counter()
        best = min(best, stopped - started)
        if stopped > end and n:
            break
    return best


def _memory() -> float:
    """Bytes of memory of this machine; 0 where the system does not say."""
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, ValueError, OSError):
        return 0.0
