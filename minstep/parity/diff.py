"""Two recordings -> which tensor departs first in the model's order, and by how much.

Checked by: tests/parity/test_diff.py
"""

from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from minstep.config import Config
from minstep.errors import InputError, shown
from minstep.moe import MoEWeights
from minstep.parity.compare import (
    TOLERANCES,
    Comparison,
    compare_all,
    comparison_table,
    describe,
    row_json,
)
from minstep.parity.engine_tensors import Recording, align, check_forms
from minstep.parity.facts import common_part
from minstep.parity.names import mtp_layers
from minstep.parity.router_ties import Choice, Choose, are_experts, choice, chooser
from minstep.store.checkpoint import open_checkpoint
from minstep.store.stages import split

Routers = Callable[[int], Choose | None]
NO_ROUTER = "give --model DIR, whose router bias decides"
NO_LOGITS = "record moe.gate, which decides"


class Report(NamedTuple):
    """What came of each tensor that both recordings can give, and what only one of them holds.

    `shared`: how many tokens were compared where the texts go on differently, else None.
    """

    ours: Recording
    theirs: Recording
    tolerance: float
    rows: list[Comparison]
    only_ours: list[str]
    only_theirs: list[str]
    shared: int | None = None

    @property
    def departure(self) -> Comparison | None:
        """The first tensor in the model's order that is not the same."""
        return next((row for row in self.rows if not row.is_match), None)


@np.errstate(over="ignore", invalid="ignore")  # what is not finite is refused by name
def diff(
    ours: Recording,
    theirs: Recording,
    tolerance: float | None = None,
    config: Config | None = None,
    globs: Sequence[str] = (),
    routers: Routers | None = None,
) -> Report:
    """Compare all that two recordings of one prompt have in common; ours is the reference.

    Where a model has continued it differently in each, only the tokens before that are looked at.
    `tolerance`: for every tensor, in place of that of the less precise engine, which grows from
    layer to layer where the engine has 16 bits. `config`: of the model, for what the recordings do
    not say; `routers`: of the model, for where experts differ. `globs`: our names to look at. A
    tensor of another size departs; one that cannot be what its name says is refused. Raises
    InputError for recordings of other prompts or of another model, with nothing in common, or ours
    with values not finite, and as check_forms does.
    """
    if config is not None:
        _check_model(ours, config)
        _check_model(theirs, config)
    check_forms((ours, theirs), config)
    ours, theirs, shared = common_part(ours, theirs, config)
    engines = {ours.engine_dtype, theirs.engine_dtype}
    grows = tolerance is None and bool(engines & {"bfloat16", "float16"})
    tolerance = max(TOLERANCES[dtype] for dtype in engines) if tolerance is None else tolerance
    all_ours, all_theirs = ours.names, theirs.names
    names = _matching(align(ours, theirs, config), globs)
    if not names:
        kind = f" whose name matches {' or '.join(globs)}" if globs else ""
        both = f"{ours.path} has {_such(all_ours)}, {theirs.path} {_such(all_theirs)}"
        raise InputError(f"no tensor in common{kind}: {both}")
    mtp = mtp_layers((*ours.forms, *theirs.forms), config)

    def judge(n: int, tolerance: float) -> Choice | None:
        return recorded_choice(n, ours, theirs, tolerance, routers and routers(n))

    rows = list(compare_all(ours, theirs, names, tolerance, mtp, grows, judge))
    used = {term.source for name in names for term in ours.forms[name]}
    used_by_them = {term.source for name in names for term in theirs.forms[name]}
    return Report(
        ours,
        theirs,
        tolerance,
        rows,
        _unused(ours, _matching(all_ours, globs), used),
        _unused(theirs, _matching(all_theirs, globs), used_by_them),
        shared,
    )


def routers_of(folder: Path) -> Routers:
    """Each layer's router; None where it has none, or its bias is not in the folder."""
    try:
        checkpoint = open_checkpoint(folder)
    except InputError:  # a config alone
        return lambda n: None
    config = checkpoint.config
    specs = (*config.layers, *config.mtp_layers)

    def router(n: int) -> Choose | None:
        spec, bias = specs[n].moe, f"{specs[n].name}.moe.router_bias"
        if spec is None or (spec.has_bias and bias not in checkpoint.tensors):
            return None
        none: Any = np.empty(0)
        router_bias = checkpoint.get(bias, (spec.experts,)) if spec.has_bias else None
        return chooser(MoEWeights(none, router_bias, none, none, none), spec)

    return router


def recorded_choice(
    n: int, ours: Recording, theirs: Recording, tolerance: float, choose: Choose | None
) -> Choice | None:
    """What two recordings tell of the experts of layer n; None where ours has none.

    `choose`: the layer's router, where its bias is known.
    """
    at = f"model.layers.{n}.moe"
    ids, chosen = (r.if_any(f"{at}.ids", 2) for r in (ours, theirs))
    gate, other = (r.if_any(f"{at}.gate", 2) for r in (ours, theirs))
    if ids is None or (chosen is not None and not are_experts(chosen, ids.shape[1], gate)):
        return None
    if gate is None or (other is not None and other.shape[1] != gate.shape[1]):
        other = None  # without ours, theirs say nothing
    T = min(len(x) for x in (ids, chosen, gate, other) if x is not None)
    chosen, gate, other = (x if x is None else x[:T] for x in (chosen, gate, other))
    ids = np.sort(ids[:T], axis=-1)
    if choose is not None and gate is not None:
        return choice(choose, ids, gate, other, chosen, tolerance)
    other_ids = ids if chosen is None else np.sort(chosen, axis=-1)
    differs, none = (other_ids != ids).any(axis=-1), np.zeros(T, bool)
    lacks = NO_ROUTER if choose is None else NO_LOGITS
    return Choice(ids, differs, none, lacks if chosen is None or differs.any() else "")


def layer_of(report: Report, config: Config) -> int:
    """The layer to run for the first departure: its own, else the one before or after it."""
    name = report.departure.name if report.departure else ""
    layer = split(name)[0]
    first_or_last = 0 if name == "model.embed_tokens" else len(config.layers) - 1
    return first_or_last if layer is None else layer


def _check_model(recording: Recording, config: Config) -> None:
    """Raise InputError where a recording has layers or widths that the config does not."""
    count = len(config.layers) + len(config.mtp_layers)
    for name in recording.names:
        layer, part = split(name)
        where = f"{recording.path}: tensor {shown(recording.source(name))}"
        if layer is not None and layer >= count:
            raise InputError(f"{where}: expected layers 0 to {count - 1}: it is of another model")
        if part == "input_layernorm" and recording.shape(name)[-1:] != (config.hidden_size,):
            found, D = list(recording.shape(name)), config.hidden_size
            message = f"expected [positions, {D}]: it is of another model"
            raise InputError(f"{where} has shape {found}, {message}")


def _matching(names: Iterable[str], globs: Sequence[str]) -> list[str]:
    """The names that any glob matches; all of them where there is no glob."""
    return [n for n in names if not globs or any(fnmatchcase(n, glob) for glob in globs)]


def _unused(recording: Recording, names: Iterable[str], used: set[str]) -> list[str]:
    """The names of what no comparison has looked at, not even as a part of another tensor."""
    return [n for n in names if not any(term.source in used for term in recording.forms[n])]


def _such(names: Sequence[str]) -> str:
    return f"{len(names)} such as {shown(names[0])}" if names else "none"


def diff_table(report: Report) -> str:
    """A line for each tensor, and how much could not be compared."""
    return "\n".join([comparison_table(report.rows), *_unmatched(report)])


def _unmatched(report: Report) -> list[str]:
    """How much only one recording has, and how much of the texts was not looked at."""
    sides = (report.ours, report.only_ours), (report.theirs, report.only_theirs)
    lines = [f"only in {shown(str(r.path))}: {_such(names)}" for r, names in sides if names]
    if report.shared is not None:
        tokens = f"the first {report.shared} tokens" if report.shared > 1 else "the first token"
        lines.append(f"compared over {tokens}, all that both texts begin with")
    return lines


def verdict(report: Report) -> str:
    """The last line: where it departs first, or that it does not."""
    first = report.departure
    if first is not None:
        return f"departs first at {describe(first)}"
    compared = [row for row in report.rows if not row.is_empty]
    figures = [row for row in compared if not row.name.endswith(".moe.ids")] or compared
    if not figures:
        return "match: 0 tensors" + _not_compared(report)
    worst = max(figures, key=lambda row: row.max_error / row.tolerance)
    least, most = (f(row.tolerance for row in report.rows) for f in (min, max))
    within = f"{least:g}" if least == most else f"{least:g} to {most:.2g}"
    at = f"worst {worst.max_error:.1e} at {shown(worst.name)}"
    left_out = sum(row.left_out > 0 for row in compared)
    more = f"; rows of {left_out} left out, where experts tied" if left_out else ""
    return f"match: {len(compared)} tensors within {within} ({at}){more}{_not_compared(report)}"


def _not_compared(report: Report) -> str:
    """What a verdict must say where a tie left no row of some tensors."""
    empty = [row.name for row in report.rows if row.is_empty]
    if not empty:
        return ""
    after = f"; {len(empty)} from {shown(empty[0])} on not compared, since a tie leaves no row"
    return f"{after}: use check-layer for these"


def as_json(report: Report) -> dict[str, Any]:
    """The report as a JSON object; an error that is not a number, as of other shapes, is null."""
    first = report.departure
    return {
        "match": first is None,
        "not_compared": [row.name for row in report.rows if row.is_empty],
        "tolerance": report.tolerance,
        "ours": {"path": str(report.ours.path), "dtype": report.ours.engine_dtype},
        "theirs": {"path": str(report.theirs.path), "dtype": report.theirs.engine_dtype},
        "first": first and first.name,
        "tensors": [row_json(row) for row in report.rows],
        "only_ours": report.only_ours,
        "only_theirs": report.only_theirs,
        "shared_tokens": report.shared,
    }
