"""Exhibits of the footgun museum: what went wrong, why, and who met it; here norms and positions.

The changed lines are those of parity/known_bugs.py. `met` holds only what was read: of this model
where there is any, else of others that have the same trap, and it says which.
Checked by: tests/learn/test_museum.py
"""

from typing import NamedTuple

NORMS, POSITIONS, ATTENTION, EXPERTS = "norms", "positions", "attention", "experts"
CLAMPS, DRAFTS, DECODING, FILES = "clamps", "drafts", "decoding", "files and text"
TIGHT, END = "tight clamps", "a token of the text, which came as a draft, taken for its end"


class Met(NamedTuple):
    """Where a bug was met: a place under github.com, and what was seen there."""

    place: str
    what: str


class Exhibit(NamedTuple):
    """A name for the command line, and the bugs of parity/known_bugs.py that it shows, best first.

    `setting`: TIGHT or END where they need it to show; the right run has it too.
    """

    name: str
    title: str
    group: str
    bugs: tuple[str, ...]
    story: str
    met: tuple[Met, ...] = ()
    setting: str = ""


ANGLES = (
    Exhibit("norm-weight", "The norm's missing or doubled 1", NORMS,
        ("norm weight used as w, not 1 + w", "1 added twice to the norm weight"),
        "Norm weights are stored around zero and the norm multiplies by 1 + w. A port that takes "
        "Llama's norm multiplies by w and scales every activation to about nothing. The opposite "
        "happens between a converter that writes 1 + w into its file and code that adds 1 again.",
        (
            Met("ggml-org/llama.cpp/pull/19283",
                "llama.cpp, this model: the converter adds the 1, and the review settles to which "
                "norms"),
            Met("InternLM/lmdeploy/pull/4790",
                "lmdeploy, Qwen3.5: 1 + w was rounded to bfloat16, which loses small w"),
        ),
    ),
    Exhibit("qk-norm-weight", "The 1 forgotten in QK-norm alone", NORMS,
        ("QK-norm weight used as w, not 1 + w",),
        "The norms of queries and keys are zero-centred as all others are. In many frameworks they "
        "are another class, or a list of names in a converter leaves them out. Then all scores are "
        "near zero and attention is little more than an average of what it sees.",
        (
            Met("ggml-org/llama.cpp/pull/19283",
                "llama.cpp, this model: q_norm and k_norm are named one by one in the converter"),
        ),
    ),
    Exhibit("layer-norm", "LayerNorm in the place of RMSNorm", NORMS,
        ("norm subtracts the mean",),
        "Both norms take a vector and a weight, and LayerNorm is the one that frameworks have "
        "built in. It subtracts the mean first, which is small where a residual stream is roughly "
        "centred: the damage is as large as that mean.",
    ),
    Exhibit("llama3-everywhere", "Llama-3 scaling on sliding layers too", POSITIONS,
        ("Llama-3 scaling applied to a sliding layer",),
        "rope_scaling stands at the top of the config as if it were everybody's. The key that "
        "keeps it to full layers is called yarn_only_types, though the rule is not YaRN, so "
        "readers drop it. A window needs no longer reach, and its slow pairs now turn at another "
        "speed.",
        (
            Met("vllm-project/vllm/pull/29111",
                "vLLM, Gemma 3: sliding layers must have their own base and no scaling"),
            Met("antonellof/ferrox/issues/39",
                "ferrox, Gemma 3: the base varied by layer, the scaling did not"),
        ),
    ),
    Exhibit("llama3-nowhere", "Llama-3 scaling dropped, or applied to every pair", POSITIONS,
        (
            "Llama-3 scaling applied to no layer",
            "every frequency slowed by the factor, not by Llama-3's rule",
        ),
        "An engine that reads rope_theta and no further rotates without scaling; one that knows "
        "only linear scaling slows all pairs by the factor. Pairs that turn often in the original "
        "length must stay as they are, slow ones take the factor, and between them the two are "
        "mixed. Without it short texts look fine and long ones drift.",
        (
            Met("sbryngelson/ANEForge/pull/58",
                "ANEForge, Llama 3.1: articles of 1,600 tokens ended in loops"),
            Met("Blaizzy/mlx-vlm/pull/1709",
                "mlx-vlm, Gemma 3: logits agree at 195 tokens and no longer at 2,916"),
        ),
    ),
    Exhibit("rope-theta", "The first rope_theta taken for all layers", POSITIONS,
        ("first element of rope_theta taken for all layers",),
        "rope_theta is a list with an entry for each layer. Code that wants one number takes the "
        "first, the 5,000,000 of a full layer, where a sliding one has 10,000. Inside a "
        "window most pairs then hardly turn, and the layer loses the order of what it sees.",
        (
            Met("ggml-org/llama.cpp/pull/19283",
                "llama.cpp, this model: the list has to become one number where the converter "
                "makes Llama-3 factors"),
            Met("Avarok-Cybersecurity/atlas/pull/276",
                "Atlas, DeepSeek V4: one table of angles for all layers; errors grew with the "
                "position"),
        ),
    ),
    Exhibit("rotary-width", "Partial rotation with the wrong width", POSITIONS,
        (
            "rotary exponent over head_dim, not the rotary width",
            "whole head rotated where partial_rotary_factors says a part",
        ),
        "Full layers rotate half of each head. The exponent of a frequency runs over those rotated "
        "dimensions, and code written for whole heads divides by the head's width instead; or it "
        "rotates all of it. Every shape still fits, and at position 0 nothing is wrong.",
        (
            Met("pie-project/pie/issues/602",
                "pie, Qwen3.6: exact at position 0, worse with distance, and a test had the same "
                "mistake"),
            Met("huggingface/transformers/pull/48652",
                "transformers, GPT-NeoX-Japanese: frequencies over the whole head"),
            Met("AI-Hypercomputer/maxtext/pull/4615",
                "MaxText, Qwen3.5: the factor dropped on one path, all of the head rotated"),
        ),
    ),
    Exhibit("rotation-interleaved", "Neighbours rotated as pairs, not halves", POSITIONS,
        ("interleaved instead of half-split rotation",),
        "One family of models pairs dimension i with i + P, the other 2i with 2i + 1, and weights "
        "fit only the layout that they were trained with. Nothing in a config tells which one it "
        "is. Every pair gets the angle of another.",
        (
            Met("jzhang38/TinyLlama/issues/24",
                "llama.cpp, TinyLlama: gibberish until the layout was changed"),
            Met("ooples/AiDotNet/pull/2074",
                "AiDotNet, the Llama family: silently wrong logits from files stored for halves"),
        ),
    ),
    Exhibit("rotation-permuted", "Rows permuted for the other layout", POSITIONS,
        ("rows of q_proj and k_proj permuted for interleaved rotation, but half-split is used",),
        "Converters reorder the rows of q_proj and k_proj so that engines with the other layout "
        "get the same scores. Weights that were permuted for an engine that rotates halves, or "
        "permuted twice, or with the wrong count of heads, are scrambled for good.",
        (
            Met("ggml-org/llama.cpp/pull/22611",
                "llama.cpp, TinyLlama in NVFP4: one path skipped the permutation, perplexity 44 "
                "became 4,419"),
            Met("huggingface/transformers/pull/31788",
                "transformers, GGUF: rows of keys need their own count of heads"),
        ),
    ),
    Exhibit("rotation-backwards", "The rotation the other way round", POSITIONS,
        ("rotation the other way round",),
        "Scores depend on differences of positions, so a wrong sign looks as if it cancelled. It "
        "does not: the difference itself changes its sign, and what the model learned of the token "
        "before is looked for behind it.",
    ),
    Exhibit("qk-norm-order", "QK-norm after the rotation, or on one side", POSITIONS,
        ("QK-norm after the rotation", "QK-norm on the queries only"),
        "The norm's division commutes with a rotation, its weight does not: the weight of one "
        "dimension meets a mix of two. So the error is as large as the weights of a pair differ, "
        "and there is none at position 0. A norm left out on one side is cruder.",
        (
            Met("vllm-project/vllm-metal/issues/660",
                "vllm-metal, Hunyuan: the order differs between models, and no name tells it"),
            Met("karpathy/nanochat/issues/743",
                "nanochat: taken for a bug, and then argued to be none"),
        ),
    ),
)  # fmt: skip
