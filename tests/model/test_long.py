"""The whole context: 262,144 prompt tokens and 8 more, in bounded memory."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from minstep import find_config, load_config
from tests.conftest import Run
from tests.support.processes import forked_small


def long_run(checkpoint: Path, count: int) -> dict[str, object]:
    """Read `count` tokens and write 8, in a process of its own: its stats."""
    tokens = np.random.default_rng(1).integers(320, size=count)
    command = [sys.executable, "-m", "minstep", "generate", "--model", str(checkpoint)]
    command += ["--tokens", "-", "--max-tokens", "8", "--ignore-eos", "--json"]
    text = ",".join(map(str, tokens))
    ran = subprocess.run(
        forked_small(command), input=text, capture_output=True, text=True, check=True
    )
    result = json.loads(ran.stdout)
    assert len(result["tokens"]) == 8 and len(result["prompt_tokens"]) == count
    stats: dict[str, object] = result["stats"]
    return stats


@pytest.fixture
def checkpoint(tmp_path: Path, run: Run) -> Path:
    assert run("make-tiny", "long", "--out", tmp_path / "long").code == 0
    return tmp_path / "long"


def test_memory_grows_by_the_caches_of_full_layers_and_little_else(checkpoint: Path) -> None:
    pytest.importorskip("resource")
    config = load_config(find_config("long"))
    full = sum(spec.window is None for spec in config.layers)
    per_token = full * 2 * config.layers[0].groups * config.layers[0].head_dim * 4
    short, long = (long_run(checkpoint, n)["peak_memory_bytes"] for n in (3_000, 10_000))
    assert isinstance(short, int) and isinstance(long, int)
    # Beside the caches: the prompt as text, as Python integers and as JSON, 200 bytes a token.
    assert long - short < 7_000 * (per_token + 200) + 8e6


@pytest.mark.thorough
def test_the_whole_context_takes_under_a_gigabyte_and_a_quarter_of_an_hour(
    checkpoint: Path,
) -> None:
    stats = long_run(checkpoint, 262_144)
    print(stats)
    assert isinstance(stats["peak_memory_bytes"], int) and stats["peak_memory_bytes"] < 1e9
    assert float(str(stats["prompt_seconds"])) + float(str(stats["generation_seconds"])) < 900
