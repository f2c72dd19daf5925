"""The book's figures: the files are what the code draws, and the code draws what the model does."""

import html
import itertools
import math
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import DTypeLike

import minstep
from docs.make import gallery
from docs.make.curves import (
    fp8_values,
    precision_svg,
    rope_svg,
    swiglu_svg,
)
from docs.make.decoding import sampling_svg
from docs.make.gallery import FIGURES, PROMPT, ROUTED, SENTENCE, WAYS, released, trained
from docs.make.masks import GONE, HELD, SEEN, mask, masks_svg
from docs.make.router import Routing, router_cut_svg, routing
from minstep.attention import visible
from minstep.cache import new_caches
from minstep.config import FULL, SLIDING, LayerSpec
from minstep.draw.charts import LEFT, PLOT_HEIGHT, PLOT_WIDTH, TOP
from minstep.fast.fp8 import LARGEST, to_fp8
from minstep.generate import steps
from minstep.mlp import MLPWeights, swiglu
from minstep.parity.trace import record
from minstep.rope import inverse_frequencies
from minstep.sampling import Sampling, distribution
from minstep.tap import Array

DOCS = Path(__file__).parents[2] / "docs" / "figures"
SVG = "{http://www.w3.org/2000/svg}"
Box = tuple[float, float, float, float]


@cache
def drawn(name: str) -> str:
    return FIGURES[name]()


@cache
def model() -> gallery.Trained:
    return trained()


def figure(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg)


def texts(svg: str) -> list[str]:
    return ["".join(element.itertext()) for element in figure(svg).iter(f"{SVG}text")]


def marks(svg: str, kind: str) -> list[ElementTree.Element]:
    return [element for element in figure(svg).iter() if element.get("class") == kind]


def numbers(svg: str, kind: str, *keys: str) -> Array:
    """Those attributes of each rectangle of a kind: [N, keys]."""
    found = [[float(mark.get(key, "nan")) for key in keys] for mark in marks(svg, kind)]
    return np.array(found).reshape(-1, len(keys))


def curve(
    svg: str, n: int, log: tuple[bool, bool], ends: tuple[float, float, float, float]
) -> Array:
    """The points [N, 2] of series n read back from the canvas; `ends`: of the x and the y axis."""
    path = marks(svg, f"curve s{n}")[0].get("d", "")
    places = np.array([pair.split() for pair in path.removeprefix("M").split("L")], np.float64)
    shares = ((places[:, 0] - LEFT) / PLOT_WIDTH, (TOP + PLOT_HEIGHT - places[:, 1]) / PLOT_HEIGHT)
    columns = []
    for share, low, high, is_log in zip(shares, ends[::2], ends[1::2], log, strict=True):
        columns.append(low * (high / low) ** share if is_log else low + (high - low) * share)
    return np.stack(columns, axis=-1)


# All figures


@pytest.mark.parametrize("name", FIGURES)
def test_the_committed_file_is_what_the_code_draws_each_time(name: str) -> None:
    assert drawn(name) == FIGURES[name]()
    assert (DOCS / name).read_bytes() == drawn(name).encode()


def test_all_figures_are_written_into_a_folder(tmp_path: Path) -> None:
    paths = gallery.write_figures(tmp_path)
    assert paths == [tmp_path / name for name in FIGURES]
    assert [path.read_bytes() for path in paths] == [drawn(name).encode() for name in FIGURES]
    assert sorted(tmp_path.iterdir()) == sorted(paths)


def test_a_missing_folder_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(minstep.InputError, match="cannot be written"):
        gallery.write_figures(tmp_path / "missing")


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_says_what_it_is_and_stays_on_its_canvas(name: str) -> None:
    root = figure(drawn(name))
    assert root.findtext(f"{SVG}title") and root.findtext(f"{SVG}desc")
    width, height = float(root.get("width", 0)), float(root.get("height", 0))
    assert width <= 980  # else its letters shrink where it is shown
    for mark in root.iter(f"{SVG}rect"):
        x, y, w, h = (float(mark.get(key, -1)) for key in ("x", "y", "width", "height"))
        assert 0 <= x <= x + w <= width and 0 <= y <= y + h <= height, mark.attrib
    for left, top, right, bottom in boxes(drawn(name)).values():
        assert 0 <= left and right <= width and 0 <= top and bottom <= height
    assert not re.search(r"\b(nan|inf)\b", drawn(name))


@pytest.mark.parametrize("name", sorted(FIGURES.keys() - {"model.svg"}))
def test_no_text_lies_over_another(name: str) -> None:
    for (one, a), (other, b) in itertools.combinations(boxes(drawn(name)).items(), 2):
        assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1], (one, other)


def boxes(svg: str) -> dict[tuple[int, str], Box]:
    """Where each text lies: left, top, right, bottom, by its number and words."""
    found = {}
    for n, element in enumerate(figure(svg).iter(f"{SVG}text")):
        kind, words = element.get("class") or "", "".join(element.itertext())
        wide = len(words) * {"title": 10.5}.get(kind, 6.2)
        x, y = float(element.get("x", -1)), float(element.get("y", -1))
        left = x - wide * ("mid" in kind) / 2 - wide * ("end" in kind)
        found[n, words] = (left, y - 9, left + wide, y + 2)
    return found


@pytest.mark.parametrize("name", FIGURES)
def test_every_class_has_a_colour_for_light_and_for_dark_pages(name: str) -> None:
    style = html.unescape(figure(drawn(name)).findtext(f"{SVG}style") or "")
    light, dark = style.split("@media (prefers-color-scheme:dark)")
    for element in figure(drawn(name)).iter():
        for kind in set((element.get("class") or "").split()) - {"mid", "end", "title"}:
            for rules in (light, dark):
                assert re.search(rf"\.{kind}[.,{{]", rules), kind


# What follows from the configuration


@pytest.mark.parametrize("window", [None, 3, 5])
@pytest.mark.parametrize("slack", [0, 2])
def test_a_mask_shows_what_attention_sees_and_keeps_all_that_a_rollback_needs(
    window: int | None, slack: int
) -> None:
    spec = released().layers[0]._replace(window=window)
    states = mask(spec, 12, slack)
    assert np.array_equal(states == SEEN, visible(0, 12, 0, 12, window))
    position, query = np.arange(12), np.arange(12)[:, None]
    sees = query + 1 if window is None else window + slack
    held = (position <= query) & (position > query - sees)
    assert np.array_equal(states >= HELD, held)
    assert (states[~held] == GONE).all()


def test_the_masks_figure_has_a_cell_for_each_pair_and_for_each_layer() -> None:
    config, T, window = released(), 9, 4
    svg = masks_svg(config, T, window)
    layers = config.layers + config.mtp_layers
    full, sliding = ([spec.kind for spec in layers].count(kind) for kind in (FULL, SLIDING))
    key = 1
    assert len(marks(svg, "full")) == T * (T + 1) // 2 + full + key
    seen = int(visible(0, T, 0, T, window).sum())
    assert len(marks(svg, "sliding")) == seen + sliding + key
    states = mask(config.layers[1]._replace(window=window), T, len(config.mtp_layers))
    assert len(marks(svg, "held")) == (states == HELD).sum() + key
    assert len(marks(svg, "ahead")) == T * (T - 1) + key
    cells = [
        (x, kind)
        for kind in ("full", "sliding")
        for x, y, h in numbers(svg, kind, "x", "y", "height")
        if h == 20
    ]
    assert [kind for _, kind in sorted(cells)] == [spec.kind.split("_")[0] for spec in layers]


def test_wavelengths_are_those_of_the_layers() -> None:
    config = released()
    full, sliding = config.layers[0].rope, config.layers[1].rope
    ropes = (full, full._replace(scaling=None), sliding)
    pairs = max(rope.rotary_dim for rope in ropes) // 2
    for n, rope in enumerate(ropes):
        points = curve(drawn("rope.svg"), n, (False, True), (0, pairs - 1, 1, 1e8))
        waves = 2 * math.pi / inverse_frequencies(rope, np.float64)
        assert points[:, 0] == pytest.approx(np.arange(len(waves)), abs=0.01)
        assert points[:, 1] == pytest.approx(waves, rel=0.005)
    scaling = full.scaling
    assert scaling
    ends = [config.max_positions, scaling.original_max_position_embeddings]
    ends = [*(f"{end:,}:" for end in ends), f"{ends[1] / scaling.high_freq_factor:,.0f}:"]
    assert [word.split()[0] for word in texts(drawn("rope.svg")) if ": " in word][1:] == ends
    slowed = curve(drawn("rope-scaling.svg"), 0, (False, False), (0, 31, 1, scaling.factor))
    expected = inverse_frequencies(ropes[1], np.float64) / inverse_frequencies(full, np.float64)
    assert slowed[:, 1] == pytest.approx(expected, abs=0.001)


def test_a_model_without_what_a_figure_shows_is_refused() -> None:
    config = released()
    plain = [spec._replace(rope=spec.rope._replace(scaling=None)) for spec in config.layers]
    with pytest.raises(ValueError, match="not scaled"):
        rope_svg(config._replace(layers=tuple(plain)))
    for draw in (rope_svg, masks_svg):
        with pytest.raises(ValueError, match="no .*layer"):
            draw(config._replace(layers=config.layers[:1]))


def measured(specs: Iterable[LayerSpec], length: int, slack: int, dtype: DTypeLike) -> int:
    """Bytes of the caches of these layers after a text of `length`; a drafting window has slack."""
    total = 0
    for spec in specs:  # what a full layer reserves is freed again, and never written
        (cache,) = new_caches([spec], dtype, slack, slack + 1, length)
        if cache.most is not None:
            text = np.zeros((min(length, cache.most), spec.groups, spec.head_dim), dtype)
            cache.append(text, text)  # [S, G, K]
        total += cache.nbytes
    return total


def test_cache_memory_is_that_of_the_positions_held() -> None:
    config = released()
    M, width = len(config.mtp_layers), 2 * 8 * 128 * 2  # keys and values, groups, head, bytes
    full, sliding = config.layers[:1], config.layers[1:2]
    for length in (1, 300, config.max_positions):
        assert measured(full, length, M, np.uint16) == length * width
    assert measured(sliding, 300, M, np.uint16) == 300 * width
    room = 511 + M + M + 1
    assert measured(sliding, 100_000, M, np.uint16) == room * width
    assert measured(sliding, 100_000, M, np.float32) == 2 * room * width
    every = config.layers + config.mtp_layers
    assert measured(every, 4096, M, np.uint16) == (12 * 4096 + 36 * room) * width


def test_the_cache_figure_shows_those_bytes() -> None:
    config = released()
    M, every = len(config.mtp_layers), config.layers + config.mtp_layers
    full = tuple(spec._replace(window=None) for spec in every)
    ends = (64.0, float(config.max_positions), 0.1, 1e5)
    for n, specs in enumerate((full, every)):
        for length, size in curve(drawn("cache.svg"), n, (True, True), ends)[::6]:
            expected = measured(specs, round(length), M, np.uint16) / 1e6
            assert size == pytest.approx(expected, rel=0.02)


def test_precision_is_that_of_the_stored_formats() -> None:
    values = fp8_values(np.ones((1, 1), np.float32))
    assert values[0] == 2.0**-9 and values[-1] == LARGEST and (np.diff(values) > 0).all()
    block = np.full((3, 5), -0.7, np.float32)
    block[0, 0] = 0.01
    svg = precision_svg(block)
    ends = (2.0**-20, 2.0**9, 0.1, 100.0)
    log = (True, True)
    bf16, fp8 = (curve(svg, n, log, ends) for n in (0, 1))
    assert bf16[:, 1].min() == pytest.approx(100 / 256, rel=0.03)
    assert bf16[:, 1].max() == pytest.approx(100 / 128, rel=0.03)
    normal = fp8[fp8[:, 0] > 2.0**-6]
    assert 6 < normal[:, 1].min() < 7 and 12 < normal[:, 1].max() < 13
    scale = to_fp8(block, block.shape)[1]
    assert fp8_values(scale)[-1] == pytest.approx(0.7)
    scaled = curve(svg, 2, log, ends)
    assert scaled[0, 0] == pytest.approx(fp8_values(scale)[0], rel=0.05)
    assert scaled[0, 1] == pytest.approx(100, rel=0.02)


def test_swiglu_is_capped_above_and_clipped_on_both_sides() -> None:
    one = np.ones((1, 1))
    for n, limit in enumerate((None, 7, 16)):
        over_gate = curve(drawn("swiglu-gate.svg"), n, (False, False), (-20, 20, -5, 20))
        assert over_gate[-1] == pytest.approx([20, limit or 20], abs=0.05)
        assert -0.35 < over_gate[:, 1].min() < -0.2
        over_up = curve(drawn("swiglu-up.svg"), n, (False, False), (-20, 20, -400, 400))
        most = (limit or 20) ** 2
        assert [over_up[0, 1], over_up[-1, 1]] == pytest.approx([-most, most], abs=1)
        square = curve(swiglu_svg(released()), n, (False, False), (-20, 20, 0, 400))
        for x, y in square[::10]:
            (expected,) = swiglu(np.array([[x]]), MLPWeights(one, one, one), limit)
            assert y == pytest.approx(float(expected[0]), abs=2)
    assert [word for word in texts(drawn("swiglu-up.svg")) if "limit " in word] == [
        "limit 16: shared of 44",
        "limit 7: experts of 43-44",
    ]


# What the trained model does


@cache
def routed() -> Routing:
    tokens = model().encode(SENTENCE)
    return routing(tokens, model().weights, model().config, ROUTED)


def test_scores_bias_and_cut_are_those_that_the_router_chooses_by() -> None:
    seen = routed()
    A = seen.ids.shape[1]
    order = np.argsort(-seen.biased, axis=-1, kind="stable")
    assert np.array_equal(np.sort(order[:, :A], axis=-1), seen.ids)
    ranked = -np.sort(-seen.biased, axis=-1)
    assert seen.margin == pytest.approx(ranked[:, A - 1] - ranked[:, A])
    raw = np.take_along_axis(seen.scores, seen.ids, axis=-1)
    assert seen.weights / seen.weights[:, :1] == pytest.approx(raw / raw[:, :1])
    by_score = np.argsort(-seen.scores, axis=-1, kind="stable")[:, :A]
    assert np.array_equal(np.sort(by_score, axis=-1), seen.unbiased)


def test_a_layer_that_chooses_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="layer 0 chooses no experts"):
        routing([0, 5], model().weights, model().config, 0)


def test_the_router_map_marks_each_choice_with_its_weight() -> None:
    svg, seen = drawn("router-map.svg"), routed()
    T, A = seen.ids.shape
    E = seen.scores.shape[1]
    assert len(marks(svg, "idle")) == T * E and len(marks(svg, "chosen")) == T * A
    columns = np.unique(numbers(svg, "idle", "x")[:, 0])
    chosen = numbers(svg, "chosen", "x", "y", "fill-opacity")
    assert np.array_equal(np.searchsorted(columns, chosen[:, 0]).reshape(T, A), seen.ids)
    shades = chosen[:, 2].reshape(T, A)
    assert shades == pytest.approx(0.1 + 0.5 * seen.weights / seen.weights[0].sum(), abs=0.006)
    words = texts(svg)
    assert all(f"{weight:.2f}" in words for weight in seen.weights.ravel().tolist())
    loads = np.bincount(seen.ids.ravel(), minlength=E)
    assert [str(load) for load in loads.tolist()] == [
        "".join(e.itertext())
        for e in marks(svg, "mid")
        if float(e.get("y", 0)) > max(chosen[:, 1]) + 20
    ]


def test_the_cut_lies_between_the_chosen_and_the_others() -> None:
    scores = np.array([[0.1, 0.6, 0.3, 0.5]])
    biased = scores + [0.5, 0.2, 0.5, 0.2]
    seen = Routing(
        scores,
        biased,
        np.array([[1, 2]]),
        np.array([[2.0, 1.0]]),
        np.array([0.1]),
        np.array([[1, 3]]),
    )
    svg = router_cut_svg("word", seen, 0, 7)
    assert "Layer 7, token word: experts 1 and 2; by score alone 1 and 3" in texts(svg)
    bars = [
        numbers(svg, kind, "x", "height")[:-1] for kind in ("score", "best", "biased", "chosen")
    ]
    assert [len(kind) for kind in bars] == [2, 2, 2, 2]
    every = np.concatenate(bars)
    heights = every[np.argsort(every[:, 0]), 1]
    expected = np.stack((scores, biased - 0.2), axis=-1).ravel()
    assert heights / heights.max() == pytest.approx(expected / expected.max(), abs=1e-3)
    (cut,) = (mark.get("d", "") for mark in marks(svg, "mark")[:1])
    lowest, highest = (
        pick(numbers(svg, k, "y")[:-1]) for k, pick in (("chosen", np.max), ("biased", np.min))
    )
    at = float(cut.split()[1].split("H")[0])
    assert at == pytest.approx((lowest + highest) / 2, abs=0.06)


def test_states_are_as_large_as_those_of_a_trace() -> None:
    trace = record(model().encode(SENTENCE), model().weights, model().config, np.float64)
    low, top = (float(y_labels(drawn("norm.svg"))[n]) for n in (0, -1))
    ends = (0, len(model().config.layers) - 1, low, top)
    stream, normed = (curve(drawn("norm.svg"), n, (False, False), ends) for n in (0, 1))
    names = ["model.embed_tokens", *(spec.name for spec in model().config.layers)]
    for n, name in enumerate(names[:-1]):
        for points, its in ((stream, name), (normed, f"{names[n + 1]}.input_layernorm")):
            size = float(np.sqrt((trace[its] ** 2).mean()))
            assert points[n] == pytest.approx([n, size], abs=top / 500), its


def test_a_bug_departs_where_it_is_and_rounding_stays_small() -> None:
    svg = drawn("departure.svg")
    labels = [float(label) for label in y_labels(svg)]
    count = curve(svg, 0, (False, True), (0, 1, labels[0], labels[-1])).shape[0]
    ends = (0, count - 1, labels[0], labels[-1])
    float32, bf16, bug = (curve(svg, n, (False, True), ends) for n in range(3))
    trace = record(model().encode(SENTENCE), model().weights, model().config, np.float64)
    main = [name for name in trace if not name.endswith((".ids", ".margin", ".probs"))]
    where = main.index("model.layers.0.self_attn.o_proj")  # BUG forgets the gate before it
    assert "model.layers.0.self_attn.o_proj" in texts(svg)
    assert float32[:where] == pytest.approx(bug[:where])
    assert bug[where, 1] > 1000 * float32[where, 1]
    assert (float32[1:, 1] < bf16[1:, 1]).all()
    assert float32[:, 1].max() < 1e-4 < bf16[1, 1] < 0.01


def y_labels(svg: str) -> list[str]:
    """The numbers on the y axis, from the lowest."""
    return ["".join(mark.itertext()) for mark in marks(svg, "muted end")]


def test_the_timeline_shows_every_draft_and_every_token_of_the_decoding() -> None:
    prompt, config = model().encode(PROMPT), model().config
    rng = np.random.default_rng(5)
    passes = list(steps(prompt, model().weights, config, rng, 36, dtype=np.float64))
    svg = drawn("timeline.svg")
    kept = sum(min(step.accepted, len(step.tokens)) for step in passes)
    tokens, drafts = (
        sum(len(x) for x in all)
        for all in zip(*((s.tokens, s.drafts) for s in passes), strict=True)
    )
    key = 1
    rects = {
        k: sum(m.tag == f"{SVG}rect" for m in marks(svg, k)) - key for k in ("kept", "lost", "own")
    }
    assert rects == {"kept": kept, "lost": drafts - kept, "own": tokens - kept}
    spans = [m for m in figure(svg).iter(f"{SVG}tspan") if m.get("class") != "lost"]
    said = [model().word(token) for step in passes for token in step.tokens]
    assert [span.text for span in spans] == said
    places = [
        float(m.get("x", 0))
        for kind in ("kept", "own")
        for m in marks(svg, kind)[key:]
        if m.tag == f"{SVG}rect"
    ]
    assert np.diff(sorted(places)) == pytest.approx(13)  # each place has one token
    facts = f"{tokens} tokens after "
    assert any(w.startswith(facts) and f"{kept} of {drafts} drafts kept" in w for w in texts(svg))


def test_tokens_are_words_on_one_line() -> None:
    ids = model().encode("a  \n" + "-" * 40)
    words = [model().word(token) for token in ids]
    assert words[0] == "(begin)" and all(word.isprintable() and " " not in word for word in words)
    every = [model().word(token) for token in range(model().config.vocab_size)]
    assert max(map(len, every)) <= len("(token 1023)")
    assert "\\n" in every and "·the" in every


def test_bars_are_the_probabilities_that_are_sampled_from() -> None:
    logits = np.log([0.05, 0.5, 0.3, 0.15])
    ways = [Sampling(1.0), Sampling(1.0, top_k=2), Sampling(0.5), Sampling(1.0, min_p=0.4)]
    svg = sampling_svg(logits, [], ways, lambda token: f"t{token}", most=3)
    bars = numbers(svg, "kept", "width").reshape(4, 4) / 64
    for shares, how in zip(bars, ways, strict=True):
        probs = distribution(logits, [], how)
        assert shares == pytest.approx([*probs[[1, 2, 3]], probs[0]], abs=1e-3)
    words = texts(svg)
    assert [word for word in words if re.fullmatch(r"t\d", word)] == ["t1", "t2", "t3"]
    assert {"top k 2", "temperature 0.5", "min p 0.4", "as it is", "2 tokens left"} <= set(words)
    assert len(WAYS) == sum("left" in word for word in texts(drawn("sampling.svg")))
