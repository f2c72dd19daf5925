"""Figures of decoding: drafts kept and rejected over the text, and what filters leave of a choice.

Checked by: tests/docs/test_gallery.py
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from html import escape

import numpy as np

from minstep.config import Config
from minstep.draw.svg import Colours, card, rect, text, widest
from minstep.generate import steps
from minstep.model import ModelWeights
from minstep.sampling import Sampling, distribution
from minstep.tap import Array
from minstep.text.continuation import Continuation, Pass

Word = Callable[[int], str]  # a token as text
LEFT, TOP, ROW, CELL = 66, 104, 24, 13  # of the timeline, in units of the canvas
NEW = 36  # tokens of the timeline, at most
LINE, COLUMN, BAR = 22, 132, 64  # of the distributions: row, column, and the bar of probability 1
COLOURS: Colours = {  # fill and stroke on a light card, fill and stroke on a dark one
    ".kept": ("#2563c9", "none", "#6cb0ff", "none"),
    ".lost": ("none", "#d6246e", "none", "#ff4f93"),
    ".rest": ("#eaeef2", "none", "#21262d", "none"),
    ".own": ("#b45309", "none", "#f0a13a", "none"),
    "tspan.lost": ("#d6246e", "none", "#ff4f93", "none"),
}
RULES = "tspan.own{font-weight:600} tspan.lost{text-decoration:line-through} text{white-space:pre}"


def timeline_svg(
    prompt: Sequence[int],
    weights: ModelWeights,
    config: Config,
    word: Word,
) -> str:
    """Each pass of greedy decoding as a row: the drafts, and the main model's own token.

    Places from left to right are those of the new tokens. Raises InputError for a bad prompt.
    """
    rng = np.random.default_rng(0)  # greedy: its numbers change nothing
    answer = Continuation(steps(prompt, weights, config, rng, NEW, dtype=np.float64))
    for _ in answer:
        pass
    count, edge = len(answer.tokens), TOP + len(answer.passes) * ROW
    right = LEFT + (count + len(config.mtp_layers)) * CELL + 16
    lines = [
        text(LEFT - 14, TOP - 10, "pass", "muted end"),
        text(right, TOP - 10, "tokens", "muted"),
    ]
    for place in range(0, count, 5):
        x = LEFT + (place + 0.5) * CELL
        lines.append(f'<path class="grid" d="M{x:.1f} {TOP - 4}V{edge}"/>')
        lines.append(text(x, TOP - 10, str(place + 1), "muted mid"))
    width, drafts, kept = 0.0, 0, 0
    for n, each in enumerate(answer.passes):
        y, row = TOP + n * ROW, list(_row(each, answer.tokens))
        lines.append(text(LEFT - 14, y + 14, str(n + 1), "muted end"))
        for kind, place, _ in row:
            down, height = (13, 8) if kind == "own" else (1, 10)
            lines.append(rect(LEFT + place * CELL + 1, y + down, CELL - 2, height, kind, 2))
        words = [(kind, word(token)) for kind, _, token in row]
        spans = " ".join(
            f'<tspan class="{kind}">{escape(shown, quote=False)}</tspan>' for kind, shown in words
        )
        lines.append(f'<text x="{right}" y="{y + 14}">{spans}</text>')
        width = max(width, widest([" ".join(shown for _, shown in words)]))
        drafts, kept = drafts + len(each.drafts), kept + each.kept
    facts = f"{count} tokens after {''.join(map(word, prompt))} in {len(answer.passes)} passes, "
    facts += f"{kept} of {drafts} drafts kept"
    title = "Drafts that the main model keeps"
    drawn = [text(24, 50, facts, "muted"), *_key(), *lines]
    return card(title, f"{facts}.", drawn, right + width, edge + 16, COLOURS, RULES)


def _row(each: Pass, tokens: Sequence[int]) -> Iterator[tuple[str, int, int]]:
    """What a pass saw and gave, in reading order: kind, place among the new tokens, and token."""
    for k, draft in enumerate(each.drafts[: each.kept]):
        yield "kept", each.before + k, draft
    if each.new > each.kept:
        yield "own", each.before + each.kept, tokens[each.before + each.kept]
    for k, draft in enumerate(each.drafts[each.kept :], start=each.kept):
        yield "lost", each.before + k, draft


def _key() -> Iterator[str]:
    x = 24.0
    marks = (
        ("kept", "draft kept"),
        ("lost", "draft rejected"),
        ("own", "the main model's own token"),
    )
    for kind, words in marks:
        yield rect(x, 60, 12, 10, kind, 2)
        yield text(x + 18, 69, words)
        x += 36 + len(words) * 6


def sampling_svg(
    logits: Array, text_so_far: Sequence[int], ways: Sequence[Sampling], word: Word, most: int = 12
) -> str:
    """What each of `ways` makes of logits [V]: the `most` likeliest tokens, and all the others.

    `text_so_far`: the tokens before, which a repetition penalty looks at.
    """
    probs = [distribution(logits, text_so_far, how) for how in ways]  # each [V]
    order = np.argsort(-probs[0], kind="stable")[:most].tolist()
    words = [word(token) for token in order]
    left, lines = 40 + widest([*words, "all others"]), list[str]()
    top = 62 + 15 * max(len(_names(how)) for how in ways)
    for column, (how, p) in enumerate(zip(ways, probs, strict=True)):
        x = left + column * COLUMN
        for n, name in enumerate(_names(how)):
            lines.append(text(x, 62 + 15 * n, name))
        lines.append(text(x, top, f"{np.count_nonzero(p):,} tokens left", "muted"))
        shares = [*p[order].tolist(), float(np.delete(p, order).sum())]
        for row, share in enumerate(shares):
            y = top + 12 + row * LINE
            lines.append(rect(x, y, BAR, 14, "rest", 1))
            lines.append(rect(x, y, BAR * share, 14, "kept", 1))
            number = f"{share:.3f}" if share >= 0.0005 else "<0.001" if share else "none"
            lines.append(text(x + BAR + 6, y + 11, number, "" if share else "muted"))
    for row, label in enumerate([*words, "all others"]):
        lines.append(text(24, top + 23 + row * LINE, label, "" if row < len(words) else "muted"))
    title = "One choice of the next token, sampled in several ways"
    description = "; ".join(
        f"{', '.join(_names(how))}: {np.count_nonzero(p)} tokens left"
        for how, p in zip(ways, probs, strict=True)
    )
    right, bottom = left + len(ways) * COLUMN - 20, top + (len(order) + 1) * LINE + 28
    return card(title, f"{description}.", lines, right, bottom, COLOURS, RULES)


def _names(how: Sampling) -> list[str]:
    """What sets a way to sample apart from plain sampling: temperature first."""
    if how.temperature == 0:
        return ["greedy"]
    plain = Sampling(temperature=1.0)
    changed = {key: value for key, value in asdict(how).items() if value != getattr(plain, key)}
    return [f"{key.replace('_', ' ')} {value:g}" for key, value in changed.items()] or ["as it is"]
