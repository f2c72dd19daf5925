"""How long a pass takes at best: reading or multiplying, whichever is longer; and the figure of it.

Checked by: tests/cost/test_roofline.py, tests/cost/test_report.py
"""

from collections.abc import Callable, Sequence
from itertools import accumulate
from operator import mul
from typing import NamedTuple

from minstep.config import Config
from minstep.cost.count import FORMS, PassCost, cache_bytes, decoding_pass, stored_bytes
from minstep.cost.hardware import HARDWARE, LAYER, ROOM, Hardware
from minstep.draw.charts import line_chart

MOST_GPUS, MOST_BATCH = 1024, 1 << 16
LOW, HIGH = 0.5, 2048.0  # FLOPs a byte that the figure shows
MOST_LINES = 6  # lines that a chart can tell apart
DRAWN = ("h100", "h200", "h20", "dgx-spark", "m4-max")  # an H800's roof is an H100's
TEXTS = (1, 64, 1024)  # whose passes are marked


class Deployment(NamedTuple):
    """A model on hardware: what it is stored as, on how many devices, with which drafts.

    `form`: a key of FORMS. `acceptance`: for each depth the share of its drafts that are kept where
    all before them were; () decodes without drafts. `context` in positions.
    """

    config: Config
    hardware: Hardware
    gpus: int
    form: str
    context: int
    acceptance: tuple[float, ...]

    @property
    def exchanges(self) -> float:
        """Seconds a pass spends in exchanges between devices, beside reading and multiplying."""
        layers = len(self.config.layers) + len(self.acceptance)
        return LAYER * layers if self.gpus > 1 else 0.0


def tokens_per_pass(acceptance: Sequence[float]) -> float:
    """Tokens that a pass yields: the model's own one, and each draft whose forerunners were kept.

    1 + a1 + a1*a2 + ..., where a_k is the share kept of depth k's drafts once it is reached.
    Source: chapter 9 of the book.
    """
    return 1 + sum(accumulate(acceptance, mul))


def pass_of(setup: Deployment, batch: int = 1) -> PassCost:
    """What one pass over `batch` texts costs."""
    drafts = len(setup.acceptance)
    return decoding_pass(setup.config, FORMS[setup.form], setup.context, batch, drafts)


def pass_seconds(setup: Deployment, batch: int = 1, is_expected: bool = False) -> float:
    """Seconds of a pass over `batch` texts, read and multiplied evenly by all devices.

    At least the longer of reading and multiplying: a bound that no kernel beats. `is_expected`: the
    sum of both at the shares of full speed that are reached, and of the waiting in exchanges.
    Weights in 8 bits are multiplied at FP8's rate, and attention with them, which is generous.
    Source: the roofline model, Williams, Waterman and Patterson 2009.
    """
    cost = pass_of(setup, batch)
    rate = setup.hardware.fp8 if setup.form == "fp8" else setup.hardware.bf16
    multiplying = cost.flops / (setup.gpus * rate)
    reading = cost.bytes / (setup.gpus * setup.hardware.bandwidth)
    if is_expected:
        reads, multiplies = setup.hardware.reached
        return reading / reads + multiplying / multiplies + setup.exchanges
    return max(reading, multiplying)


def speed(setup: Deployment, batch: int = 1, is_expected: bool = False) -> float:
    """Tokens a second of each text."""
    return tokens_per_pass(setup.acceptance) / pass_seconds(setup, batch, is_expected)


def room(setup: Deployment) -> float:
    """Bytes left for caches beside the weights; negative where the weights do not fit.

    ROOM of the memory is used: the rest is for activations and what the system holds.
    """
    weights = stored_bytes(setup.config, FORMS[setup.form])
    return ROOM * setup.gpus * setup.hardware.memory - weights


def fitting_batch(setup: Deployment) -> int:
    """How many texts of `context` positions fit beside the weights."""
    specs = [*setup.config.layers, *setup.config.mtp_layers[: len(setup.acceptance)]]
    return max(0, min(MOST_BATCH, int(room(setup) // cache_bytes(specs, setup.context))))


def batch_within(setup: Deployment, latency: float) -> int:
    """The most texts at once for which a token takes at most `latency` seconds, and which fit.

    By the expected time of a pass; 0 where one text alone takes longer, or does not fit.
    """
    target = 1 / latency
    return last_that_holds(lambda n: speed(setup, n, True) >= target, fitting_batch(setup))


def gpus_for(setup: Deployment, target: float) -> int | None:
    """The fewest devices on which one text is expected to reach `target` tokens a second.

    At least as many as the weights and one text's caches fit on. None where MOST_GPUS, or any
    number, is too slow, for each layer's exchange stays; and for devices that do not come several
    to a node, whose exchanges are not known.
    """
    if setup.hardware.usual == 1:
        return 1 if fitting_batch(setup) and speed(setup, 1, True) >= target else None

    def is_short(gpus: int) -> bool:
        here = setup._replace(gpus=gpus)
        return fitting_batch(here) < 1 or speed(here, 1, True) < target

    if not is_short(1):
        return 1
    gpus = last_that_holds(is_short, MOST_GPUS) + 1
    return gpus if gpus <= MOST_GPUS else None


def last_that_holds(holds: Callable[[int], bool], most: int) -> int:
    """The largest n up to `most` for which `holds`, which is true up to some n and false after."""
    low, high = 0, most + 1  # holds(low) is taken for granted, high is out of bounds
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def form_that_fits(setup: Deployment) -> str:
    """The most precise of FORMS in which the weights and a text fit; the smallest if none does."""
    fits = (name for name in FORMS if fitting_batch(setup._replace(form=name)))
    return next(fits, [*FORMS][-1])


def roofline_svg(
    config: Config, context: int, devices: Sequence[Hardware] = (), drafts: int = 0
) -> str:
    """FLOP/s that a device reaches over FLOPs for each byte read, in bfloat16.

    Up to its ridge a device waits for memory. Dashed lines stand where passes over some numbers of
    texts lie, each with `context` positions, one of them with `drafts` drafts. Raises ValueError
    for more devices than a chart can tell apart.
    """
    devices = devices or [HARDWARE[name] for name in DRAWN]
    if len(devices) > MOST_LINES:
        raise ValueError(f"has {len(devices)} devices, expected at most {MOST_LINES}")
    form = FORMS["bf16"]
    marks = {
        f"{n:,} text{'s' if n > 1 else ''}": decoding_pass(config, form, context, n).intensity
        for n in TEXTS
    }
    if drafts:
        one = decoding_pass(config, form, context, 1, drafts)
        marks[f"1 text, {drafts} drafts"] = one.intensity
    roofs = {}
    for device in devices:
        bends = [LOW, min(max(LOW, device.ridge), HIGH), HIGH]
        roofs[device.label] = [
            (x, min(x * device.bandwidth, device.bf16) / 1e12) for x in dict.fromkeys(bends)
        ]
    return line_chart(
        f"What a pass can reach, at {context:,} tokens of context",
        roofs,
        "FLOPs for each byte read",
        "TFLOP/s",
        bases=(4, 10),
        x_marks={words: x for words, x in marks.items() if LOW <= x <= HIGH},
    )
