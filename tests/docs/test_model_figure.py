"""The block diagram: what it shows is what the config says, and it fits its canvas."""

import re
import xml.etree.ElementTree as ElementTree

import pytest

from docs.make.model_figure import HEIGHT, WIDTH, model_svg
from minstep.store.config_file import find_config, load_config, shipped_folder

NAMES = sorted(path.parent.name for path in shipped_folder().glob("*/config.json"))
SVG = "{http://www.w3.org/2000/svg}"
WIDEST = {"title": 10.5}  # units per character in a wide font; 6.8 in other classes


def draw(name: str) -> ElementTree.Element:
    return ElementTree.fromstring(model_svg(load_config(find_config(name))))


def test_the_released_models_numbers_are_in_the_figure() -> None:
    texts = "\n".join(text.text or "" for text in draw("step-3.5-flash").iter(f"{SVG}text"))
    for number in ("45", "96", "64", "288", "512", "511", "top 8", "1,280", "11,264", "128,896"):
        assert re.search(rf"(?<![\d,]){number}(?![\d,]*\d)", texts), number
    assert "full attention × 12\n" in texts
    assert "sliding attention × 33 + 3 MTP" in texts
    assert "clamped SwiGLU × 2" in texts


@pytest.mark.parametrize("name", NAMES)
def test_every_layer_and_expert_is_drawn_once(name: str) -> None:
    config, rects = load_config(find_config(name)), list(draw(name).iter(f"{SVG}rect"))
    marks = [rect.get("class") for rect in rects if float(rect.get("rx", 0)) == 4]
    cells = [mark for mark in marks if mark and re.match("(full|sliding) ", mark)]
    assert len(cells) == len(config.layers + config.mtp_layers) + 1  # and the attention of one
    moe = config.layers[-1].moe
    kinds = [rect.get("class") for rect in rects]
    assert moe and kinds.count("chosen") == moe.top_k
    assert kinds.count("idle") == moe.experts - moe.top_k


@pytest.mark.parametrize("name", NAMES)
def test_a_figure_has_a_title_and_stays_on_its_canvas(name: str) -> None:
    figure = draw(name)
    assert figure.findtext(f"{SVG}title") and figure.findtext(f"{SVG}desc")
    for rect in figure.iter(f"{SVG}rect"):
        x, y, width, height = (float(rect.get(key, -1)) for key in ("x", "y", "width", "height"))
        assert 0 <= x < x + width <= WIDTH and 0 <= y < y + height <= HEIGHT
    for text in figure.iter(f"{SVG}text"):
        kind, words = text.get("class", ""), text.text or ""
        width = len(words) * WIDEST.get(kind, 6.8)
        start = float(text.get("x", -1)) - (width / 2 if "mid" in kind else 0)
        assert 0 <= start and start + width <= WIDTH, words
        assert 12 <= float(text.get("y", -1)) <= HEIGHT - 4, words


def test_a_model_without_moe_gate_or_mtp_draws_a_dense_layer() -> None:
    config = load_config(find_config("tiny"))
    layers = tuple(spec._replace(moe=None, has_gate=False) for spec in config.layers)
    svg = model_svg(config._replace(layers=layers, mtp_layers=()))
    assert "SwiGLU MLP of width 160" in svg
    assert not re.search("g_proj|router|eh_proj", svg)
