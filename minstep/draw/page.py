"""What every chart shares: its colours for light and dark pages, and the card that it stands on.

Series differ by dashes or outline and stand in one order, so that colour is never needed.
"""

import math
from collections.abc import Iterable

from minstep.draw.svg import Colours, document, rect, text

LETTER, TITLE_LETTER, DASH = 6.8, 10.5, 12.0  # the width of a wide font's characters
INKS = (
    *(("#2563c9", "#6cb0ff"), ("#b45309", "#f0a13a"), ("#6f36d9", "#c4a7ff")),
    *(("#d6246e", "#ff4f93"), ("#1a7f37", "#3fb950"), ("#59636e", "#9198a1")),
)
DASHES = ("none", "8 4", "2 3", "12 3 2 3", "5 2", "1 5")
KINDS: Colours = {  # the charts' own classes: fill and stroke on a light page and on a dark one
    ".grid": ("none", "#d8dee4", "none", "#2a3038"),
    ".low": ("#fbd3e2", "none", "#5c1736", "none"),
    ".fair": ("none", "#1f2328", "none", "#e6edf3"),
    ".tenth,.mark": ("none", "#d6246e", "none", "#ff4f93"),
    ".cut": ("#ffffff", "none", "#0d1117", "none"),
    "text.over": ("#59636e", "#ffffff", "#9198a1", "#0d1117"),
    **{f".curve.s{n}": ("none", light, "none", dark) for n, (light, dark) in enumerate(INKS)},
    **{f".bar.s{n}": (light, light, dark, dark) for n, (light, dark) in enumerate(INKS)},
}
RULES = ".end{text-anchor:end} .curve{stroke-width:1.8;stroke-linejoin:round}"
RULES += " text.over{paint-order:stroke;stroke-width:3px;stroke-linejoin:round}"
RULES += " .bar{fill-opacity:.3;stroke-width:1.5} .bar.s0{fill-opacity:1} .tenth,.mark"
RULES += "{stroke-dasharray:4 3}" + "".join(
    f" .s{n}{{stroke-dasharray:{dash}}}" for n, dash in enumerate(DASHES)
)


def page(
    title: str,
    said: str,
    lines: Iterable[str],
    width: float,
    height: float,
    colours: Colours | None = None,
    rules: str = "",
) -> str:
    """A chart's lines on a card as an SVG file; it is at least as wide as the title.

    `said`: what screen readers say of it; `width`: where the rightmost of the lines ends.
    Checked by: tests/draw/test_charts.py, tests/docs/test_gallery.py
    """
    across, down = math.ceil(max(width, 24 + len(title) * TITLE_LETTER) + 24), math.ceil(height)
    card = rect(0.5, 0.5, across - 1, down - 1, "card", 10)
    head = [card, text(24, 32, title, "title")]
    drawn = [*head, *lines]
    return document((across, down), title, said, drawn, {**KINDS, **(colours or {})}, RULES + rules)


def widest(names: Iterable[str]) -> float:
    """How wide the longest of the names is, at most; 0 where there is none."""
    return max((sum(DASH if c >= "\u2000" else LETTER for c in name) for name in names), default=0)
