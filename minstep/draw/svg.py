"""Drawing in SVG: text of the same bytes each time, legible on light and on dark pages.

Lengths are in units of the canvas, y grows downwards; a `kind` is a class of COLOURS or STYLE.
"""

import math
from collections.abc import Iterable, Mapping
from html import escape

STYLE = """text{font:11px system-ui,-apple-system,'Segoe UI',Helvetica,Arial,sans-serif}
text.title{font-size:16px;font-weight:600} .mid{text-anchor:middle} .line{fill:none}"""
Colours = Mapping[str, tuple[str, str, str, str]]
COLOURS: Colours = {  # class: fill and stroke on a light page, fill and stroke on a dark one
    ".card": ("#ffffff", "#d0d7de", "#0d1117", "#30363d"),
    "text": ("#1f2328", "none", "#e6edf3", "none"),
    "text.muted,.tip": ("#59636e", "none", "#9198a1", "none"),
    "text.on": ("#ffffff", "none", "#0d1117", "none"),
    ".line": ("none", "#6e7781", "none", "#8b949e"),
    ".box": ("#f6f8fa", "#afb8c1", "#161b22", "#484f58"),
}
# The colours of charts. Series differ by dashes or outline and stand in one order too, so that
# colour is never needed.
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


def document(
    size: tuple[int, int],
    title: str,
    description: str,
    lines: Iterable[str],
    colours: Colours | None = None,
    rules: str = "",
) -> str:
    """A whole SVG file of `size` (width, height), with what screen readers say of it.

    `colours` and the CSS `rules` are the figure's own, beside those that every figure has.
    Checked by: tests/docs/test_model_figure.py, tests/draw/test_charts.py
    """
    width, height = size
    head = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" role="img" aria-labelledby="title desc">',
        f'<title id="title">{escape(title, quote=False)}</title>',
        f'<desc id="desc">{escape(description, quote=False)}</desc>',
        _style({**COLOURS, **(colours or {})}, rules),
    ]
    return "\n".join([*head, *lines]) + "\n</svg>\n"


def rect(x: float, y: float, width: float, height: float, kind: str, radius: float = 4) -> str:
    """A rectangle with its upper left corner at x, y and corners rounded by `radius`."""
    size = f'width="{width:.5g}" height="{height:.5g}" rx="{radius:g}"'
    return f'<rect class="{kind}" x="{x:.5g}" y="{y:.5g}" {size}/>'


def text(x: float, y: float, words: str, kind: str = "") -> str:
    """A line of text on the base line y: from x on, or about x where `kind` says `mid`."""
    return f'<text class="{kind}" x="{x:.5g}" y="{y:.5g}">{escape(words, quote=False)}</text>'


def card(
    title: str,
    description: str,
    lines: Iterable[str],
    width: float,
    height: float,
    colours: Colours | None = None,
    rules: str = "",
) -> str:
    """A chart's lines on a card as an SVG file; it is at least as wide as the title.

    `description`: what screen readers say of it; `width`: where the rightmost of the lines ends.
    Checked by: tests/draw/test_charts.py, tests/docs/test_gallery.py
    """
    across, down = math.ceil(max(width, 24 + len(title) * TITLE_LETTER) + 24), math.ceil(height)
    card = rect(0.5, 0.5, across - 1, down - 1, "card", 10)
    head = [card, text(24, 32, title, "title")]
    colours = {**KINDS, **(colours or {})}
    return document((across, down), title, description, [*head, *lines], colours, RULES + rules)


def widest(names: Iterable[str]) -> float:
    """How wide the longest of the names is, at most; 0 where there is none."""
    return max((sum(DASH if c >= "\u2000" else LETTER for c in name) for name in names), default=0)


def _style(colours: Colours, rules: str) -> str:
    light = "".join(f"{name}{{fill:{c[0]};stroke:{c[1]}}}" for name, c in colours.items())
    dark = "".join(f"{name}{{fill:{c[2]};stroke:{c[3]}}}" for name, c in colours.items())
    rules = f"{STYLE}{rules}{light}@media (prefers-color-scheme:dark){{{dark}}}"
    tip = '<path class="tip" d="M0 0L7 3.5L0 7Z"/>'
    box = 'viewBox="0 0 7 7" refX="6.5" refY="3.5" markerWidth="6" markerHeight="6" orient="auto"'
    return f'<style>{rules}</style><defs><marker id="tip" {box}>{tip}</marker></defs>'
