"""The six models of the published table of decoding costs, as far as a cost follows from shapes.

Draft layers stand among the others, for they are read and multiplied with like them. Sizes are
counts of layers, heads and widths; nothing here was fitted to anything. Left out are norms, inputs
of drafts, the look-up of embeddings, and that the files of Kimi K2 Thinking have 4-bit experts.
Source: the models' configurations: XiaomiMiMo/MiMo-V2-Flash (as in NeMo AutoModel's copy),
        MiniMaxAI/MiniMax-M2.1, deepseek-ai/DeepSeek-V3.2 and FlashMLA's README for what its cache
        holds, zai-org/GLM-4.7, moonshotai/Kimi-K2; speeds, drafts and EP: arXiv 2602.10604.
Checked by: tests/cost/test_serving.py, which holds parameters against what the makers announce
"""

from collections import Counter
from typing import NamedTuple

from minstep.config import Config

NODE = 8  # GPUs of one machine, which share the heads of a layer


class Grouped(NamedTuple):
    """Layers of grouped-query attention: H heads read G groups of keys and values, gates or not."""

    layers: int
    heads: int
    groups: int
    key: int
    value: int
    window: int | None = None
    has_gate: bool = False

    def weights(self, hidden: int) -> int:
        """Parameters of one layer."""
        both = self.key + self.value
        return hidden * (self.heads * (both + self.has_gate) + self.groups * both)

    def cached(self, context: int, size: float) -> float:
        """Bytes that all these layers keep of one text, on all GPUs of a node together.

        Heads are split over the GPUs. With fewer groups than GPUs, groups are kept twice or more.
        """
        seen = min(context, self.window or context)
        return self.layers * max(self.groups, NODE) * (self.key + self.value) * size * seen

    def read(self, context: int, size: float) -> float:
        """Bytes that a pass reads of it."""
        return self.cached(context, size)

    def flops(self, context: int) -> float:
        """FLOPs of scores and mixing for one token in all these layers."""
        seen = min(context, self.window or context)
        return 2.0 * self.layers * self.heads * (self.key + self.value) * seen

    def index_flops(self, context: int) -> float:
        """None: nothing is chosen."""
        return 0.0


class Latent(NamedTuple):
    """Layers of MLA: all heads read one latent of 512 numbers and 64 rotated ones per position.

    `chosen`: how many positions a query attends to, all where None; they are chosen by 64 small
    heads of width 128 that score every position (DeepSeek Sparse Attention).
    """

    layers: int
    heads: int
    chosen: int | None = None

    def weights(self, hidden: int) -> int:
        """Parameters of one layer: queries over rank 1536, one latent, values of width 128."""
        queries = hidden * 1536 + 1536 * self.heads * (128 + 64)
        latent = hidden * (512 + 64) + 512 * self.heads * (128 + 128)
        index = (1536 * 64 * 128 + hidden * (128 + 64)) if self.chosen else 0
        return queries + latent + self.heads * 128 * hidden + index

    def cached(self, context: int, size: float) -> float:
        """Bytes that one GPU keeps of one text: the latent cannot be split by heads.

        In 8 bits 656 a position: the latent, four float32 scales, rotated numbers in 16 bits. The
        index's keys take 128 and a float32 scale.
        """
        position = 656 if size == 1 else (512 + 64) * size
        return self.layers * context * (position + (132 if self.chosen else 0))

    def read(self, context: int, size: float) -> float:
        """Bytes that a pass reads of it: where positions are chosen, those and the index."""
        if self.chosen is None:
            return self.cached(context, size)
        attended = self._replace(chosen=None).cached(min(self.chosen, context), size)
        return attended + self.layers * context * 132

    def flops(self, context: int) -> float:
        """FLOPs for one token, weights of the latent absorbed: 576 numbers a score, 512 a mix."""
        seen = min(context, self.chosen or context)
        return 2.0 * self.layers * self.heads * (512 + 64 + 512) * seen

    def index_flops(self, context: int) -> float:
        """FLOPs of the scores that choose positions."""
        return 2.0 * self.layers * 64 * 128 * context if self.chosen else 0.0


class Served(NamedTuple):
    """A model and how it is served: tokens a second of each text, drafts a pass, GPUs.

    `dense`: layers and width; `moe`: layers, experts E, of which A, width, width shared; `outputs`:
    output matrices of [vocab, hidden]. `published`: its cost beside Step 3.5 Flash.
    """

    name: str
    hidden: int
    vocab: int
    attention: tuple[Grouped | Latent, ...]
    dense: tuple[int, int]
    moe: tuple[int, int, int, int, int]
    speed: float
    drafts: int
    gpus: int
    published: float
    outputs: int = 1

    @property
    def layers(self) -> int:
        """Layers that follow each other in a pass, those of drafts among them."""
        return sum(part.layers for part in self.attention)

    @property
    def one_expert(self) -> int:
        """Parameters of one routed expert in every MoE layer."""
        layers, _, _, width, _ = self.moe
        return 3 * layers * self.hidden * width

    @property
    def shared(self) -> int:
        """Parameters that every token is multiplied with; norms and draft inputs are left out."""
        layers, experts, _, _, width = self.moe
        attention = sum(part.layers * part.weights(self.hidden) for part in self.attention)
        mlps = 3 * (self.dense[0] * self.dense[1] + layers * width) + layers * experts
        return attention + self.hidden * (mlps + self.outputs * self.vocab)


def from_config(config: Config) -> Served:
    """Step 3.5 Flash as the table serves it, all of its shapes from a configuration.

    For a model whose MoE layers are all alike, and whose dense layers are.
    """
    every = config.layers + config.mtp_layers
    kinds = Counter(
        (s.heads, s.groups, s.head_dim, s.head_dim, s.window, s.has_gate) for s in every
    )
    attention = tuple(Grouped(count, *kind) for kind, count in kinds.items())
    dense = [spec.mlp_width for spec in every if not spec.moe]
    moes = [spec.moe for spec in config.layers if spec.moe]
    moe = moes[0]
    return Served(
        "Step 3.5 Flash",
        config.hidden_size,
        config.vocab_size,
        attention,
        (len(dense), max(dense, default=0)),
        (len(moes), moe.experts, moe.top_k, moe.width, moe.shared_width),
        speed=100,
        drafts=len(config.mtp_layers),
        gpus=8,
        published=1.0,
        outputs=1 + len(config.mtp_layers),
    )


OTHERS = (
    Served(
        "MiMo-V2 Flash",
        4096,
        152_576,
        (Grouped(9, 64, 4, 192, 128), Grouped(39 + 3, 64, 8, 192, 128, 128)),
        (1 + 3, 16_384),
        (47, 256, 8, 2048, 0),
        *(100, 3, 8, 1.2),
    ),
    Served(
        "MiniMax M2.1",
        3072,
        200_064,
        (Grouped(62 + 3, 48, 8, 128, 128),),
        (0, 0),
        (62 + 3, 256, 8, 1536, 0),
        *(100, 3, 8, 3.9),
    ),
    Served(
        "DeepSeek V3.2",
        7168,
        129_280,
        (Latent(61 + 1, 128, chosen=2048),),
        (3, 18_432),
        (58 + 1, 256, 8, 2048, 2048),
        *(33, 1, 32, 6.0),
    ),
    Served(  # has one draft layer, which runs three times
        "GLM-4.7",
        5120,
        151_552,
        (Grouped(92 + 3, 96, 8, 128, 128),),
        (3, 12_288),
        (89 + 3, 160, 8, 1536, 1536),
        *(100, 3, 8, 18.9),
    ),
    Served(
        "Kimi K2",
        7168,
        163_840,
        (Latent(61, 64),),
        (1, 18_432),
        (60, 384, 8, 2048, 2048),
        *(33, 0, 32, 18.9),
    ),
)
