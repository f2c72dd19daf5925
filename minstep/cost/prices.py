"""What a conversation costs at the published prices, in CNY."""

from typing import Any, NamedTuple

from minstep.errors import InputError

MILLION = 1_000_000
LONGEST, MOST_OUTPUT = 262_144, 65_536  # tokens that the API allows: in all, and of one answer


class Price(NamedTuple):
    """CNY for a million tokens of input, of input that was cached before, and of output."""

    input: float
    cached: float
    output: float


API = Price(0.7, 0.14, 2.1)  # step-3.5-flash; Source: StepFun's platform documentation
PLANS = {"Flash Mini": 49, "Flash Plus": 99, "Flash Pro": 199, "Flash Max": 699}  # CNY a month


class Turn(NamedTuple):
    """Tokens of one request: input that was sent before, input that is new, and output."""

    old: int
    new: int
    output: int


def turns(count: int, new: int, output: int) -> list[Turn]:
    """The requests of a conversation in which every turn adds `new` input and `output` tokens.

    Each request sends all of the conversation before it once more: that is what a cache holds.
    """
    return [Turn(k * (new + output), new, output) for k in range(count)]


def price(conversation: list[Turn], prices: Price = API, is_cached: bool = True) -> float:
    """CNY of a conversation; without a cache all input costs the same.

    Source: StepFun's prices for step-3.5-flash.
    Checked by: tests/cost/test_roofline.py
    """
    old, new, output = (sum(column) for column in zip(*conversation, strict=True))
    again = prices.cached if is_cached else prices.input
    return float(old * again + new * prices.input + output * prices.output) / MILLION


def conversation_report(count: int, new: int, output: int) -> dict[str, Any]:
    """Tokens, prices with and without a cache, and how many such conversations a plan's price buys.

    Raises InputError where the conversation or an answer is longer than the API allows.
    """
    total = count * (new + output)
    if output > MOST_OUTPUT:
        raise InputError(f"--tokens: {output:,} of an answer, expected at most {MOST_OUTPUT:,}")
    if total > LONGEST:
        found = f"--turns {count}: {total:,} tokens in all"
        raise InputError(f"{found}, expected at most the API's {LONGEST:,}")
    requests = turns(count, new, output)
    cached = price(requests)
    return {
        "turns": count,
        "tokens_at_the_end": total,
        "input": sum(turn.old + turn.new for turn in requests),
        "cached_input": sum(turn.old for turn in requests),
        "output": sum(turn.output for turn in requests),
        "cny": cached,
        "cny_without_cache": price(requests, is_cached=False),
        "plans": {name: {"cny": cny, "conversations": cny / cached} for name, cny in PLANS.items()},
    }
