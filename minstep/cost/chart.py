"""The roofline of each device, with what passes of the model ask of it, as one SVG figure.

Checked by: tests/cost/test_command.py
"""

from collections.abc import Sequence

from minstep.config import Config
from minstep.cost.count import FORMS, decoding_pass
from minstep.cost.hardware import HARDWARE, Hardware
from minstep.draw.charts import line_chart

LOW, HIGH = 0.5, 2048.0  # FLOPs a byte that the figure shows
MOST = 6  # lines that a chart can tell apart
SHOWN = ("h100", "h200", "h20", "dgx-spark", "m4-max")  # an H800's roof is an H100's
TEXTS = (1, 64, 1024)


def roofline_svg(
    config: Config, context: int, devices: Sequence[Hardware] = (), drafts: int = 0
) -> str:
    """FLOP/s that a device reaches over FLOPs for each byte read, in bfloat16.

    Up to its ridge a device waits for memory. Dashed lines stand where passes over some numbers of
    texts lie, each with `context` positions, one of them with `drafts` drafts. Raises ValueError
    for more devices than a chart can tell apart.
    """
    devices = devices or [HARDWARE[name] for name in SHOWN]
    if len(devices) > MOST:
        raise ValueError(f"has {len(devices)} devices, expected at most {MOST}")
    form = FORMS["bf16"]
    marks = {
        f"{n:,} text{'s' if n > 1 else ''}": decoding_pass(config, form, context, n).intensity
        for n in TEXTS
    }
    if drafts:
        told = f"1 text, {drafts} drafts"
        marks[told] = decoding_pass(config, form, context, 1, drafts).intensity
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
