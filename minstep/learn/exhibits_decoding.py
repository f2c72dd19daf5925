"""Exhibits of drafts, decoding, files and text: no tensor of the main model shows them.

Checked by: tests/learn/test_museum.py
"""

from minstep.learn.exhibits import DECODING, DRAFTS, END, FILES, Exhibit, Met

BESIDE = (
    Exhibit("mtp-head", "lm_head in place of the drafts' own heads", DRAFTS,
        ("MTP head replaced by lm_head",),
        "Each MTP layer has an output matrix of its own. Engines let draft layers share the main "
        "model's, since some checkpoints store no other, and overwrite the trained one. Nothing "
        "fails and the text stays right, as every draft is checked: only the speed is gone.",
        (
            Met("vllm-project/vllm/pull/38494",
                "vLLM, this model: drafts kept fell from about 97 % to 4 %"),
            Met("NVIDIA-NeMo/Megatron-Bridge/pull/5364",
                "Megatron-Core ties the two; in this model 99.9 % of their elements differ"),
        ),
    ),
    Exhibit("mtp-head-norm", "The norm before a draft head: another's, twice, or none", DRAFTS,
        (
            "norm before an MTP head forgotten",
            "norm before an MTP head replaced by model.norm",
            "norm before an MTP head applied twice",
        ),
        "A draft head is a norm and a matrix, both the layer's own. The norm is taken for the main "
        "model's last one, or left to another module that does not apply it, or applied by both. "
        "RMSNorm hides much of it: the second only scales by its weight once more.",
        (
            Met("vllm-project/vllm/pull/47448",
                "vLLM, GLM: the norm moved into the layer, and so had to leave the head"),
        ),
    ),
    Exhibit("mtp-normed-states", "States passed between depths after the norm", DRAFTS,
        ("hidden passed between MTP depths after the norm",),
        "In Step a depth hands on its block's raw output; the norm is for the head alone. Other "
        "models want the normed state, and one engine serves both. Since the next depth norms what "
        "it gets, only the weight of the extra norm is left as an error.",
        (
            Met("vllm-project/vllm/pull/46075",
                "vLLM, GLM-5, which wants the norm: acceptance fell to about 10 % at the third "
                "draft without it"),
            Met("ggml-org/llama.cpp/pull/24025",
                "llama.cpp, Qwen3.6: post-norm after all, by what acceptance says"),
            Met("ROCm/ATOM/pull/1764",
                "ATOM, DeepSeek R1: 2.84 tokens a pass became 2.94 with the norm"),
        ),
    ),
    Exhibit("mtp-main-state", "The main model's state fed to every depth", DRAFTS,
        ("main model's state fed to every MTP depth",),
        "Step's depths are a chain, each continues from the one before. MiMo's take the main "
        "model's state, every one of them. With the other's habit the first draft is right and all "
        "later ones are worse.",
        (
            Met("sgl-project/sglang/pull/18564", "SGLang, this model: the chain had to be added"),
            Met("sgl-project/sglang-jax/pull/1256",
                "sglang-jax, MiMo, the other way round: 0.47 of second drafts kept, SGLang's 0.75"),
        ),
    ),
    Exhibit("mtp-halves", "The halves of eh_proj's input swapped", DRAFTS,
        ("enorm and hnorm halves swapped before eh_proj",),
        "eh_proj takes the embedding's half first, then the state's. DeepSeek V3's report writes "
        "them in the other order, and both halves are equally wide, so that no shape complains.",
        (
            Met("sgl-project/sglang/issues/6423",
                "SGLang: asked why code and report differ in the order"),
            Met("ml-explore/mlx-lm/pull/1469",
                "mlx-lm, Qwen3.5: state first, and about no draft agreed"),
        ),
    ),
    Exhibit("mtp-token", "A depth fed the token before", DRAFTS,
        ("MTP depth fed the token before",),
        "Depth k at position i reads the embedding of token i + k, so each depth shifts the text "
        "by one more. A shift too few feeds it a token that its state has already seen.",
        (
            Met("ggml-org/llama.cpp/pull/24340",
                "llama.cpp, this model: a neighbour of it, later depths read the wrong row"),
        ),
    ),
    Exhibit("drafts-stale", "Rows computed from drafts kept for good", DECODING,
        ("rows computed from drafts never computed again",),
        "While drafting, the last rows of each depth's cache come from tokens that are guesses, "
        "and from states that are guesses even where the token was right. Kept, they can spoil "
        "what later drafts attend to. The text stays right.",
        (
            Met("lablup/mlxcel/issues/994",
                "mlxcel: a draft cache rewound by two too many, so that drafts got worse and "
                "worse"),
        ),
    ),
    Exhibit("drafts-unchecked", "Drafts kept without asking the main model", DECODING,
        ("drafts kept unchecked",),
        "The rule of acceptance is a comparison of two probabilities, and a shortcut in it is not "
        "seen in speed: all drafts are kept and every pass gives four tokens. The text is then "
        "what the small layers say.",
        (
            Met("z-lab/dflash/issues/74",
                "DFlash: drafts drawn greedily but verified as if sampled"),
            Met("ml-explore/mlx-swift-lm/pull/459",
                "mlx-swift-lm: drafts kept where two samples agree, which changes the "
                "distribution"),
        ),
    ),
    Exhibit("end-token", "An end token among kept drafts overlooked", DECODING,
        ("end token looked for in the last place only",),
        "A loop written for one token a step looks at the last one. With drafts the end may come "
        "earlier in a step: the text goes on behind it, into whatever the model says after its "
        "end.",
        (
            Met("huggingface/transformers/issues/47912",
                "transformers: only the last token of a block is looked at"),
            Met("LostRuins/koboldcpp/issues/1276",
                "KoboldCpp: tokens behind the end reached the user"),
        ),
        END,
    ),
    Exhibit("cache-rollback", "Rejected drafts left in the cache", DECODING,
        ("rejected drafts left in the cache",),
        "A pass writes keys and values of all drafts before it is known which are kept. Those of "
        "the rejected must go, and positions with them. Where a cache cannot be cut back, the next "
        "tokens attend to words that were never said.",
        (
            Met("ml-explore/mlx-lm/pull/1109",
                "mlx-lm: caches that cannot be trimmed kept rejected drafts"),
            Met("paiml/aprender/pull/2014",
                "aprender: all of the cache dropped in place of its end"),
        ),
    ),
    Exhibit("shards-pattern", "Shards found by their names, not by the index", FILES,
        ("shards found by a pattern with -of-",),
        "Shards are usually called model-00001-of-00005.safetensors, and many loaders look for "
        'that. In the released checkpoint at least one has no "-of-" in its name. A careful loader '
        "then misses tensors; a careless one leaves them as they were initialised.",
        (
            Met("NVIDIA-NeMo/Megatron-Bridge/pull/5364",
                "this model: lm_head and a draft head lie in model-00002.safetensors"),
            Met("sgl-project/sglang/pull/32279",
                "SGLang: shards that were not found left random weights, without a word"),
        ),
    ),
    Exhibit("moe-layers", "moe_layers_enum read as characters", FILES,
        ("layer numbers read as characters", "layer numbers compared with characters"),
        'The layers with experts are listed in one string, "3,4,...,44". Python goes through a '
        "string by characters without complaint: each digit becomes a layer, or no layer number is "
        "ever found among them. Small test models with one-digit layers do not show the first.",
    ),
    Exhibit("tool-calls", "A tool-call parser that is handed whole drafts", FILES,
        ("rest of a piece of text dropped behind a call",),
        "A parser written for one token at a time finds nothing behind a tag and may empty its "
        "buffer there. Accepted drafts bring several tags in one piece, such as the end of a call "
        "and the start of the next: the second call loses its head and is never made.",
        (
            Met("vllm-project/vllm/pull/33690",
                "vLLM, this model: an end and a start in one piece began an empty call"),
            Met("vllm-project/vllm-ascend/issues/5596",
                "vllm-ascend, GLM 4.7: the same piece, the call not parsed"),
            Met("vllm-project/vllm/issues/55082",
                "vLLM, Step3: arguments empty unless each token comes alone"),
        ),
    ),
)  # fmt: skip
