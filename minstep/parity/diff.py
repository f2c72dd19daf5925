"""Two recordings -> which tensor departs first in the model's order, and by how much.

Checked by: tests/parity/test_diff.py
"""

import math
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import numpy as np

from minstep.config import Config
from minstep.errors import InputError, shown
from minstep.parity.compare import Comparison
from minstep.parity.facts import common_beginning, depths
from minstep.parity.names import mtp_layers
from minstep.parity.pairs import align, compare_all, tolerance_of
from minstep.parity.recording import Recording, check_forms
from minstep.parity.router_ties import Choice, Routers, recorded_choice
from minstep.store.stages import split

STARTS = ("model.embed_tokens", "model.layers.0.input_layernorm")  # nothing of the port is in them


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
        return first_departure(self.rows)


@np.errstate(over="ignore", invalid="ignore")  # what is not finite is told by name
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
    not say. `globs`: our names to look at. `routers`: of the model, where experts
    differ. A tensor of another size departs; one that cannot be what its name says is refused.
    Raises InputError for recordings of other prompts or of another model, with nothing in common,
    or ours with values not finite, and as check_forms does.
    """
    if config is not None:
        check_model(ours, config)
        check_model(theirs, config)
    check_forms((ours, theirs), config)
    shared = common_beginning(ours, theirs)
    if shared is not None:
        deep = depths(ours, theirs, config)
        ours, theirs = ours.beginning(shared, deep), theirs.beginning(shared, deep)
    is_short = {ours.engine_dtype, theirs.engine_dtype} & {"bfloat16", "float16"}
    grows = tolerance is None and bool(is_short)
    tolerance = tolerance_of(ours, theirs) if tolerance is None else tolerance
    held = ours.names, theirs.names
    names = _matching(align(ours, theirs, config), globs)
    if not names:
        kind = f" whose name matches {' or '.join(globs)}" if globs else ""
        said = f"{ours.path} has {_such(held[0])}, {theirs.path} {_such(held[1])}"
        raise InputError(f"no tensor in common{kind}: {said}")
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
        _unused(ours, _matching(held[0], globs), used),
        _unused(theirs, _matching(held[1], globs), used_by_them),
        shared,
    )


def first_departure(rows: Iterable[Comparison]) -> Comparison | None:
    """The first row that is not a match; rows are in the model's order."""
    return next((row for row in rows if not row.is_match), None)


def layer_of(report: Report, config: Config) -> int:
    """The layer to run for the first departure: its own, else the one before or after it."""
    name = report.departure.name if report.departure else ""
    layer = split(name)[0]
    first_or_last = 0 if name == "model.embed_tokens" else len(config.layers) - 1
    return first_or_last if layer is None else layer


def check_model(recording: Recording, config: Config) -> None:
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
    """One line for each tensor: name, shape, errors, cosine, verdict."""
    names = [shown(row.name) for row in report.rows]
    width = max(map(len, names))
    shapes = [str(list(row.shape)) for row in report.rows]
    wide = max(map(len, shapes))
    lines = [f"{'tensor':{width}}  {'shape':{wide}}  max error  mean error    cosine  verdict"]
    for row, name, shape in zip(report.rows, names, shapes, strict=True):
        verdict = "not compared" if row.is_empty else "ok" if row.is_match else "departs"
        if row.left_out:
            verdict += f", {row.left_out} rows left out"
        figures = f"{row.max_error:9.1e}  {row.mean_error:10.1e}  {row.cosine:8.6f}"
        if row.is_empty:
            figures = f"{'-':>9}  {'-':>10}  {'-':>8}"
        lines.append(f"{name:{width}}  {shape:{wide}}  {figures}  {verdict}")
    return "\n".join([*lines, *_unmatched(report)])


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


def describe(row: Comparison) -> str:
    """One line on a tensor that departs: its name, the error and the first element."""
    said = f"error {row.max_error:.1e} of the largest value, tolerance {row.tolerance:.2g}"
    line = f"{shown(row.name)}: {row.note or said}"
    if row.first is not None:
        place, ours, theirs = row.first
        line += f", first at {list(place)}: {ours:.6g} against {theirs:.6g}"
    return line + (": perhaps another prompt or other weights" if row.name in STARTS else "")


def as_json(report: Report) -> dict[str, Any]:
    """The report as JSON holds it; an error that is not a number, as of other shapes, is null."""
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


def row_json(row: Comparison) -> dict[str, Any]:
    """One comparison as JSON holds it."""
    errors = {"max_error": row.max_error, "mean_error": row.mean_error}
    return {
        "name": row.name,
        "shape": list(row.shape),
        **{key: x if math.isfinite(x) else None for key, x in errors.items()},
        "cosine": row.cosine,
        "match": row.is_match,
        "compared": not row.is_empty,
        "tolerance": row.tolerance,
        "first": row.first and dict(zip(("index", "ours", "theirs"), row.first, strict=True)),
        "left_out": row.left_out,
        "note": row.note,
    }
