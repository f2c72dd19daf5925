"""The MTP lab: how many drafts the main model keeps on held-out text, and what spoils them.

Each way of drafting runs through the decoding code itself, with other weights or with one line
changed. Whatever the way, greedy text must be the same: drafts decide only how fast it comes.
Checked by: tests/explore/test_acceptance.py
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike

from minstep.config import Config
from minstep.draw.charts import bar_chart
from minstep.errors import InputError
from minstep.model import ModelWeights, decoder, head
from minstep.parity.decoding_bugs import IN_DRAFTER
from minstep.parity.known_bugs import FOOTGUNS, Footgun
from minstep.parity.variants import variant
from minstep.text.continuation import Continuation, Pass
from minstep.validation import check_finite

Tokens = Sequence[int]
Progress = Callable[[int], None]
MAIN = "main model"


class Way(NamedTuple):
    """A way to draft: the right one, or one that a port has got wrong.

    `drafting` and `forward` are the same mistake in mtp.Drafter and in mtp.mtp_forward.
    """

    name: str
    drafting: Footgun | None = None
    forward: Footgun | None = None
    own_heads: bool = True  # False: lm_head in place of every depth's own output matrix
    drafts: bool = True

    def weights(self, weights: ModelWeights) -> ModelWeights:
        """The weights that this way drafts with."""
        if self.own_heads:
            return weights
        mtp = (depth._replace(shared_head_output=weights.lm_head) for depth in weights.mtp)
        return weights._replace(mtp=tuple(mtp))


NORMED, MAIN_STATE = FOOTGUNS["MTP hidden"]
AS_IT_IS = Way("as it is")
WAYS = (
    AS_IT_IS,
    Way("lm_head as every head", own_heads=False),
    Way("states after their norm", IN_DRAFTER[NORMED.bug], NORMED),
    Way("main state to each depth", IN_DRAFTER[MAIN_STATE.bug], MAIN_STATE),
    Way("no drafts", drafts=False),
)


class Drafted(NamedTuple):
    """What one way of drafting did."""

    texts: list[list[int]]  # each prompt's continuation
    passes: list[Pass]  # of all prompts, but without the prompts' own, which have no drafts


class Agreement(NamedTuple):
    """How often a depth, shown the true tokens, guesses what it should."""

    guesses: int  # of a token that is there
    main: int  # those that are the main model's own greedy choice
    text: int  # those that are the token itself


def beginnings(
    texts: Sequence[Tokens], count: int, length: int, rng: np.random.Generator
) -> list[list[int]]:
    """`count` prompts of `length` tokens, drawn without repeats and in the order of the texts.

    They are the beginnings of texts; only where there are too few of those, later pieces too.
    Raises InputError where the texts are too short for so many.
    """
    pieces: list[list[int]] = []
    for start in range(0, max(map(len, texts), default=0), length):
        if len(pieces) < count:
            parts = (list(text[start : start + length]) for text in texts)
            pieces += [part for part in parts if len(part) == length]
    if len(pieces) < count:
        few = f"{len(pieces)} pieces of {length} tokens"
        raise InputError(f"the held-out text has {few}, expected at least {count} for the prompts")
    return [pieces[n] for n in np.sort(rng.choice(len(pieces), count, replace=False))]


def draft(
    prompts: Sequence[Tokens],
    weights: ModelWeights,
    config: Config,
    way: Way = AS_IT_IS,
    max_tokens: int = 48,
    dtype: DTypeLike = np.float32,
    progress: Progress = lambda done: None,
) -> Drafted:
    """Continue each prompt greedily by at most `max_tokens`; `progress` is told of each prompt."""
    steps, weights = variant(way.drafting).generate.steps, way.weights(weights)
    options = {"dtype": dtype, "num_draft_tokens": None if way.drafts else 0}
    drafted, rng = Drafted([], []), np.random.default_rng(0)  # greedy: its numbers change nothing
    for done, prompt in enumerate(prompts, start=1):
        answer = Continuation(steps(prompt, weights, config, rng, max_tokens, **options))
        for _ in answer:
            pass
        drafted.texts.append(answer.tokens)
        drafted.passes.extend(answer.passes[1:])
        progress(done)
    return drafted


def agreements(
    windows: Sequence[Tokens],
    weights: ModelWeights,
    config: Config,
    ways: Sequence[Way] = WAYS,
    dtype: DTypeLike = np.float32,
    progress: Progress = lambda done: None,
) -> dict[str, list[Agreement]]:
    """For each way by name, the Agreement of each depth; for MAIN that of the main model itself.

    Depth k at position i guesses token i + k + 1, as the main model does at i + k, and all tokens
    before are true ones. `progress` is told of the tokens done.
    Source: mtp.mtp_forward, which is what training sees (report section 2).
    """
    sums = {way.name: np.zeros((len(weights.mtp), 3), int) for way in ways if way.drafts}
    sums[MAIN] = np.zeros((1, 3), int)
    done = 0
    for window in windows:
        hidden = decoder(window, weights, config, dtype)  # [T, D]
        logits = head(hidden, weights, config)  # [T, V]
        check_finite("lm_head", logits)  # of NaN the largest is a token like any other
        choice = logits.argmax(-1)[:-1]  # [T-1], guesses at tokens 1, ...
        text = np.asarray(window)[1:]  # [T-1]
        sums[MAIN] += len(text), len(text), (choice == text).sum()
        for way in (way for way in ways if way.drafts):
            forward = variant(way.forward).mtp.mtp_forward
            depths = forward(window, hidden, way.weights(weights), config)
            for k, logits in enumerate(depths, start=1):
                name = f"{config.mtp_layers[k - 1].name}.transformer.shared_head.output"
                check_finite(name, logits)
                guess = logits.argmax(-1)[:-1]  # [T-k-1]
                same = (guess == choice[k:]).sum(), (guess == text[k:]).sum()
                sums[way.name][k - 1] += len(guess), *same
        progress(done := done + len(window))
    return {name: [Agreement(*map(int, row)) for row in rows] for name, rows in sums.items()}


def worth(drafted: Drafted) -> dict[str, Any]:
    """What the drafts of all prompts were worth.

    For each depth, `kept` is the share of its drafts that the main model kept; `once_reached` the
    same of those whose forerunners were all kept, None where there were none. `mean_accepted` is
    drafts kept a pass, `tokens_per_pass` new tokens over passes, the prompts' own left out.
    Differs: the stats of generate leave out drafts that were kept beyond the end of the text.
    """
    accepted = np.array([each.accepted for each in drafted.passes], int)  # [passes]
    tried = np.array([len(each.drafts) for each in drafted.passes], int)  # [passes]
    depths = range(int(tried.max(initial=0)))
    kept = [int((accepted > k).sum()) for k in depths]
    new = sum(len(text) - 1 for text in drafted.texts)
    return {
        "passes": len(accepted),
        "kept": [_share(kept[k], (tried > k).sum()) for k in depths],
        "once_reached": [_share(kept[k], ((tried > k) & (accepted >= k)).sum()) for k in depths],
        "mean_accepted": _share(accepted.sum(), len(accepted)),
        "tokens_per_pass": _share(new, len(accepted)),
    }


def first_difference(one: Drafted, other: Drafted) -> tuple[int, int] | None:
    """The first prompt continued differently, and the place in its text; None where none is."""
    for n, (ours, theirs) in enumerate(zip(one.texts, other.texts, strict=True)):
        if ours != theirs:
            pairs = enumerate(zip(ours, theirs, strict=False))
            return n, next(at for at, (a, b) in pairs if a != b)
    return None


def mtp_report(drafted: dict[str, Drafted], guessed: dict[str, list[Agreement]]) -> dict[str, Any]:
    """What was measured, by the name of each way; its texts are held against the first way's.

    `main` and `text` are shares of `agreements`; `is_lossless`: all texts are the same. Raises
    InputError where no text went beyond its first token.
    """
    first, ways = next(iter(drafted.values())), {}
    if not first.passes:
        raise InputError("every continuation is one token long, expected some that are longer")
    for name, each in drafted.items():
        found = guessed.get(name, [])
        ways[name] = worth(each) | {
            "main": [_share(depth.main, depth.guesses) for depth in found],
            "text": [_share(depth.text, depth.guesses) for depth in found],
            "difference": first_difference(first, each),
        }
    return {
        "prompts": len(first.texts),
        "new_tokens": sum(map(len, first.texts)),
        "read_tokens": guessed[MAIN][0].guesses,
        "main_model": _share(guessed[MAIN][0].text, guessed[MAIN][0].guesses),
        "is_lossless": all(way["difference"] is None for way in ways.values()),
        "ways": ways,
    }


def mtp_table(report: dict[str, Any]) -> str:
    """mtp_report as text for a terminal."""
    ways, name_wide = report["ways"], 26
    M = max(len(way["kept"]) for way in ways.values())
    wide, indent = max(5 * M + 1, 14), " " * name_wide
    depths = "".join(f"{k:4} " for k in range(1, M + 1))
    counted = f"{report['prompts']} prompts, {report['new_tokens']:,} new tokens"
    lines = [
        f"held-out text: {counted}, greedy; shares of drafts by depth",
        f"{indent}{'kept':{wide}}{'once reached':{wide}}mean  tokens",
        f"{indent}{depths:{wide}}{depths:{wide}}of {M}  a pass",
    ]
    for name, way in ways.items():
        cells = f"{_cells(way['kept']):{wide}}{_cells(way['once_reached']):{wide}}"
        totals = f"{way['mean_accepted']:.2f}    {way['tokens_per_pass']:.2f}"
        lines.append(f"{name:{name_wide}}{cells}{totals}")
    lines += [_verdict(report), ""]
    lines += [
        f"{report['read_tokens']:,} guesses where every token before is the true one",
        f"{indent}{'as main model':{wide}}as the text",
        f"{MAIN:{name_wide}}{'':{wide}}{_cells([report['main_model']])}",
    ]
    for name, way in ways.items():
        if way["main"]:
            lines.append(f"{name:{name_wide}}{_cells(way['main']):{wide}}{_cells(way['text'])}")
    return "\n".join(line.rstrip() for line in lines)


def _verdict(report: dict[str, Any]) -> str:
    for name, way in report["ways"].items():
        if way["difference"]:
            prompt, at = way["difference"]
            where = f"in prompt {prompt + 1} at new token {at + 1}"
            return f"NOT the same text: {name} differs {where} (float32 may, at a near tie)"
    return f"the same text in all {len(report['ways'])} ways: drafts change only how fast it comes"


def _cells(shares: Sequence[float | None]) -> str:
    return "".join("   - " if share is None else f"{share:4.0%} " for share in shares)


def _share(part: Any, of: Any) -> float | None:
    return round(int(part) / int(of), 4) if of else None


def mtp_chart(report: dict[str, Any]) -> str:
    """The share of drafts kept by depth, for each way to draft, as SVG text."""
    groups: dict[str, dict[str, float]] = {}
    for name, way in report["ways"].items():
        for k, kept in enumerate(way["kept"], start=1):
            groups.setdefault(f"depth {k}", {})[name] = kept
    return bar_chart("Share of drafts that the main model keeps", groups)
