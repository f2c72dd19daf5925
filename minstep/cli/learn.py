"""`minstep footgun list | show NAME | run NAME`: known bugs of ports, and what each one does.

Checked by: tests/learn/test_museum.py
"""

import textwrap
from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

from minstep.cli.arguments import FLOATS, add_command, add_model, at_least, not_empty
from minstep.cli.explore import text_tokenizer
from minstep.cli.generate import note_shipped, open_model
from minstep.cli.terminal import Progress, print_json, print_text
from minstep.learn.damage import TIGHTER
from minstep.learn.exhibits import TIGHT, Exhibit
from minstep.learn.museum import EXHIBITS, changes, find_exhibit, measured, patient, ways
from minstep.learn.offstage import RUNNERS

WIDTH = 88


def exhibit_text(exhibit: Exhibit) -> str:
    """What `show` prints."""
    lines = [f"{exhibit.name}: {exhibit.title}", "", *textwrap.wrap(exhibit.story, WIDTH)]
    for bug in exhibit.bugs:
        for n, footgun in enumerate(ways(bug)):
            lines += ["", "or else" if n else bug]
            for change in changes(footgun):
                lines += [f"  {change.file}, line {change.line}"]
                lines += [f"  {line}" for line in change.marked()]
    if exhibit.met:
        lines += ["", "met by"]
    for met in exhibit.met:
        lines += textwrap.wrap(met.what, WIDTH, initial_indent="  ", subsequent_indent="  ")
        lines.append(f"    https://github.com/{met.place}")
    return "\n".join([*lines, "", f"what it does: minstep footgun run {exhibit.name}"])


def report_text(report: dict[str, Any]) -> str:
    """What `run` prints."""
    lines = [f"{report['name']}: {report['title']}"]
    if "happened" in report:
        return "\n".join([*lines, "", *report["happened"]])
    right = report["as_it_is"]
    lines.append(f"{report['tokens']} tokens of held-out text, {len(right['texts'])} prompts")
    if report["setting"]:
        lines.append(f"with {setting_text(report['setting'])}, in the right run too")
    lines += ["", "as it is", f"  perplexity     {number(right['perplexity'])}"]
    if right["agreed"]:
        lines += [f"  drafts kept    {kept(right)} a pass"]
        lines += [f"  as main model  {agreed(right)} of each depth's guesses in the text"]
    lines += [f"  greedy text    {one_line(right['texts'][0])}"]
    for bug in report["bugs"]:
        lines += ["", bug["bug"], *_bug_lines(bug, right)]
    return "\n".join(lines)


def _bug_lines(bug: dict[str, Any], right: dict[str, Any]) -> Iterator[str]:
    if bug["refused"]:
        yield f"  refused        {bug['refused']}"
    if not bug["texts"]:
        return
    if bug["refused"]:
        yield "                 cut to that size it runs:"
    yield f"  departs first  {departure(bug)}"
    if not bug.get("departs_with_own_limits", True):
        yield "                 with the model's own limits nothing departs in this text"
    yield f"  perplexity     {number(right['perplexity'])} -> {number(bug['perplexity'])}"
    if right["agreed"]:
        yield f"  drafts kept    {kept(right)} -> {kept(bug)} a pass"
        yield f"  as main model  {agreed(right)} -> {agreed(bug)}"
    pairs = zip(right["texts"], bug["texts"], strict=True)
    other = next((n for n, (ours, theirs) in enumerate(pairs) if ours != theirs), None)
    if other is None:
        yield "  greedy text    the same for every prompt"
    else:
        yield f"  greedy text    {one_line(right['texts'][other])}"
        yield f"              -> {one_line(bug['texts'][other])}"


def setting_text(setting: str) -> str:
    """A setting in words."""
    return f"limits an {TIGHTER}th of the model's" if setting == TIGHT else setting


def departure(bug: dict[str, Any]) -> str:
    """The first tensor that departs, in words."""
    if bug["tensor"] is None:
        return "nowhere: every tensor is the same over the text"
    return f"{bug['tensor']} at token {bug['token']}, {error(bug)}"


def error(bug: dict[str, Any]) -> str:
    """By how much the first tensor departs, of its largest value."""
    share = bug["error"]
    return "in its shape" if share is None else f"by {share:.{0 if share >= 0.1 else 1}%}"


def number(x: float | None) -> str:
    """A perplexity."""
    return "not finite" if x is None else f"{x:,.2f}" if x < 1000 else f"{x:,.0f}"


def kept(figures: dict[str, Any]) -> str:
    """Drafts kept a pass; there are none where every text ends with its first token."""
    return "none" if figures["accepted"] is None else f"{figures['accepted']:.2f}"


def agreed(figures: dict[str, Any]) -> str:
    """How often each depth guesses what the main model does."""
    return ", ".join(f"{share:.0%}" for share in figures["agreed"])


def one_line(text: str, most: int = 68) -> str:
    """The beginning of a text, its white space made visible where it is more than a space."""
    shown = repr(text)[1:-1]
    return shown if len(shown) <= most else f"{shown[: most - 3]}..."


def run_list(args: Namespace) -> None:
    """Print names and titles, by group."""
    wide = max(len(exhibit.name) for exhibit in EXHIBITS) + 2
    group = ""
    for exhibit in EXHIBITS:
        if exhibit.group != group:
            print_text(*([""] if group else []), exhibit.group)
            group = exhibit.group
        print_text(f"  {exhibit.name:{wide}}{exhibit.title}")


def run_show(args: Namespace) -> None:
    """Print an exhibit: the story, the changed lines, who met it."""
    print_text(exhibit_text(find_exhibit(args.name)))


def run_run(args: Namespace) -> None:
    """Run a model with the bugs of an exhibit, and print what they do."""
    exhibit = find_exhibit(args.name)
    for bug in exhibit.bugs:
        changes(ways(bug)[0])  # a line that was edited is refused before anything runs
    model = open_model(args.model)
    tokenizer = text_tokenizer(args, model)
    its = patient(model.checkpoint, tokenizer, args.tokens, np.dtype(args.dtype))
    if exhibit.bugs[0] not in RUNNERS:
        note_shipped(args.model)
    with Progress(exhibit.name, len(exhibit.bugs), "bugs") as bar:
        report = measured(exhibit, its, tokenizer, bar)
    print_json(report) if args.json else print_text(report_text(report))


def add_footgun(command: Callable[..., Any]) -> None:
    """Add `footgun` and its own commands to the parser."""
    text = "known bugs of ports: the changed line, and what it does"
    commands = command("footgun", run_list, text, "list").add_subparsers(
        required=True, metavar="WHAT"
    )

    add, name = partial(add_command, commands), "window-off-by-one"
    add("list", run_list, "their names", "footgun list")
    its = add("show", run_show, "what it is, and who met it", f"footgun show {name}")
    its.add_argument("name", type=not_empty, metavar="NAME")
    its = add("run", run_run, "run a model with it", f"footgun run {name}")
    its.add_argument("name", type=not_empty, metavar="NAME")
    add_model(its)
    text = "of the held-out text (all)"
    its.add_argument("--tokens", type=at_least(2), metavar="N", help=text)
    text = "of every activation (float64: the same figures on every machine)"
    its.add_argument("--dtype", **FLOATS | {"default": "float64"}, help=text)
    its.add_argument("--json", action="store_true", help="print one JSON object")
