"""The learning rate over a run: a linear warm-up, then half a cosine down to a floor."""

import math


def rate_at(step: int, steps: int, warmup: int, floor: float = 0.1) -> float:
    """The share of the peak rate, 0 to 1, that step `step` of `steps`, counted from 0, goes at.

    Step 0 gets 1 / warmup, so that no step is wasted at rate 0; step warmup - 1 is the first at the
    peak, and the last step gets `floor`, a share of the peak. No warm-up is one of one step; steps
    after the last stay at the floor. A run of one step goes at the peak.
    Source: stage 1 of report section D: 0 to 2.5e-4 in 2,000 steps, cosine to 5e-5, a floor of 0.2.
    Checked by: tests/train/test_schedule.py
    """
    if step < warmup:
        return (step + 1) / warmup
    peak = max(warmup - 1, 0)
    if step == peak:
        return 1.0
    progress = min(1.0, (step - peak) / max(1, steps - 1 - peak))
    return floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2
