"""Drawing in SVG: text of the same bytes each time, legible on light and on dark pages.

Lengths are in units of the canvas, y grows downwards; a `kind` is a class of COLOURS or STYLE.
"""

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


def up(x: float, *spans: tuple[float, float]) -> str:
    """Upright arrows at x, each from the first y to the second."""
    return "".join(arrow(f"M{x:.5g} {start:.5g}V{end:.5g}") for start, end in spans)


def arrow(path: str) -> str:
    """An arrow along `path`, in SVG's own path commands."""
    return f'<path class="line" d="{path}" marker-end="url(#tip)"/>'


def _style(colours: Colours, rules: str) -> str:
    light = "".join(f"{name}{{fill:{c[0]};stroke:{c[1]}}}" for name, c in colours.items())
    dark = "".join(f"{name}{{fill:{c[2]};stroke:{c[3]}}}" for name, c in colours.items())
    rules = f"{STYLE}{rules}{light}@media (prefers-color-scheme:dark){{{dark}}}"
    tip = '<path class="tip" d="M0 0L7 3.5L0 7Z"/>'
    box = 'viewBox="0 0 7 7" refX="6.5" refY="3.5" markerWidth="6" markerHeight="6" orient="auto"'
    return f'<style>{rules}</style><defs><marker id="tip" {box}>{tip}</marker></defs>'
