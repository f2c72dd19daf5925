"""The learning rate's schedule: its ends, its shape, and runs of odd lengths."""

import math

import pytest

from minstep.train.optimizer import rate_at


def rates(steps: int, warmup: int, floor: float = 0.1) -> list[float]:
    return [rate_at(step, steps, warmup, floor) for step in range(steps)]


def test_it_warms_up_in_a_line_and_ends_at_the_floor() -> None:
    assert rates(20, 4)[:4] == [0.25, 0.5, 0.75, 1]
    assert rates(20, 4)[-1] == pytest.approx(0.1, rel=1e-15)
    assert rates(20, 4, floor=0.2)[-1] == pytest.approx(0.2, rel=1e-15)


def test_between_peak_and_floor_it_is_half_a_cosine() -> None:
    assert rates(21, 1, floor=0.0)[10] == pytest.approx(0.5)
    assert rates(21, 1, floor=0.2)[5] == pytest.approx(0.2 + 0.8 * (1 + math.sqrt(0.5)) / 2)
    falling = rates(100, 10)[9:]
    assert falling == sorted(falling, reverse=True) and len({*falling}) == len(falling)


def test_no_warm_up_begins_at_the_peak() -> None:
    assert rates(5, 0) == rates(5, 1)
    assert rates(5, 0)[0] == 1


def test_short_runs() -> None:
    assert rates(1, 0) == rates(1, 1) == [1]
    assert rates(1, 4) == [0.25]  # the run ends while it warms up
    assert rates(2, 0) == [1, pytest.approx(0.1)]


def test_after_the_last_step_it_stays_at_the_floor() -> None:
    assert rate_at(25, 20, 4, 0.1) == rate_at(19, 20, 4, 0.1)
