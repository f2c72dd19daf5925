"""What a pass multiplies and reads: FLOPs of matrix products, bytes of weights and of caches.

Everything follows from the shapes of the tensors and the layers' specs. A product of [m, k] and
[k, n] is 2*m*k*n FLOPs: one multiplication and one addition each. Norms, activations, softmax and
rotations are left out of FLOPs: they are no matrix products, and nothing beside them.
Checked by: tests/cost/test_count.py, which counts what the model's code really multiplies and reads
"""

import math
from collections.abc import Iterable
from functools import cache
from typing import NamedTuple

from minstep.config import Config, LayerSpec, MoESpec
from minstep.store.stages import layer_number, part_of
from minstep.weights import tensor_shapes

SCORES = "scores and values"  # the part of attention that multiplies no weight


class WeightBytes(NamedTuple):
    """Bytes that one weight takes: in a routed expert, and anywhere else."""

    expert: float
    other: float


FORMS = {
    "bf16": WeightBytes(2, 2),
    "fp8": WeightBytes(1 + 4 / 128**2, 2),  # as released: experts alone, a float32 scale per block
    "int4": WeightBytes(4.5 / 8, 4.5 / 8),  # a 16-bit scale for each 32 weights, as GGUF's Q4_0
}


class Matrix(NamedTuple):
    """One tensor: its part, its number of weights, and how it is used.

    `depth`: 0 for the main model, k for MTP depth k. `moe`: what chooses from a stack of experts.
    `is_product`: whether tokens are multiplied with it as a matrix.
    """

    name: str
    part: str
    size: int
    depth: int
    moe: MoESpec | None
    is_product: bool


def matrices(config: Config) -> list[Matrix]:
    """Every tensor of the model, by the shapes that checkpoints must have."""
    found = []
    for name, shape in tensor_shapes(config).items():
        part = part_of(name)
        n = layer_number(name)
        moe = config.layers[n].moe if part == "routed experts" else None
        depth = max(0, n + 1 - len(config.layers))
        is_product = len(shape) > 1 and part != "embedding"
        found.append(Matrix(name, part, math.prod(shape), depth, moe, is_product))
    if config.tie_word_embeddings:  # one tensor that is looked up, and multiplied with
        size = config.vocab_size * config.hidden_size
        found.append(Matrix("model.embed_tokens.weight", "output matrix", size, 0, None, True))
    return found


class Group(NamedTuple):
    """All tensors of one part and depth: their weights, and those that tokens multiply with."""

    part: str
    depth: int
    moe: MoESpec | None
    size: int
    products: int


@cache
def groups(config: Config) -> tuple[Group, ...]:
    """The tensors of matrices() summed up, which is what every count begins with."""
    sums: dict[tuple[str, int, MoESpec | None], list[int]] = {}
    for tensor in matrices(config):
        found = sums.setdefault((tensor.part, tensor.depth, tensor.moe), [0, 0])
        found[0] += tensor.size
        found[1] += tensor.size * tensor.is_product
    return tuple(Group(*key, *found) for key, found in sums.items())


def product_flops(
    config: Config, tokens: int, logits: int | None = None, depth: int = 0
) -> dict[str, int]:
    """FLOPs of all products with weights, by part, of `tokens` tokens through one depth.

    `depth`: 0 is the main model, k MTP depth k. `logits`: how many of the tokens go through the
    output matrix (all). Of E routed experts each token is multiplied with A.
    Source: 2*m*k*n for each product of [m, k] and [k, n]; the shapes of the released checkpoint.
    """
    flops: dict[str, int] = {}
    for group in groups(config):
        if group.depth == depth and group.products:
            used = group.products
            if group.moe:
                used = used // group.moe.experts * group.moe.top_k
            is_output = group.part == "output matrix"
            flops[group.part] = 2 * used * (tokens if not is_output or logits is None else logits)
    return flops


def visible_pairs(spec: LayerSpec, tokens: int, before: int) -> int:
    """Pairs of a query and a key that it may see, for `tokens` queries after `before` positions.

    Query i sees min(before + i + 1, W) positions, itself among them. This is what must be
    multiplied; a kernel that masks computes more, at most computed_pairs.
    """
    if spec.window is None:
        return tokens * before + tokens * (tokens + 1) // 2
    growing = min(tokens, max(0, spec.window - before))  # queries that see all there is
    return growing * before + growing * (growing + 1) // 2 + (tokens - growing) * spec.window


def computed_pairs(spec: LayerSpec, tokens: int, before: int) -> int:
    """Pairs when each query is multiplied with every position in the cache: the mask hides some.

    A cache that keeps no more than it must holds min(before, W - 1) positions before an append.
    """
    cached = before if spec.window is None else min(before, spec.window - 1)
    return tokens * (cached + tokens)


def score_flops(spec: LayerSpec, pairs: int) -> int:
    """FLOPs of scores and of mixing values in one layer: 2*K each, per head and pair."""
    return 4 * spec.heads * spec.head_dim * pairs


def cache_bytes(specs: Iterable[LayerSpec], context: int, size: float = 2) -> float:
    """Bytes of keys and values that a token sees at a context of `context` positions.

    2*G*K numbers of `size` bytes for each of min(context, W) positions of each layer: what one
    sequence's caches hold, and what a pass over it reads.
    Checked by: tests/cost/test_count.py
    """
    return sum(
        2 * spec.groups * spec.head_dim * size * min(context, spec.window or context)
        for spec in specs
    )


def experts_read(moe: MoESpec, tokens: int) -> float:
    """How many of E experts `tokens` tokens are expected to choose among them.

    Each token chooses A at random and by itself: one expert stays unread with probability
    (1 - A/E) ** tokens. Tokens of one text are more alike, so fewer are read in truth.
    """
    return moe.experts * (1 - (1 - moe.top_k / moe.experts) ** tokens)


def weight_bytes(
    config: Config, form: WeightBytes, tokens: int, depth: int = 0, read: float | None = None
) -> dict[str, float]:
    """Bytes of weights that a pass over `tokens` different tokens reads, by part.

    Each weight is read once, of the embedding one row for each token, of a stack of experts those
    that any token chose: in the mean over layers as many as experts_read says, or `read`. Norms
    count; a depth's look-ups in the embedding, whose rows the main model has read, do not.
    """
    total: dict[str, float] = {}
    for group in groups(config):
        if group.depth != depth:
            continue
        size, each = float(group.size), form.other
        if group.part == "embedding":
            is_there = config.tie_word_embeddings  # in the output matrix, which is read as a whole
            size = 0 if is_there else tokens * config.hidden_size
        elif group.moe:
            chosen = experts_read(group.moe, tokens) if read is None else read
            size, each = group.size / group.moe.experts * chosen, form.expert
        total[group.part] = size * each
    return total


class PassCost(NamedTuple):
    """What a pass costs: FLOPs, and bytes of weights (read once) and of caches (of each text)."""

    flops: float
    weights: float
    caches: float

    @property
    def bytes(self) -> float:
        """All bytes that are read."""
        return self.weights + self.caches

    @property
    def intensity(self) -> float:
        """FLOPs for each byte read."""
        return self.flops / self.bytes


def decoding_pass(
    config: Config, form: WeightBytes, context: int, batch: int = 1, drafts: int = 0
) -> PassCost:
    """One pass of `batch` texts that each hold `context` positions, verifying `drafts` drafts.

    Each text has drafts + 1 new tokens at its end, all with logits, and its first `drafts` MTP
    depths run over as many positions to draft anew, with logits of one. Caches are bfloat16 and
    read once for all new tokens of a text; what is written is left out.
    """
    new = min(drafts + 1, context)
    tokens = batch * new
    specs = [*config.layers, *config.mtp_layers[:drafts]]
    pairs = sum(score_flops(spec, visible_pairs(spec, new, context - new)) for spec in specs)
    flops, read = batch * pairs, 0.0
    for depth in range(drafts + 1):
        logits = tokens if depth == 0 else batch
        flops += sum(product_flops(config, tokens, logits, depth).values())
        read += sum(weight_bytes(config, form, tokens, depth).values())
    return PassCost(flops, read, batch * cache_bytes(specs, context))


def stored_bytes(config: Config, form: WeightBytes) -> float:
    """Bytes that all weights take in memory, MTP layers among them."""
    sizes = (group.size * (form.expert if group.moe else form.other) for group in groups(config))
    tied = config.vocab_size * config.hidden_size * form.other * config.tie_word_embeddings
    return sum(sizes) - tied
