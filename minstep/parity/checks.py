"""Several layers, each held against a recording from its own recorded input: what comes of it all.

Checked by: tests/parity/test_layer.py
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike

from minstep.cli.terminal import Progress
from minstep.config import LayerSpec
from minstep.errors import InputError, shown
from minstep.parity.compare import Comparison
from minstep.parity.diff import Report, describe, diff_table, row_json
from minstep.parity.explain import explain, looks_like, not_tried
from minstep.parity.known_bugs import ALL, Footgun, is_plantable
from minstep.parity.layer import Checked, check_layer
from minstep.parity.names import axes
from minstep.parity.recording import Recording, check_forms
from minstep.parity.rerun import input_names
from minstep.store.checkpoint import Checkpoint
from minstep.store.stages import EMBEDDING, spans, split
from minstep.validation import NotFinite


class Checks(NamedTuple):
    """What came of each layer that was held against the recording `theirs`.

    `explained`: what is said of a layer that departs. `skipped`: layers that were not checked, by
    the reason. `untried`: known bugs that could not be tried.
    """

    theirs: Recording
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
    config, there = checkpoint.config, theirs.names
    L = len(config.layers)
    numbers: list[int] = []
    skipped: dict[str, list[int]] = {}
    by_layer: dict[int, set[str]] = {}
    for name in there:
        layer, part = split(name)
        if layer is not None and axes(name) is not None:  # else nothing here computes it
            by_layer.setdefault(layer, set()).add(part)
    for n in range(L + len(config.mtp_layers)):
        parts = by_layer.get(n, {"input"})
        has_input = any(name in there for name in input_names(n))
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
        said = "; ".join(
            f"layers {','.join(spans(which))}: {why}" for why, which in skipped.items()
        )
        raise InputError(f"{theirs.path}: no layer can be checked: {said}")
    return numbers, skipped


@np.errstate(over="ignore", invalid="ignore")  # what is not finite is told by name
def check_layers(
    checkpoint: Checkpoint,
    theirs: Recording,
    numbers: Sequence[int],
    dtype: DTypeLike = np.float32,
    tolerance: float | None = None,
) -> Checks:
    """Check each layer, and look for what explains those that depart.

    Bugs that explained something of a layer are tried first on the next. Where no bug is known,
    layers that differ in nothing but their weights, and depart at the same tensor, are not tried
    with all bugs again. Raises InputError as check_layer does.
    """
    check_forms((theirs,), checkpoint.config, {*numbers})
    bar = Progress("checking", len(numbers), "layers")
    config, checks = checkpoint.config, Checks(theirs, [], {}, {})
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
                bar.erase()
                untried = tuple(footgun for footgun in ALL if not is_plantable(footgun))
                tried = Progress(f"layer {n} departs, trying", len(ALL), "known bugs")
                trials = explain(checkpoint, theirs, checked, dtype, progress=tried)
                is_explained = any(trial.still is None for trial in trials)
            known += [trial.footgun for trial in trials if trial.footgun not in known]
            lines = looks_like(checked, trials)
            if not trials and kind in unexplained:
                lines = [f"is of the same kind as layer {unexplained[kind]}: {lines[0]}"]
            elif not is_explained:
                unexplained.setdefault(kind, n)
            checks.explained[n] = lines
        bar(done)
    return checks._replace(untried=untried)


def checks_table(checks: Checks) -> str:
    """A line for each tensor, then what is to be said of layers; the last line is the verdict."""
    lines = [diff_table(Report(checks.theirs, checks.theirs, 0.0, checks.rows, [], []))]
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
    """The same as JSON holds it."""
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
    said = {"match": checks.is_match, "layers": layers, "skipped": checks.skipped}
    return said | {"not_tried": [*dict.fromkeys(footgun.bug for footgun in checks.untried)]}
