"""record: the chosen tensors of a trace, whatever interrupts it, and what is refused."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import minstep
from minstep import attention, linear, moe
from minstep.fast.bf16 import BF16Array
from minstep.parity import record as lab_record
from minstep.parity import trace
from minstep.parity.record import names_of, open_parts, plan, record_file
from minstep.parity.trace import Recorder
from minstep.store import output
from minstep.store.stages import stages
from tests.conftest import GOLDEN, Refused, Run
from tests.support.recordings import save
from tests.support.tiers import cases

FOLDERS = [GOLDEN / name / "bf16" for name in ("tiny", "odd", "no_extras", "drafts")]
TINY = FOLDERS[0]  # layers 0 and 1 are dense, 2 to 7 have experts, 8 to 10 are MTP layers
TOKENS = [21, 252, 204, 177, 255, 80, 277, 109]
GIVEN = ("--model", TINY, "--tokens", ",".join(map(str, TOKENS)))
ORDER = [stage.name for stage in stages(minstep.load_config(TINY), len(TOKENS))]
MTP = [spec.name for spec in minstep.load_config(TINY).mtp_layers]

Tensors = dict[str, np.ndarray[Any, Any]]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def traced(folder: Path, tokens: list[int], dtype: str) -> Tensors:
    """What parity.trace.record computes, with every attention probability and layer input."""
    checkpoint, tensors = minstep.open_checkpoint(folder), Tensors()
    trace.walk(tokens, checkpoint.weights(), checkpoint.config, dtype, Recorder(tensors))
    before = "model.embed_tokens"
    for spec in checkpoint.config.layers + checkpoint.config.mtp_layers:
        if spec.name in tensors:
            tensors[f"{spec.name}.input"] = tensors[before]
            before = spec.name
    return tensors


def same(written: Path, wanted: Tensors) -> None:
    """The file holds these tensors and no others, with the same numbers."""
    found = load_file(written)
    assert sorted(found) == sorted(wanted)
    for name, x in wanted.items():
        assert found[name].dtype == x.dtype and np.array_equal(found[name], x), name


# What is recorded


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.parent.name)
def test_without_choosing_it_is_the_whole_trace_but_probabilities(
    folder: Path, dtype: str, run: Run, tmp_path: Path
) -> None:
    prompt = json.loads((folder.parent / "meta.json").read_text())["prompt"]
    out, tokens = tmp_path / "out.safetensors", ",".join(map(str, prompt))
    given = ("--model", folder, "--tokens", tokens, "--dtype", dtype, "--out", out)
    assert run("record", *given).only_wrote
    every = traced(folder, prompt, dtype)
    same(out, {n: x for n, x in every.items() if not n.endswith((".probs", ".input"))})
    assert names(tmp_path) == ["out.safetensors"]
    with safe_open(out, "numpy") as opened:
        metadata = opened.metadata()
        order = [name for name in every if name in opened.keys()]
    assert metadata.pop("format") == "minstep-trace" and metadata.pop("engine") == "minstep"
    facts = json.loads(metadata.pop("model"))
    config = minstep.load_config(folder)
    assert (facts["hidden_size"], facts["layers"]) == (config.hidden_size, len(config.layers))
    assert len(json.loads(metadata.pop("layers"))) == len(config.layers + config.mtp_layers)
    assert metadata == {"tokens": json.dumps(prompt), "order": json.dumps(order), "dtype": dtype}


L = "model.layers."


@pytest.mark.parametrize(
    ("chosen", "wanted"),
    [
        (("--layers", "0"), lambda n: own(n, 0) and aside(n)),
        (("--layers", "3"), lambda n: own(n, 3) and aside(n) or n == L + "3.input"),
        (("--layers", "2-3,3,9"), lambda n: own(n, 2, 3, 9) and aside(n) or n in (L + "2.input", L + "9.input")),
        (("--layers", "7,8", "--layers", "9"), lambda n: own(n, 7, 8, 9) and aside(n) or n == L + "7.input"),
        (("--layers", "4", "--names", "*.moe.ids"), lambda n: n in (L + "4.moe.ids", L + "4.input")),
        (("--layers", "3,4", "--names", "*.[34]"), lambda n: n in (L + "3", L + "4", L + "3.input")),
        (("--names", "model.layers.*.moe.ids"), lambda n: n.endswith(".moe.ids")),
        (("--names", "lm_head", "--names", "*.margin"), lambda n: n == "lm_head" or n.endswith(".margin")),
        (("--names", "*.probs"), lambda n: n.endswith(".probs")),
        (("--names", L + "[16].input"), lambda n: n in (L + "1.input", L + "6.input")),
        (("--names", "model.embed_tokens"), lambda n: n == "model.embed_tokens"),
        (("--names", "*"), lambda n: True),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)  # fmt: skip
def test_layers_and_globs_choose_among_the_tensors_of_a_trace(
    chosen: tuple[str, ...], wanted: Callable[[str], bool], run: Run, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert run("record", *GIVEN, *chosen, "--out", out).only_wrote
    every = traced(TINY, TOKENS, "float32")
    expected = {name: x for name, x in every.items() if wanted(name)}
    if "0" in chosen:
        expected[L + "0.input"] = every["model.embed_tokens"]
    same(out, expected)


def own(name: str, *layers: int) -> bool:
    """Whether a tensor is of one of these layers."""
    return any(f"{name}.".startswith(f"{L}{n}.") for n in layers)


def aside(name: str) -> bool:
    return not name.endswith((".probs", ".input"))


@pytest.mark.parametrize("count", [1, 2, 3, 4, 9])
@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.parent.name)
def test_the_names_are_known_before_anything_is_computed(folder: Path, count: int) -> None:
    found = names_of(minstep.load_config(folder), count)
    computed = traced(folder, [1] * count, "float32")
    assert sorted(found) == sorted(computed)
    assert [name for name in found if not name.endswith(".input")] == [
        name for name in computed if not name.endswith(".input")
    ]
    for number in range(len(minstep.load_config(folder).layers)):
        its = [name for name in found if own(name, number)]
        assert its[0] == f"{L}{number}.input" and its[-1] == f"{L}{number}"


def test_stages_that_nothing_is_wanted_of_are_not_run(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    watch(monkeypatch, lambda name: seen.append(name))
    out = tmp_path / "out"
    assert run("record", *GIVEN, "--layers", "2", "--out", out).code == 0
    assert L + "2" in seen and L + "3.input_layernorm" not in seen and "lm_head" not in seen
    seen.clear()
    assert run("record", *GIVEN, "--layers", "9", "--out", out).code == 0
    assert L + "9" in seen and L + "10.eh_proj" not in seen and "lm_head" not in seen


def watch(monkeypatch: pytest.MonkeyPatch, see: Callable[[str], object]) -> None:
    """Show `see` the full name of each tensor that a recorder is shown, before it is kept."""

    class Watched(Recorder):
        def __call__(self, name: str, x: Any) -> Any:
            see(self._full(name))
            return super().__call__(name, x)

    def recorder(*arguments: Any, **how: Any) -> Recorder:
        return (Watched if how else Recorder)(*arguments, **how)  # else names are looked up

    monkeypatch.setattr(lab_record, "Recorder", recorder)


def test_the_prompt_may_be_text(run: Run, refused: Refused, tmp_path: Path) -> None:
    made = tmp_path / "made"
    assert run("make-tiny", "tiny", "--out", made).code == 0
    given = (
        "--model",
        made,
        "--prompt",
        "Once",
        "--names",
        "model.norm",
        "--out",
        tmp_path / "out",
    )
    assert run("record", *given).only_wrote
    with safe_open(tmp_path / "out", "numpy") as opened:
        tokens = json.loads(opened.metadata()["tokens"])
    tokenizer = minstep.text.tokenizer.load_tokenizer(made)
    assert tokenizer and tokens == tokenizer.encode("Once").ids
    (made / "tokenizer.json").unlink()
    refused("record", *given, naming=(str(made / "tokenizer.json"), "--prompt", "--tokens"))


@pytest.mark.parametrize("dtype", ["fp8", "bfloat16", "float32"])
def test_any_stored_dtype_is_recorded_as_trace_does(dtype: str, run: Run, tmp_path: Path) -> None:
    made = tmp_path / "made"
    assert run("make-tiny", "tiny", "--out", made, "--dtype", dtype, "--shards", 3).code == 0
    given = ("--model", made, "--tokens", "5,17,9,4", "--out")
    assert run("record", *given, tmp_path / "out", "--layers", "2-9").only_wrote
    every = traced(made, [5, 17, 9, 4], "float32")
    wanted = {n: x for n, x in every.items() if own(n, *range(2, 10)) and aside(n)}
    same(tmp_path / "out", wanted | {L + "2.input": every[L + "1"]})


def test_an_mtp_layer_without_a_head_of_its_own_needs_lm_head(tmp_path: Path, run: Run) -> None:
    base = shutil.copytree(GOLDEN / "tiny" / "fp32", tmp_path / "base")
    held = load_file(base / "model.safetensors")
    save_file(
        {n: x for n, x in held.items() if "shared_head.output" not in n}, base / "model.safetensors"
    )
    given = ("--model", base, "--tokens", "5,17,9,4", "--layers", "8", "--out", tmp_path / "out")
    assert run("record", *given).code == 0
    every = traced(base, [5, 17, 9, 4], "float32")
    name = L + "8.transformer.shared_head.output"
    assert np.array_equal(load_file(tmp_path / "out")[name], every[name])


# Some of the shards


def test_only_the_shards_of_the_layers_run_must_be_there(
    run: Run, refused: Refused, sharded_tiny: Path, tmp_path: Path
) -> None:
    (sharded_tiny / "model-00002-of-00002.safetensors").unlink()  # the second half of 5, and 6 on
    given = ("--model", sharded_tiny, *GIVEN[2:], "--out", tmp_path / "out")
    assert run("record", *given, "--layers", "0-4").only_wrote
    before = names(tmp_path)
    for chosen in (("--layers", "0-5"), ("--layers", "5"), (), ("--names", "lm_head")):
        naming = ("model-00002-of-00002.safetensors", "is missing", f"{L}5.moe.")
        refused("record", *given, *chosen, naming=naming)
    assert names(tmp_path) == before


@pytest.fixture
def sharded_tiny(tmp_path: Path) -> Path:
    """A copy of a checkpoint in two shards."""
    return shutil.copytree(TINY, tmp_path / "tiny")


def test_a_layer_begins_from_its_recorded_input_with_its_own_shard_alone(
    run: Run, sharded_tiny: Path, tmp_path: Path
) -> None:
    whole, one = tmp_path / "whole", tmp_path / "one"
    assert run("record", *GIVEN, "--layers", "2-9", "--out", whole).code == 0
    every = traced(TINY, TOKENS, "float32")
    for gone, layer, where in (("model-00001.", 6, ".5"), ("model-00002-of-00002.", 2, ".2.input")):
        kept = shutil.copytree(sharded_tiny, tmp_path / f"kept{layer}")
        (kept / f"{gone}safetensors").unlink()
        given = ("--model", kept, *GIVEN[2:], "--layers", layer, "--input", whole, "--out", one)
        assert run("record", *given).only_wrote, where
        wanted = {n: x for n, x in every.items() if own(n, layer) and aside(n)}
        same(one, wanted | {f"{L}{layer}.input": every[f"{L}{layer - 1}"]})


@pytest.mark.parametrize("layers", ["8", "9", "9-10", "7-8"])
def test_mtp_layers_begin_from_a_recorded_input_too(layers: str, run: Run, tmp_path: Path) -> None:
    whole, some = tmp_path / "whole", tmp_path / "some"
    assert run("record", *GIVEN, "--out", whole).code == 0
    given = (*GIVEN, "--layers", layers, "--out", some, "--input")
    assert run("record", *given, whole).only_wrote
    numbers = [int(n) for n in layers.split("-")]
    every = traced(TINY, TOKENS, "float32")
    wanted = {n: x for n, x in every.items() if own(n, *numbers) and aside(n)}
    same(some, wanted | {f"{L}{numbers[0]}.input": every[f"{L}{numbers[0] - 1}"]})


def test_the_input_may_be_another_engine_s(run: Run, tmp_path: Path) -> None:
    every = traced(TINY, TOKENS, "float32")
    x = every[L + "1"]
    bits = (x.view(np.uint32) >> 16).astype(np.uint16)
    header = {L + "1": {"dtype": "BF16", "shape": [1, *x.shape], "data_offsets": [0, 2 * x.size]}}
    text = json.dumps(header).encode()
    foreign = tmp_path / "foreign"
    foreign.write_bytes(len(text).to_bytes(8, "little") + text + bits.tobytes())
    out = tmp_path / "out"
    given = (*GIVEN, "--layers", "2", "--input", foreign, "--dtype", "float64", "--out", out)
    assert run("record", *given).only_wrote
    rounded = (bits.astype(np.uint32) << 16).view(np.float32)
    assert np.array_equal(load_file(out)[L + "2.input"], rounded.astype(np.float64))


# Interrupted


@pytest.fixture
def uninterrupted(run: Run, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The bytes of a recording of all stages that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert run("record", *GIVEN, "--out", out).code == 0
    return out.read_bytes()


def in_stage(name: str) -> str:
    """A tensor in the middle of a stage."""
    middle = {"model.embed_tokens": "model.embed_tokens", "lm_head": "model.norm"}
    return middle.get(name, f"{name}.self_attn.o_proj")


def test_it_goes_on_after_ctrl_c_in_every_stage(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uninterrupted: bytes
) -> None:
    """One Ctrl-C in each stage: every run does one stage more."""
    out, stop = tmp_path / "out", [""]
    seen: list[str] = []

    def see(name: str) -> None:
        seen.append(name)
        if name == in_stage(stop[0]):
            raise KeyboardInterrupt

    watch(monkeypatch, see)
    for done, stage in enumerate(ORDER):
        seen.clear()
        stop[0] = stage
        ran = run("record", *GIVEN, "--out", out)
        assert ran.code == 130 and ran.out == "" and not out.exists()
        if done == 0:
            assert ran.err == "" and names(tmp_path) == []
            continue
        after, last = ORDER[done - 1], ORDER[max(0, done - 2)]
        resumed = f"minstep: resuming after {last}\n" if done > 1 else ""
        assert (
            ran.err
            == f"{resumed}minstep: stopped after {after}: the same command goes on from there\n"
        )
        assert names(tmp_path) == [".out.parts"]
        first = ORDER[done - 1] if done > 1 else ORDER[0]
        assert seen[0].startswith("model.norm" if first == "lm_head" else first)
    stop[0] = "nothing"
    ran = run("record", *GIVEN, "--out", out)
    assert ran.code == 0 and ran.err.startswith(
        f"minstep: resuming after {ORDER[-2]}\nwrote {out} ("
    )
    assert out.read_bytes() == uninterrupted and names(tmp_path) == ["out"]


KILLER = """
import os, signal, sys
from pathlib import Path
from minstep.cli.main import main
from minstep.parity import record, trace

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

where, at = sys.argv[1], int(sys.argv[2])
calls = 0
def counted(real, before, half=False):
    def call(*arguments, **named):
        global calls
        calls += 1
        if calls == at and half:
            Path(arguments[0]).write_bytes(b"half of it")
        if calls == at and before:
            die()
        result = real(*arguments, **named)
        if calls == at:
            die()
        return result
    return call

if where == "tap":
    class Watched(trace.Recorder):
        __call__ = counted(trace.Recorder.__call__, True)
    record.Recorder = lambda *a, **how: (Watched if how else trace.Recorder)(*a, **how)
elif where == "write":
    record.write_tensors = counted(record.write_tensors, True, half=True)
elif where == "written":
    record.write_tensors = counted(record.write_tensors, False)
elif where == "rename":
    os.replace = counted(os.replace, True)
elif where == "replaced":
    os.replace = counted(os.replace, False)
elif where == "remove":
    Path.unlink = counted(Path.unlink, False)
main(sys.argv[3:])
"""

# A stage is two files, its own and the state, each renamed. At the end the whole file is written and
# renamed, what is left of it removed, and the folder.
FILES = RENAMES = UNLINKS = 2 * len(ORDER)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs kill -9")
@pytest.mark.parametrize(
    ("where", "at"),
    cases(
        [
            ("tap", 60),
            ("write", 8),
            ("rename", 14),
            ("replaced", 13),
            ("replaced", RENAMES + 1),
            ("remove", UNLINKS + 1),
        ],
        [
            ("tap", 1),
            ("tap", 150),
            ("write", 1),
            ("written", 7),
            ("rename", 2),
            ("rename", 13),
            ("replaced", 14),
            ("write", FILES + 1),
            ("written", FILES + 1),
            ("rename", RENAMES + 1),
            ("remove", UNLINKS + 6),
        ],
    ),
)
def test_it_goes_on_after_kill_9_anywhere(
    where: str, at: int, run: Run, tmp_path: Path, uninterrupted: bytes
) -> None:
    out = tmp_path / "out"
    arguments = [*map(str, GIVEN), "--out", str(out)]
    command = [sys.executable, "-c", KILLER, where, str(at), "record", *arguments]
    killed = subprocess.run(command, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed
    assert out.exists() == (where == "remove" or (where, at) == ("replaced", RENAMES + 1))
    assert not out.exists() or out.read_bytes() == uninterrupted
    ran = run("record", *GIVEN, "--out", out)
    assert ran.code == 0 and out.read_bytes() == uninterrupted and names(tmp_path) == ["out"]


def done_by(state: Path) -> int:
    """How many stages a state file counts."""
    with safe_open(state, "numpy") as opened:
        count: int = json.loads(opened.metadata()["run"])["done"]
    return count


@pytest.mark.parametrize("at", cases([3, 4], [1, 2, 5, 6]))  # renames: two files of each stage
def test_kill_9_loses_at_most_one_stage(at: int, tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLER, "rename", str(at), "record", *map(str, GIVEN)]
    subprocess.run([*command, "--out", str(tmp_path / "out")], capture_output=True)
    state = tmp_path / ".out.parts" / "state.safetensors"
    assert (done_by(state) if state.exists() else 0) == (at - 1) // 2


def test_a_full_disk_keeps_what_is_done(
    run: Run,
    refused: Refused,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    uninterrupted: bytes,
) -> None:
    out, calls = tmp_path / "out", [0]
    real = trace.write_tensors

    def full(file: Path, *rest: Any) -> None:
        calls[0] += 1
        if calls[0] in (9, 14, FILES + 3):  # two stages, and the whole file
            file.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        real(file, *rest)

    monkeypatch.setattr(lab_record, "write_tensors", full)
    naming = (str(tmp_path), "cannot be written", "No space left on device")
    refused("record", *GIVEN, "--out", out, naming=naming)
    for _ in range(2):
        ran = run("record", *GIVEN, "--out", out)
        assert ran.code == 2 and ran.err.count("\n") == 2 and "No space left" in ran.err
        assert names(tmp_path) == [".out.parts"]
        assert "whole.safetensors" not in names(tmp_path / ".out.parts")
    assert calls[0] == FILES + 3
    assert run("record", *GIVEN, "--out", out).code == 0
    assert out.read_bytes() == uninterrupted and names(tmp_path) == ["out"]


def test_ctrl_c_while_the_file_is_put_together_says_how_to_go_on(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uninterrupted: bytes
) -> None:
    out, real = tmp_path / "out", trace.write_tensors

    def stop(file: Path, *rest: Any) -> None:
        real(file, *rest)
        if file.name == "whole.safetensors":
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(lab_record, "write_tensors", stop)
        ran = run("record", *GIVEN, "--out", out)
    said = f"minstep: stopped after {ORDER[-1]}: the same command goes on from there\n"
    assert (ran.code, ran.err) == (130, said) and names(tmp_path) == [".out.parts"]
    ran = run("record", *GIVEN, "--out", out)
    assert ran.code == 0 and ran.err.startswith(
        f"minstep: resuming after {ORDER[-1]}\nwrote {out} ("
    )
    assert out.read_bytes() == uninterrupted and names(tmp_path) == ["out"]


@pytest.fixture
def begun(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The output of a recording that was stopped in layer 4."""

    def see(name: str) -> None:
        if name == L + "4.self_attn.o_proj":
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        watch(patched, see)
        assert run("record", *GIVEN, "--out", tmp_path / "out").code == 130
    return tmp_path / "out"


@pytest.mark.parametrize(
    ("other", "differs"),
    [
        (("--tokens", "21,252,204,177,255,80,277,110"), "tokens"),
        (("--dtype", "float64"), "dtype"),
        (("--layers", "0-7"), "names"),
        (("--names", "lm_head", "--dtype", "float64"), "dtype"),
        (("--model", GOLDEN / "tiny" / "fp32"), "model"),
    ],
)
def test_parts_of_another_recording_are_refused_and_kept(
    other: tuple[object, ...], differs: str, begun: Path, refused: Refused, run: Run
) -> None:
    folder = begun.parent / ".out.parts"
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    given = dict(zip(GIVEN[::2], GIVEN[1::2], strict=True))
    given |= dict(zip(other[::2], other[1::2], strict=True))  # type: ignore[arg-type]
    flags = [word for pair in given.items() for word in pair]
    naming = (str(folder), f"another recording ({differs})", "--out")
    refused("record", *flags, "--out", begun, naming=naming)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    said = f"minstep: resuming after {L}3\nwrote {begun} ("
    assert run("record", *GIVEN, "--out", begun).err.startswith(said)


def test_a_checkpoint_that_has_changed_is_another_one(
    sharded_tiny: Path, run: Run, refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ("record", "--model", sharded_tiny, *GIVEN[2:], "--out", tmp_path / "out")

    def see(name: str) -> None:
        if name == L + "1":
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        watch(patched, see)
        assert run(*given, "--layers", "0-4").code == 130
    refused(*given, "--layers", "0-5", naming=("another recording (names)",))
    second = sharded_tiny / "model-00002-of-00002.safetensors"
    second.unlink()  # is not needed
    with monkeypatch.context() as patched:
        watch(patched, see)
        assert "resuming" in run(*given, "--layers", "0-4").err
    os.utime(sharded_tiny / "model-00001.safetensors")
    refused(*given, "--layers", "0-4", naming=("another recording (model)",))


def test_whatever_a_recording_depends_on_makes_its_parts_those_of_another(
    sharded_tiny: Path, run: Run, refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is changed between an interrupted run and the same command, and which fact differs."""
    source, config, out = tmp_path / "source", sharded_tiny / "config.json", tmp_path / "out"
    assert run("record", *GIVEN, "--names", L + "2", "--out", source).code == 0
    recorded, said = source.read_bytes(), config.read_bytes()
    given = ("record", "--model", sharded_tiny, *GIVEN[2:], "--layers", "3-4", "--input", source)

    def see(name: str) -> None:
        if name == L + "4.self_attn.o_proj":
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        watch(patched, see)
        assert run(*given, "--out", out).code == 130
    state = load_file(source)[L + "2"]
    for place in ((0, 0), (len(TOKENS) - 1, 63)):
        other = state.copy()
        other[place] = np.nextafter(other[place], np.inf)
        save_file({L + "2": other}, source)
        refused(*given, "--out", out, naming=("another recording (input)",))
    refused(*given[:-2], "--out", out, naming=("another recording (input)",))  # none at all
    source.write_bytes(recorded)
    raw = json.loads(said)
    for change in ({"rms_norm_eps": 2e-5}, {"sliding_window": raw["sliding_window"] + 1}):
        config.write_text(json.dumps(raw | change))
        refused(*given, "--out", out, naming=("another recording (model)",))
    config.write_bytes(said)
    moved = shutil.copy(source, tmp_path / "moved")  # the same numbers are the same input
    assert "resuming after" in run(*given[:-1], moved, "--out", out).err


@pytest.mark.parametrize("kind", ["changed", "miscounted", "truncated", "removed"])
@pytest.mark.parametrize("which", ["00002.safetensors", "state.safetensors"])
def test_damaged_parts_are_refused(kind: str, which: str, begun: Path, refused: Refused) -> None:
    file = begun.parent / ".out.parts" / which
    raw = file.read_bytes()
    if kind == "removed":  # without the state nothing says that the parts count
        (file if which != "state.safetensors" else file.parent / "00004.safetensors").unlink()
        which = "0000"
    elif kind == "miscounted":
        count = b'\\"done\\": '
        place = raw.index(count) + len(count)
        file.write_bytes(raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :])
    else:
        file.write_bytes(raw[:-1] if kind == "truncated" else raw[:-1] + bytes([raw[-1] ^ 1]))
    naming = (str(begun.parent / ".out.parts"), which, "remove", "to begin again")
    refused("record", *GIVEN, "--out", begun, naming=naming)
    assert not begun.exists()


@pytest.mark.parametrize(
    "content",
    [
        None,
        "",
        "{",
        "[" * 100_000,
        "[]",
        "{}",
        '{"recording": 3}',
        '{"recording": {}, "done": 1}',
    ],
)
def test_a_state_that_record_did_not_write_is_refused(
    content: str | None, begun: Path, refused: Refused
) -> None:
    folder = begun.parent / ".out.parts"
    state = load_file(folder / "state.safetensors")
    forged(folder / "state.safetensors", state, content)
    naming = (str(folder / "state.safetensors"), f"remove {folder} to begin again")
    refused("record", *GIVEN, "--out", begun, naming=naming)


@pytest.mark.parametrize("done", [-1, 0, 6, 10**9, "four", None, [5], "5.5"])
def test_a_count_of_stages_that_the_parts_do_not_bear_out_is_refused(
    done: Any, begun: Path, refused: Refused
) -> None:
    folder = begun.parent / ".out.parts"
    state = load_file(folder / "state.safetensors")
    forged(folder / "state.safetensors", state, run_of(folder, done))
    naming = (str(folder), f"remove {folder} to begin again")
    refused("record", *GIVEN, "--out", begun, naming=naming)
    assert not begun.exists()


def run_of(folder: Path, done: Any) -> str:
    """What the parts say of their run, with another count of stages."""
    with safe_open(folder / "state.safetensors", "numpy") as opened:
        return json.dumps(json.loads(opened.metadata()["run"]) | {"done": done})


def forged(file: Path, tensors: dict[str, Any], run: str | None) -> None:
    """Write one of the parts anew, with a checksum that fits."""
    checksum = zlib.crc32((run or "").encode())
    for _, x in sorted(tensors.items()):
        bits = x.bits if isinstance(x, BF16Array) else x
        checksum = zlib.crc32(np.ascontiguousarray(bits), checksum)
    said = {} if run is None else {"run": run}
    save(tensors, file, crc32=str(checksum), **said)


BF16 = BF16Array(np.zeros((8, 64), np.uint16))
STATES = {
    "wide": np.zeros((8, 65), np.float32),
    "short": np.zeros((7, 64), np.float32),
    "long": np.zeros((9, 64), np.float32),
    "flat": np.zeros(64, np.float32),
    "empty": np.zeros((0, 64), np.float32),
    "batch": np.zeros((1, 8, 64), np.float32),
    "one number": np.float32(0).reshape(()),
    "whole numbers": np.zeros((8, 64), np.int64),
    "other floats": np.zeros((8, 64), np.float64),
    "half floats": BF16,
    "infinite": np.full((8, 64), np.inf, np.float32),
}


@pytest.mark.parametrize("kind", STATES)
def test_a_state_that_the_next_stage_cannot_take_is_refused(
    kind: str, begun: Path, refused: Refused
) -> None:
    folder = begun.parent / ".out.parts"
    run = run_of(folder, 5)
    forged(folder / "state.safetensors", {"state": STATES[kind]}, run)
    refused("record", *GIVEN, "--out", begun, naming=(f"remove {folder} to begin again",))
    assert not begun.exists()


@pytest.mark.parametrize(
    ("first", "count", "tensors"),
    [
        (2, 1, {}),
        (2, 1, {"x": np.zeros(1)}),
        (2, 1, None),  # another stage's
        (4, 1, {"model.layers.3": BF16}),
        (5, 3, {"x": np.zeros(1)}),
        (5, 50, {}),
    ],
)
def test_parts_that_no_stage_gives_are_refused(
    first: int, count: int, tensors: Tensors | None, begun: Path, refused: Refused
) -> None:
    folder = begun.parent / ".out.parts"
    held = load_file(folder / "00003.safetensors") if tensors is None else tensors
    for n in range(first, first + count):
        forged(folder / f"{n:05}.safetensors", held, run_of(folder, n + 1))
    done = max(5, first + count)
    state = load_file(folder / "state.safetensors")
    forged(folder / "state.safetensors", state, run_of(folder, done))
    refused("record", *GIVEN, "--out", begun, naming=(f"{folder}: ", "to begin again"))
    assert not begun.exists()


def test_a_folder_of_somebody_s_own_is_left_alone(tmp_path: Path, refused: Refused) -> None:
    folder = tmp_path / ".out.parts"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    naming = (str(folder / "notes.txt"), "no part of a recording")
    refused("record", *GIVEN, "--out", tmp_path / "out", naming=naming)
    assert (folder / "notes.txt").read_text() == "mine"
    for name in (
        "mine.safetensors",
        "model-00001.safetensors",
        ".mine.safetensors.bak",
        "00001.safetensors.bak",
    ):
        (folder / "notes.txt").rename(folder / name)
        naming = (str(folder / name), "no part of a recording")
        refused("record", *GIVEN, "--out", tmp_path / "out", naming=naming)
        (folder / name).rename(folder / "notes.txt")
    shutil.rmtree(folder)
    folder.write_text("mine")
    refused("record", *GIVEN, "--out", tmp_path / "out", naming=("out", "cannot be written"))


def test_a_link_in_place_of_the_parts_is_refused(tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "00001.safetensors").write_text("mine")
    (tmp_path / ".out.parts").symlink_to(tmp_path / "precious")
    naming = (str(tmp_path / ".out.parts"), "is a link")
    refused("record", *GIVEN, "--out", tmp_path / "out", naming=naming)
    assert names(tmp_path / "precious") == ["00001.safetensors"]


def test_a_file_that_comes_into_the_parts_meanwhile_stays(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = tmp_path / ".out.parts" / "mine.safetensors"
    watch(monkeypatch, lambda name: name != "lm_head" or mine.write_text("mine"))
    given = (*GIVEN, "--names", "lm_head", "--out", tmp_path / "out")
    assert run("record", *given).code == 2 and mine.read_text() == "mine"


@pytest.mark.skipif(output.fcntl is None, reason="needs file locks")
def test_two_runs_to_one_output_do_not_meet(
    tmp_path: Path, run: Run, refused: Refused, uninterrupted: bytes
) -> None:
    out = tmp_path / "out"
    with open_parts(out, {"tokens": [1]}):
        naming = (str(tmp_path / ".out.parts"), "another run")
        refused("record", *GIVEN, "--out", out, naming=naming)
        assert run("record", *GIVEN, "--out", tmp_path / "other").code == 0
    assert names(tmp_path) == ["other"]
    assert run("record", *GIVEN, "--out", out).code == 0
    assert out.read_bytes() == uninterrupted


def test_a_link_is_followed_and_an_old_output_replaced_at_the_end(
    run: Run, tmp_path: Path, uninterrupted: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    kept, link = tmp_path / "elsewhere" / "kept", tmp_path / "link"
    kept.write_text("old")
    link.symlink_to(kept)
    watch(monkeypatch, lambda name: kept.read_text() == "old" or pytest.fail("it is gone"))
    assert run("record", *GIVEN, "--out", link).code == 0
    assert link.is_symlink() and kept.read_bytes() == uninterrupted
    assert names(tmp_path) == ["elsewhere", "link"] and names(tmp_path / "elsewhere") == ["kept"]


# What is wrong


@pytest.mark.parametrize(
    ("wrong", "naming"),
    [
        (("--layers", "11"), ("--layers 11", "0 to 10")),
        (("--layers", "0-3,99"), ("--layers 99", "0 to 10")),
        (("--layers", "3-1"), ("--layers", "'3-1'", "0-17,45")),
        (("--layers", "x"), ("--layers", "'x'", "0-17,45")),
        (("--layers", ""), ("--layers", "0-17,45")),
        (("--layers", "-1"), ("--layers",)),
        (("--layers", "1,,2"), ("--layers", "'1,,2'")),
        (("--layers", "9" * 5000), ("--layers", "0-17,45")),
        (("--names", "model.layers.9.moe.*"), ("--names model.layers.9.moe.*", "matches no name")),
        (("--names", "*.moe.ids", "--names", "*.moes"), ("--names *.moes", "matches no name")),
        (("--names", ""), ("--names", "not empty")),
        (("--layers", "0-1", "--names", "*.moe.ids"), ("*.moe.ids", "of the layers given")),
        (("--layers", "3", "--names", "lm_head"), ("--names lm_head", "of the layers given")),
        (("--tokens", "4,5", "--layers", "9"), (f"{L}9", "MTP depth 2", "at least 3 tokens")),
        (("--tokens", ""), ("empty",)),
        (("--tokens", "4,320"), ("320", "position 1", "0 to 319")),
        (("--tokens", "4,-3"), ("-3", "position 1")),
        (("--tokens", ",".join("4" * 4097)), ("4097 tokens", "4096")),
        (("--dtype", "float16"), ("--dtype", "float16")),
        (("--input", GOLDEN / "no"), ("no", "cannot be read")),
        (("--input", TINY / "config.json", "--layers", "3"), ("config.json", "header")),
        (("--model", GOLDEN), (str(GOLDEN), "config.json")),
    ],
)  # fmt: skip
def test_what_cannot_be_recorded_is_refused_before_the_work(
    wrong: tuple[object, ...], naming: tuple[str, ...], tmp_path: Path, refused: Refused
) -> None:
    given = (*GIVEN, "--layers", "2") if wrong[0] == "--input" else GIVEN
    refused("record", *given, *wrong, "--out", tmp_path / "out", naming=naming)
    assert names(tmp_path) == []


def test_a_prompt_must_be_given_once(refused: Refused, tmp_path: Path) -> None:
    given = ("record", "--model", TINY, "--out", tmp_path / "out")
    refused(*given, naming=("--tokens", "--prompt"))
    refused(*given, "--tokens", "4", "--prompt", "x", naming=("--prompt", "--tokens"))
    refused("record", "--model", TINY, "--tokens", "4", naming=("--out",))


@pytest.mark.parametrize("place", ["no/parent", "file/below", "folder", "loop", "", "x" * 300])
def test_an_output_that_cannot_be_written_is_refused_before_the_work(
    place: str, tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    watch(monkeypatch, lambda name: name != L + "0" or pytest.fail("the work was done"))
    before = names(tmp_path)
    naming = ("out" if not place else str(tmp_path / place), "" if not place else "cannot be")
    refused("record", *GIVEN, "--out", tmp_path / place if place else "", naming=naming)
    assert names(tmp_path) == before and names(tmp_path / "folder") == []


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_device_is_never_replaced(tmp_path: Path, refused: Refused) -> None:
    os.mkfifo(tmp_path / "pipe")
    refused("record", *GIVEN, "--out", tmp_path / "pipe", naming=("pipe", "cannot be written"))
    assert (tmp_path / "pipe").is_fifo() and names(tmp_path) == ["pipe"]


def test_an_output_among_the_checkpoint_s_files_is_refused(
    sharded_tiny: Path, refused: Refused
) -> None:
    before = {file.name: file.read_bytes() for file in sharded_tiny.iterdir()}
    for name in ("model-00001.safetensors", "config.json", "model.safetensors.index.json"):
        given = ("--model", sharded_tiny, *GIVEN[2:], "--out", sharded_tiny / name)
        refused("record", *given, naming=(name, "belongs to the checkpoint"))
    assert {file.name: file.read_bytes() for file in sharded_tiny.iterdir()} == before


def test_an_output_that_is_the_input_is_refused(run: Run, refused: Refused, tmp_path: Path) -> None:
    whole, link = tmp_path / "whole", tmp_path / "link"
    assert run("record", *GIVEN, "--layers", "2", "--out", whole).code == 0
    link.symlink_to(whole)
    before = whole.read_bytes()
    for source, out in ((whole, whole), (link, whole), (whole, link)):
        given = (*GIVEN, "--layers", "3", "--input", source, "--out", out)
        refused("record", *given, naming=(f"--out {out}", "is an input"))
    assert whole.read_bytes() == before and names(tmp_path) == ["link", "whole"]


def test_an_input_of_another_prompt_model_or_layer_is_refused(
    run: Run, refused: Refused, tmp_path: Path
) -> None:
    whole, odd, out = tmp_path / "whole", tmp_path / "odd", tmp_path / "out"
    assert run("record", *GIVEN, "--names", "*.[1-9]", "--out", whole).code == 0
    other = ("--model", FOLDERS[1], "--tokens", "1,2,3,4,5,6,7,8")
    assert run("record", *other, "--layers", "1", "--out", odd).code == 0
    save_file({L + "2": load_file(odd)[L + "1"]}, tmp_path / "wide")
    save_file({L + "2": load_file(whole)[L + "2"][:5]}, tmp_path / "short")
    more = np.concatenate([load_file(whole)[L + "2"]] * 2)[:9]
    save_file({L + "2": more}, tmp_path / "long")
    save_file({L + "9.input": load_file(whole)[L + "8"][:5]}, tmp_path / "short mtp")
    save_file({L + "2": load_file(whole)[L + "2"][0]}, tmp_path / "flat")
    save_file({L + "2": np.zeros((8, 64), np.int64)}, tmp_path / "whole numbers")
    save_file({L + "2": np.full((8, 64), np.nan, np.float32)}, tmp_path / "nan")
    cut = tmp_path / "cut"
    cut.write_bytes(whole.read_bytes()[:-100])
    before = names(tmp_path)
    for file, layer, naming in (
        (odd, 3, ("another prompt",)),
        (tmp_path / "wide", 3, (L + "2", "[8, 40]", "[8, 64]")),
        (tmp_path / "short", 3, (L + "2", "[5, 64]", "[8, 64]")),
        (tmp_path / "long", 3, (L + "2", "[9, 64]", "[8, 64]")),
        (tmp_path / "short mtp", 9, (L + "9.input", "[5, 64]", "[6, 64]")),
        (tmp_path / "flat", 3, (L + "2", "[64]")),
        (tmp_path / "whole numbers", 3, (L + "2", "int64", "floats")),
        (tmp_path / "nan", 3, (L + "2", "nan")),
        (cut, 3, ("truncated",)),
        (tmp_path / "short", 5, (L + "5.input", L + "4")),
        (tmp_path / "missing", 5, ("cannot be read",)),
    ):
        given = (*GIVEN, "--layers", layer, "--input", file, "--out", out)
        refused("record", *given, naming=(str(file), *naming))
    refused("record", *GIVEN, "--input", whole, "--out", out, naming=("--input", "--layers"))
    assert names(tmp_path) == before


@pytest.mark.parametrize(
    ("weight", "place", "first"),
    [
        ("model.embed_tokens.weight", (17, 3), "model.embed_tokens is nan at [1, 3]"),
        (L + "3.input_layernorm.weight", 2, L + "3.input_layernorm is nan at [0, 2]"),
        (L + "3.moe.gate.weight", (4, 0), L + "3.moe.gate is nan at [0, 4]"),
        ("model.norm.weight", 3, "model.norm is nan at [0, 3]"),
        ("lm_head.weight", (319, 0), "lm_head is nan at [0, 319]"),
        (L + "8.eh_proj.weight", (5, 0), L + "8.eh_proj is nan at [0, 5]"),
        (L + "9.transformer.shared_head.norm.weight", 0, L + "9.transformer.shared_head.norm is nan at [0, 0]"),
        (L + "9.transformer.shared_head.output.weight", (7, 0), L + "9.transformer.shared_head.output is nan at [0, 7]"),
    ],
    ids=lambda value: value if isinstance(value, str) and value.endswith("weight") else "",
)  # fmt: skip
def test_what_is_not_finite_is_refused_at_its_place(
    weight: str, place: Any, first: str, run: Run, refused: Refused, tmp_path: Path
) -> None:
    spoiled = shutil.copytree(GOLDEN / "tiny" / "fp32", tmp_path / "spoiled")
    held = load_file(spoiled / "model.safetensors")
    held[weight][place] = np.nan
    save_file(held, spoiled / "model.safetensors")
    given = ("--model", spoiled, "--tokens", "5,17,9,4", "--out", tmp_path / "out")
    for command in ("record", "trace"):
        refused(command, *given, naming=(first, "expected finite numbers"))
    assert names(tmp_path) in (["spoiled"], [".out.parts", "spoiled"])


def test_a_state_that_is_not_finite_is_refused_though_it_is_not_written(
    refused: Refused, tmp_path: Path
) -> None:
    spoiled = shutil.copytree(GOLDEN / "tiny" / "fp32", tmp_path / "spoiled")
    held = load_file(spoiled / "model.safetensors")
    held[L + "3.share_expert.down_proj.weight"][1, 0] = np.inf
    save_file(held, spoiled / "model.safetensors")
    given = ("--model", spoiled, "--tokens", "5,17", "--names", "*.moe.ids")
    refused("record", *given, "--out", tmp_path / "out", naming=(f"{L}3 is ", "at [0, "))
    assert not (tmp_path / "out").exists()


def test_a_full_disk_names_the_output_of_trace(
    refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(trace, "write_tensors", full)
    out = tmp_path / "out"
    refused("trace", *GIVEN, "--out", out, naming=(f"{out}: cannot be written: No space left",))
    assert names(tmp_path) == []


# What it costs


def test_memory_holds_one_layer_whatever_their_number(tmp_path: Path) -> None:
    source = json.loads((minstep.find_config("odd") / "config.json").read_text())
    peaks = []
    for count in (4, 24):
        kinds = ["full_attention", *["sliding_attention"] * (count - 1)]
        changes = dict.fromkeys(("swiglu_limits", "swiglu_limits_shared"), 0.0)
        per_layer = {"layer_types": kinds, "rope_theta": 1e4, "partial_rotary_factors": 1.0}
        config = source | changes | per_layer
        config |= {"num_hidden_layers": count, "num_nextn_predict_layers": 0}
        config["moe_layers_enum"] = ",".join(map(str, range(2, count)))
        made = tmp_path / str(count)
        made.mkdir()
        (made / "config.json").write_text(json.dumps(config))
        parsed = minstep.load_config(made)
        drawn = dict(
            minstep.store.random_checkpoint.random_tensors(parsed, np.random.default_rng(0))
        )
        save_file({n: np.array(x) for n, x in drawn.items()}, made / "model.safetensors")
        (made / "config.json").write_text(json.dumps(config | {"torch_dtype": "float32"}))
        checkpoint = minstep.open_checkpoint(made)
        tokens = [3] * 400
        job = plan(checkpoint, tokens, np.float32, globs=["*"])
        tracemalloc.start()
        record_file(job, tmp_path / f"{count}.out")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    sizes = [(tmp_path / f"{count}.out").stat().st_size for count in (4, 24)]
    assert sizes[1] > 5 * sizes[0] and sizes[1] > 4 * peaks[1]
    assert peaks[1] < 1.2 * peaks[0], peaks


def test_memory_holds_the_logits_once(run: Run, tmp_path: Path) -> None:
    config = json.loads((minstep.find_config("tiny") / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"vocab_size": 40_000}))
    made = tmp_path / "made"
    assert run("make-tiny", tmp_path / "config.json", "--out", made) == (0, "", "")
    job = plan(minstep.open_checkpoint(made), [3] * 400, np.float32, globs=["lm_head"])
    tracemalloc.start()
    record_file(job, tmp_path / "out")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    logits = 400 * 40_000 * 4
    assert logits < peak < 1.2 * logits


@pytest.mark.parametrize("in_blocks", [False, True])
@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.parent.name)
def test_no_component_writes_into_what_it_has_shown(
    folder: Path, in_blocks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (attention, linear, moe) if in_blocks else ():
        monkeypatch.setattr(module, "LARGE", 0)
    checkpoint, shown = minstep.open_checkpoint(folder), Tensors()

    class Copying(Recorder):
        def __call__(self, name: str, x: Any) -> Any:
            shown[self._full(name)] = x.copy()
            return super().__call__(name, x)

    tap = Copying({}, lambda name: not in_blocks or not name.endswith(".probs"))
    trace.walk([3, 1, 4, 1, 5, 2, 6, 5], checkpoint.weights(), checkpoint.config, np.float32, tap)
    assert tap.tensors.keys() == shown.keys()
    for name, x in shown.items():
        assert np.array_equal(tap.tensors[name], x), name


@pytest.mark.parametrize("count", [1, 2, 8])
def test_the_bytes_of_a_stage_are_guessed_from_experts_chosen_at_random(count: int) -> None:
    """4 of 16 experts a token, each as likely; of the embedding a row for each token."""
    checkpoint = minstep.open_checkpoint(TINY)
    job = plan(checkpoint, TOKENS[:count], "float32")
    read = {stage.name: 0.0 for stage in job.stages}
    for name, tensor in checkpoint.tensors.items():
        for stage in (stage for stage in job.stages if stage.has(name)):
            is_expert = ".moe." in name and "_proj." in name
            share = 1 - (12 / 16) ** count if is_expert else 1
            share = count / 320 if "embed_tokens" in name else share
            read[stage.name] += tensor.nbytes * share
    for stage in job.stages:
        more = 64 * 2 * count if stage.name in MTP else 0  # a look-up of the next tokens
        assert job.reads(stage) == pytest.approx(read[stage.name] + more, abs=3), stage.name


def test_the_bar_counts_the_bytes_of_the_experts_that_were_chosen(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[tuple[str, int, int]] = []

    class Bar(minstep.cli.terminal.Progress):
        def __call__(self, done: int) -> None:
            shown.append((self.label, done, self.total))

    monkeypatch.setattr(minstep.cli.parity, "Progress", Bar)
    out = tmp_path / "out"
    assert (
        run("record", *GIVEN, "--names", "lm_head", "--names", "*.moe.ids", "--out", out).code == 0
    )
    assert [label for label, _, _ in shown] == ORDER[1 : ORDER.index("lm_head") + 1]
    checkpoint, ids = minstep.open_checkpoint(TINY), load_file(out)
    for (layer, before, _), (_, after, _) in zip(shown, shown[1:], strict=False):
        read = 0
        for name, tensor in checkpoint.tensors.items():
            if name.startswith(f"{layer}."):
                is_expert = ".moe." in name and name.count("proj")
                chosen = len(np.unique(ids[f"{layer}.moe.ids"])) if is_expert else 1
                read += tensor.nbytes // (tensor.shape[0] if is_expert else 1) * chosen
        assert after - before == read, layer
    sizes = [total for _, _, total in shown]
    logits = sum(checkpoint.tensors[f"{n}.weight"].nbytes for n in ("lm_head", "model.norm"))
    assert sizes[-1] == shown[-1][1] + logits
