"""Loss and gradients of a few sequences: our tape in one process, and torch's autograd.

Both sides leave out the drafts' loss, which transformers' model has not, and the optimizer. Ours
runs the sequences one after the other, as `train` does in each process; torch all at once.
Checked by: tests/bench/test_bench.py, tests/bench/test_peer.py
"""

from pathlib import Path

import numpy as np

from minstep.bench.peer import FLOATS, Setup
from minstep.bench.timing import Block, Found, Row, fastest, rounds
from minstep.linear import as_float
from minstep.store.checkpoint import open_checkpoint
from minstep.store.config_file import find_config
from minstep.train.workers import Sums, Tensors, share
from minstep.weights import tensor_shapes

SEQUENCES, LENGTH = 4, 256
TOLERANCE = 1e-3  # of the loss, and of the size of the embedding's gradient


def training(setup: Setup, folder: Path | None = None, length: int = LENGTH) -> Found:
    """One step of the trained configuration from its weights; `folder`: another checkpoint."""
    folder = find_config("trained") if folder is None else folder
    checkpoint, errors = open_checkpoint(folder), list[str]()
    config = checkpoint.config._replace(mtp_layers=())
    tensors: Tensors = {
        name: as_float(checkpoint.get(name, shape), np.float32)
        for name, shape in tensor_shapes(config).items()
    }
    rng = np.random.default_rng(setup.seed)
    tokens = rng.integers(config.vocab_size, size=(SEQUENCES, length)).astype(np.int32)
    results = list[Sums]()

    def ours() -> float:
        def step() -> None:
            results[:] = [share(tokens, tensors, config, 0.0)]

        return fastest(step, 2, warm_up=1)

    blocks: dict[str, Block] = {"ours": ours}
    if setup.peer:
        setup.peer.ask("text", name="train", folder=str(folder), dtype=FLOATS[0])

        def theirs() -> float:
            assert setup.peer
            asked = {"name": "train", "sequences": tokens.tolist(), "calls": 2}
            answer = setup.peer.ask("train", **asked)
            gradient = results[0].gradients["model.embed_tokens.weight"] / SEQUENCES
            pairs = {
                "loss": (float(results[0].losses[0]) / SEQUENCES, answer["loss"]),
                "gradient of the embedding": (float(np.linalg.norm(gradient)), answer["slope"]),
            }
            for what, (our, other) in pairs.items():
                if not abs(our - other) <= TOLERANCE * abs(other):
                    errors.append(f"training: {what} is {our:.6g}, torch has {other:.6g}")
            return float(answer["seconds"])

        blocks[FLOATS[0]] = theirs
    times = rounds(blocks, min(setup.rounds, 3))
    if setup.peer:
        setup.peer.ask("drop")
    row = Row("training", f"{SEQUENCES} x {length} tokens", times.pop("ours"), times)
    notes = ["loss and gradients of the main model, no drafts and no optimizer on either side"]
    return Found([row], sorted(set(errors)), notes)
