"""The footgun museum: exhibits by name, the lines that each changes, and what that does to a model.

Checked by: tests/learn/test_museum.py
"""

import math
from collections.abc import Callable, Sequence
from difflib import SequenceMatcher, get_close_matches
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike
from tokenizers import Tokenizer

from minstep.errors import InputError
from minstep.learn.damage import Damage, Patient
from minstep.learn.exhibits import ANGLES, TIGHT, Exhibit
from minstep.learn.exhibits_decoding import BESIDE
from minstep.learn.exhibits_layer import LAYER
from minstep.learn.offstage import RUNNERS
from minstep.parity.decoding_bugs import EVERY, IN_DRAFTER
from minstep.parity.known_bugs import Footgun
from minstep.parity.variants import planted, source
from minstep.store.checkpoint import Checkpoint, open_checkpoint
from minstep.store.config_file import find_config
from minstep.text.tokenizer import load_tokenizer
from minstep.train.data import encode_documents
from minstep.train.documents import Document

EXHIBITS = (*ANGLES, *LAYER, *BESIDE)
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
    """What the bugs of an exhibit do, as JSON can hold it; `progress` is told how many are done."""
    report: dict[str, Any] = {"name": exhibit.name, "title": exhibit.title}
    if runner := RUNNERS.get(exhibit.bugs[0]):
        return report | {"happened": runner(tuple(ways(bug)[0] for bug in exhibit.bugs))}
    right = patient.unspoiled(exhibit.setting)
    report |= {"setting": exhibit.setting, "tokens": len(patient.tokens)}
    report |= {"prompts": [_text(tokenizer, prompt) for prompt in patient.prompts]}
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


def measured_all(progress: Callable[[int], None] = lambda done: None) -> list[dict[str, Any]]:
    """What `measured` says of every exhibit and the shipped model, over one unspoiled run."""
    folder = find_config("trained")
    checkpoint, tokenizer = open_checkpoint(folder), load_tokenizer(folder)
    assert tokenizer
    its, reports = patient(checkpoint, tokenizer), list[dict[str, Any]]()
    for exhibit in EXHIBITS:
        reports.append(measured(exhibit, its, tokenizer))
        progress(len(reports))
    return reports


def _figures(damage: Damage, tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "perplexity": _number(damage.perplexity),
        "accepted": damage.accepted,
        "agreed": damage.agreed,
        "texts": [_text(tokenizer, text) for text in damage.texts],
    }


def _number(x: float) -> float | None:
    """A number of JSON, which has neither NaN nor infinity."""
    return x if math.isfinite(x) else None


def _text(tokenizer: Tokenizer, tokens: Sequence[int]) -> str:
    return str(tokenizer.decode(list(tokens)))
