"""The recipe that records a torch model, and checkpoints that transformers and safetensors wrote.

The recipe is held against minstep's own trace, and with bugs planted against check-layer.
"""

import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import minstep
from minstep.parity.engine_tensors import open_recording
from minstep.parity.trace import Trace
from minstep.parity.trace import record as traced
from minstep.store.checkpoint import open_checkpoint
from minstep.store.config_file import load_config
from minstep.store.header import read_header
from minstep.weights import block_weights
from tests.conftest import GOLDEN, Refused, Run
from tests.model.test_golden import TOLERANCE, departures
from tests.support.torch_port import (
    BUGS,
    LAYOUTS,
    RECIPE,
    Bug,
    Port,
    attends,
    build,
    record,
    recording,
    released,
    step,
    torch,
)

pytestmark = pytest.mark.torch
TOKENS = np.random.default_rng(0).integers(128, size=40).tolist()  # more than every window
MODELS = ["tiny", "odd", "no_extras"]


def golden(name: str, dtype: str = "fp32") -> Path:
    return GOLDEN / name / dtype


def port(name: str = "tiny", dtype: str = "float32") -> Port:
    return build(open_checkpoint(golden(name)), dtype)


def arrays(file: Path) -> Trace:
    """Everything in a recording, under the names in the file, which must be ours already."""
    recording = open_recording(file)
    assert all(recording.source(name) == name for name in recording.names)
    return {name: recording.array(name) for name in recording.names}


@pytest.mark.parametrize("name", MODELS)
def test_a_recording_of_every_layer_is_our_own_trace(name: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(golden(name))
    layers = range(len(checkpoint.config.layers) + len(checkpoint.config.mtp_layers))
    file = record(port(name), tmp_path / "port.safetensors", layers, TOKENS, outer=True)
    theirs, ours = arrays(file), traced(TOKENS, checkpoint.weights(), checkpoint.config)
    missing = {key for key in ours if not key.endswith((".probs", ".margin"))} - theirs.keys()
    assert not missing
    others = (".input", ".enorm", ".hnorm", ".g_proj" if name == "no_extras" else "none")
    assert all(key.endswith(others) for key in theirs.keys() - ours.keys())
    shared = {key: theirs[key] for key in theirs if key in ours}
    assert not departures(ours, shared, TOLERANCE["float32"])


def test_a_layer_is_recorded_with_its_input_unless_the_layer_before_it_is_too(
    tmp_path: Path,
) -> None:
    full = arrays(record(port(), tmp_path / "all", range(11), TOKENS, outer=True))
    some = arrays(record(port(), tmp_path / "some", [2, 3, 9], TOKENS))
    inputs = [key for key in some if key.endswith(".input")]
    assert inputs == ["model.layers.2.input", "model.layers.9.input"]
    np.testing.assert_array_equal(some["model.layers.2.input"], full["model.layers.1"])
    np.testing.assert_array_equal(some["model.layers.9.input"], full["model.layers.8"][:-1])
    assert {key.split(".")[2] for key in some} == {"2", "3", "9"}
    for key in some.keys() - inputs:
        np.testing.assert_array_equal(some[key], full[key])


@pytest.mark.parametrize("tokens", [1, 2, 4, 6, 7])  # 4 and 6 query heads, 2 key-value heads
@pytest.mark.parametrize("attention", LAYOUTS)
def test_heads_are_told_from_tokens_however_a_port_lays_them_out(
    attention: type, tokens: int, tmp_path: Path
) -> None:
    model, checkpoint = native("tiny"), open_checkpoint(golden("tiny"))
    attends(attention)(model, lambda *_: None)
    theirs = arrays(record(model, tmp_path / "file", [0, 1], TOKENS[:tokens]))
    ours = traced(TOKENS[:tokens], checkpoint.weights(), checkpoint.config)
    del theirs["model.layers.0.input"]
    for n, part in itertools.product([0, 1], ["q_norm", "k_norm", "q_rope", "k_rope"]):
        assert f"model.layers.{n}.self_attn.{part}" in theirs
    assert not departures(ours, theirs, TOLERANCE["float32"])


def test_the_file_says_what_it_is_and_safetensors_reads_it(tmp_path: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import load_file

    file = record(port("odd", "bfloat16"), tmp_path / "file", [1], [5, 17, 9])
    tensors, header = load_file(file), read_header(file)
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    assert metadata["format"] == "minstep-trace" and metadata["engine"] == "torch Port"
    assert metadata["dtype"] == "bfloat16" and json.loads(metadata["tokens"]) == [5, 17, 9]
    order = json.loads(metadata["order"])
    assert order[0] == "model.layers.1.input" and order[-1] == "model.layers.1"
    assert set(order) == set(tensors) == set(header)
    sizes = {"BF16": 2, "F32": 4, "I32": 4}  # every tensor is aligned, odd as the shapes are
    assert all(place.offset % sizes[place.dtype] == 0 for place in header.values())
    assert header["model.layers.1"].dtype == "BF16"
    assert header["model.layers.1.moe.weights"].dtype == "F32"


def test_the_released_codes_modules_are_recorded_alike(tmp_path: Path) -> None:
    native = arrays(record(port(), tmp_path / "native", range(8), TOKENS, outer=True))
    theirs = arrays(record(released(port()), tmp_path / "remote", range(8), TOKENS, outer=True))
    assert set(theirs) == set(native)
    assert not departures(native, theirs, TOLERANCE["float32"])


def test_after_a_recording_the_model_is_as_it_was(tmp_path: Path) -> None:
    for model in (port(), released(port())):
        before = {name: dict(vars(module)) for name, module in model.named_modules()}
        rotate = step.apply_rotary_pos_emb
        record(model, tmp_path / "file", range(8), TOKENS)
        with pytest.raises(IndexError), recording(model, tmp_path / "file", [0], [999]):
            model(torch.tensor([[999]]))
        assert step.apply_rotary_pos_emb is rotate
        for name, module in model.named_modules():
            hooks = module._forward_hooks, module._forward_pre_hooks
            assert not any(hooks) and dict(vars(module)).keys() == before[name].keys()
            assert vars(module).get("custom_routing_function") == before[name].get(
                "custom_routing_function"
            )


def twice(model: Port) -> None:
    model(torch.tensor([TOKENS]))
    model(torch.tensor([TOKENS]))


@pytest.mark.parametrize(
    ("layers", "run", "words"),
    [
        ([0, 11], lambda model: model(torch.tensor([TOKENS])), ("layer 11 is not in the model",)),
        ([1], lambda model: None, ("layer 1 was not run",)),
        ([1], twice, ("model.layers.1.input is computed twice",)),
        ([1], lambda model: model(torch.tensor([TOKENS[:-1]])), ("[39, 64]", "40 tokens")),
        ([1], lambda model: model(torch.tensor([TOKENS, TOKENS])), ("[2, 40, 64]", "batch")),
    ],
)
def test_anything_but_one_run_of_the_prompt_is_refused_and_leaves_no_file(
    layers: list[int], run: Callable[[Port], None], words: tuple[str, ...], tmp_path: Path
) -> None:
    model = port()
    with pytest.raises(ValueError) as refused, torch.no_grad():
        with recording(model, tmp_path / "file", layers, TOKENS):
            run(model)
    for word in words:
        assert word in str(refused.value)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_was_there_stays_unless_the_recording_ends_well(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("before")
    with pytest.raises(KeyboardInterrupt), recording(port(), file, [0], TOKENS):
        raise KeyboardInterrupt
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("file", "before")]
    record(port(), file, [0], TOKENS)
    assert list(tmp_path.iterdir()) == [file] and "model.layers.0" in arrays(file)


def test_memory_grows_by_no_more_than_a_few_tensors(tmp_path: Path) -> None:
    """80 tensors of 2 MB, in a process of their own."""
    code = """
import resource, runpy, sys, torch
recording = runpy.run_path(sys.argv[1])["recording"]
nn = torch.nn
class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.mlp = nn.Identity()
    def forward(self, x):
        return self.mlp(x) + 1
model, x = nn.Sequential(), torch.zeros(1, 1024, 512)
model.add_module("layers", nn.Sequential(*(Block() for _ in range(40))))
peaks = []
for layers in ([0], range(40)):
    with recording(model, sys.argv[2], layers, range(1024)):
        model(x)
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
print((peaks[1] - peaks[0]) // 1024)
"""
    file = tmp_path / "file"
    command = [sys.executable, "-c", code, str(RECIPE), str(file)]
    ran = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    assert file.stat().st_size > 160 << 20
    assert int(ran.stdout) < 20, "MB"


def script(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, RECIPE, *arguments]
    return subprocess.run([str(word) for word in command], capture_output=True, text=True)


def test_the_script_records_a_checkpoint_in_hub_layout(tmp_path: Path) -> None:
    file, words = tmp_path / "file", ("--tokens", "5,17,9", "--layers", "0,3", "--outer")
    given = ("--model", golden("tiny"), "--out", file, "--dtype", "float32")
    ran = script(*given, *words)
    assert ran.returncode == 0, ran.stderr
    checkpoint = open_checkpoint(golden("tiny"))
    ours, theirs = traced([5, 17, 9], checkpoint.weights(), checkpoint.config), arrays(file)
    del theirs["model.layers.0.input"], theirs["model.layers.3.input"]
    assert {"lm_head", "model.layers.3.moe.ids"} <= set(theirs)
    assert not departures(ours, theirs, TOLERANCE["float32"])


def test_the_script_refuses_a_checkpoint_that_transformers_would_fill_with_random_numbers(
    single: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(single / "model.safetensors")
    del tensors["model.layers.2.moe.gate.weight"]
    save_file(tensors, single / "model.safetensors", {"format": "pt"})
    ran = script("--model", single, "--out", tmp_path / "file", "--tokens", "5", "--layers", "0")
    assert ran.returncode == 2 and "found no tensor for" in ran.stderr
    assert ran.stderr.count("\n") == 1 and not (tmp_path / "file").exists()


@pytest.mark.parametrize(
    ("flag", "given", "words"),
    [
        ("--tokens", "5,x", "--tokens is '5,x', expected numbers such as 5,17,9"),
        ("--tokens", "", "--tokens is ''"),
        ("--tokens", "5,99999", "--tokens has 99999, expected 0 to "),
        ("--layers", "0,-1", "--layers is '0,-1', expected numbers"),
        ("--layers", "0,11", "layer 11 is not in the model"),
        ("--model", "nowhere", "nowhere/config.json"),
        ("--out", "nowhere/file", "--out is nowhere/file, expected a file in a folder"),
    ],
)
def test_the_script_refuses_bad_arguments_in_one_line(
    flag: str, given: str, words: str, tmp_path: Path
) -> None:
    good = {"--model": golden("tiny"), "--out": tmp_path / "file", "--tokens": 5, "--layers": 0}
    ran = script(*(word for pair in (good | {flag: given}).items() for word in pair))
    assert ran.returncode == 2 and words in ran.stderr
    assert ran.stderr.count("\n") == 1 and ran.stderr.startswith("record_torch.py: ")
    assert ran.stdout == "" and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["tiny", "odd"])
def test_a_port_without_bugs_passes_check_layer_in_every_layer(
    name: str, dtype: str, run: Run, tmp_path: Path
) -> None:
    config = load_config(golden(name))
    layers = range(len(config.layers) + len(config.mtp_layers))
    file = record(port(name, dtype), tmp_path / "file", layers, TOKENS, outer=True)
    ran = run("check-layer", golden(name), "--all", "--against", file)
    assert ran.code == 0, ran.out
    assert ran.out.splitlines()[-1].startswith("match"), ran.out


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: f"{bug.looks_like}-{bug.layer}")
def test_check_layer_finds_each_bug_at_its_first_tensor_and_names_it(
    bug: Bug, dtype: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(open_checkpoint(golden("tiny")), dtype, bug.alter)
    bug.plant(model, monkeypatch.setattr)
    layers = [7, 8, 9] if bug.layer > 7 else [bug.layer]  # a depth is fed what those before gave
    file = record(model, tmp_path / "file", layers, TOKENS)
    monkeypatch.undo()
    ran = run("check-layer", golden("tiny"), "--layer", bug.layer, "--against", file)
    assert ran.code == 1
    said = [line for line in ran.out.splitlines() if line.startswith(f"layer {bug.layer} ")]
    first = f"model.layers.{bug.layer}.{bug.first}".removesuffix(".")
    assert said[0].startswith(f"layer {bug.layer} departs first at {first}: "), said
    (line,) = said[1:]
    assert line.startswith(f"layer {bug.layer} looks like: {bug.looks_like} (minstep/")
    assert line.endswith(".py)") or dtype == "bfloat16"  # nothing departs but by rounding


FIRSTS = {  # of all layers, where each bug shows first in a whole run
    "1 added twice to the norm weight": "model.layers.0.input_layernorm",
    "Llama-3 scaling applied to no layer": "model.layers.0.self_attn.q_rope",
    "first element of rope_theta taken for all layers": "model.layers.1.self_attn.q_rope",
    "window one too long": "model.layers.1.self_attn.o_proj",
    "router bias forgotten when experts are chosen": "model.layers.2.moe.ids",
    "clamp of the routed experts used for the shared expert": "model.layers.6.share_expert",
    "MTP head replaced by lm_head": "model.layers.8.transformer.shared_head.output",
    "main model's state fed to every MTP depth": "model.layers.9.eh_proj",
}


@pytest.mark.parametrize("bug", [bug for bug in BUGS if bug.looks_like in FIRSTS], ids=str)
def test_diff_of_whole_runs_finds_a_bug_where_it_shows_first(
    bug: Bug, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ours = build(open_checkpoint(golden("tiny")), alter=bug.alter), tmp_path / "ours"
    bug.plant(model, monkeypatch.setattr)
    theirs = record(model, tmp_path / "theirs", range(11), TOKENS, outer=True)
    tokens = ",".join(map(str, TOKENS))
    run("trace", "--model", golden("tiny"), "--tokens", tokens, "--out", ours)
    ran = run("diff", ours, theirs, "--json")
    assert ran.code == 1
    assert json.loads(ran.out)["first"] == FIRSTS[bug.looks_like]


def own(checkpoint: Any) -> Trace:
    """What minstep computes from an opened checkpoint, which may have no head."""
    D, V = checkpoint.config.hidden_size, checkpoint.config.vocab_size
    get = checkpoint.get
    embedding = get("model.embed_tokens.weight", (V, D))
    layers = tuple(block_weights(spec, D, get) for spec in checkpoint.config.layers)
    norm = get("model.norm.weight", (D,))
    tied = checkpoint.config.tie_word_embeddings or "lm_head.weight" not in checkpoint.tensors
    lm_head = embedding if tied else get("lm_head.weight", (V, D))
    weights = minstep.model.ModelWeights(embedding, layers, norm, lm_head, ())
    return traced(TOKENS, weights, checkpoint.config)


def native(name: str, dtype: str = "float32") -> Port:
    """A port without MTP layers, as transformers has none."""
    checkpoint = open_checkpoint(golden(name))
    return build(checkpoint._replace(config=checkpoint.config._replace(mtp_layers=())), dtype)


def with_vision(name: str, **how: Any) -> Any:
    """transformers' model with a small vision part, and a golden model's weights in the text's."""
    part, eye = native(name), {"width": 28, "layers": 1, "heads": 2}
    config = step.Step3p7Config(text_config=part.model.config, vision_config=eye, **how)
    model = step.Step3p7ForConditionalGeneration(config).eval()
    model.model.language_model.load_state_dict(part.model.state_dict())
    if not how.get("tie_word_embeddings"):
        model.lm_head.load_state_dict(part.lm_head.state_dict())
    return model


def recorded(model: Any, file: Path, layers: range, **how: Any) -> Path:
    """The recipe on a model of transformers."""
    with torch.no_grad(), recording(model, file, layers, TOKENS, **how):
        model(input_ids=torch.tensor([TOKENS]), use_cache=False)
    return file


def saved_text(name: str, folder: Path) -> Any:
    native(name).model.save_pretrained(folder)
    return step.Step3p7TextModel.from_pretrained(folder)


def saved_whole(name: str, folder: Path) -> Any:
    model = with_vision(name)
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="100KB")
    return type(model).from_pretrained(folder, dtype=torch.float32)


def saved_tied(name: str, folder: Path) -> Any:
    with_vision(name, tie_word_embeddings=True).save_pretrained(folder)
    return step.Step3p7ForConditionalGeneration.from_pretrained(folder)


def saved_base(name: str, folder: Path) -> Any:
    with_vision(name).model.save_pretrained(folder)
    return step.Step3p7Model.from_pretrained(folder)


SAVED = {"text": saved_text, "whole": saved_whole, "tied": saved_tied, "base": saved_base}


@pytest.mark.parametrize("save", SAVED.values(), ids=SAVED)
@pytest.mark.parametrize("name", MODELS)
def test_what_transformers_saved_computes_the_same_here(
    name: str, save: Callable[[str, Path], Any], tmp_path: Path
) -> None:
    model = save(name, tmp_path / "saved").eval()
    checkpoint = open_checkpoint(tmp_path / "saved")
    assert not checkpoint.config.mtp_layers
    layers = range(len(checkpoint.config.layers))
    theirs = arrays(recorded(model, tmp_path / "file", layers, outer=True))
    del theirs["model.layers.0.input"]
    assert ("lm_head" in theirs) == (save in (saved_whole, saved_tied))
    assert not departures(own(checkpoint), theirs, TOLERANCE["float32"])


def test_commands_take_what_transformers_saved(run: Run, refused: Refused, tmp_path: Path) -> None:
    models = {name: save("tiny", tmp_path / name) for name, save in SAVED.items()}
    assert run("inspect", tmp_path / "whole").code == 0
    assert run("generate", "--model", tmp_path / "whole", "--tokens", "5,17").code == 0
    generate = ("generate", "--model", tmp_path / "text", "--tokens", "5,17")
    refused(*generate, naming=("lm_head.weight",))
    for name, model in models.items():
        file = recorded(model.eval(), tmp_path / "file", range(8))
        assert run("check-layer", tmp_path / name, "--all", "--against", file).code == 0


def test_a_text_model_of_few_settings_opens(tmp_path: Path) -> None:
    few = {"num_hidden_layers": 4, "head_dim": 16, "num_attention_heads": 2, "vocab_size": 128}
    few |= {"num_key_value_heads": 1, "n_routed_experts": 4, "num_experts_per_tok": 2}
    few |= {"sliding_window": 8}  # for a mask that transformers makes though no layer takes it
    widths = ("hidden_size", "intermediate_size", "moe_intermediate_size", "share_expert_dim")
    config = step.Step3p7TextConfig(**few, **dict.fromkeys(widths, 24))
    model = step.Step3p7TextModel(config).eval()
    model.save_pretrained(tmp_path / "saved")
    theirs = arrays(recorded(model, tmp_path / "file", range(4)))
    del theirs["model.layers.0.input"]
    checkpoint = open_checkpoint(tmp_path / "saved")
    assert not departures(own(checkpoint), theirs, TOLERANCE["float32"])


def test_files_of_safetensors_own_writer_open_in_any_order(tmp_path: Path) -> None:
    """Two shards with metadata, and every tensor in another place than make-tiny puts it."""
    from safetensors.torch import load_file, save_file

    source = golden("odd", "bf16")
    tensors: dict[str, Any] = {}
    for shard in source.glob("*.safetensors"):
        tensors |= load_file(shard)
    names = sorted(tensors, key=lambda name: name[::-1])
    shards = {"b.safetensors": names[::2], "a.safetensors": names[1::2]}
    for file, held in shards.items():
        metadata = {"format": "pt", "made": "elsewhere"}
        save_file({name: tensors[name] for name in held}, tmp_path / file, metadata)
    weight_map = {name: file for file, held in shards.items() for name in held}
    index = {"metadata": {"total_size": 1.5}, "weight_map": weight_map}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    checkpoints = open_checkpoint(tmp_path), open_checkpoint(source)
    one, other = (traced(TOKENS, opened.weights(), opened.config) for opened in checkpoints)
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], name)
