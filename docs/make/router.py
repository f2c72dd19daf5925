"""Figures of the router at work: which experts each token of a text gets, and why those.

Checked by: tests/docs/test_gallery.py
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from minstep.activations import sigmoid
from minstep.config import Config
from minstep.draw.charts import axis
from minstep.draw.svg import Colours, card, rect, text, widest
from minstep.linear import as_float
from minstep.model import ModelWeights, decoder
from minstep.moe import route
from minstep.parity.trace import Recorder, Trace
from minstep.tap import Array

Ids = NDArray[np.integer[Any]]
ROW, CELL, TOP = 20, 36, 98  # of the map, in units of the canvas
BAR, HEIGHT, LEFT = 13, 220, 64  # of the bars of one token
COLOURS: Colours = {  # fill and stroke on a light card, fill and stroke on a dark one
    ".idle": ("#f6f8fa", "none", "#161b22", "none"),
    ".chosen": ("#6f36d9", "none", "#c4a7ff", "none"),
    ".biased": ("#c2c9d1", "none", "#3d444d", "none"),
    ".score": ("none", "#6e7781", "none", "#8b949e"),
    ".best": ("none", "#6f36d9", "none", "#c4a7ff"),
}
RULES = ".best{stroke-width:2}"


class Routing(NamedTuple):
    """What one MoE layer's router makes of T tokens."""

    scores: Array  # [T, E], the sigmoid of its logits
    biased: Array  # [T, E], what experts are chosen by
    ids: Ids  # [T, A]
    weights: Array  # [T, A]
    margin: Array  # [T], by how much the last that is chosen beats the first that is not
    unbiased: Ids  # [T, A], what it would choose by score alone

    def telling(self) -> int:
        """The last token whose experts the bias changes; the last of all where there is none."""
        changed = (self.ids != self.unbiased).any(axis=-1)  # [T]
        return len(changed) - 1 - int(changed[::-1].argmax())


def routing(tokens: Sequence[int], weights: ModelWeights, config: Config, layer: int) -> Routing:
    """Run the tokens up to main layer `layer`, a MoE one that leaves experts out; what it chooses.

    Raises ValueError for another layer.
    """
    spec, moe = config.layers[layer], weights.layers[layer].moe
    if spec.moe is None or moe is None or spec.moe.top_k == spec.moe.experts:
        raise ValueError(f"layer {layer} chooses no experts, expected a MoE layer that does")
    trace: Trace = {}
    tap = Recorder(trace, lambda name: name.startswith(f"{spec.name}."))
    upto = weights._replace(layers=weights.layers[: layer + 1])
    decoder(tokens, upto, config._replace(layers=config.layers[: layer + 1]), np.float64, tap=tap)
    x = trace[f"{spec.name}.post_attention_layernorm"]  # [T, D]
    gate, ids, weighed, margin = (
        trace[f"{spec.name}.moe.{name}"] for name in ("gate", "ids", "weights", "margin")
    )
    scores = sigmoid(gate)  # [T, E]
    bias = 0 if moe.router_bias is None else as_float(moe.router_bias, scores.dtype)
    unbiased = route(x, moe._replace(router_bias=None), spec.moe).ids  # [T, A]
    return Routing(scores, scores + bias, ids, weighed, margin, unbiased)


def router_map_svg(words: Sequence[str], routed: Routing, layer: int) -> str:
    """A row for each of the T tokens, given as `words`; its experts are shaded by their weights."""
    (T, E), A = routed.scores.shape, routed.ids.shape[1]
    total, left, bottom = routed.weights[0].sum(), 40 + widest(words), TOP + T * ROW
    facts = f"Layer {layer}: {A} of {E} experts a token, whose weights sum to {total:.3g}"
    lines = [
        text(24, 50, facts, "muted"),
        text(24, TOP - 8, "token", "muted"),
        text(left + E * CELL / 2, TOP - 24, "expert", "muted mid"),
        text(24, bottom + 18, "tokens it gets", "muted"),
    ]
    for e, count in enumerate(np.bincount(routed.ids.ravel(), minlength=E).tolist()):
        lines.append(text(left + (e + 0.5) * CELL, TOP - 8, str(e), "muted mid"))
        lines.append(text(left + (e + 0.5) * CELL, bottom + 18, str(count), "mid"))
    for t, word in enumerate(words):
        y = TOP + t * ROW
        lines.append(text(24, y + 14, word))
        chosen = dict(zip(routed.ids[t].tolist(), routed.weights[t].tolist(), strict=True))
        for e in range(E):
            cell = rect(left + e * CELL + 1, y + 1, CELL - 2, ROW - 2, "idle", 2)
            lines.append(cell)
            if e in chosen:
                shade = f'class="chosen" fill-opacity="{0.1 + 0.5 * chosen[e] / total:.2f}"'
                lines.append(cell.replace('class="idle"', shade))
                words_at = left + (e + 0.5) * CELL
                lines.append(text(words_at, y + 14, f"{chosen[e]:.2f}", "mid"))
    title = "Which experts each token of a text gets"
    return card(title, f"{facts}. {T} tokens.", lines, left + E * CELL, bottom + 34, COLOURS)


def router_cut_svg(word: str, routed: Routing, token: int, layer: int) -> str:
    """The scores of one token, given as `word` too, with and without the bias, and the cut.

    What all biases share decides nothing: the least of them is drawn as 0.
    """
    shared = float((routed.biased[token] - routed.scores[token]).min())
    scores, biased = routed.scores[token].tolist(), (routed.biased[token] - shared).tolist()
    chosen, best = routed.ids[token].tolist(), routed.unbiased[token].tolist()
    E, A = len(scores), len(chosen)
    upward = axis([0.0, *scores, *biased])
    right, bottom = LEFT + E * CELL, TOP + HEIGHT

    def height(value: float) -> float:
        return bottom - HEIGHT * upward.share(value)

    facts = f"Layer {layer}, token {word}: experts {_listed(chosen)}"
    facts += " with the bias and without" if chosen == best else f"; by score alone {_listed(best)}"
    lines = [text(24, 50, facts, "muted")]
    for tick in upward.ticks:
        lines.append(f'<path class="grid" d="M{LEFT} {height(tick):.1f}H{right}"/>')
        lines.append(text(LEFT - 8, height(tick) + 4, upward.label(tick), "muted end"))
    for e, pair in enumerate(zip(scores, biased, strict=True)):
        kinds = ("best" if e in best else "score", "chosen" if e in chosen else "biased")
        x = LEFT + (e + 0.5) * CELL - BAR - 1
        for value, kind in zip(pair, kinds, strict=True):
            top, base = sorted((height(value), height(0)))
            lines.append(rect(x, top, BAR, base - top, kind, 1))
            x += BAR + 2
        ink = "mid" if e in chosen else "muted mid"
        lines.append(text(LEFT + (e + 0.5) * CELL, bottom + 18, str(e), ink))
    words = "expert (of the biases, the least is drawn as 0)"
    lines.append(text(LEFT + E * CELL / 2, bottom + 36, words, "muted mid"))
    cut = height(np.sort(biased)[-A] - routed.margin[token] / 2)
    lines.append(f'<path class="mark" d="M{LEFT} {cut:.1f}H{right}"/>')
    lines += _key(A, TOP - 26)
    title = "Scores decide the weights, scores with the bias who is chosen"
    return card(title, f"{facts}.", lines, right, bottom + 50, COLOURS, RULES)


def _key(top_k: int, y: float) -> Iterator[str]:
    """What the four kinds of bars and the dashed line are."""
    kinds = {
        "score": "score",
        "best": f"the {top_k} highest",
        "biased": "score + bias",
        "chosen": f"the {top_k} highest: chosen",
    }
    x = 24.0
    for kind, words in kinds.items():
        yield rect(x, y - 10, 12, 12, kind, 1)
        yield text(x + 18, y, words)
        x += 34 + len(words) * 6
    yield f'<path class="mark" d="M{x:.1f} {y - 4}h24"/>'
    yield text(x + 30, y, "the cut")


def _listed(experts: Sequence[int]) -> str:
    return " and ".join(map(str, experts)) if len(experts) < 3 else ", ".join(map(str, experts))
