"""Two tiers of tests: what README's command runs, and what `pytest -m thorough` adds."""

from collections.abc import Iterable
from typing import Any

import pytest


def cases(quick: Iterable[Any], thorough: Iterable[Any]) -> list[Any]:
    """Cases to parametrize over: those of every run, then those that are marked `thorough`.

    A case that is a tuple has a value for each of several arguments, as for pytest.
    """
    more = (case if isinstance(case, tuple) else (case,) for case in thorough)
    return [*quick, *(pytest.param(*case, marks=pytest.mark.thorough) for case in more)]
