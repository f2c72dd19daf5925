"""The footgun museum: exhibits by name, the lines that each changes, and what that does to a model.

Checked by: tests/learn/test_museum.py
"""

import math
import textwrap
from collections.abc import Callable, Iterator, Sequence
from difflib import SequenceMatcher, get_close_matches
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike
from tokenizers import Tokenizer

from minstep.errors import InputError
from minstep.learn.damage import RUNNERS, TIGHTER, Damage, Patient
from minstep.learn.exhibits import EXHIBITS, TIGHT, Exhibit
from minstep.parity.decoding_bugs import EVERY, IN_DRAFTER
from minstep.parity.known_bugs import Footgun
from minstep.parity.variants import planted, source
from minstep.store.checkpoint import Checkpoint
from minstep.train.data import encode_documents
from minstep.train.documents import Document

WIDTH = 88  # of a text in a terminal
PROMPT = 16  # tokens of a document that are continued
# In the manner of Python's documentation, of things that are not there: nobody was trained on it.
HELD_OUT = (
    Document(
        "topic/repeat",
        """\
The "repeat" statement
**********************

The "repeat" statement is used to execute a suite a given number of
times:

   repeat_stmt: "repeat" expression ":" suite

The expression is evaluated once; it must return an integer.
""",
    ),
    Document(
        "module/harbour",
        """\
Module harbour
**************

class Berth(size, /)

A place for one object.  The optional argument size is the number of
bytes that are reserved for it.
""",
    ),
    Document(
        "module/moorings",
        """\
Module moorings
***************

def moor(name, timeout=None)

Return the object with the given name, or raise KeyError if there is
no such object.  If timeout is not None, wait for so many seconds.
""",
    ),
    Document(
        "topic/tides",
        """\
Tides
*****

A tide is an object that changes between two calls.  The following
methods are supported by all tides; those of other modules may be
called with a tide as their first argument.
""",
    ),
)


def find_exhibit(name: str) -> Exhibit:
    """The exhibit of a name. Raises InputError that gives near names where there is none."""
    by_name = {exhibit.name: exhibit for exhibit in EXHIBITS}
    if name in by_name:
        return by_name[name]
    inside = [other for other in by_name if name in other]
    near = dict.fromkeys([*inside, *get_close_matches(name, by_name, 3, 0.4)])
    expected = f"{' or '.join([*near][:3])}, or another" if near else "one"
    raise InputError(f"{name}: no such footgun, expected {expected} of minstep footgun list")


def ways(bug: str) -> tuple[Footgun, ...]:
    """All ways that ports have had a bug, by its words; the first is the one that is run."""
    return tuple(footgun for footgun in EVERY if footgun.bug == bug)


class Change(NamedTuple):
    """The lines of a file that a bug changes, and the number of the first of them."""

    file: str
    line: int
    before: list[str]
    after: list[str]

    def marked(self) -> list[str]:
        """The lines as a diff has them."""
        return [*(f"-{line}" for line in self.before), *(f"+{line}" for line in self.after)]


def changes(footgun: Footgun) -> list[Change]:
    """What a bug changes, its second place in the Drafter included, if it has one."""
    found = []
    for each in (footgun, IN_DRAFTER.get(footgun.bug)):
        if each:
            right, wrong = source(each.module).splitlines(), planted(each).splitlines()
            blocks = SequenceMatcher(None, right, wrong, autojunk=False).get_opcodes()
            found += [
                Change(each.file, a + 1, right[a:b], wrong[c:d])
                for kind, a, b, c, d in blocks
                if kind != "equal"
            ]
    return found


def patient(
    checkpoint: Checkpoint,
    tokenizer: Tokenizer,
    most: int | None = None,
    dtype: DTypeLike = np.float64,
) -> Patient:
    """A model to try bugs on, over `most` tokens of the held-out text, None for all.

    Raises InputError where the text has fewer, and as encode_documents does.
    """
    texts = [encode_documents([document], tokenizer).tolist() for document in HELD_OUT]
    tokens = [token for text in texts for token in text]
    if most is not None and most > len(tokens):
        raise InputError(f"--tokens {most}: the text has {len(tokens)}, expected at most those")
    prompts = [text[:PROMPT] for text in texts]
    return Patient(checkpoint, tokens[:most], prompts, dtype=dtype)


def measured(
    exhibit: Exhibit,
    patient: Patient,
    tokenizer: Tokenizer,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, Any]:
    """What the bugs of an exhibit do, as JSON can hold it; `progress` gets how many are done."""
    report: dict[str, Any] = {"name": exhibit.name, "title": exhibit.title}
    if runner := RUNNERS.get(exhibit.bugs[0]):
        return report | {"happened": runner(tuple(ways(bug)[0] for bug in exhibit.bugs))}
    right = patient.unspoiled(exhibit.setting)
    report |= {"setting": exhibit.setting, "tokens": len(patient.tokens)}
    report |= {"prompts": [_decoded(tokenizer, prompt) for prompt in patient.prompts]}
    report |= {"as_it_is": _figures(right, tokenizer), "bugs": []}
    for done, bug in enumerate(exhibit.bugs, start=1):
        damage = patient.spoiled(ways(bug)[0], exhibit.setting)
        figures = {"bug": bug} | _figures(damage, tokenizer)
        figures |= {"tensor": damage.tensor, "token": damage.token, "error": _number(damage.error)}
        if exhibit.setting == TIGHT:
            figures |= {"departs_with_own_limits": patient.departs(ways(bug)[0])}
        report["bugs"].append(figures | {"refused": damage.refused})
        progress(done)
    return report


def _figures(damage: Damage, tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "perplexity": _number(damage.perplexity),
        "accepted": damage.accepted,
        "agreed": damage.agreed,
        "texts": [_decoded(tokenizer, text) for text in damage.texts],
    }


def _number(x: float) -> float | None:
    """A number of JSON, which has neither NaN nor infinity."""
    return x if math.isfinite(x) else None


def _decoded(tokenizer: Tokenizer, tokens: Sequence[int]) -> str:
    return str(tokenizer.decode(list(tokens)))


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
    lines += ["", "as it is", f"  perplexity     {perplexity_text(right['perplexity'])}"]
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
    yield f"  departs first  {first_departure_text(bug)}"
    if not bug.get("departs_with_own_limits", True):
        yield "                 with the model's own limits nothing departs in this text"
    before, after = (perplexity_text(each["perplexity"]) for each in (right, bug))
    yield f"  perplexity     {before} -> {after}"
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


def first_departure_text(bug: dict[str, Any]) -> str:
    """The first tensor that departs, in words."""
    if bug["tensor"] is None:
        return "nowhere: every tensor is the same over the text"
    return f"{bug['tensor']} at token {bug['token']}, {error(bug)}"


def error(bug: dict[str, Any]) -> str:
    """By how much the first tensor departs, of its largest value."""
    share = bug["error"]
    return "in its shape" if share is None else f"by {share:.{0 if share >= 0.1 else 1}%}"


def perplexity_text(x: float | None) -> str:
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
