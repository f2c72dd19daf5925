"""What was measured beside its targets, as a table, as JSON and as charts.

A target missed is printed, and is nobody's error: timings are noisy, and machines differ in what
they lack.

Checked by: tests/bench/test_bench.py
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from minstep.bench.timing import LIMIT, Found, Row
from minstep.draw.charts import bar_chart, line_chart

BUSY = 0.9  # share of idle processors below which times say little
NAMES = {"float32": "torch float32", "bfloat16": "torch bfloat16", LIMIT: "reading alone"}
BESIDE = ("float32", "bfloat16")  # what the chart of ratios has bars for


class Target(NamedTuple):
    """A row of the report is to be at least so many times as fast as `other`."""

    case: str
    what: str  # how the row begins
    other: str
    at_least: float


TARGETS = (
    Target("tiny", "decode", "float32", 2.0),
    Target("trained", "decode", "float32", 2.0),
    Target("mid", "decode", "float32", 1.0),
    Target("mid", "prefill", "float32", 0.8),
    Target("moe", "one token", LIMIT, 0.42),
    Target("moe", "512 tokens, 288 experts", "bfloat16", 0.4),
    Target("attention", "262,144 positions", LIMIT, 0.4),
    Target("drafts", "with drafts", "without", 1.25),
)


def target(case: str, what: str, other: str) -> float | None:
    """What a row is to reach against `other`; None where nothing was asked for."""
    for each in TARGETS:
        if (each.case, each.other) == (case, other) and what.startswith(each.what):
            return each.at_least
    return None


def bench_report(machine: dict[str, Any], found: Mapping[str, Found]) -> dict[str, Any]:
    """Machine and cases as one object of plain values: every round's seconds, ratios, targets.

    A ratio is how many times as fast ours is, from the fastest round of each side; `least` and
    `most` are those of single rounds.
    """
    return {"machine": machine, "cases": {name: judged(each) for name, each in found.items()}}


def judged(found: Found) -> dict[str, Any]:
    """What a case found as plain values: seconds of every round, ratios, and their targets."""
    rows = [{**row._asdict(), "ratios": _ratios(row)} for row in found.rows]
    curves = [curve._asdict() for curve in found.curves]
    return {"rows": rows, "errors": found.errors, "notes": found.notes, "curves": curves}


def _ratios(row: Row) -> dict[str, dict[str, Any]]:
    """How many times as fast as each other side, and as was to be reached."""
    ratios = {}
    for other in row.others:
        ratio, least, most = row.ratio(other)
        wanted = target(row.case, row.what, other)
        is_met = None if wanted is None else ratio >= wanted
        found: dict[str, Any] = {"ratio": ratio, "least": least, "most": most}
        ratios[other] = found | {"target": wanted, "is_met": is_met}
    return ratios


def bench_table(report: dict[str, Any]) -> str:
    """The report as text for a terminal."""
    cases = [line for case in report["cases"].values() for line in case_lines(case)]
    return "\n".join([*head_lines(report["machine"]), *cases, *end_lines(report)])


def head_lines(machine: dict[str, Any]) -> list[str]:
    """What stands above the rows: the machine, and what the columns are."""
    idle = machine["idle"]
    busy = "; OTHERS ARE AT WORK: these times say little" if is_busy(idle) else ""
    load = "" if idle is None else f"; {idle:.0%} idle before{busy}"
    one, every = (rate / 1e9 for rate in machine["read_rates"])
    columns = f"{'case':36}{'ours':>11}  {'against':18}{'its':>11}{'times as fast':>15}  of rounds"
    return [
        f"{machine['threads']} threads, NumPy {machine['numpy']}{load}",
        f"memory is read at {one:.1f} GB/s by one thread, {every:.1f} GB/s by all of them",
        f"torch: {machine['peer'] or 'no peer: ' + machine['no_peer']}",
        "",
        f"{columns}    target",
    ]


def is_busy(idle: float | None) -> bool:
    """Whether others had so much of the processors before that times say little."""
    return idle is not None and idle < BUSY


def case_lines(case: dict[str, Any]) -> list[str]:
    """The lines of one case of the report."""
    rows = [line for row in case["rows"] for line in _row_lines(row)]
    errors = [f"ERROR: {error}" for error in case["errors"]]
    return [*rows, *(f"  {note}" for note in case["notes"]), *errors]


def end_lines(report: dict[str, Any]) -> list[str]:
    """How many of the targets were met."""
    rows = [row for case in report["cases"].values() for row in case["rows"]]
    ratios = [ratio for row in rows for ratio in row["ratios"].values()]
    wanted = [ratio["is_met"] for ratio in ratios if ratio["target"] is not None]
    return ["", f"{sum(wanted)} of {len(wanted)} targets met"]


def _row_lines(row: dict[str, Any]) -> list[str]:
    """A line for each thing that a row is held against."""
    start = f"{row['case'] + ', ' + row['what']:36}{_time(row['ours']):>11}"
    if not row["others"]:
        return [start]
    lines = []
    for name, times in row["others"].items():
        ratio = row["ratios"][name]
        spread = f"{ratio['least']:.2f}-{ratio['most']:.2f}"
        line = f"{start}  {NAMES.get(name, name):18}{_time(times):>11}"
        line += f"{ratio['ratio']:>14.2f}x  {spread:11}"
        if ratio["target"] is not None:
            line += f"  {ratio['target']:.2f} {'met' if ratio['is_met'] else 'NOT met'}"
        lines.append(line.rstrip())
        start = " " * 47
    return lines


def _time(times: list[float]) -> str:
    """The fastest round, with a unit that suits it."""
    best = min(times)
    if best >= 1:
        return f"{best:.2f} s"
    return f"{best * 1e3:.2f} ms" if best >= 1e-3 else f"{best * 1e6:.1f} us"


def charts(found: Mapping[str, Found]) -> dict[str, str]:
    """File name -> SVG text: the ratios to torch, and every curve."""
    drawn = {}
    rows: list[Row] = [row for each in found.values() for row in each.rows]
    bars: dict[str, dict[str, float]] = {}
    for row in rows:
        beside = {NAMES[name]: row.ratio(name)[0] for name in BESIDE if name in row.others}
        if beside:
            bars[f"{row.case} {row.what.split()[0].strip(',')}"] = beside  # names fit under bars
    if bars:
        drawn["ratios.svg"] = bar_chart("Times as fast as transformers or torch", bars)
    for name, each in found.items():
        for curve in each.curves:
            drawn[f"{name}.svg"] = line_chart(
                curve.title,
                {NAMES.get(line, line): points for line, points in curve.lines.items()},
                "positions",
                "milliseconds",
                bases=(2, 10),
            )
    return drawn
