"""Exhibits of attention, experts and clamps.

Checked by: tests/learn/test_museum.py
"""

from minstep.learn.exhibits import ATTENTION, CLAMPS, EXPERTS, TIGHT, Exhibit, Met

LAYER = (
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
)  # fmt: skip
