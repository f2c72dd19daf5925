"""The block diagram, drawn from a Config as SVG text: the same bytes each time, light and dark."""

import math
from collections.abc import Iterator

from minstep.config import FULL, SLIDING, Config, LayerSpec
from minstep.draw.svg import document, rect, text

WIDTH, HEIGHT = 960, 640
# Where the map of layers, the MTP depths and the layer in detail lie, in units of the canvas.
MAP_X, MAP_WIDTH, MAP_TOP, MAP_BOTTOM = 24, 184, 164, 540
MTP_X, MTP_WIDTH = 242, 222
RESIDUAL_X, DETAIL_X, DETAIL_WIDTH = 512, 544, 392
KIND = {FULL: "full", SLIDING: "sliding"}
COLOURS = {  # class: fill and stroke on a light page, fill and stroke on a dark one
    ".full.moe": ("#b45309", "#b45309", "#f0a13a", "#f0a13a"),
    ".full.dense": ("#fff3e0", "#b45309", "#2d1e0b", "#f0a13a"),
    ".sliding.moe": ("#2563c9", "#2563c9", "#6cb0ff", "#6cb0ff"),
    ".sliding.dense": ("#e8f1ff", "#2563c9", "#0f2038", "#6cb0ff"),
    ".clamp": ("#d6246e", "#ffffff", "#ff4f93", "#0d1117"),
    ".idle": ("#d8ccf5", "none", "#3b2f63", "none"),
    ".chosen": ("#6f36d9", "none", "#c4a7ff", "none"),
}


def model_svg(config: Config) -> str:
    """The whole model on one screen, as the text of an SVG file of 960 x 640 units.

    Left, each layer as a cell, coloured by attention and filled by MLP, with the MTP depths beside;
    right, one layer in detail: the first that is sliding and MoE, or else the nearest to it.
    Source: the config for what is drawn; model.block and mtp.mtp_depth for the order of operations.
    Checked by: tests/docs/test_model_figure.py
    """
    spec = max(config.layers, key=lambda layer: (layer.moe is not None, layer.window is not None))
    title = f"Step 3.5: {len(config.layers)} layers + {len(config.mtp_layers)} MTP"
    size = f"hidden size {config.hidden_size:,}, vocabulary {config.vocab_size:,}"
    described = [f"The stack of layers and {spec.name} in detail", *map(", ".join, _kinds(config))]
    lines = [
        rect(0.5, 0.5, WIDTH - 1, HEIGHT - 1, "card", 10) + '<path class="card" d="M484 24V616"/>',
        text(MAP_X, 32, title, "title"),
        text(MAP_X, 50, f"{size}, up to {config.max_positions:,} positions", "muted"),
        *_stack(config),
        *(_depths(config) if config.mtp_layers else ()),
        *_legend(config),
        *_attention(spec, config.hidden_size),
        *_feed_forward(spec),
    ]
    return document((WIDTH, HEIGHT), title, ". ".join(described) + ".", lines, COLOURS)


def _stack(config: Config) -> Iterator[str]:
    """Embedding, the map of main layers from bottom left to top right, final norm and head."""
    full = [n for n, spec in enumerate(config.layers) if spec.kind == FULL]
    columns = min(max(full[1] - full[0], 2), 8) if len(full) > 1 else 4  # full ones in line
    width = MAP_WIDTH / columns
    height = min(40, (MAP_BOTTOM - MAP_TOP) / math.ceil(len(config.layers) / columns))
    for n, spec in enumerate(config.layers):
        x, y = MAP_X + n % columns * width, MAP_BOTTOM - (n // columns + 1) * height
        yield _cell(x + 1.5, y + 1.5, width - 3, height - 3, spec)
    first, last = MAP_X + width / 2, x + width / 2
    bar, shared = MAP_WIDTH, ""
    if config.mtp_layers:
        bar, shared = MTP_X + MTP_WIDTH - MAP_X, ", shared with MTP"
        yield f'<path class="line" d="M{last:g} 154H{MTP_X + 7}"/>'
    yield _up(first, (604, 586), (562, MAP_BOTTOM)) + text(first, 618, "token t", "muted mid")
    label = f"embed_tokens [{config.vocab_size:,}, {config.hidden_size:,}]{shared}"
    yield _box(MAP_X, 562, bar, 24, label)
    label = text(MAP_X + MAP_WIDTH / 2, 76, "token t+1", "muted mid")
    yield _up(last, (y, 142), (120, 108)) + label
    yield _box(MAP_X, 120, MAP_WIDTH, 22, "norm")
    yield _box(MAP_X, 84, MAP_WIDTH, 24, "lm_head" + " (tied)" * config.tie_word_embeddings)


def _depths(config: Config) -> Iterator[str]:
    """MTP depths from left to right, each fed the raw state of the one before, with own heads."""
    pitch = min(74, MTP_WIDTH / len(config.mtp_layers))
    for k, spec in enumerate(config.mtp_layers, start=1):
        x, width = MTP_X + (k - 1) * pitch + 16, pitch - 16
        middle = x + width / 2
        yield _arrow(f"M{middle - pitch if k > 1 else x - 9:g} 154H{x - 9:g}V235H{x:g}")
        yield _up(middle, (266, 246), (224, 202), (170, 142), (120, 108))
        yield text(middle, 279, f"E[t+{k}]", "muted mid") + _box(x, 224, width, 22, "eh_proj")
        yield _cell(x, 170, width, 32, spec) + _box(x, 120, width, 22, f"norm {k}")
        yield _box(x, 84, width, 24, f"head {k}") + text(middle, 76, f"t+{k + 1}", "muted mid")
    yield text(MTP_X + 16, 304, "eh_proj joins E and the state before", "muted")


def _kinds(config: Config) -> Iterator[list[str]]:
    """For each kind of attention in the model: its name and count, then what sets it apart."""
    for spec in {spec.kind: spec for spec in config.layers + config.mtp_layers}.values():
        main, mtp = ([s.kind for s in part].count(spec.kind) for part in config[-2:])
        rope, sees = spec.rope, f"window {spec.window:,}" if spec.window else "sees all before"
        scaled = f"Llama-3 scaled × {rope.scaling.factor:g}" if rope.scaling else "not scaled"
        yield [
            f"{KIND[spec.kind]} attention × {main}" + (f" + {mtp} MTP" if mtp else ""),
            f"{spec.heads} heads on {spec.groups}, {sees}",
            f"RoPE on {rope.rotary_dim} of {spec.head_dim}, θ {rope.theta:,.0f}",
            f"frequencies {scaled}",
        ]


def _legend(config: Config) -> Iterator[str]:
    """What colours, fills and the dot mean, with how many layers of each there are."""
    x, y, every = MTP_X + 16, 344, config.layers + config.mtp_layers
    moe, clamped = sum(s.moe is not None for s in every), sum(map(_is_clamped, every))
    entries = [(f"{fact[0].split()[0]} moe", fact) for fact in _kinds(config)]
    entries += [("tip", [f"filled: MoE × {moe}"])] if moe else []
    dense = [f"outlined: dense MLP × {len(every) - moe}", f"width {every[0].mlp_width:,}"]
    entries += [("box", dense)] if moe < len(every) else []
    entries += [("clamp", [f"clamped SwiGLU × {clamped}"])] if clamped else []
    for mark, (name, *details) in entries:
        yield rect(x + 4, y - 10, 12, 12, mark, 3 + 3 * (mark == "clamp")) + text(x + 26, y, name)
        yield from (text(x + 26, y + 14 * n, d, "muted") for n, d in enumerate(details, start=1))
        y += 20 + 14 * len(details)


def _attention(spec: LayerSpec, hidden: int) -> Iterator[str]:
    """The first half of a layer, from its input at the bottom to the sum with the residual."""
    H, G, K = spec.heads, spec.groups, spec.head_dim
    number, mlp = spec.name.rsplit(".", 1)[1], "MoE" if spec.moe else "dense MLP"
    yield text(RESIDUAL_X - 12, 32, f"Layer {number}: {KIND[spec.kind]} attention, {mlp}", "title")
    yield text(RESIDUAL_X - 12, 50, "T positions; projections have no bias", "muted")
    yield _up(RESIDUAL_X, (604, 70)) + text(RESIDUAL_X - 12, 618, f"x [T, {hidden:,}]", "muted")
    for name, x, width, heads in (("q", 0, 112, H), ("k", 122, 86, G), ("v", 218, 86, G)):
        yield _box(DETAIL_X + x, 512, width, 38, f"{name}_proj\n[T, {heads}, {K}]")
        rotated = ((512, 494), (472, 461), (439, 428)) if name != "v" else ((512, 428),)
        yield _up(DETAIL_X + x + width / 2, (568, 550), *rotated)
    yield _box(DETAIL_X, 472, 208, 22, "RMSNorm of each head")
    yield _box(DETAIL_X, 439, 208, 22, f"RoPE on {spec.rope.rotary_dim} of {K} dimensions")
    sees = f"itself and the {spec.window - 1:,} before it" if spec.window else "all before it"
    label = f"{H} query heads share {G} key-value heads\na query sees {sees}"
    yield _box(DETAIL_X, 386, 304, 42, label, kind=f"{KIND[spec.kind]} dense")
    yield _up(DETAIL_X + 152, (386, 372 if spec.has_gate else 338))
    if spec.has_gate:
        yield _box(DETAIL_X + 314, 512, 78, 38, f"g_proj\n[T, {H}]")
        yield _box(DETAIL_X, 350, DETAIL_WIDTH, 22, "each head times its gate, sigmoid(g)")
        yield _up(DETAIL_X + 353, (568, 550), (512, 372)) + _up(DETAIL_X + 152, (350, 338))
    yield _box(DETAIL_X, 316, DETAIL_WIDTH, 22, f"o_proj: {H * K:,} to {hidden:,}") + _half(
        568, 327
    )


def _feed_forward(spec: LayerSpec) -> Iterator[str]:
    """The second half of a layer: routed and shared experts, or a dense MLP, and the sum."""
    routed, shared, moe = DETAIL_X + 130, DETAIL_X + 332, spec.moe
    output = f"SwiGLU MLP of width {spec.mlp_width:,}"
    if moe:
        output = f"routed outputs, weights summing to {moe.scaling_factor:g}, plus shared"
        bias = " + bias" if moe.has_bias else ""
        yield _box(DETAIL_X, 230, 260, 26, f"router: top {moe.top_k} by sigmoid score{bias}")
        yield rect(DETAIL_X, 120, 260, 92, "box") + _experts(moe.experts, moe.top_k)
        yield text(routed, 203, f"{moe.experts} experts of width {moe.width:,}", "mid")
        yield _box(shared - 60, 120, 120, 92, f"shared expert\nwidth {moe.shared_width:,}")
        yield _up(routed, (274, 256), (230, 212), (120, 102)) + _up(shared, (274, 212), (120, 102))
    yield _box(DETAIL_X, 80, DETAIL_WIDTH, 22, output) + _half(274, 91)
    yield "" if moe else _up(routed, (274, 102))


def _experts(count: int, chosen: int) -> str:
    """A square for each expert; which of them are lit is for show, but not how many."""
    ideal = math.isqrt(count * 4 - 1) + 1
    columns = min(range(ideal, ideal + 4), key=lambda columns: -count % columns)
    rows = math.ceil(count / columns)
    pitch = min(240 / columns, 60 / rows, 18)
    left, top = DETAIL_X + 130 - columns * pitch / 2, 158 - rows * pitch / 2
    kinds = dict.fromkeys(range(count), "idle")
    kinds |= dict.fromkeys(sorted(kinds, key=lambda n: n * n * 0.618034 % 1)[:chosen], "chosen")
    cells = ((left + n % columns * pitch, top + n // columns * pitch, k) for n, k in kinds.items())
    return "".join(rect(x, y, pitch * 0.8, pitch * 0.8, kind, 1) for x, y, kind in cells)


def _cell(x: float, y: float, width: float, height: float, spec: LayerSpec) -> str:
    """One layer of the map with its number, and a dot if its SwiGLU is clamped."""
    fill, ink = ("moe", "on mid") if spec.moe else ("dense", "mid")
    label = text(x + width / 2, y + height / 2 + 4, spec.name.rsplit(".", 1)[1], ink)
    dot = rect(x + width - 11, y + 2, 9, 9, "clamp", 4.5) if _is_clamped(spec) else ""
    return rect(x, y, width, height, f"{KIND[spec.kind]} {fill}") + label + dot


def _is_clamped(spec: LayerSpec) -> bool:
    return bool(spec.swiglu_limit_shared or (spec.moe and spec.swiglu_limit))


def _half(norm_y: float, sum_y: float) -> str:
    x = RESIDUAL_X
    norm = _box(DETAIL_X, norm_y, DETAIL_WIDTH, 22, "RMSNorm, times 1 + w")
    norm += _arrow(f"M{x} {norm_y + 11:g}H{DETAIL_X}")
    plus = rect(x - 8, sum_y - 8, 16, 16, "box", 8) + text(x, sum_y + 4, "+", "mid")
    return norm + _arrow(f"M{DETAIL_X} {sum_y:g}H{x + 8}") + plus


def _box(x: float, y: float, w: float, h: float, label: str, *, kind: str = "box") -> str:
    name, _, detail = label.partition("\n")
    under = text(x + w / 2, y + h / 2 + 12, detail, "muted mid") if detail else ""
    label = text(x + w / 2, y + h / 2 + (-3 if detail else 4), name, "mid")
    return rect(x, y, w, h, kind) + label + under


def _up(x: float, *spans: tuple[float, float]) -> str:
    """Upright arrows at x, each from the first y to the second."""
    return "".join(_arrow(f"M{x:.5g} {start:.5g}V{end:.5g}") for start, end in spans)


def _arrow(path: str) -> str:
    """An arrow along `path`, in SVG's own path commands."""
    return f'<path class="line" d="{path}" marker-end="url(#tip)"/>'
