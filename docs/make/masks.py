"""The figure of window masks: what each query sees, what the caches hold, and where layers slide.

Checked by: tests/docs/test_gallery.py
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from docs.make.model_figure import KIND
from minstep.attention import visible
from minstep.cache import new_caches
from minstep.config import FULL, Config, LayerSpec
from minstep.draw.svg import Colours, card, rect, text

LEFT, TOP, CELL, GAP = 86, 124, 17, 110  # of the grids, in units of the canvas
GONE, HELD, SEEN = range(3)  # what a position is to a query
COLOURS: Colours = {  # fill and stroke on a light card, fill and stroke on a dark one
    ".ahead": ("none", "#d8dee4", "none", "#2a3038"),
    ".gone": ("#eaeef2", "none", "#21262d", "none"),
    ".held": ("#e8f1ff", "#2563c9", "#0f2038", "#6cb0ff"),
    ".full": ("#b45309", "none", "#f0a13a", "none"),
    ".sliding": ("#2563c9", "none", "#6cb0ff", "none"),
}


def masks_svg(config: Config, count: int = 16, window: int = 5) -> str:
    """Full and sliding attention over `count` positions, and the kind of each layer of the model.

    The grids have a `window` that is small enough to draw. Raises ValueError for a model that has
    no layer of one of the two kinds.
    """
    lines, described, slack = list[str](), list[str](), len(config.mtp_layers)
    for n, (kind, name) in enumerate(KIND.items()):
        spec = next((spec for spec in config.layers if spec.kind == kind), None)
        if spec is None:
            raise ValueError(f"the model has no {name} layer, expected one to draw")
        drawn = spec._replace(window=window if spec.window else None)
        states = mask(drawn, count, slack)  # [T, T]
        sees, holds = int((states[-1] == SEEN).sum()), int((states[-1] >= HELD).sum())
        words = f"the last query sees {sees}, the cache holds {holds}"
        described.append(f"{name}: {words}")
        x = LEFT + n * (count * CELL + GAP)
        before = "all before it" if spec.window is None else f"the {window - 1} before it"
        lines += [
            text(x, TOP - 42, f"{name} attention: itself and {before}"),
            text(x, TOP - 26, words, "muted"),
            *_grid(x, states, name),
        ]
    below = TOP + count * CELL + 28
    sizes = sorted({spec.window for spec in config.layers if spec.window})
    real = f"the model's window is {' or '.join(f'{size:,}' for size in sizes)}"
    right = LEFT + 2 * count * CELL + GAP
    return card(
        "What a query sees, and what its cache still holds",
        "; ".join(described) + f"; {real}.",
        [
            text(24, 50, f"drawn with a window of {window}; {real}", "muted"),
            *lines,
            *_key(below, slack),
            *_layers(config, below + 38, right - 24),
        ],
        right,
        below + 90,
        COLOURS,
    )


def mask(spec: LayerSpec, count: int, slack: int) -> NDArray[np.int64]:
    """What each of `count` positions is to each query [T, T], decoded one token at a time.

    SEEN, HELD by the cache but out of sight, or GONE; positions after the query are GONE too.
    `slack`: drafts that may be rolled back.
    """
    (cache,) = new_caches([spec], np.float32, slack, 1)
    token = np.zeros((1, spec.groups, spec.head_dim), np.float32)  # [1, G, K]
    states = np.full((count, count), GONE)  # [T, T]
    for query in range(count):
        past = cache.append(token, token)
        end = past.start + past.keys.shape[1]
        states[query, past.start : end] = HELD
        seen = visible(query, 1, past.start, end - past.start, spec.window)[0]  # [S]
        states[query, past.start : end][seen] = SEEN
    return states


def _grid(left: float, states: NDArray[np.int64], name: str) -> Iterator[str]:
    """A row for each query and a column for each position."""
    for query, row in enumerate(states.tolist()):
        y = TOP + query * CELL
        for position, state in enumerate(row):
            kind = "ahead" if position > query else ("gone", "held", name)[state]
            yield rect(left + position * CELL + 1, y + 1, CELL - 2, CELL - 2, kind, 2)
        if query % 5 == 0:
            yield text(left - 6, y + 12, str(query), "muted end")
            yield text(left + (query + 0.5) * CELL, TOP - 6, str(query), "muted mid")
    yield text(left - 6, TOP - 6, "position", "muted end")
    yield text(left - 6, TOP + len(states) * CELL + 12, "query", "muted end")


def _key(y: float, slack: int) -> Iterator[str]:
    spare = f"held to roll back up to {slack} drafts"
    marks = (("full", "seen"), ("sliding", "seen"), ("held", spare), ("gone", "dropped"))
    x = float(LEFT)
    for kind, words in (*marks, ("ahead", "not there yet")):
        yield rect(x, y - 10, 12, 12, kind, 2)
        if kind != "full":  # both colours of what is seen share a word
            yield text(x + 18, y, words)
            x += len(words) * 6 + 24
        x += 18


def _layers(config: Config, y: float, width: float) -> Iterator[str]:
    """A cell for each layer in its kind's colour, and how many there are of each."""
    every = config.layers + config.mtp_layers
    counts = {kind: [spec.kind for spec in config.layers].count(kind) for kind in KIND}
    words = ", ".join(f"{counts[kind]} {name}" for kind, name in KIND.items())
    yield text(24, y, f"The layers: {words}, and {len(config.mtp_layers)} MTP layers after them")
    pitch = width / (len(every) + 0.5)
    for n, spec in enumerate(every):
        x = 24 + n * pitch + (pitch / 2 if n >= len(config.layers) else 0)
        yield rect(x + 0.5, y + 10, pitch - 1, 20, KIND[spec.kind], 2)
        if spec.kind == FULL or n == len(config.layers):
            yield text(x + pitch / 2, y + 24, str(n), "on mid")
