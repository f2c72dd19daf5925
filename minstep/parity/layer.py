"""One layer held against what another engine recorded of it.

Checked by: tests/parity/test_layer.py
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import DTypeLike

from minstep.errors import InputError
from minstep.parity.compare import TOLERANCES, Comparison
from minstep.parity.forms import config_widths, derived
from minstep.parity.known_bugs import variant
from minstep.parity.names import is_weight, mtp_layers
from minstep.parity.pairs import align, compare_all
from minstep.parity.recording import Recording, check_forms
from minstep.parity.rerun import NORM, Rerun, layer_input, run_layer, weight_of
from minstep.store.checkpoint import Checkpoint
from minstep.store.stages import EMBEDDING, HEAD, split


class Checked(NamedTuple):
    """What came of one layer: a comparison for each tensor, in the model's order.

    `ties`: how many of the `tokens` went on with the recorded experts, which only a tie parts from
    ours. `others`: what the recording has of the layer and nothing here computes.
    """

    layer: int
    tolerance: float
    comparisons: list[Comparison]
    tokens: int
    ties: int
    others: list[str]

    @property
    def first(self) -> Comparison | None:
        """The first tensor that departs."""
        return next((c for c in self.comparisons if not c.is_match), None)


@np.errstate(over="ignore", invalid="ignore")  # what is not finite is told by name
def check_layer(
    checkpoint: Checkpoint,
    n: int,
    theirs: Recording,
    dtype: DTypeLike = np.float32,
    tolerance: float | None = None,
) -> Checked:
    """Run layer n from its recorded input, and compare every tensor that the recording has of it.

    The recording is taken to be of a whole prompt. Only this layer's weights are read, and for an
    MTP layer the embedding; what stands before and after the layers is compared where its weights
    are there. `tolerance`: in place of the one of the less precise engine's dtype. Raises
    InputError where the recording lacks the input or every output, or is of another model or
    prompt, and as check_forms does.
    """
    check_forms((theirs,), checkpoint.config, {n})
    state = layer_input(checkpoint, n, theirs, dtype)
    if tolerance is None:
        tolerance = max(TOLERANCES[np.dtype(dtype).name], TOLERANCES[theirs.engine_dtype])
    run = Rerun(theirs, wanted(checkpoint, theirs), tolerance)
    run_layer(variant(), checkpoint, n, state, run)
    names, ours = comparable(checkpoint, run, np.dtype(dtype).name)
    if not names:
        at = f"model.layers.{n}"
        raise InputError(f"{theirs.path}: has no tensor of layer {n}, expected such as {at}")
    mtp = mtp_layers((), checkpoint.config)
    found = list(compare_all(ours, theirs, names, tolerance, mtp, judge=run.judge))
    used = {term.source for name in names for term in theirs.forms[name]}
    there = [name for name in theirs.names if split(name)[0] == n and not is_weight(name)]
    others = {theirs.source(name) for name in there if split(name)[1] != "input"}
    return Checked(n, tolerance, found, len(state), run.ties, sorted(others - used))


def comparable(checkpoint: Checkpoint, run: Rerun, dtype: str) -> tuple[list[str], Recording]:
    """The names of what compares of a run, in the model's order; what it kept, as a recording."""
    ours = Recording("minstep", run.tensors, engine_dtype=dtype)
    return align(ours, run.theirs, checkpoint.config), ours


def wanted(checkpoint: Checkpoint, theirs: Recording) -> Callable[[str], bool]:
    """Which of our tensors to keep: what the recording has, and what comparing that takes."""
    config = checkpoint.config
    widths = config_widths(config)
    factor = next((spec.moe.scaling_factor for spec in config.layers if spec.moe), None)
    weights = {m: weight_of(m, config.tie_word_embeddings) for m in (EMBEDDING, NORM, HEAD)}

    def wants(name: str) -> bool:
        part = split(name)[1]
        if part in ("moe", "share_expert") and name.replace(part, "mlp") in theirs.forms:
            return True
        module = HEAD if part.endswith("head.output") and not checkpoint.has_own_heads() else name
        if module in weights and weights[module] not in checkpoint.tensors:
            return False
        return derived(name, theirs.forms, factor, widths) is not None

    return wants
