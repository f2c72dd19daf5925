"""Several layers held against a recording, and the porting bug that explains each that departs.

A layer that departs is run again with each known bug in turn.
Checked by: tests/parity/test_check_layer.py
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike

from minstep.config import LayerSpec
from minstep.errors import InputError, shown
from minstep.parity.check_layer import (
    Checked,
    Rerun,
    check_layer,
    comparable,
    input_names,
    layer_input,
    leading,
    run_layer,
    wanted,
)
from minstep.parity.compare import Comparison, compare_all, comparison_table, describe, row_json
from minstep.parity.engine_tensors import Recording, check_forms
from minstep.parity.known_bugs import ALL, Footgun
from minstep.parity.names import axes, mtp_layers
from minstep.parity.variants import is_plantable, variant
from minstep.store.checkpoint import Checkpoint
from minstep.store.stages import EMBEDDING, spans, split
from minstep.tap import Array
from minstep.validation import NotFinite

NEAR = 2.0  # times the error of the bug that explains best: those that explain worse are left out
Progress = Callable[[str, int, int], None]  # what is done, how much of it, of how much


class Checks(NamedTuple):
    """What came of each layer that was held against a recording.

    `explained`: the lines on a layer that departs. `skipped`: layers that were not checked, by
    the reason. `untried`: known bugs that could not be tried.
    """

    layers: list[Checked]
    explained: dict[int, list[str]]
    skipped: dict[str, list[int]]
    untried: tuple[Footgun, ...] = ()

    @property
    def rows(self) -> list[Comparison]:
        """Every comparison of every layer, in order."""
        return [row for checked in self.layers for row in checked.comparisons]

    @property
    def is_match(self) -> bool:
        """Whether no tensor departs."""
        return all(row.is_match for row in self.rows)


def checkable(checkpoint: Checkpoint, theirs: Recording) -> tuple[list[int], dict[str, list[int]]]:
    """The layers that a recording and the shards that are there let one check, and the others.

    Raises InputError where there is none.
    """
    config, names = checkpoint.config, theirs.names
    L = len(config.layers)
    numbers: list[int] = []
    skipped: dict[str, list[int]] = {}
    by_layer: dict[int, set[str]] = {}
    for name in names:
        layer, part = split(name)
        if layer is not None and axes(name) is not None:  # else nothing here computes it
            by_layer.setdefault(layer, set()).add(part)
    for n in range(L + len(config.mtp_layers)):
        parts = by_layer.get(n, {"input"})
        has_input = any(name in names for name in input_names(n))
        takes_tokens = n >= L or (n == 0 and not has_input)
        needs = [f"model.layers.{n}.", *([f"{EMBEDDING}."] if takes_tokens else [])]
        reasons = {
            "the recording has no output of theirs": not parts - {"input"},
            "the recording has no input of theirs": not has_input and (n or not theirs.tokens),
            "the recording does not say the tokens": n >= L and theirs.tokens is None,
            "the prompt is too short": n >= L and len(theirs.tokens or ()) <= n - L + 1,
            "shards are missing": any(name.startswith(tuple(needs)) for name in checkpoint.absent),
        }
        reason = next((reason for reason, holds in reasons.items() if holds), None)
        if reason is None:
            numbers.append(n)
        else:
            skipped.setdefault(reason, []).append(n)
    if not numbers:
        whys = [f"layers {','.join(spans(which))}: {why}" for why, which in skipped.items()]
        raise InputError(f"{theirs.path}: no layer can be checked: {'; '.join(whys)}")
    return numbers, skipped


@np.errstate(over="ignore", invalid="ignore")  # what is not finite is refused by name
def check_layers(
    checkpoint: Checkpoint,
    theirs: Recording,
    numbers: Sequence[int],
    dtype: DTypeLike = np.float32,
    tolerance: float | None = None,
    progress: Progress = lambda label, done, total: None,
) -> Checks:
    """Check each layer, and look for what explains those that depart.

    Bugs that explained something of a layer are tried first on the next. Where no bug is known,
    layers that differ in nothing but their weights, and depart at the same tensor, are not tried
    with all bugs again. Raises InputError as check_layer does.
    """
    check_forms((theirs,), checkpoint.config, {*numbers})
    progress("checking", 0, len(numbers))
    config, checks = checkpoint.config, Checks([], {}, {})
    known: list[Footgun] = []
    untried: tuple[Footgun, ...] = ()
    unexplained: dict[tuple[LayerSpec, str], int] = {}
    for done, n in enumerate(numbers, start=1):
        try:
            checked = check_layer(checkpoint, n, theirs, dtype, tolerance)
        except NotFinite:
            if n == numbers[-1] and not checks.layers:  # there is no other to tell of
                raise
            checks.skipped.setdefault("their input is not finite", []).append(n)
            continue
        checks.layers.append(checked)
        if checked.first is not None:
            spec, first = (*config.layers, *config.mtp_layers)[n], split(checked.first.name)[1]
            kind = spec._replace(name=""), first
            trials = explain(checkpoint, theirs, checked, dtype, known)
            is_explained = any(trial.still is None for trial in trials)
            if not is_explained and kind not in unexplained:
                untried = tuple(footgun for footgun in ALL if not is_plantable(footgun))
                trying = partial(progress, f"layer {n} departs, trying")
                trials = explain(checkpoint, theirs, checked, dtype, progress=trying)
                is_explained = any(trial.still is None for trial in trials)
            known += [trial.footgun for trial in trials if trial.footgun not in known]
            lines = looks_like(checked, trials)
            if not trials and kind in unexplained:
                lines = [f"is of the same kind as layer {unexplained[kind]}: {lines[0]}"]
            elif not is_explained:
                unexplained.setdefault(kind, n)
            checks.explained[n] = lines
        progress("checking", done, len(numbers))
    return checks._replace(untried=untried)


def checks_table(checks: Checks) -> str:
    """A line for each tensor, then lines on layers; the last line is the verdict."""
    lines = [comparison_table(checks.rows)]
    for why, which in checks.skipped.items():
        lines.append(f"not checked: layers {','.join(spans(which))}, since {why}")
    for checked in checks.layers:
        at = f"layer {checked.layer}"
        if checked.others:
            such = f"{len(checked.others)} such as {shown(checked.others[0])}"
            lines.append(f"{at}: not compared, since nothing here computes it: {such}")
        if checked.ties:
            count = f"{checked.ties} of {checked.tokens} tokens"
            lines.append(f"{at}: {count} chose other experts at a tie; went on with the recorded")
        if checked.first:
            lines.append(f"{at} departs first at {describe(checked.first)}")
            lines += [f"{at} {line}" for line in checks.explained.get(checked.layer, [])]
    return "\n".join([*lines, *not_tried(checks.untried), _verdict(checks)])


def _verdict(checks: Checks) -> str:
    worst = max((row for row in checks.rows), key=lambda row: row.max_error)
    departing = [checked.layer for checked in checks.layers if checked.first]
    count = f"{len(checks.layers)} layer{'s' if len(checks.layers) > 1 else ''}"
    if departing:
        several = "s" if len(departing) > 1 else ""
        return f"mismatch: layer{several} {','.join(spans(departing))} of {count} checked"
    tolerance = checks.layers[0].tolerance
    at = f"worst {worst.max_error:.1e} at {shown(worst.name)}"
    compared = [row for row in checks.rows if not row.is_empty]
    if not compared:
        return f"no verdict: {count}, of which no tensor could be compared"
    empty = len(checks.rows) - len(compared)
    more = f"; {empty} not compared" if empty else ""
    return f"match: {count}, {len(compared)} tensors within {tolerance:g} ({at}){more}"


def checks_json(checks: Checks) -> dict[str, Any]:
    """The same as a JSON object."""
    layers = [
        {
            "layer": checked.layer,
            "match": checked.first is None,
            "first": checked.first and checked.first.name,
            "ties": checked.ties,
            "tokens": checked.tokens,
            "tolerance": checked.tolerance,
            "tensors": [row_json(row) for row in checked.comparisons],
            "not_compared": checked.others,
            "explained": checks.explained.get(checked.layer, []),
        }
        for checked in checks.layers
    ]
    not_tried = [*dict.fromkeys(footgun.bug for footgun in checks.untried)]
    verdict = {"match": checks.is_match, "layers": layers, "skipped": checks.skipped}
    return verdict | {"not_tried": not_tried}


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
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Trial]:
    """The bugs with which a layer computes what was recorded, best first.

    `checked`: what check_layer found in the same `dtype`; where nothing departs there is nothing to
    explain. Each variant of the layer runs until a tensor departs. Where none comes to the end,
    those that come furthest are returned, if that is further than without a bug. A bug whose line
    was edited is passed over. `progress` takes how many of how many footguns are done.
    """
    if checked.first is None:
        return []
    state = layer_input(checkpoint, checked.layer, theirs, dtype)
    trials: list[Trial] = []
    progress(0, len(footguns))
    for done, footgun in enumerate(footguns, start=1):
        if reaches(footgun, checkpoint, checked.layer) and is_plantable(footgun):
            trial = _try(footgun, checkpoint, state, theirs, checked)
            trials += [trial] if trial else []
        progress(done, len(footguns))
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
    """A line on the bugs that explain passed over; none where there are none."""
    bugs = {footgun.bug for footgun in footguns}
    files = dict.fromkeys(footgun.file for footgun in footguns)
    whose = "bug, whose line" if len(bugs) == 1 else "bugs, whose lines"
    was = "was" if len(bugs) == 1 else "were"
    line = f"not tried: {len(bugs)} known {whose} in {' and '.join(files)} {was} changed"
    return [line] if bugs else []


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
