"""What `minstep bench` is to reach: a table, so that every figure has one place.

Source: goals of this project. A target missed is printed, and is nobody's error: timings are
noisy, and machines differ in what they lack.
"""

from typing import NamedTuple

LIMIT = "limit"  # the time that reading the bytes alone takes


class Target(NamedTuple):
    """A row of the report is to be at least so many times as fast as `other`."""

    case: str
    what: str  # how the row begins
    other: str
    at_least: float


TARGETS = (
    Target("tiny", "decode", "float32", 2.0),
    Target("trained", "decode", "float32", 2.0),
    Target("mid", "decode", "float32", 1.0),
    Target("mid", "prefill", "float32", 0.8),
    Target("moe", "one token", LIMIT, 0.42),
    Target("moe", "512 tokens, 288 experts", "bfloat16", 0.4),
    Target("attention", "262,144 positions", LIMIT, 0.4),
    Target("drafts", "with drafts", "without", 1.25),
)


def target(case: str, what: str, other: str) -> float | None:
    """What a row is to reach against `other`; None where nothing was asked for."""
    for each in TARGETS:
        if (each.case, each.other) == (case, other) and what.startswith(each.what):
            return each.at_least
    return None
