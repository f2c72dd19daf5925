"""The page of a trace, what `trace` keeps for it, and what the logit lens says."""

import base64
import json
import re
import tomllib
from fnmatch import fnmatch
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import minstep.parity.trace
from minstep import find_config, load_config
from minstep.activations import sigmoid, softmax
from minstep.attention import visible
from minstep.errors import InputError
from minstep.explore.logit_lens import guesses, lens, open_lens
from minstep.explore.view import page, page_data
from minstep.parity.engine_tensors import Recording, open_recording
from minstep.parity.facts import Facts, LayerFacts, layer_facts, read_facts
from minstep.parity.trace import record
from minstep.store.checkpoint import open_checkpoint
from minstep.text.tokenizer import FRONT, byte_level_tokenizer, encode, piece
from tests.conftest import GOLDEN, Refused, Run
from tests.support.recordings import as_transformers

TINY, TRAINED = GOLDEN / "tiny" / "bf16", find_config("trained")
PROMPT = "The with statement"


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trace of the shipped model that continues PROMPT with drafts."""
    out = tmp_path_factory.mktemp("trace") / "trace.safetensors"
    arguments = ("trace", "--prompt", PROMPT, "--max-tokens", "20", "--out", str(out))
    assert minstep.cli.main.main([*arguments]) == 0
    return out


def data_of(file: Path, model: Path | None = None) -> dict[str, Any]:
    recording = open_recording(file)
    facts = read_facts(recording)
    lens = open_lens(open_checkpoint(model), recording, facts) if model else None
    return page_data(recording, facts, lens)


def unpacked(text: str, dtype: str, most: int) -> NDArray[np.float64]:
    return np.frombuffer(base64.b64decode(text), dtype) / most


def metadata_of(file: Path) -> dict[str, str]:
    with safe_open(file, "numpy") as opened:
        return dict(opened.metadata())


def data_in(text: str) -> Any:
    found = re.search(r'<script type="application/json" id="trace">(.*?)</script>', text, re.S)
    assert found
    return json.loads(found[1])


# What trace keeps


def test_a_continued_trace_is_of_the_greedy_text_and_keeps_its_drafts(
    trace: Path, run: Run
) -> None:
    arguments = ("--prompt", PROMPT, "--max-tokens", 20, "--json")
    said = json.loads(run("generate", *arguments).out)
    recording = open_recording(trace)
    assert recording.tokens == said["prompt_tokens"] + said["tokens"]
    facts = read_facts(recording)
    assert facts.passes and facts.pieces
    drafted = [
        [each["before"], each["drafts"], each["accepted"]]
        for each in facts.passes
        if each["drafts"]
    ]
    assert drafted == said["mtp_trace"]
    new = recording.tokens[len(said["prompt_tokens"]) :]
    assert "".join(facts.pieces[token] for token in new).startswith(said["text"][:40])
    assert facts.layers == layer_facts(load_config(TRAINED))


def test_it_holds_what_a_forward_pass_over_the_whole_text_computes(trace: Path) -> None:
    tokens = json.loads(metadata_of(trace)["tokens"])
    checkpoint = open_checkpoint(TRAINED)
    expected = record(tokens, checkpoint.weights(), checkpoint.config)
    found = load_file(trace)
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        np.testing.assert_array_equal(found[name], x, err_msg=name)


def test_a_trace_of_token_ids_says_nothing_of_passes_and_still_gives_a_page(
    run: Run, tmp_path: Path
) -> None:
    file, out = tmp_path / "trace", tmp_path / "page.html"
    ran = run("trace", "--model", TINY, "--tokens", "5,17,9,4,11", "--out", file)
    assert (ran.code, ran.out) == (0, "")
    assert ran.err == f"wrote {file} ({file.stat().st_size / 1000:,.0f} KB)\n"
    assert "passes" not in metadata_of(file)
    ran = run("view", file, "--out", out)
    assert (ran.code, ran.out) == (0, "")
    size = f"{out.stat().st_size / 1000:,.0f} KB"
    assert ran.err == f"wrote {out} ({size}): open it in a browser\n"
    data = data_in(out.read_text())
    assert data["passes"] is None and data["no_lens"]
    assert list(data["lens"])[0] == "lm_head" and len(data["lens"]) == 4
    with_model = data_of(file, TINY)
    assert with_model["no_lens"] is None and "model.layers.0" in with_model["lens"]


def test_a_continuation_that_ends_early_is_traced_as_far_as_it_goes(
    run: Run, tmp_path: Path
) -> None:
    file = tmp_path / "trace"
    arguments = ("--model", TINY, "--tokens", "5", "--out", file)
    assert run("trace", *arguments, "--max-tokens", 1).code == 0
    tokens = json.loads(metadata_of(file)["tokens"])
    facts = read_facts(open_recording(file))
    assert len(tokens) == 2 and facts.passes and [each["new"] for each in facts.passes] == [1]


def test_probabilities_of_every_layer_are_kept_until_they_would_be_too_many(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    checkpoint = open_checkpoint(TINY)
    config, weights = checkpoint.config, checkpoint.weights()
    heads = sum(spec.heads for spec in config.layers + config.mtp_layers)

    def kept() -> list[str]:
        return [n.split(".")[2] for n in record([5, 17, 9, 4], weights, config) if "probs" in n]

    monkeypatch.setattr(minstep.parity.trace, "MOST_PROBS", heads * 4 * 4)
    assert len(kept()) == len(config.layers + config.mtp_layers)
    monkeypatch.setattr(minstep.parity.trace, "MOST_PROBS", heads * 4 * 4 - 1)
    kinds = [spec.kind for spec in config.layers]
    assert kept() == [str(n) for n in sorted({*map(kinds.index, kinds), len(kinds) - 1})]


# What the page holds


def test_the_page_holds_the_numbers_of_the_trace(trace: Path) -> None:
    tensors, data = load_file(trace), data_of(trace, TRAINED)
    assert data["tokens"] == json.loads(metadata_of(trace)["tokens"])
    assert data["count"] == len(data["tokens"]) and data["dtype"] == "float32"
    norm = np.linalg.norm(tensors["model.embed_tokens"], axis=-1)
    np.testing.assert_allclose(data["embedding"], norm, rtol=1e-3)
    specs = load_config(TRAINED).layers + load_config(TRAINED).mtp_layers
    assert [layer["name"] for layer in data["layers"]] == [spec.name for spec in specs]
    for layer, spec in zip(data["layers"], specs, strict=True):
        at = spec.name
        np.testing.assert_allclose(layer["state"], np.linalg.norm(tensors[at], axis=-1), rtol=1e-3)
        attention = np.linalg.norm(tensors[f"{at}.self_attn.o_proj"], axis=-1)
        np.testing.assert_allclose(layer["attention"], attention, rtol=1e-3)
        probs = tensors[f"{at}.self_attn.probs"]
        T = layer["queries"]
        seen = visible(0, T, 0, T, spec.window)
        shown = unpacked(layer["probs"], "<u2", 65535).reshape(spec.heads, -1)
        np.testing.assert_allclose(shown, probs[:, seen], atol=1e-5)
        assert layer["unseen"] == 0 and (layer["heads"], layer["window"]) == (
            spec.heads,
            spec.window,
        )
        gate = sigmoid(tensors[f"{at}.self_attn.g_proj"])
        np.testing.assert_allclose(unpacked(layer["gate"], "u1", 255), gate.ravel(), atol=2e-3)
        if spec.moe is None:
            assert (layer["ids"], layer["scores"], layer["experts"]) == (None, None, 0)
            added = tensors[f"{at}.mlp"]
        else:
            assert layer["ids"] == tensors[f"{at}.moe.ids"].tolist()
            np.testing.assert_allclose(layer["weights"], tensors[f"{at}.moe.weights"], rtol=1e-3)
            np.testing.assert_allclose(layer["margin"], tensors[f"{at}.moe.margin"], rtol=1e-3)
            scores = sigmoid(tensors[f"{at}.moe.gate"])
            np.testing.assert_allclose(
                unpacked(layer["scores"], "u1", 255), scores.ravel(), atol=2e-3
            )
            added = tensors[f"{at}.moe"] + tensors[f"{at}.share_expert"]
        np.testing.assert_allclose(layer["mlp"], np.linalg.norm(added, axis=-1), rtol=1e-3)


def test_the_lens_ends_in_the_logits_of_the_model_and_of_its_depths(trace: Path) -> None:
    tensors, data = load_file(trace), data_of(trace, TRAINED)
    names = ["model.embed_tokens", *(f"model.layers.{n}" for n in range(6))]
    outputs = [f"model.layers.{n}.transformer.shared_head.output" for n in (6, 7, 8)]
    assert list(data["lens"]) == names + outputs
    said = {"model.layers.5": ("lm_head", 1), **{n: (n, 2 + k) for k, n in enumerate(outputs)}}
    for name, (logits, ahead) in said.items():
        probs = softmax(tensors[logits])
        row = data["lens"][name]
        assert [ids[0] for ids in row["ids"]] == probs.argmax(axis=-1).tolist()
        np.testing.assert_allclose([p[0] for p in row["probs"]], probs.max(axis=-1), rtol=1e-3)
        following = data["tokens"][ahead:]
        own = probs[np.arange(len(following)), following]
        np.testing.assert_allclose(row["true"][: len(own)], own, rtol=1e-3)
        assert row["true"][len(own) :] == [None] * (len(probs) - len(own))
    every = {str(n) for row in data["lens"].values() for ids in row["ids"] for n in ids}
    assert every <= {str(n) for n in data["words"]}


def test_guesses_are_ordered_and_end_where_the_text_does() -> None:
    logits = np.log(np.array([[1, 5, 2, 4], [1, 1, 1, 1.0]]))
    ids, probs, true = guesses(logits, [3])
    assert ids.tolist() == [[1, 3, 2], [0, 1, 2]]
    np.testing.assert_allclose(probs[0], [5 / 12, 4 / 12, 2 / 12])
    assert true[0] == pytest.approx(4 / 12) and np.isnan(true[1])


def test_a_probability_where_a_layer_must_not_look_is_told(single: Path) -> None:
    T = 4
    probs = np.tile(np.tril(np.ones((T, T))), (2, 1, 1)).astype(np.float32)
    layer = LayerFacts("model.layers.0", 0, "sliding_attention", 2, 1, 2, 0)
    stored = {"model.layers.0": np.ones((T, 8)), "model.layers.0.self_attn.probs": probs}
    recording = Recording("theirs", stored, [1, 2, 3, 4])
    assert page_data(recording, Facts())["layers"][0]["unseen"] == 0
    data = page_data(recording, Facts(layers=[layer]))
    assert data["layers"][0]["unseen"] == 1
    assert len(unpacked(data["layers"][0]["probs"], "<u2", 65535)) == 2 * (1 + 2 + 2 + 2)
    probs[1, 0, 3] = 0.25
    assert page_data(recording, Facts())["layers"][0]["unseen"] == 0.25


def test_a_recording_of_some_layers_gives_a_page_that_says_what_is_missing(
    run: Run, tmp_path: Path
) -> None:
    file, out = tmp_path / "recording", tmp_path / "page.html"
    arguments = ("--model", TINY, "--tokens", "5,17,9,4", "--layers", "3", "--out", file)
    assert run("record", *arguments).code == 0
    assert run("view", file, "--model", TINY, "--out", out).only_wrote
    layers = data_in(out.read_text())["layers"]
    recorded = [layer["n"] for layer in layers if layer["state"]]
    assert recorded == [3] and len(layers) == 11
    assert "probs" not in layers[3] and layers[3]["ids"] and layers[3]["window"] == 8
    alone = data_of(file)["layers"]
    assert len(alone) == 11 and alone[3] == layers[3]


def test_a_recording_of_mtp_layers_needs_no_model_to_be_known_as_such(
    run: Run, tmp_path: Path
) -> None:
    file, out = tmp_path / "recording", tmp_path / "page.html"
    arguments = ("--model", TINY, "--tokens", "5,17,9,4", "--names", "*q_proj", "--out", file)
    assert run("record", *arguments).code == 0
    assert run("view", file, "--out", out).only_wrote
    assert [layer["depth"] for layer in data_in(out.read_text())["layers"]][-3:] == [1, 2, 3]


def test_what_transformers_recorded_gives_the_same_page_but_for_what_it_lacks() -> None:
    checkpoint = open_checkpoint(TINY)
    tokens = [5, 17, 9, 4]
    ours = record(tokens, checkpoint.weights(0), checkpoint.config._replace(mtp_layers=()))
    factor = next(spec.moe.scaling_factor for spec in checkpoint.config.layers if spec.moe)
    theirs = as_transformers(ours, factor, np.random.default_rng(0))
    datas = [page_data(Recording("x", each, tokens), Facts()) for each in (ours, theirs)]
    for one, other in zip(*(data["layers"] for data in datas), strict=True):
        for key in ("state", "attention", "ids"):
            assert one[key] == other[key], (one["name"], key)
    assert datas[0]["lens"] == datas[1]["lens"] and list(datas[0]["lens"]) == ["lm_head"]


def test_a_token_that_is_no_whole_character_is_shown_by_its_number() -> None:
    tokenizer = byte_level_tokenizer()
    whole, first, second = encode(tokenizer, "aé")
    assert [piece(tokenizer, token) for token in (whole, first, second)] == [
        "a",
        f"⟨{first}⟩",
        f"⟨{second}⟩",
    ]
    assert piece(None, 7) == "⟨7⟩" and piece(tokenizer, 0) == FRONT[0]


# The page as a file


class Parsed(HTMLParser):
    """Every tag, checked to be closed in order."""

    VOID = ("meta", "input", "br", "link", "img", "hr")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += attrs
        self.open += [] if tag in self.VOID else [tag]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_is_well_formed_and_loads_nothing(trace: Path, run: Run, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    assert run("view", trace, "--out", out).only_wrote
    text = out.read_text(encoding="utf-8")
    parsed = Parsed(text)
    assert parsed.open == []
    assert not {"src", "href", "data", "srcset", "action"} & {name for name, _ in parsed.attributes}
    assert "://" not in text and "@import" not in text and "url(" not in text
    ids = {value for name, value in parsed.attributes if name == "id"}
    assert set(re.findall(r'byId\("([\w-]+)"\)', text)) <= ids
    assert data_in(text)["title"].startswith("Trace of “The with statement")


def test_64_tokens_of_the_shipped_model_take_less_than_a_megabyte_and_a_half(
    run: Run, tmp_path: Path
) -> None:
    file, out = tmp_path / "trace", tmp_path / "page.html"
    tokens = ",".join(str(3 + n % 1000) for n in range(0, 64 * 37, 37))
    assert run("trace", "--model", TRAINED, "--tokens", tokens, "--out", file).code == 0
    assert run("view", file, "--out", out).code == 0
    assert data_in(out.read_text())["count"] == 64 and out.stat().st_size < 1_500_000


def test_the_same_trace_gives_the_same_bytes_whatever_it_is_called(
    trace: Path, run: Run, tmp_path: Path
) -> None:
    pages = []
    for name in ("one", "other"):
        file, out = tmp_path / f"{name}.safetensors", tmp_path / f"{name}.html"
        file.write_bytes(trace.read_bytes())
        assert run("view", file, "--out", out).code == 0
        pages.append(out.read_bytes())
    assert pages[0] == pages[1]


def test_no_text_of_a_token_can_be_markup_or_a_blank_of_the_page() -> None:
    said = ["</script><b>", "<!--", "{{data}}{{title}}", "\u2028\x00&\"'", "é"]
    recording = Recording("theirs", {"model.layers.0": np.ones((5, 8))}, [0, 1, 2, 3, 4])
    data = page_data(recording, Facts(pieces=dict(enumerate(said))))
    text = page(data)
    assert text.count("</script>") == 2 and "<b>" not in text and text.count("<!--") == 0
    assert list(data_in(text)["words"].values()) == said
    assert Parsed(text).open == []
    assert "<title>Trace of “&lt;/script&gt;&lt;b&gt;&lt;!--{{data}}{{title}}" in text


def test_half_a_surrogate_pair_in_the_metadata_does_not_end_the_page(
    trace: Path, run: Run, tmp_path: Path
) -> None:
    file, out = tmp_path / "changed", tmp_path / "page.html"
    metadata = metadata_of(trace)
    pieces = dict.fromkeys(json.loads(metadata["pieces"]), "\ud800")
    save_file(load_file(trace), file, metadata | {"pieces": json.dumps(pieces)})
    assert run("view", file, "--out", out).only_wrote
    assert data_in(out.read_text())["title"].startswith("Trace of “\ud800")


def test_an_installed_package_has_the_page_and_every_other_file_that_is_no_module() -> None:
    top = Path(__file__).parents[2]
    settings = tomllib.loads((top / "pyproject.toml").read_text())["tool"]["setuptools"]
    for file in (top / "minstep").rglob("*"):
        if file.is_file() and file.suffix not in (".py", ".pyc"):
            folder = next(up for up in file.parents if (up / "__init__.py").exists())
            globs = settings["package-data"].get(".".join(folder.relative_to(top).parts), ())
            assert any(fnmatch(str(file.relative_to(folder)), glob) for glob in globs), file


@pytest.mark.parametrize("is_tied", [False, True])
def test_the_lens_of_a_model_takes_logits_that_rounding_parts_from_its_own(
    is_tied: bool, single: Path
) -> None:
    """Off by up to 5 % of the largest; the head may be the embedding."""
    if is_tied:
        raw = json.loads((single / "config.json").read_text())
        (single / "config.json").write_text(json.dumps(raw | {"tie_word_embeddings": True}))
        held = load_file(single / "model.safetensors")
        del held["lm_head.weight"]
        save_file(held, single / "model.safetensors")
    checkpoint, tokens = open_checkpoint(single), [5, 17, 9, 4]
    trace = record(tokens, checkpoint.weights(), checkpoint.config)
    logits = trace["lm_head"]
    for share, is_own in ((0.0, True), (0.049, True), (0.051, False), (0.5, False)):
        moved = logits.copy()
        moved[2, 3] -= share * np.abs(logits).max() * np.sign(moved[2, 3])
        theirs = Recording("theirs", trace | {"lm_head": moved}, tokens)
        if is_own:
            model = open_lens(checkpoint, theirs, Facts())
            found = lens(theirs, {}, model)[checkpoint.config.layers[-1].name]
            np.testing.assert_allclose(found.true, guesses(logits, tokens[1:]).true, rtol=1e-3)
            continue
        with pytest.raises(InputError, match="lm_head is not what .* its own model"):
            open_lens(checkpoint, theirs, Facts())


# What is refused


def test_tokens_that_the_logits_have_no_column_for_are_refused() -> None:
    stored = {"model.layers.0": np.ones((2, 8)), "lm_head": np.ones((2, 6))}
    assert page_data(Recording("theirs", stored, [3, 5]), Facts())
    with pytest.raises(InputError, match="theirs: token id 6 is out of range, expected 0 to 5"):
        page_data(Recording("theirs", stored, [3, 6]), Facts())


def test_what_is_no_trace_is_refused(refused: Refused, tmp_path: Path, trace: Path) -> None:
    out = tmp_path / "page.html"
    cut, text = tmp_path / "cut", tmp_path / "text"
    cut.write_bytes(trace.read_bytes()[:-1])
    text.write_text("no safetensors file at all")
    for file, naming in (
        (tmp_path / "missing", "No such file"),
        (text, "is not a safetensors file, or not a whole one: its header length"),
        (cut, "truncated"),
        (TRAINED / "model.safetensors", "holds nothing that a layer computed"),
    ):
        refused("view", file, "--out", out, naming=(str(file), naming))
    refused("view", trace, "--out", trace, naming=("--out", "is an input"))
    refused("view", trace, naming=("--out",))
    theirs = (
        "--model",
        GOLDEN / "tiny" / "bf16",
        "--out",
        GOLDEN / "tiny" / "bf16" / "config.json",
    )
    refused("view", trace, *theirs, naming=("config.json", "belongs to the checkpoint"))
    refused("view", trace, "--out", tmp_path / "no" / "page.html", naming=("cannot be written",))
    assert not out.exists()


@pytest.mark.parametrize(
    ("name", "shape", "value", "naming"),
    [
        ("model.embed_tokens", (3, 128), 1.0, "expected 2 axes and T positions"),
        ("model.layers.1", (3, 128), 1.0, "expected 2 axes and T positions"),
        ("model.layers.6", ("T+1", 128), 1.0, "at most T positions"),
        ("model.layers.1.self_attn.probs", (6, "T", 2), 0.5, "expected 3 axes and T positions"),
        ("model.layers.6.self_attn.probs", (6, "T", 2), 0.5, "3 axes and at most T positions"),
        ("model.layers.1", ("T", 128), np.nan, "expected finite numbers"),
        ("model.layers.1.moe.ids", ("T", 2), 99, "holds 99 to 99, expected 0 to 15"),
        ("model.layers.1.moe.ids", ("T", 2), 3, "an expert twice in a row"),
        ("model.layers.1.moe.gate", ("T", 2, 8), 0.5, "expected 2 axes"),
        ("model.layers.1.share_expert", ("T", 64), 1.0, "expected one, since they are added up"),
    ],
)
def test_a_tensor_that_does_not_fit_the_text_is_refused_by_name(
    name: str,
    shape: tuple[Any, ...],
    value: float,
    naming: str,
    trace: Path,
    tmp_path: Path,
    refused: Refused,
) -> None:
    T, file = len(json.loads(metadata_of(trace)["tokens"])), tmp_path / "changed"
    sizes = {"T": T, "T+1": T + 1}
    x = np.full([sizes.get(n, n) for n in shape], value)
    save_file(load_file(trace) | {name: x}, file, metadata_of(trace))
    naming = naming.replace(" T ", f" {T} ")
    refused("view", file, "--out", tmp_path / "page.html", naming=(str(file), name, naming))


NO_WINDOW = json.dumps([LayerFacts("model.layers.0", 0, "sliding_attention", 2, 1, 0, 0)._asdict()])


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("passes", "[]x"),
        ("passes", "[1]"),
        ("passes", '[{"before": 0, "drafts": [3], "accepted": 2, "new": 1}]'),
        ("passes", '[{"before": 0, "drafts": [3], "accepted": 1, "new": 3}]'),
        ("passes", '[{"before": 0, "drafts": [], "accepted": 0, "new": 2}]'),
        ("passes", '[{"before": 1, "drafts": [], "accepted": 0, "new": 1}]'),
        ("passes", '[{"before": 0, "drafts": ["x"], "accepted": 0, "new": 1}]'),
        ("pieces", "[1]"),
        ("pieces", '{"1": 2}'),
        ("pieces", '{"x": "y"}'),
        ("layers", '[{"name": 1}]'),
        ("layers", "{}x"),
        ("layers", NO_WINDOW),
    ],
)
def test_malformed_metadata_is_refused_by_key(
    key: str, text: str, trace: Path, tmp_path: Path, refused: Refused
) -> None:
    file = tmp_path / "changed"
    save_file(load_file(trace), file, metadata_of(trace) | {key: text})
    naming = (str(file), f"metadata {key} is")
    refused("view", file, "--out", tmp_path / "page.html", naming=naming)


def test_a_model_that_did_not_make_the_trace_is_refused_and_no_default_stands_in(
    trace: Path, tmp_path: Path, run: Run, refused: Refused
) -> None:
    out = tmp_path / "page.html"
    naming = (str(trace), "expected its own model")
    refused("view", trace, "--model", TINY, "--out", out, naming=naming)
    other = tmp_path / "other"
    assert run("make-tiny", "trained", "--out", other).code == 0
    refused("view", trace, "--model", other, "--out", out, naming=("lm_head", "its own model"))
    theirs = tmp_path / "theirs"
    assert run("trace", "--model", other, "--tokens", "5,6,7", "--out", theirs).code == 0
    assert run("view", theirs, "--out", out).code == 0
    data = data_in(out.read_text())
    assert data["no_lens"] and not any(name == "model.layers.0" for name in data["lens"])


def test_trace_refuses_a_prompt_that_it_cannot_read(
    single: Path, tmp_path: Path, refused: Refused
) -> None:
    out = ("--out", tmp_path / "trace")
    refused("trace", "--prompt", "", *out, naming=("the prompt is empty",))
    refused("trace", *out, naming=("--tokens", "--prompt"))
    refused("trace", "--tokens", "4", "--prompt", "x", *out, naming=("not allowed with",))
    refused("trace", "--tokens", "4", "--max-tokens", "-1", *out, naming=("--max-tokens",))
    (single / "tokenizer.json").unlink(missing_ok=True)
    naming = ("tokenizer.json", "trace --tokens does without")
    refused("trace", "--model", single, "--prompt", "x", *out, naming=naming)
