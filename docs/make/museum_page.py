"""The museum as a page of the book: every exhibit, its change, its story, and figures of a run.

    python -m docs.make.museum_page

runs all exhibits, which takes minutes, and writes the page.

Checked by: tests/learn/test_museum.py
"""

import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from docs.make.pages import DOCS, fill
from minstep.learn.damage import TIGHTER
from minstep.learn.exhibits import DECODING, DRAFTS, EXHIBITS, FILES, Exhibit
from minstep.learn.museum import (
    agreed,
    changes,
    error,
    kept,
    measured,
    one_line,
    patient,
    perplexity_text,
    setting_text,
    ways,
)
from minstep.parity.compare import TOLERANCES
from minstep.store.checkpoint import open_checkpoint
from minstep.store.config_file import find_config, load_config
from minstep.text.tokenizer import load_tokenizer

HEAD = """\
# 13. The footgun museum

*Which mistakes have ports of this model made, and how would one have noticed?*

A footgun is a tool that makes it easy to shoot oneself in the foot: here, a rule of the model that
is easily got wrong. Most of these bugs raise no error. Shapes fit, the text is fluent, a short
comparison passes. What gives them away is a number: a tensor that departs from a reference, a
perplexity that is a little too high, drafts that are refused.

This page has {count} exhibits with {bugs} bugs. Each is a line of minstep changed to what a port
has had, and each was run: the small trained model, in float64, reads {tokens} tokens of text that
it was not trained on, and continues {prompts} prompts.

```sh
minstep footgun list
minstep footgun show window-off-by-one
minstep footgun run window-off-by-one
```

`show` prints the change with its file and line. `run` makes the figures of this page again, with
`--model DIR` those of a model of yours. The changed lines are data:
[parity/known_bugs.py](../minstep/parity/known_bugs.py) has those that a layer shows,
[decoding_bugs.py](../minstep/parity/decoding_bugs.py) the others. With the first table
[check-layer](11-comparing.md) says which bug explains a layer of your port that departs.

A bug shows in one tensor first, and in all that follow from it. Here it is the gate of the first
layer, beside what rounding does:

![Errors of tensors in order: float32, bfloat16, and a gate forgotten](figures/departure.svg)

## What the numbers say

The model as it is has a perplexity of {perplexity} on this text and keeps {accepted} drafts a pass.

{findings}

The small model is no measure of how bad a bug is at full size. It is narrow, its texts are short
and its window is {window} tokens: what needs a long text shows early, and what needs outliers
hardly at all, so that clamps are tried with limits an {tighter}th as large.

## All of them

*departs first*: the first tensor that differs by more than {exact:g} of its largest value, from
which token on, and by how much of that value; of chosen experts, what share of them. *drafts kept*:
of {depths} a pass, while continuing the prompts; passes are few, and a small difference may be
chance. *depths agree*: how often each of the draft depths guesses in the text what the main model
does. Of several bugs in an exhibit the first stands here. An arrow leads from the right figure
where that is another one, since something had to be changed for the bug to show.

| exhibit | departs first at | token | by | perplexity | drafts kept |
|---|---|---|---|---|---|
"""

TAIL = """\
## Exercises

`minstep exercise 13 --out ch13` plants a bug that you have to find, and tests that turn green then.

1. `gate` has three bugs, and in each `o_proj` is the first tensor that departs. Which one would
   you record besides, to tell them apart?
2. Plant `window-off-by-one` in your copy of the code and run the tests. Which of them fail? How
   long is the shortest prompt that shows it?
3. In a model whose QK-norm has no weight, `qk-norm-order` would be no bug. Show why, with one pair
   of dimensions, and say what a weight changes.

<!-- nav -->
<!-- end -->
"""
# A bug of these is not one of the main model.
ASIDE = (DRAFTS, DECODING, FILES)


def measured_all() -> list[dict[str, Any]]:
    """What `measured` reports of every exhibit and the shipped model, over one unspoiled run."""
    folder = find_config("trained")
    checkpoint, tokenizer = open_checkpoint(folder), load_tokenizer(folder)
    assert tokenizer
    tried = patient(checkpoint, tokenizer)
    return [measured(exhibit, tried, tokenizer) for exhibit in EXHIBITS]


def museum_page(reports: Sequence[dict[str, Any]]) -> str:
    """The text of docs/13-footguns.md, but for the links to the chapters beside it.

    `reports`: those of measured_all.
    """
    plain = reports[0]  # an exhibit that changes nothing but a line
    config = load_config(find_config("trained"))
    head = HEAD.format(
        count=len(EXHIBITS),
        bugs=sum(len(exhibit.bugs) for exhibit in EXHIBITS),
        tokens=plain["tokens"],
        prompts=len(plain["prompts"]),
        perplexity=perplexity_text(plain["as_it_is"]["perplexity"]),
        accepted=kept(plain["as_it_is"]),
        findings=_findings(reports),
        window=max(spec.window or 0 for spec in config.layers),
        tighter=TIGHTER,
        exact=TOLERANCES["float64"],
        depths=len(config.mtp_layers),
    )
    lines = [_row(report) for report in reports]
    group = ""
    for exhibit, report in zip(EXHIBITS, reports, strict=True):
        if exhibit.group != group:
            group = exhibit.group
            lines += ["", f"## {group.capitalize()}"]
        lines += ["", *_section(exhibit, report)]
    return head + "\n".join([*lines, "", TAIL])


def _findings(reports: Sequence[dict[str, Any]]) -> str:
    """What the bugs of the main model have in common, counted."""
    ran = [
        (report["as_it_is"], bug)
        for exhibit, report in zip(EXHIBITS, reports, strict=True)
        for bug in report.get("bugs", ())
        if exhibit.group not in ASIDE and bug["texts"]
    ]
    ratios = [_ratio(*pair) for pair in ran]
    loud, quiet = sum(x >= 2 for x in ratios), sum(x < 1.05 for x in ratios)
    same = sum(right["texts"] == bug["texts"] for right, bug in ran)
    more = sum((bug["accepted"] or 0) > (right["accepted"] or 0) for right, bug in ran)
    findings = (
        f"{len(ran)} bugs are in the main model. {loud} of them at least double the perplexity: "
        f"any text shows those. {quiet} raise it by less than a twentieth, or not at all.",
        f"{same} of the bugs leave the greedy text of every prompt as it was. Nobody finds these "
        "by reading what the model says.",
        f"{more} of the bugs raise acceptance: more drafts are kept than without the bug. "
        "Acceptance measures drafts, not the model: a model that repeats itself is easily "
        "predicted.",
    )
    return "\n".join(_filled(text, "- ") for text in findings)


def _ratio(right: dict[str, Any], bug: dict[str, Any]) -> float:
    perplexity = bug["perplexity"]
    return np.inf if perplexity is None else float(perplexity / right["perplexity"])


def _row(report: dict[str, Any]) -> str:
    """An exhibit's row of the first table."""
    link = f"[{report['name']}](#{report['name']})"
    if "happened" in report:
        return f"| {link} | no tensor shows it | | | | |"
    right = report["as_it_is"] if report["setting"] else None
    return f"| {link} | {_cells(report['bugs'][0], right)}"


def _cells(bug: dict[str, Any], right: dict[str, Any] | None = None) -> str:
    if not bug["texts"]:
        return "does not run | | | | |"
    before = (
        (f"{perplexity_text(right['perplexity'])} → ", f"{kept(right)} → ") if right else ("", "")
    )
    where = "nowhere | | " if bug["tensor"] is None else _where(bug)
    return f"{where}| {before[0]}{perplexity_text(bug['perplexity'])} | {before[1]}{kept(bug)} |"


def _where(bug: dict[str, Any]) -> str:
    name = bug["tensor"].removeprefix("model.")
    return f"`{name}` | {bug['token']} | {error(bug).removeprefix('by ')} "


def _section(exhibit: Exhibit, report: dict[str, Any]) -> Iterator[str]:
    yield f"### {exhibit.name}"
    yield ""
    yield _filled(f"**{exhibit.title}.** {exhibit.story}")
    yield ""
    yield "```diff"
    for bug in exhibit.bugs:
        yield f"# {bug}"
        for change in changes(ways(bug)[0]):
            yield f"  {change.file}"
            yield from change.marked()
    yield "```"
    yield ""
    yield from _happened(report) if "happened" in report else _measures(report)
    yield from ("", "Met by:", "") if exhibit.met else ()
    for met in exhibit.met:
        yield _filled(met.what, "- ")
        yield f"  ([{met.place}](https://github.com/{met.place}))"


def _filled(text: str, mark: str = "") -> str:
    return textwrap.fill(
        text, 100, initial_indent=mark, subsequent_indent=" " * len(mark), break_on_hyphens=False
    )


def _happened(report: dict[str, Any]) -> Iterator[str]:
    yield "```text"
    yield from report["happened"]
    yield "```"


def _measures(report: dict[str, Any]) -> Iterator[str]:
    right = report["as_it_is"]
    if report["setting"]:
        yield f"With {setting_text(report['setting'])}, in the right run too:"
        yield ""
    yield "| | departs first at | token | by | perplexity | drafts kept | depths agree |"
    yield "|---|---|---|---|---|---|---|"
    perplexity = perplexity_text(right["perplexity"])
    yield f"| as it is | | | | {perplexity} | {kept(right)} | {agreed(right)} |"
    for bug in report["bugs"]:
        yield f"| {bug['bug']} | {_cells(bug)} {agreed(bug)} |"
    yield ""
    for bug in report["bugs"]:
        if bug["refused"]:
            yield "A loader that checks shapes refuses the model, and all figures are those of one"
            yield "that takes as much of each matrix as it expects:"
            yield from ("", "```text", *textwrap.wrap(bug["refused"], 98), "```", "")
    own = [bug["bug"] for bug in report["bugs"] if not bug.get("departs_with_own_limits", True)]
    if own:
        yield _filled(
            f"With the limits of the model itself nothing departs here: {', '.join(own)}."
        )
        yield ""
    yield from _texts(report)


def _texts(report: dict[str, Any]) -> Iterator[str]:
    """The first greedy text that one of the bugs makes different."""
    right = report["as_it_is"]
    for bug in report["bugs"]:
        for prompt, ours, theirs in zip(
            report["prompts"], right["texts"], bug["texts"], strict=False
        ):
            if ours != theirs:
                yield f"After `{one_line(prompt, 40)}`, {bug['bug']}:"
                yield ""
                yield "```text"
                yield f"as it is      {one_line(ours)}"
                yield f"with the bug  {one_line(theirs)}"
                yield "```"
                return
    yield "Greedy text stays as it is, for every prompt."


if __name__ == "__main__":
    page = DOCS / "13-footguns.md"
    page.write_text(museum_page(measured_all()), encoding="utf-8")
    page.write_text(fill(page), encoding="utf-8")
