"""The published table of decoding costs, predicted from architecture and deployment alone.

A deployment promises each text a speed. So a pass may take (tokens it yields) / speed, and the
question is how many texts fit into that time, and into memory beside the weights. The cost of a
token is GPUs / (texts * speed), relative to Step 3.5 Flash. Every constant is one for all models.
Source: the method is that of arXiv 2507.19427 (bytes and FLOPs of attention and of experts, at the
        batch that a deployment reaches, times the price of the hardware, here one kind of it).
Differs: that paper prices attention and experts on machines of their own, each at its own batch.
        Here both share GPUs and their time, as the table's EP 8 and EP 32 suggest; it does not say.
Checked by: tests/cost/test_serving.py
"""

from typing import Any, NamedTuple

import numpy as np

from minstep.config import Config
from minstep.cost.architectures import NODE, OTHERS, Latent, Served, from_config
from minstep.cost.hardware import HARDWARE, KEPT, LAYER, MULTIPLIES, READS, ROOM
from minstep.cost.roofline import tokens_per_pass

GPU = HARDWARE["h800"]
WITHIN = 0.35  # of the published figure: how near a prediction should be


class Assumed(NamedTuple):
    """What is assumed of every deployment alike.

    `context`: positions, the table's. `weight`, `cache`: bytes of a number, 8 bits as in arXiv
    2507.19427. `reads`: share of the bandwidth, 3000 of 3350 GB/s in FlashMLA's README.
    `multiplies`: share of the FLOPs, its 410 of 989 TFLOPS for decoding from an 8-bit cache.
    `memory`: share of it that is used, vLLM's default. `kept`: share of each depth's drafts that
    are kept once reached, which makes 2.8 tokens of 3 drafts, as a log of Step's successor shows.
    `layer`: seconds each layer waits for exchanges and starts of kernels in one node; the announced
    350 tok/s leave at most 0.12 ms (chapter 14). `across`: times that for EP over several nodes,
    (155 + 273) / (77 + 114) us in DeepEP's table of EP 32 and EP 8. `overlaps`: whether reading
    hides behind multiplying; a decoder has few tokens, short kernels, and mostly waits for both.
    """

    context: int = 131_072
    weight: float = 1
    cache: float = 1
    reads: float = READS
    multiplies: float = MULTIPLIES
    memory: float = ROOM
    kept: float = KEPT
    layer: float = LAYER
    across: float = 428 / 191
    overlaps: bool = False


RANGES: dict[str, tuple[Any, ...]] = {  # of each constant, the others being as they are
    "cache": (1, 2),
    "reads": (0.7, 0.8, 0.9, 1.0),
    "multiplies": (0.3, 0.41, 0.55, 0.67),
    "memory": (0.8, 0.85, 0.9, 0.95),
    "kept": (0.65, 0.7, 0.77, 0.85),
    "layer": (0.0, 50e-6, 75e-6, 100e-6, 125e-6),
    "across": (1.0, 1.5, 428 / 191, 2.5),
    "overlaps": (False, True),
}


class Load(NamedTuple):
    """Where the time of a pass goes, in seconds, and how many texts a GPU has on average."""

    texts: float
    experts: float
    others: float
    caches: float
    multiplying: float
    waiting: float
    is_full: bool  # no more texts would fit; else there is no time for more

    @property
    def seconds(self) -> float:
        """Of the pass."""
        return self.experts + self.others + self.caches + self.multiplying + self.waiting


def load(model: Served, texts: float, assumed: Assumed) -> Load:
    """The load of one GPU with `texts` texts, a mean that need not be whole.

    Routed experts lie on all GPUs, and those that any token chose are read. All else is split over
    the 8 GPUs of a node, but for MLA, which keeps whole texts on a GPU and so all of these weights.
    Drafts multiply every FLOP, and are verified by one reading. Scores and mixes run in bfloat16,
    products with weights and the index in FP8.
    """
    bandwidth, rate = GPU.bandwidth * assumed.reads, assumed.multiplies
    _, experts, top_k, _, _ = model.moe
    each = model.drafts + 1  # tokens that a pass verifies of a text
    chosen = experts * (1 - (1 - top_k / experts) ** (texts * model.gpus * each))
    # Of its own texts a GPU reads all, or of those of its node an eighth: the same bytes.
    caches = sum(part.read(assumed.context, assumed.cache) for part in model.attention)
    scores = sum(part.flops(assumed.context) for part in model.attention)
    others = sum(part.index_flops(assumed.context) for part in model.attention)
    others += 2 * (model.shared + top_k * model.one_expert)
    return Load(
        texts=texts,
        experts=chosen * model.one_expert * assumed.weight / model.gpus / bandwidth,
        others=model.shared * assumed.weight / _split(model) / bandwidth,
        caches=texts * caches / bandwidth,
        multiplying=texts * each * (scores / GPU.bf16 + others / GPU.fp8) / rate,
        waiting=model.layers * assumed.layer * (assumed.across if model.gpus > NODE else 1),
        is_full=False,
    )


def _split(model: Served) -> int:
    """GPUs that share weights other than routed experts: a node's, or with MLA none."""
    return 1 if isinstance(model.attention[0], Latent) else NODE


def most_texts(model: Served, assumed: Assumed) -> float:
    """Texts for which a GPU has memory: what its weights and the reserve leave, in whole caches."""
    routed = model.moe[1] * model.one_expert / model.gpus
    weights = assumed.weight * (routed + model.shared / _split(model))
    kept = sum(part.cached(assumed.context, assumed.cache) for part in model.attention)
    left = assumed.memory * GPU.memory - weights
    return max(0.0, left / kept)


def served(model: Served, assumed: Assumed | None = None) -> Load:
    """The most texts a GPU can have at the promised speed, and where its time goes then."""
    assumed = assumed or Assumed()
    allowed = tokens_per_pass([assumed.kept] * model.drafts) / model.speed
    most = most_texts(model, assumed)

    def time(texts: float) -> float:
        found = load(model, texts, assumed)
        if assumed.overlaps:
            reading = found.experts + found.others + found.caches
            return max(reading, found.multiplying) + found.waiting
        return found.seconds

    if time(most) <= allowed:
        return load(model, most, assumed)._replace(is_full=True)
    low, high = 0.0, most
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if time(middle) <= allowed else (low, middle)
    return load(model, low, assumed)


def cost(model: Served, assumed: Assumed | None = None) -> float:
    """GPU-seconds of a decoded token; infinite where the promised speed is out of reach."""
    texts = served(model, assumed).texts
    return 1 / (texts * model.speed) if texts > 1e-9 else float("inf")


def predicted(config: Config, assumed: Assumed | None = None) -> dict[str, float]:
    """The relative cost of each model of the table, Step 3.5 Flash, of `config`, being 1."""
    ours = from_config(config)
    return {model.name: cost(model, assumed) / cost(ours, assumed) for model in (ours, *OTHERS)}


def published(config: Config) -> dict[str, float]:
    """The authors' figures, in the same order. Source: arXiv 2602.10604 and the model card."""
    return {model.name: model.published for model in (from_config(config), *OTHERS)}


def count_within(config: Config, assumed: Assumed | None = None) -> int:
    """How many of the six predictions lie within WITHIN of the published figure."""
    found, expected = predicted(config, assumed), published(config)
    return sum(abs(found[name] / expected[name] - 1) <= WITHIN for name in expected)


def sensitivity(config: Config) -> dict[str, dict[Any, int]]:
    """For each constant how many predictions are near at each value in RANGES, by itself."""
    return {
        name: {x: count_within(config, Assumed()._replace(**{name: x})) for x in values}
        for name, values in RANGES.items()
    }


def drawn_together(config: Config, rng: np.random.Generator, count: int) -> list[int]:
    """The same with all constants drawn at once from RANGES: how often none to all six are near."""
    times = [0] * (len(OTHERS) + 2)
    for _ in range(count):
        drawn = {name: values[rng.integers(len(values))] for name, values in RANGES.items()}
        times[count_within(config, Assumed()._replace(**drawn))] += 1
    return times
