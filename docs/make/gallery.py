"""The figures of the book: each file's name, and the function that draws it with all filled in.

    python -m docs.make.gallery

writes them into docs/figures.

Checked by: tests/docs/test_gallery.py
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from docs.make.curves import cache_svg, precision_svg, rope_svg, scaling_svg, swiglu_svg
from docs.make.decoding import sampling_svg, timeline_svg
from docs.make.departures import departure_svg, norm_svg
from docs.make.masks import masks_svg
from docs.make.model_figure import model_svg
from docs.make.pages import DOCS
from docs.make.router import router_cut_svg, router_map_svg, routing
from minstep.config import Config
from minstep.cost.roofline import roofline_svg
from minstep.model import ModelWeights, decoder, head
from minstep.parity.known_bugs import FOOTGUNS
from minstep.sampling import Sampling
from minstep.store.checkpoint import open_checkpoint
from minstep.store.config_file import find_config, load_config
from minstep.store.output import atomic_file
from minstep.text.tokenizer import encode, load_tokenizer, text_of

SENTENCE = 'A list is a sequence: "for x in items:" visits each of them in turn.'
PROMPT = "The with statement is"
LONGEST = 12  # letters of a token that are shown
ROUTED = 3  # the MoE layer whose router is drawn
BUG = FOOTGUNS["gate"][-1]
WAYS = (
    *(Sampling(temperature) for temperature in (1.0, 0.6, 1.5)),
    *(Sampling(1.0, top_k=4), Sampling(1.0, top_p=0.8), Sampling(1.0, min_p=0.1)),
)


class Trained(NamedTuple):
    """The trained model that is shipped."""

    weights: ModelWeights
    config: Config
    tokenizer: Tokenizer

    def word(self, token: int) -> str:
        """A token on one line: spaces as dots, newlines as in Python; only the start if long."""
        if token == self.config.bos_token_id:
            return "(begin)"
        written = text_of(self.tokenizer, token) or ""
        if len(written) > 3 and len({*written}) == 1:  # a rule across the page, or indentation
            written = f"{written[0]}×{len(written)}"
        written = written.replace(" ", "·").replace("\n", "\\n")
        if not written or not written.isprintable():
            return f"(token {token})"
        return written if len(written) <= LONGEST else f"{written[: LONGEST - 1]}…"

    def encode(self, text: str) -> list[int]:
        """The ids of `text`."""
        return encode(self.tokenizer, text)


def released() -> Config:
    """The configuration of the released model."""
    return load_config(find_config("step-3.5-flash"))


def trained() -> Trained:
    """The trained model, read anew."""
    folder = find_config("trained")
    checkpoint, tokenizer = open_checkpoint(folder), load_tokenizer(folder)
    assert tokenizer
    return Trained(checkpoint.weights(None), checkpoint.config, tokenizer)


def weight_block() -> np.ndarray:
    """Weights [128, 128] float32 as a block that shares a scale might be: normal, of size 0.02."""
    return np.random.default_rng(0).normal(0, 0.02, (128, 128)).astype(np.float32)


def router_map() -> str:
    """The experts of each token of SENTENCE."""
    model = trained()
    tokens = model.encode(SENTENCE)
    routed = routing(tokens, model.weights, model.config, ROUTED)
    return router_map_svg([model.word(token) for token in tokens], routed, ROUTED)


def router_cut() -> str:
    """The scores of the last token of SENTENCE whose experts the bias changes."""
    model = trained()
    tokens = model.encode(SENTENCE)
    routed = routing(tokens, model.weights, model.config, ROUTED)
    token = routed.telling()
    return router_cut_svg(model.word(tokens[token]), routed, token, ROUTED)


def norm() -> str:
    """The size of the states while SENTENCE is read."""
    model = trained()
    return norm_svg(model.encode(SENTENCE), model.weights, model.config)


def departure() -> str:
    """Ports that read SENTENCE, one of them with BUG."""
    model = trained()
    return departure_svg(model.encode(SENTENCE), model.weights, model.config, BUG)


def timeline() -> str:
    """The passes that continue PROMPT greedily."""
    model = trained()
    return timeline_svg(model.encode(PROMPT), model.weights, model.config, model.word)


def sampling() -> str:
    """What each of WAYS makes of the token after PROMPT."""
    model = trained()
    tokens = model.encode(PROMPT)
    x = decoder(tokens, model.weights, model.config, np.float64)  # [T, D]
    logits = head(x[-1:], model.weights, model.config)[0]  # [V]
    return sampling_svg(logits, tokens, WAYS, model.word)


FIGURES: dict[str, Callable[[], str]] = {
    "model.svg": lambda: model_svg(released()),
    "rope.svg": lambda: rope_svg(released()),
    "rope-scaling.svg": lambda: scaling_svg(released()),
    "masks.svg": lambda: masks_svg(released()),
    "swiglu-gate.svg": lambda: swiglu_svg(released(), up=1.0),
    "swiglu-up.svg": lambda: swiglu_svg(released(), gate=20.0),
    "router-map.svg": router_map,
    "router-cut.svg": router_cut,
    "cache.svg": lambda: cache_svg(released()),
    "timeline.svg": timeline,
    "precision.svg": lambda: precision_svg(weight_block()),
    "norm.svg": norm,
    "departure.svg": departure,
    "sampling.svg": sampling,
    "roofline.svg": lambda: roofline_svg(released(), 32_768, drafts=3),
}


def write_figures(folder: Path) -> list[Path]:
    """Write every figure into `folder`, which exists; returns their paths.

    Raises InputError when a file cannot be written.
    """
    for name, draw in FIGURES.items():
        with atomic_file(folder / name) as temporary:
            temporary.write_bytes(draw().encode())
    return [folder / name for name in FIGURES]


if __name__ == "__main__":
    write_figures(DOCS / "figures")
