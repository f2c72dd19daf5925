"""The released sizes: 804 tensors, 399 GB that take little disk, one MoE layer of real numbers."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from safetensors.numpy import load_file

from minstep import open_checkpoint
from minstep.activations import silu
from minstep.linear import as_float
from minstep.weights import block_weights
from tests.support.processes import forked_small

pytestmark = pytest.mark.thorough

LAYER = 17
TOKENS = ",".join(str(n * 7919 % 128896) for n in range(1, 17))
RUN = """
import resource, sys
from minstep.cli.main import main
code = main(sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024, file=sys.stderr)
sys.exit(code)
"""


class Ran(NamedTuple):
    """One command in a process of its own."""

    out: str
    seconds: float
    megabytes: int


def minstep(*arguments: object) -> Ran:
    started = time.perf_counter()
    argv = [sys.executable, "-c", RUN, *map(str, arguments)]
    done = subprocess.run(forked_small(argv), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    megabytes = int(done.stderr.split()[-1])
    return Ran(done.stdout, time.perf_counter() - started, megabytes)


@pytest.fixture(scope="module")
def flash(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole checkpoint in 44 shards; written are the embedding, layer 0 and part of another."""
    out = tmp_path_factory.mktemp("real") / "flash"
    written = ("model.embed_tokens.weight", "model.layers.0.*", f"model.layers.{LAYER}.*")
    only = [word for glob in written for word in ("--only", glob)]
    made = minstep(
        "make-tiny", "step-3.5-flash", "--out", out, "--dtype", "bfloat16", "--shards", 44,
        "--experts", 32, *only,
    )  # fmt: skip
    assert made.megabytes < 3000
    return out


def test_inspect_reads_headers_only(flash: Path) -> None:
    sizes = [file.stat() for file in flash.glob("*.safetensors")]
    assert len(sizes) == 44
    assert sum(size.st_size for size in sizes) > 398_768_626_944
    assert sum(size.st_blocks for size in sizes) * 512 < 4e9
    ran = minstep("inspect", flash, "--json")
    report = json.loads(ran.out)
    assert report["total_parameters"] == 199_384_301_376 and len(report["tensors"]) == 804
    assert report["bytes"] == 398_768_626_944
    assert ran.seconds < 2 and ran.megabytes < 150


def test_a_moe_layer_matches_float64_in_bounded_memory(flash: Path, tmp_path: Path) -> None:
    exact = tmp_path / "float64.safetensors"
    how = ("--model", flash, "--tokens", TOKENS, "--layers", LAYER, "--dtype", "float64")
    recorded = minstep("record", *how, "--out", exact)
    assert recorded.megabytes < 1500
    checked = minstep("check-layer", flash, "--layer", LAYER, "--against", exact, "--json")
    assert checked.megabytes < 1500
    assert json.loads(checked.out)
    trace = load_file(exact)
    name = f"model.layers.{LAYER}"
    x = trace[f"{name}.post_attention_layernorm"]
    ids, weights = trace[f"{name}.moe.ids"], trace[f"{name}.moe.weights"]
    assert ids.shape == (16, 8) and len(np.unique(ids)) > 16 and ids.max() < 32
    checkpoint = open_checkpoint(flash)
    moe = block_weights(checkpoint.config.layers[LAYER], 4096, checkpoint.get).moe
    assert moe
    routed = np.zeros_like(x)
    for expert in np.unique(ids):
        gate, up, down = (as_float(stack[expert], np.float64) for stack in moe[2:])
        for t, place in np.argwhere(ids == expert):
            hidden = silu(gate @ x[t]) * (up @ x[t])
            routed[t] += weights[t, place] * (down @ hidden)
    assert np.abs(routed).max() > 0.1
    assert np.abs(trace[f"{name}.moe"] - routed).max() < 1e-10 * np.abs(routed).max()


def test_a_token_passes_through_every_layer_and_mtp_depth(flash: Path) -> None:
    ran = minstep(
        "generate", "--model", flash, "--tokens", 5, "--max-tokens", 2, "--ignore-eos", "--json"
    )
    result = json.loads(ran.out)
    assert len(result["tokens"]) == 2 and len(result["mtp_trace"][0][1]) == 3
    assert ran.megabytes < 2000
