"""Exhibits of the footgun museum: what went wrong, why, and who met it.

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


EXHIBITS = (
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
    Exhibit("head-count", "The head count of full layers everywhere", ATTENTION,
        ("head count of full layers used everywhere",),
        "num_attention_heads is that of full layers; sliding ones have half as many again, in a "
        "setting of their own. A loader that checks shapes stops at the first sliding layer. One "
        "that cuts a matrix to the size it expects goes on without the last heads.",
        (
            Met("ai-dynamo/aiconfigurator/pull/1452",
                "aiconfigurator, Step 3.7: sliding layers planned with 64 heads, which no layer "
                "has"),
        ),
    ),
    Exhibit("gate", "The gate as SiLU, in the wrong place, or not at all", ATTENTION,
        ("gate as SiLU, not sigmoid", "gate on the output of o_proj", "gate forgotten"),
        "Each head's output is scaled by the sigmoid of one number, made from the layer's normed "
        "input. Gates of other models are SiLU or stand behind the output projection, and g_proj "
        "is small enough to be overlooked.",
        (
            Met("NVIDIA-NeMo/Megatron-Bridge/pull/4686",
                "Megatron-Bridge, this model: built without the gate's rows, [10240, 4096] "
                "against [10304, 4096]"),
        ),
    ),
    Exhibit("kv-stripes", "Key-value heads repeated in stripes", ATTENTION,
        ("key-value heads repeated in stripes",),
        "Query heads 0, 1, 2, ... share key-value head 0 as neighbours. Repeating the heads as a "
        "whole, 0, 1, 0, 1, has the same shape and gives most queries the keys of another group.",
        (
            Met("onnx/onnx/pull/7274", "ONNX: the Attention operator's own definition tiled"),
        ),
    ),
    Exhibit("attention-scale", "Scores divided by K, not by its root", ATTENTION,
        ("scores scaled by 1/K",),
        "The scale is applied in one place by some kernels and in another by others. Where both "
        "apply it, scores shrink by the root of the head's width and attention flattens: softer, "
        "vaguer, never an error.",
        (
            Met("antonellof/ferrox/pull/65",
                "ferrox, Gemma 27B: a size whose scale differs, up to 1.15 times too large"),
        ),
    ),
    Exhibit("window-off-by-one", "A window one too long, or one too short", ATTENTION,
        ("window one too long", "window one too short"),
        "A window of W is the token itself and the W - 1 before it. Kernels that count only the "
        "tokens to the left take W and see one more. In a text of fewer than W tokens nothing "
        "differs, so no short test finds it.",
        (
            Met("huggingface/transformers/issues/39408",
                "transformers: FlashAttention's window counts the left side alone"),
            Met("vllm-project/vllm/issues/3385", "vLLM, Mistral: backends differ by one"),
            Met("zml/zml/pull/763", "zml: the test had covered only the case without a window"),
        ),
    ),
    Exhibit("window-forgotten", "Sliding layers that see everything", ATTENTION,
        ("window forgotten",),
        "Full attention is the path that every engine has; a window that is not passed on, or is "
        "lost on one of two paths, leaves it in force. Longer sight sounds harmless, but the layer "
        "never learned to weigh keys from beyond its window.",
        (
            Met("vllm-project/vllm/issues/23969",
                "vLLM, xformers: the window reached the prompt's path only"),
            Met("Comfy-Org/ComfyUI/pull/11409",
                "ComfyUI, Gemma 3: left out at first, since prompts below 1,024 tokens do not "
                "show it"),
        ),
    ),
    Exhibit("future-visible", "A mask that shows the future", ATTENTION,
        ("next token visible", "causal mask missing"),
        "A mask that is off by one, or missing, lets a token see what it should foretell. Decoding "
        "a token at a time hides it, since nothing comes later: only the prompt is read wrongly. A "
        "perplexity that is too good is a warning too.",
        (
            Met("ModelTC/LightLLM/pull/1311",
                "LightLLM, gpt-oss: a window given to the right side as well"),
        ),
    ),
    Exhibit("router-bias", "The router's bias in the wrong place", EXPERTS,
        (
            "biased scores used as expert weights",
            "router bias forgotten when experts are chosen",
            "router bias added to the logits",
        ),
        "The bias balances load: it decides which experts are chosen and must not touch how much "
        "each counts. Code that keeps one array of scores uses the biased ones for both, and code "
        "that knows no bias chooses other experts. What comes out is fluent and a little worse.",
        (
            Met("vllm-project/vllm/pull/12002", "vLLM, DeepSeek V3: biased scores as weights"),
            Met("huggingface/transformers/pull/39581", "transformers, Ernie 4.5: the same"),
            Met("flashinfer-ai/flashinfer/pull/3875",
                "FlashInfer: score + bias - bias is zero in float32 where the bias is large"),
        ),
    ),
    Exhibit("router-softmax", "A softmax router", EXPERTS,
        ("softmax router, not sigmoid",),
        "Most routers before this kind are softmax, which keeps the order of logits. With a bias "
        "on top of much smaller scores another choice comes out, and other weights.",
        (
            Met("MetaX-MACA/vLLM-metax/issues/270",
                "a kernel that returns softmax weights for sigmoid at one shape only"),
        ),
    ),
    Exhibit("expert-weights",
        "Expert weights normalised over the wrong set, or not at all", EXPERTS,
        ("expert weights normalised over all experts", "expert weights not normalised"),
        "The scores of the chosen experts are divided by their own sum. Divided by the sum of all "
        "scores they are far too small. Undivided they add up to more the surer the router is, "
        "and not to one.",
        (
            Met("pytorch/torchtitan/issues/1448",
                "torchtitan, DeepSeek V3: not normalised; seen as large gradients after "
                "conversion"),
        ),
    ),
    Exhibit("scaling-factor", "The routed scaling factor on too much, or on nothing", EXPERTS,
        ("scaling factor on the shared expert too", "scaling factor of the experts forgotten"),
        "Routed experts are scaled by 3, the shared expert is not. Router, kernel and layer each "
        "may apply the factor, and none knows what the others do: it comes twice, never, or "
        "reaches the shared expert when its output is added first.",
        (
            Met("vllm-project/vllm/pull/24119",
                "vLLM, DeepSeek R1: applied twice, GSM8K 0.95 became 0.66"),
            Met("sgl-project/sglang/pull/8333",
                "SGLang in FP4: missing, an accuracy of 0.95 became 0.75"),
            Met("sgl-project/sglang/pull/28237",
                "SGLang on AMD: the fused shared expert weighed by its inverse; short answers hid "
                "it"),
        ),
    ),
    Exhibit("shared-expert", "The shared expert dropped", EXPERTS,
        ("shared expert dropped",),
        "share_expert stands beside moe, not in it, and its name differs by letters from what "
        "others call it. A mapping that finds no place for it often drops it in silence.",
        (
            Met("NVIDIA-NeMo/Megatron-Bridge/pull/3525",
                "Megatron-Bridge, this model: a review finds that the shared expert is never made"),
        ),
    ),
    Exhibit("clamp-order", "The gate clamped before SiLU", CLAMPS,
        ("clamp before SiLU",),
        "Step clamps SiLU's result; gpt-oss and DeepSeek V4 clamp what goes into it. Kernels have "
        "one of the two built in. Since SiLU of a large number is nearly that number, the two "
        "differ by little, and only where the clamp is reached.",
        (
            Met("flashinfer-ai/flashinfer/pull/3492",
                "FlashInfer, this model: a new activation, as the existing one clamps before"),
            Met("ROCm/rocm-libraries/pull/5992",
                "ROCm, this model: proposed with another model's formula, never merged"),
        ),
        TIGHT,
    ),
    Exhibit("clamp-list", "The two lists of limits mixed up", CLAMPS,
        (
            "clamp of the routed experts used for the shared expert",
            "clamp of the shared expert used for the routed experts",
            "clamp of the routed experts used for the dense MLP",
        ),
        "swiglu_limits is for routed experts, swiglu_limits_shared for the shared expert and dense "
        "MLPs. A layer that keeps one limit uses it for all. In the released model dense layers "
        "are in neither list, so that the last mix-up changes nothing.",
        (
            Met("NVIDIA-NeMo/Automodel/pull/2173",
                "Automodel, DeepSeek V4: the shared expert was not clamped with the others"),
        ),
        TIGHT,
    ),
    Exhibit("clamp-forgotten", "The clamp forgotten, whole or in part", CLAMPS,
        ("clamp forgotten", "up not clamped", "up clamped above only"),
        "Only the last two layers clamp, and only on outliers: a port without it passes every "
        "short comparison. In quantised kernels the activation is fused, and a limit that is not "
        "handed over is just not there. The gate is capped above, up on both sides.",
        (
            Met("lightseekorg/tokenspeed/pull/1647",
                "tokenspeed, DeepSeek V4.1: the kernel for Hopper served all layers unclamped"),
            Met("sgl-project/sglang/pull/39939",
                "SGLang: a runner that never passed the limit on; its sibling cost 0.9 points of "
                "GSM8K"),
        ),
        TIGHT,
    ),
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
