"""Roofline, hardware and prices: held to sums done by hand, and to what must grow or shrink."""

from dataclasses import dataclass

import numpy as np
import pytest

from minstep.cost.count import FORMS, decoding_pass, stored_bytes
from minstep.cost.hardware import (
    HARDWARE,
    KEPT,
    LAYER,
    MULTIPLIES,
    READS,
    ROOM,
    find_hardware,
    measure,
)
from minstep.cost.prices import API, PLANS, conversation_report, price, turns
from minstep.cost.roofline import (
    Deployment,
    batch_within,
    fitting_batch,
    form_that_fits,
    gpus_for,
    last_that_holds,
    pass_seconds,
    room,
    speed,
    tokens_per_pass,
)
from minstep.errors import InputError
from minstep.store.config_file import find_config, load_config

CONFIG = load_config(find_config("step-3.5-flash"))
H100 = HARDWARE["h100"]
SETUP = Deployment(CONFIG, H100, 8, "bf16", 32_768, (0.8, 0.6, 0.4))


# Typed from data sheets, not from the code: GB/s; TFLOP/s of dense bfloat16 and FP8; GB; devices of
# a node. NVIDIA: with sparsity FP8 of Hopper is 3,958, FP4 of DGX Spark 1,000. Apple; gpuhunter.
SHEETS = {
    "h800": ("H800", 3350, 989.4, 3958 / 2, 80, 8),
    "h100": ("H100", 3350, 989.4, 3958 / 2, 80, 8),
    "h200": ("H200", 4800, 989.4, 3958 / 2, 141, 8),
    "h20": ("H20", 4000, 148, 296, 96, 8),
    "dgx-spark": ("DGX Spark", 273, 1000 / 8, 1000 / 4, 128, 1),
    "m4-max": ("M4 Max", 546, 34, 34, 128, 1),  # no FP8 unit
}


@pytest.mark.parametrize("name", sorted({*SHEETS, *HARDWARE}))
def test_devices_are_what_their_data_sheets_say(name: str) -> None:
    label, bandwidth, bf16, fp8, memory, usual = SHEETS[name]
    device = HARDWARE[name]
    assert (device.label, device.usual) == (label, usual)
    figures = (device.bandwidth / 1e9, device.bf16 / 1e12, device.fp8 / 1e12, device.memory / 1e9)
    assert figures == pytest.approx((bandwidth, bf16, fp8, memory), rel=1e-9)


def test_shares_that_are_reached_are_those_of_their_sources() -> None:
    """FlashMLA's README: 3000 GB/s and 410 TFLOPS on an H800; vLLM's gpu_memory_utilization."""
    assert pytest.approx(3000 / 3350, abs=0.005) == READS == 0.9
    assert pytest.approx(410 / 989.4, abs=0.005) == MULTIPLIES == 0.41
    assert (ROOM, LAYER) == (0.9, 1e-4)
    assert tokens_per_pass((KEPT,) * 3) == pytest.approx(2.8, abs=0.05) and KEPT == 0.77
    assert H100.reached == (0.9, 0.41)
    assert HARDWARE["h20"]._replace(source="measured here").reached == (1, 1)


def test_prices_are_those_of_the_price_page() -> None:
    """CNY per million tokens uncached, cached, out; CNY a month. StepFun's platform, October 2026.

    Its limits, 262,144 tokens in all and 65,536 of an answer, are the longest that is priced.
    """
    assert API == (0.7, 0.14, 2.1)
    assert PLANS == {"Flash Mini": 49, "Flash Plus": 99, "Flash Pro": 199, "Flash Max": 699}
    assert conversation_report(4, 1, 65_535)["tokens_at_the_end"] == 262_144
    assert conversation_report(1, 1, 65_536)["output"] == 65_536


def test_weights_take_the_bytes_of_their_forms() -> None:
    """As released: FP8 experts, a float32 scale for 128 x 128. Q4_0: 18 bytes for 32 weights."""
    routed, others = 190_253_629_440, 199_384_301_376 - 190_253_629_440
    assert stored_bytes(CONFIG, FORMS["bf16"]) == 2 * (routed + others)
    assert stored_bytes(CONFIG, FORMS["fp8"]) == routed + 4 * routed / 128**2 + 2 * others
    assert stored_bytes(CONFIG, FORMS["int4"]) == 18 * (routed + others) / 32


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", HARDWARE)
def test_a_pass_runs_at_the_rates_of_its_device(name: str, form: str) -> None:
    _, bandwidth, bf16, fp8, _, _ = SHEETS[name]
    setup = Deployment(CONFIG, HARDWARE[name], 4, form, 4096, (0.5,))
    cost = decoding_pass(CONFIG, FORMS[form], 4096, 512, 1)
    reading = cost.bytes / (4 * bandwidth * 1e9)
    multiplying = cost.flops / (4 * (fp8 if form == "fp8" else bf16) * 1e12)
    assert pass_seconds(setup, 512) == pytest.approx(max(reading, multiplying))
    expected = reading / 0.9 + multiplying / 0.41 + 46 * 1e-4
    assert pass_seconds(setup, 512, is_expected=True) == pytest.approx(expected)


def test_tokens_of_a_pass_are_the_mean_of_passes_thrown_by_dice() -> None:
    kept, rng = (0.8, 0.6, 0.4), np.random.default_rng(0)
    thrown = rng.random((200_000, 3)) < kept
    mean = 1 + np.cumprod(thrown, axis=1).sum(axis=1).mean()
    assert tokens_per_pass(kept) == pytest.approx(1 + 0.8 + 0.48 + 0.192)
    assert tokens_per_pass(kept) == pytest.approx(mean, rel=0.005)
    assert tokens_per_pass(()) == 1 and tokens_per_pass((1, 1, 1)) == 4


def test_one_token_of_the_released_model_by_hand() -> None:
    """The sums of chapter 14: active weights with the output matrix, and a cache of 1.68 GB."""
    cost = decoding_pass(CONFIG, FORMS["bf16"], 32_768)
    weights = 10_931_407_936 + 527_958_016  # multiplied with, and 416,256 of norms and biases read
    attention = 4 * 128 * (12 * 64 * 32_768 + 33 * 96 * 512)
    assert cost.flops == pytest.approx(2 * weights + attention, rel=1e-4)
    assert cost.weights == pytest.approx(2 * weights, rel=1e-4)
    assert cost.caches == 12 * 4096 * 32_768 + 33 * 4096 * 512
    assert pass_seconds(SETUP._replace(acceptance=())) == pytest.approx(cost.bytes / (8 * 3.35e12))


def test_a_pass_takes_the_longer_of_reading_and_multiplying() -> None:
    slow_memory = H100._replace(bandwidth=1.0)
    slow_units = H100._replace(bf16=1.0)
    cost = decoding_pass(CONFIG, FORMS["bf16"], 32_768, 2, 3)
    assert pass_seconds(SETUP._replace(hardware=slow_memory), 2) == cost.bytes / 8
    assert pass_seconds(SETUP._replace(hardware=slow_units), 2) == cost.flops / 8


def test_what_is_expected_is_slower_by_shares_and_exchanges() -> None:
    cost = decoding_pass(CONFIG, FORMS["bf16"], 32_768, 1, 3)
    read, multiplied = cost.bytes / (8 * 3.35e12), cost.flops / (8 * 989.4e12)
    expected = pass_seconds(SETUP, 1, is_expected=True)
    assert expected == pytest.approx(read / 0.9 + multiplied / 0.41 + 48 * LAYER)
    assert SETUP._replace(gpus=1).exchanges == 0
    here = SETUP._replace(hardware=H100._replace(source="measured"), gpus=1)
    assert pass_seconds(here, 1, True) == pytest.approx(8 * (read + multiplied))


def test_drafts_pay_where_more_tokens_than_bytes_come_of_a_pass() -> None:
    alone = SETUP._replace(acceptance=())
    ratio = pass_seconds(SETUP) / pass_seconds(alone)
    assert speed(SETUP) / speed(alone) == pytest.approx(tokens_per_pass(SETUP.acceptance) / ratio)
    assert speed(SETUP._replace(acceptance=(0.1, 0.1, 0.1))) < speed(alone)
    assert speed(SETUP._replace(acceptance=(1, 1, 1))) > speed(alone)


def test_texts_that_fit_fill_the_memory_and_one_more_does_not() -> None:
    count = fitting_batch(SETUP)
    one = decoding_pass(CONFIG, FORMS["bf16"], 32_768, 1, 3).caches
    assert count * one <= room(SETUP) < (count + 1) * one
    assert room(SETUP) == 0.9 * 8 * 80e9 - stored_bytes(CONFIG, FORMS["bf16"])
    assert fitting_batch(SETUP._replace(gpus=1)) == 0
    assert form_that_fits(SETUP) == "bf16"
    assert form_that_fits(SETUP._replace(gpus=4)) == "fp8"
    assert form_that_fits(SETUP._replace(gpus=2)) == "int4"
    assert form_that_fits(SETUP._replace(hardware=HARDWARE["dgx-spark"], gpus=1)) == "int4"


@pytest.mark.parametrize("latency", [0.005, 0.01, 0.02, 10.0])
def test_the_batch_of_a_latency_keeps_it_and_one_more_does_not(latency: float) -> None:
    count = batch_within(SETUP, latency)
    assert count == fitting_batch(SETUP) or 1 / speed(SETUP, count + 1, True) > latency
    assert count == 0 or 1 / speed(SETUP, count, True) <= latency


def test_gpus_for_a_speed_are_the_fewest() -> None:
    found = gpus_for(SETUP, 350)
    assert found and speed(SETUP._replace(gpus=found), 1, True) >= 350
    assert speed(SETUP._replace(gpus=found - 1), 1, True) < 350
    assert gpus_for(SETUP, 1e6) is None  # exchanges stay, however many there are
    assert gpus_for(SETUP._replace(hardware=HARDWARE["m4-max"]), 350) is None
    assert gpus_for(SETUP._replace(form="bf16"), 1) == 6  # fewer do not hold the weights


def test_largest_finds_every_end() -> None:
    for most in (0, 1, 7, 8):
        for end in range(most + 1):
            assert last_that_holds(lambda n, end=end: n <= end, most) == end  # type: ignore[misc]


def test_ridges_are_those_of_the_paper_that_prices_them() -> None:
    for name, ridge in (("h800", 591), ("h20", 74)):
        hardware = HARDWARE[name]
        assert round(hardware.fp8 / hardware.bandwidth) == ridge
    assert round(H100.ridge) == 295


def test_unknown_hardware_is_refused_by_name() -> None:
    assert find_hardware([]) == [*HARDWARE.values()]
    with pytest.raises(InputError, match="--hardware b300: is not known, expected one of h800"):
        find_hardware(["h100", "b300"])


def test_this_machine_is_measured_from_what_it_did(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that ticks a second a look: what was moved and multiplied, in that time."""

    @dataclass
    class Clock:
        now: float = 0.0

        def perf_counter(self) -> float:
            self.now += 1
            return self.now

    monkeypatch.setattr("minstep.cost.hardware.time", Clock())
    monkeypatch.setattr("minstep.cost.hardware.THREADS", 2)
    found = measure(seconds=3, elements=1 << 10, side=16)
    assert (found.bandwidth, found.bf16, found.fp8) == (4 * 1024, 4 * 16**3, 4 * 16**3)
    assert found.reached == (1, 1) and found.memory >= 0 and found.usual == 1


def test_a_conversation_costs_what_its_requests_cost() -> None:
    """Three turns of 1,000 and 500: 0 + 1,500 + 3,000 tokens are sent again."""
    requests = turns(3, 1000, 500)
    assert [turn.old for turn in requests] == [0, 1500, 3000]
    assert price(requests) == pytest.approx((4500 * 0.14 + 3000 * 0.7 + 1500 * 2.1) / 1e6)
    assert price(requests, is_cached=False) == pytest.approx((7500 * 0.7 + 1500 * 2.1) / 1e6)
    assert price(requests, API._replace(cached=API.input)) == price(requests, is_cached=False)


def test_plans_buy_as_many_conversations_as_their_price_does() -> None:
    told = conversation_report(3, 1000, 500)
    assert (told["input"], told["cached_input"], told["output"]) == (7500, 4500, 1500)
    assert told["tokens_at_the_end"] == 4500
    for name, cny in PLANS.items():
        assert told["plans"][name]["conversations"] * told["cny"] == pytest.approx(cny)


@pytest.mark.parametrize(
    ("turns", "new", "output", "message"),
    [
        (2, 100, 65_537, "--tokens: 65,537 of an answer, expected at most 65,536"),
        (100, 2000, 1000, "--turns 100: 300,000 tokens in all, expected at most the API's 262,144"),
    ],
)
def test_conversations_that_the_api_refuses(
    turns: int, new: int, output: int, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        conversation_report(turns, new, output)
