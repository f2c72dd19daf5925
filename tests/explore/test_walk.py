"""`minstep walk`: its steps are those of the real run, and its table names what decides them."""

import copy
import json
import math
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import minstep
from minstep import attention
from minstep.config import parse_config
from minstep.errors import InputError
from minstep.explore import walk as walk_file
from minstep.explore.walk import Walk, deciding, point_of, sizes, take_walk
from minstep.generate import steps
from minstep.parity.record import names_of
from minstep.parity.trace import record
from minstep.store import layouts as native
from minstep.store.checkpoint import open_checkpoint
from minstep.store.stages import split
from tests.conftest import GOLDEN, Refused, Run
from tests.store.test_layouts import TEXT

TOP = Path(minstep.__file__).parent.parent
CHECKPOINTS = ["tiny/fp32", "odd/fp32", "drafts/bf16", "no_extras/bf16"]
CONFIGS = sorted(folder.parent.name for folder in (TOP / "tiny_configs").glob("*/config.json"))
TOKENS = [5, 1, 6, 3, 2, 0, 4, 4, 1]  # the smallest vocabulary has 7, the smallest windows 6


def raw_config(name: str) -> dict[str, Any]:
    return json.loads((minstep.find_config(name) / "config.json").read_text())


@cache
def walk_of(name: str, position: int) -> Walk:
    checkpoint = open_checkpoint(GOLDEN / name)
    return take_walk(TOKENS, checkpoint.weights(), checkpoint.config, position, None, np.float64)


def parsed(run: Run, *arguments: object) -> dict[str, Any]:
    ran = run("walk", *arguments, "--json")
    assert ran.code == 0, ran.err
    return json.loads(ran.out)


# The steps are those of the run


@pytest.mark.parametrize("name", CHECKPOINTS)
@pytest.mark.parametrize("position", [0, 7, 8])
def test_every_step_holds_what_the_trace_has_at_its_index(name: str, position: int) -> None:
    checkpoint, walk = open_checkpoint(GOLDEN / name), walk_of(name, position)
    trace = record(TOKENS, checkpoint.weights(), checkpoint.config, np.float64)
    # Depths of a trace see true tokens: with the ones that the walk went on with, the same.
    longer = record(walk.text[:-1], checkpoint.weights(), checkpoint.config, np.float64)
    assert {step.name for step in walk.steps} >= trace.keys() == longer.keys()
    first = len(checkpoint.config.layers)
    for step in walk.steps:
        number = split(step.name)[0]
        if step.name in trace:  # not every layer's probabilities
            its = longer if number is not None and number >= first else trace
            values = np.atleast_1d(eval(f"x{step.at}", {"x": its[step.name]})).tolist()
            assert np.allclose(step.values, values, rtol=0, atol=1e-12), step.name
            assert step.dtype == its[step.name].dtype.name
            if its is trace:
                assert step.shape == trace[step.name].shape


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_every_step_names_the_line_of_code_that_showed_it(name: str) -> None:
    for step in walk_of(name, 8).steps:
        line = (TOP / step.file).read_text().splitlines()[step.line - 1]
        number, part = split(step.name)
        shown = [f'tap("{end}"' for end in (step.name, part, part.rpartition(".")[2]) if end]
        assert any(call in line for call in (shown if part else ["tap(spec.name"])), step


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_the_text_goes_on_as_greedy_decoding_does(name: str) -> None:
    checkpoint = open_checkpoint(GOLDEN / name)
    config, rng = checkpoint.config, np.random.default_rng(0)
    decoded = steps(TOKENS, checkpoint.weights(), config, rng, 9, dtype=np.float64, ignore_eos=True)
    chosen, drafts = next(decoded).tokens, next(decoded).drafts
    assert walk_of(name, 0).text == TOKENS + chosen + drafts
    assert len(drafts) == len(config.mtp_layers)


def test_one_layer_shows_the_same_steps_as_the_whole_walk() -> None:
    checkpoint, whole = open_checkpoint(GOLDEN / "odd/fp32"), walk_of("odd/fp32", 7)
    specs = (*checkpoint.config.layers, *checkpoint.config.mtp_layers)
    done: list[int] = []
    for layer in range(len(specs)):
        done.clear()
        weights = checkpoint.weights()
        walk = take_walk(
            TOKENS, weights, checkpoint.config, 7, layer, np.float64, progress=done.append
        )
        assert walk.steps == [step for step in whole.steps if split(step.name)[0] == layer]
        assert walk.steps and done == list(range(1, len(done) + 1))
        assert bool(walk.logits) == (layer >= len(checkpoint.config.layers))


def test_probabilities_too_large_to_hold_are_left_out_and_that_is_said(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "LARGE", 1)
    given = ("--model", GOLDEN / "odd" / "fp32", "--tokens", "5,17,9", "--layer", 1)
    names = {step["name"] for step in parsed(run, *given)["steps"]}
    monkeypatch.setattr(walk_file, "MOST_PROBS", 1)
    ran = run("walk", *given, "--json")
    left = {step["name"] for step in json.loads(ran.out)["steps"]}
    assert names - left == {"model.layers.1.self_attn.probs"} and "probs" in ran.err


# The table


@pytest.mark.parametrize("name", CONFIGS)
def test_every_name_of_the_tap_has_an_entry_whose_keys_are_in_config_json(name: str) -> None:
    raw = raw_config(name)
    config = parse_config(raw)
    specs = (*config.layers, *config.mtp_layers)
    for step in names_of(config, len(specs) + 1):
        number, part = split(step)
        if part != "input":  # which recordings alone have
            keys = deciding(step, None if number is None else specs[number], raw)
            assert keys, step
            for key, value in keys.items():
                assert found(raw, key) == value, (step, key)


def found(raw: Any, key: str) -> Any:
    """What config.json has at a dotted key; the number of a list's entry stands in []."""
    for part in key.split("."):
        name, _, number = part.rstrip("]").partition("[")
        raw = raw[name][int(number)] if number else raw[name]
    return raw


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_the_letters_of_every_step_multiply_to_its_shape(name: str) -> None:
    config = open_checkpoint(GOLDEN / name).config
    specs = (*config.layers, *config.mtp_layers)
    for step in walk_of(name, 8).steps:
        number = split(step.name)[0]
        counts = sizes(config, None if number is None else specs[number], len(TOKENS))
        axes = point_of(step.name).axes
        shape = tuple(math.prod(counts[letter] for letter in axis.split("*")) for axis in axes)
        assert step.shape == shape, step.name


def others(value: Any) -> Iterator[Any]:
    """Other values for a key, some of which must say something else."""
    if isinstance(value, bool):
        yield not value
    elif isinstance(value, (int, float)):
        yield from (value * 2, value / 2, value + 1, value * 3)
    elif isinstance(value, str):
        yield from ("full_attention", "sliding_attention", "default", "0", "1", "2")
    elif value is None:
        yield raw_config("tiny")["rope_scaling"]
    else:
        yield from ([], ["sliding_attention"], None)


def with_key(raw: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """A copy of the config with another value at a dotted key."""
    changed: Any = copy.deepcopy(raw)
    *parents, last = key.replace("[", ".").replace("]", "").split(".")
    at = changed
    for part in parents:
        at = at[part]
    at[int(last) if isinstance(at, list) else last] = value
    if key == "use_moe" and not value:  # which the list must not gainsay
        changed["moe_layers_enum"] = ""
    if key == "head_dim":  # which stands there twice more
        changed["attention_other_setting"] |= {"head_dim": value, "true_head_dim": value}
    return changed


def keys_of(raw: Any, start: str = "") -> Iterator[str]:
    """Every dotted key, with the entries of lists that have one for each layer."""
    for key, value in raw.items():
        if isinstance(value, dict):
            yield from keys_of(value, f"{start}{key}.")
        elif isinstance(value, list) and key not in ("architectures", "eos_token_id"):
            yield from [key] if len(value) == 1 else [f"{key}[{n}]" for n in range(len(value))]
        else:
            yield f"{start}{key}"


# Any other value is refused, or these alone do not fit the lists, or it is weights that change.
FIXED = {"zero_centered", "use_qk_norm", "moe_router_activation"}
FIXED |= {"num_hidden_layers", "num_nextn_predict_layers", "tie_word_embeddings"}


def changed_by(raw: dict[str, Any]) -> list[set[str]]:
    """For each layer the keys of which another value changes its spec, or what all layers share."""
    config = parse_config(raw)
    specs = (*config.layers, *config.mtp_layers)
    changing: list[set[str]] = [set() for _ in specs]
    for key in keys_of(raw):
        for value in others(found(raw, key)):
            try:
                other = parse_config(with_key(raw, key, value))
            except InputError:
                continue
            theirs = (*other.layers, *other.mtp_layers)
            for n, spec in enumerate(specs):
                shared = [(c.hidden_size, c.vocab_size, c.rms_norm_eps) for c in (config, other)]
                unused = {"mlp_width": 0} if spec.moe else {"swiglu_limit": None}
                if n >= len(theirs) or theirs[n]._replace(**unused) != spec._replace(**unused):
                    changing[n].add(key)
                if shared[0] != shared[1]:
                    changing[n].add(key)
    aside = {"attention_other_setting.attention_type"}  # the name of a dotted key says it
    return [keys - FIXED - aside for keys in changing]


@pytest.mark.parametrize("name", ["tiny", "no_extras", "step-3.5-flash"])
def test_the_keys_of_a_layers_steps_are_those_that_change_it(name: str) -> None:
    raw = raw_config(name)
    config = parse_config(raw)
    specs = (*config.layers, *config.mtp_layers)
    names = names_of(config, len(specs) + 1)
    outside = [deciding(name, None, raw) for name in names if split(name)[0] is None]
    changing = changed_by(raw)
    for n, spec in enumerate(specs):
        inside = [s for s in names if split(s)[0] == n and split(s)[1] != "input"]
        keys = [*outside, *(deciding(step, spec, raw) for step in inside)]
        said = {key for each in keys for key in each}
        assert said - FIXED == changing[n], n
        assert said >= FIXED - {"moe_router_activation", "num_nextn_predict_layers"}


# The command


def test_without_flags_it_walks_the_shipped_model_in_a_hundred_columns(run: Run) -> None:
    ran = run("walk")
    assert ran.code == 0 and max(map(len, ran.out.splitlines())) <= 100
    words = ("model.embed_tokens", "model.layers.N, 0 to 5", "lm_head", "Comes next", "MTP layer 8")
    assert all(word in ran.out for word in words)
    assert "minstep/model.py:" in ran.out and "layer_types[N]" in ran.out


@pytest.mark.parametrize("layer", [0, 4, 5, 6, 8])
def test_a_layer_is_shown_step_by_step_in_a_hundred_columns(run: Run, layer: int) -> None:
    ran = run("walk", "--layer", layer, "--prompt", "import this", "--position", 1)
    assert ran.code == 0 and max(map(len, ran.out.splitlines())) <= 100
    assert f"\nmodel.layers.{layer} " in ran.out and "\nself_attn.q_rope " in ran.out
    assert ("Comes next" in ran.out) == (layer > 5), "only a depth has tokens of its own"
    other = (layer + 1) % 9
    assert f"layers.{other}" not in ran.out and f"rope_theta[{layer}]" in ran.out


def test_the_json_of_a_layer_and_of_the_model_have_the_same_keys(run: Run) -> None:
    whole, layer = parsed(run), parsed(run, "--layer", 4)
    assert list(whole) == ["prompt", "position", "layer", "letters", "steps", "next"]
    assert list(layer) == list(whole) and layer["next"] == []
    assert {tuple(step) for step in (*whole["steps"], *layer["steps"])} == {
        (
            *("name", "shape", "dtype", "at", "values", "rms", "file", "line"),
            *("layer", "axes", "what", "decided_by"),
        )
    }
    assert layer["steps"] == [step for step in whole["steps"] if step["layer"] == 4]
    assert [after["layer"] for after in whole["next"]] == [None, 6, 7, 8]


def test_what_comes_next_has_probabilities_text_and_a_source(run: Run) -> None:
    report = parsed(run, "--prompt", "The with statement", "--position", 1)
    for after in report["next"]:
        shares = [token["probability"] for token in after["likely"]]
        assert shares == sorted(shares, reverse=True) and 0 < sum(shares) < 1 + 1e-9
        assert any(token["text"] for token in after["likely"]), "a byte alone has none"
    count = len(report["prompt"])
    ends = [after["position"] for after in report["next"]]
    assert ends == [2, 3, 4, 5]
    sources = ["prompt" if end <= count else "main model" for end in ends]
    sources[count:] = ["draft"] * len(sources[count:])
    assert [after["given"]["from"] for after in report["next"]] == sources
    assert "where" in run("walk", "--position", 1).out


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_checkpoint_without_a_tokenizer_is_walked_by_ids(run: Run, name: str) -> None:
    given = ("walk", "--model", GOLDEN / name, "--tokens", ",".join(map(str, TOKENS)))
    ran = run(*given, "--dtype", "float64")
    assert ran.code == 0 and "float64" in ran.out and max(map(len, ran.out.splitlines())) <= 100
    assert f"after token {TOKENS[-1]}, of the prompt" in ran.out


def test_layers_that_are_there_can_be_walked_where_a_shard_is_missing(
    run: Run, refused: Refused, sharded: Path
) -> None:
    (sharded / "model-00002-of-00002.safetensors").unlink()
    given = ("walk", "--model", sharded, "--tokens", "5,17,9")
    assert run(*given, "--layer", 0).code == 0
    for flags in ((), ("--layer", 3)):
        refused(*given, *flags, naming=("model-00002-of-00002.safetensors", "is missing"))


def test_keys_are_the_hubs_where_transformers_wrote_the_config(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(GOLDEN / "tiny" / "fp32", tmp_path / "native")
    (folder / "config.json").write_text(json.dumps(TEXT))
    ran = run("walk", "--model", folder, "--tokens", "5,17", "--layer", 1)
    assert ran.code == 0 and "transformers' keys" in ran.err
    assert "attention_other_setting.num_attention_heads 6" in ran.out
    assert native.hub_config(TEXT)["attention_other_setting"]["num_attention_heads"] == 6


def test_bad_input_is_refused_in_one_line(refused: Refused) -> None:
    given = ("walk", "--model", GOLDEN / "odd" / "fp32")
    ids = (*given, "--tokens", "5,17,9")
    refused(*ids, "--position", 3, naming=("--position 3", "3 tokens", "0 to 2"))
    refused(*ids, "--layer", 99, naming=("--layer 99", "expected layers"))
    refused(*given, naming=("tokenizer.json", "walk --tokens"))
    refused(*given, "--tokens", "", naming=("the prompt is empty",))
    refused(*given, "--tokens", "5,999999", naming=("token id 999999", "out of range"))
    refused("walk", "--prompt", "", naming=("the prompt is empty", "some text"))
    refused(*ids, "--prompt", "a", naming=("not allowed with",))
    refused("walk", "--model", GOLDEN, naming=("config.json", "cannot be read"))


def test_a_weight_that_is_not_finite_is_refused_by_name(refused: Refused, single: Path) -> None:
    file = single / "model.safetensors"
    data = bytearray(file.read_bytes())
    size = int.from_bytes(data[:8], "little")
    header = json.loads(bytes(data[8 : 8 + size]))
    start, end = header["model.layers.1.self_attn.v_proj.weight"]["data_offsets"]
    data[8 + size + start : 8 + size + end] = np.full((end - start) // 4, np.nan, "<f4").tobytes()
    file.write_bytes(bytes(data))
    given = ("walk", "--model", single, "--tokens", "5,17,9")
    refused(*given, naming=("model.layers.1.self_attn.v_proj is nan",))
