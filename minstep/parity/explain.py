"""Which porting bug explains a layer that departs: the layer is run with each of them in turn.

Checked by: tests/parity/test_layer.py
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import DTypeLike

from minstep.linear import Weight
from minstep.parity.compare import Comparison
from minstep.parity.known_bugs import ALL, Footgun, is_plantable, variant
from minstep.parity.layer import Checked, comparable, wanted
from minstep.parity.names import mtp_layers
from minstep.parity.pairs import compare_all
from minstep.parity.recording import Recording
from minstep.parity.rerun import Rerun, layer_input, run_layer
from minstep.store.checkpoint import Checkpoint
from minstep.tap import Array
from minstep.weights import Get, Shape

NEAR = 2.0  # times the error of the bug that explains best: those that explain worse are left out


class Trial(NamedTuple):
    """What a layer with one bug gave: how many tensors match, and the sum of their mean errors.

    `still`: the first tensor that departs with the bug, None where all match.
    """

    footgun: Footgun
    matches: int
    error: float
    still: str | None


class Departed(Exception):
    """A tensor of a trial departs: the rest of the layer is not wanted."""


def explain(
    checkpoint: Checkpoint,
    theirs: Recording,
    checked: Checked,
    dtype: DTypeLike = np.float32,
    footguns: Sequence[Footgun] = ALL,
    progress: Callable[[int], None] = lambda done: None,
) -> list[Trial]:
    """The bugs with which a layer computes what was recorded, best first.

    `checked`: what check_layer found in the same `dtype`; where nothing departs there is nothing to
    explain. Each variant of the layer runs until a tensor departs. Where none comes to the end,
    those that come furthest are returned, if that is further than without a bug. A bug whose line
    was edited is passed over. `progress` hears how many of the footguns are done.
    """
    if checked.first is None:
        return []
    state = layer_input(checkpoint, checked.layer, theirs, dtype)
    trials: list[Trial] = []
    for done, footgun in enumerate(footguns, start=1):
        if reaches(footgun, checkpoint, checked.layer) and is_plantable(footgun):
            trial = _try(footgun, checkpoint, state, theirs, checked)
            trials += [trial] if trial else []
        progress(done)
    furthest = max(((trial.still is None, trial.matches) for trial in trials), default=None)
    trials = [trial for trial in trials if (trial.still is None, trial.matches) == furthest]
    least = min((trial.error for trial in trials), default=0.0)
    near = [trial for trial in trials if trial.error <= NEAR * least + 1e-12]
    return sorted(near, key=lambda trial: trial.error)


def looks_like(checked: Checked, trials: Iterable[Trial]) -> list[str]:
    """What explain has found in words, a line for each bug."""
    lines: dict[str, str] = {}  # a bug may be there in several ways: the best is told
    for trial in trials:
        line = f"looks like: {trial.footgun.bug} ({trial.footgun.file})"
        if trial.still and checked.first:
            line += f", which explains {checked.first.name}, but {trial.still} still departs"
        lines.setdefault(trial.footgun.bug, line)
    return list(lines.values()) or ["no known porting bug explains it"]


def not_tried(footguns: Sequence[Footgun]) -> list[str]:
    """What is to be said of bugs that explain passed over: a line, or none where there are none."""
    bugs = {footgun.bug for footgun in footguns}
    files = dict.fromkeys(footgun.file for footgun in footguns)
    whose = "bug, whose line" if len(bugs) == 1 else "bugs, whose lines"
    was = "was" if len(bugs) == 1 else "were"
    said = f"not tried: {len(bugs)} known {whose} in {' and '.join(files)} {was} changed"
    return [said] if bugs else []


def reaches(footgun: Footgun, checkpoint: Checkpoint, n: int) -> bool:
    """Whether layer n runs the line of a bug."""
    config = checkpoint.config
    spec, is_mtp = (*config.layers, *config.mtp_layers)[n], n >= len(config.layers)
    is_clamped = spec.swiglu_limit is not None or spec.swiglu_limit_shared is not None
    needs = {"mtp": is_mtp, "weights": is_mtp, "moe": spec.moe is not None, "mlp": is_clamped}
    return needs.get(footgun.module, True)


def _try(
    footgun: Footgun, checkpoint: Checkpoint, state: Array, theirs: Recording, checked: Checked
) -> Trial | None:
    """Run a layer with a bug until a tensor departs; None where that is as early as without it.

    A sum of routed and shared experts that departs is not looked at where the layer's output does
    too: a bug may stand between the two.
    """
    at, mtp = f"model.layers.{checked.layer}", mtp_layers((), checkpoint.config)
    departs = {c.name: not c.is_match for c in checked.comparisons}
    if f"{at}.share_expert" in departs and departs.get(at):
        departs.pop(f"{at}.mlp", None)
    seen: dict[str, Comparison] = {}

    def judge(name: str) -> None:
        if name in departs:
            beside = [name.replace("moe.ids", f"moe.{part}") for part in ("ids", "gate", "margin")]
            kept = {n: run.tensors[n] for n in beside if n in run.tensors}
            ours = Recording("minstep", kept, engine_dtype=state.dtype.name)
            pair = compare_all(ours, theirs, [name], checked.tolerance, mtp, judge=run.judge)
            seen[name] = next(pair)
            if not seen[name].is_match:
                raise Departed

    main = f"model.layers.{len(checkpoint.config.layers) - 1}"
    run = Rerun(theirs, wanted(checkpoint, theirs), checked.tolerance, judge, main)
    try:
        with np.errstate(all="ignore"):
            run_layer(variant(footgun), checkpoint, checked.layer, state, run, leading(checkpoint))
        names, ours = comparable(checkpoint, run, state.dtype.name)
        unseen = [name for name in names if name in departs and name not in seen]
        for c in compare_all(ours, theirs, unseen, checked.tolerance, mtp, judge=run.judge):
            seen[c.name] = c
    except Departed:
        pass
    except (ValueError, IndexError):  # no such layer can be run: sizes do not fit
        return None
    still = next((c.name for c in seen.values() if not c.is_match), None)
    first = next(name for name, departing in departs.items() if departing)
    if first not in seen or not seen[first].is_match or seen[first].is_empty:
        return None
    matching = [c for c in seen.values() if c.is_match]
    return Trial(footgun, len(matching), sum(c.mean_error for c in matching), still)


def leading(checkpoint: Checkpoint) -> Get:
    """Where weights come from when a bug asks for fewer heads than there are: the first of them."""

    def get(name: str, shape: Shape) -> Weight:
        tensor = checkpoint.tensors.get(name)
        stored = tensor.shape if tensor else shape
        weight = checkpoint.get(name, stored)
        return weight if stored == shape else weight[tuple(slice(size) for size in shape)]

    return get
