"""Recordings of any engine, read by our names a tensor at a time."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import minstep
from minstep.errors import InputError
from minstep.fast.bf16 import BF16Array, to_bf16
from minstep.parity.engine_tensors import Recording, align, open_recording
from minstep.parity.trace import Trace, record
from tests.model.test_golden import GOLDEN, WEIGHTS, meta
from tests.support.recordings import as_transformers, as_vllm, layers_of, rounded, save

FOLDER = GOLDEN / "tiny" / "bf16"
CONFIG = minstep.load_config(FOLDER)
TOKENS = meta(FOLDER)["prompt"]
FACTOR = next(spec.moe.scaling_factor for spec in CONFIG.layers if spec.moe)
L3 = "model.layers.3"


@pytest.fixture(scope="module")
def trace() -> Trace:
    return record(TOKENS, WEIGHTS[FOLDER], CONFIG)


@pytest.fixture
def ours(trace: Trace) -> Recording:
    return Recording("ours", trace, TOKENS)


def opened(tmp_path: Path, trace: Any, **metadata: Any) -> Recording:
    return open_recording(save(trace, tmp_path / "theirs.safetensors", **metadata))


def test_a_trace_comes_back_as_it_was(tmp_path: Path, trace: Trace) -> None:
    theirs = opened(tmp_path, trace, tokens=TOKENS)
    assert theirs.names == list(trace)
    assert theirs.tokens == TOKENS and theirs.rows == len(TOKENS)
    assert theirs.engine_dtype == "float32"
    for name, x in trace.items():
        assert theirs.source(name) == name and theirs.shape(name) == x.shape
        np.testing.assert_array_equal(theirs.array(name), x)


def test_the_package_for_safetensors_writes_such_files(tmp_path: Path, trace: Trace) -> None:
    save_file(trace, tmp_path / "theirs.safetensors", {"tokens": json.dumps(TOKENS)})
    theirs = open_recording(tmp_path / "theirs.safetensors")
    assert theirs.names == list(trace)  # though the file has them by dtype and name
    for name, x in trace.items():
        np.testing.assert_array_equal(theirs.array(name), x)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_other_floats_are_read_exactly(tmp_path: Path, trace: Trace, dtype: str) -> None:
    theirs = opened(tmp_path, {name: rounded(x, dtype) for name, x in trace.items()})
    assert theirs.engine_dtype == dtype
    for name, x in trace.items():
        expected = np.asarray(rounded(x, dtype), x.dtype if dtype != "float64" else None)
        assert theirs.dtype(name) == (dtype if x.dtype.kind == "f" else "int64")
        assert theirs.array(name).dtype == expected.dtype
        np.testing.assert_array_equal(theirs.array(name), expected)


def test_an_engine_is_judged_by_its_metadata_or_else_by_its_least_precise_floats(
    tmp_path: Path,
) -> None:
    x = np.ones((2, 3), np.float32)
    mixed = {"model.layers.0.moe.gate": x, "model.layers.0": rounded(x, "float16"), "a": x + 0.0}
    assert opened(tmp_path, mixed).engine_dtype == "float16"
    mixed["model.layers.1"] = rounded(x, "bfloat16")
    assert opened(tmp_path, mixed).engine_dtype == "bfloat16"
    assert opened(tmp_path, mixed, dtype="float32").engine_dtype == "float32"
    assert opened(tmp_path, {"a": x}, dtype="torch.bfloat16").engine_dtype == "bfloat16"
    assert opened(tmp_path, {"a": np.ones(2, int)}).engine_dtype == "float32"


def test_batch_axes_and_no_others_are_left_out(tmp_path: Path) -> None:
    def shape(name: str, *sizes: int, rows: int = 5) -> tuple[int, ...]:
        x = {name: np.ones(sizes, np.float32)}
        return opened(tmp_path, x, tokens=list(range(rows))).array(name).shape

    assert shape(L3, 1, 5, 8) == (5, 8)
    assert shape(L3, 1, 1, 8, rows=1) == (1, 8)
    assert shape(L3, 1, 8, rows=1) == (1, 8)
    assert shape(L3, 2, 5, 8) == (2, 5, 8)
    assert shape(f"{L3}.self_attn.q_norm", 1, 5, 4, 2) == (5, 4, 2)
    assert shape(f"{L3}.self_attn.q_norm", 1, 5, 8) == (5, 8)
    assert shape(f"{L3}.self_attn.q_norm", 1, 4, 2, rows=1) == (1, 4, 2)
    assert shape(f"{L3}.self_attn.probs", 1, 4, 5, 5) == (4, 5, 5)
    assert shape(f"{L3}.self_attn.probs", 1, 5, 5) == (1, 5, 5)  # one head
    assert shape(f"{L3}.moe.margin", 1, 5) == (5,)
    assert shape("lm_head", 1, 1, 8) == (1, 8)
    assert shape(f"{L3}.self_attn.q_proj.weight", 1, 8) == (1, 8)
    assert shape("zebra", 1, 5, 8) == (1, 5, 8)


def test_all_that_transformers_has_comes_by_our_names(
    tmp_path: Path, trace: Trace, ours: Recording
) -> None:
    theirs = opened(tmp_path, as_transformers(trace, FACTOR, np.random.default_rng(0)))
    names = align(ours, theirs)
    absent = ("_rope", ".margin", ".probs")
    main = [name for name in trace if int((name + "..").split(".")[2] or 0) < len(CONFIG.layers)]
    sums = [f"{at}.mlp" for at in layers_of(trace, "moe")]
    assert set(names) == {name for name in main if not name.endswith(absent)} | set(sums)
    for name in names:
        x = trace[name] if name in trace else ours.array(name)
        np.testing.assert_allclose(theirs.array(name), x, rtol=1e-6, atol=1e-7)
    assert theirs.source(f"{L3}.moe") == "model.language_model.layers.3.mlp.experts"
    assert theirs.source(f"{L3}.moe.ids") == "model.language_model.layers.3.mlp.gate.2"
    assert ours.source(f"{L3}.mlp") == f"{L3}.moe + {L3}.share_expert"


def test_all_that_vllm_has_comes_by_our_names(
    tmp_path: Path, trace: Trace, ours: Recording
) -> None:
    theirs = opened(tmp_path, as_vllm(trace))
    names = align(ours, theirs)
    absent = (".probs", ".margin", ".moe.ids", ".moe.weights", ".moe")
    sums = {f"{at}.mlp" for at in layers_of(trace, "moe")}
    assert set(names) == {name for name in trace if not name.endswith(absent)} | sums
    for name in names:
        x = trace[name] if name in trace else ours.array(name)
        np.testing.assert_array_equal(theirs.array(name).reshape(x.shape), x)
    assert theirs.source(f"{L3}.self_attn.k_proj") == f"{L3}.self_attn.qkv_proj"


def test_a_fused_projection_is_cut_by_whichever_part_the_other_has(
    tmp_path: Path, trace: Trace
) -> None:
    fused = as_vllm(trace)
    for proj in ("q_proj", "k_proj", "v_proj"):
        name = f"{L3}.self_attn.{proj}"
        theirs = opened(tmp_path, {f"{L3}.self_attn.qkv_proj": fused[f"{L3}.self_attn.qkv_proj"]})
        assert align(Recording("ours", {name: trace[name]}), theirs) == [name]
        np.testing.assert_array_equal(theirs.array(name), trace[name])


def test_a_config_says_the_sizes_and_the_factor_that_no_recording_has(
    tmp_path: Path, trace: Trace
) -> None:
    names = [f"{L3}.self_attn.k_proj", f"{L3}.moe"]
    native = as_transformers(trace, FACTOR, np.random.default_rng(0))
    source = "model.language_model.layers.3.mlp.experts"
    theirs = {source: native[source]}
    theirs[f"{L3}.self_attn.qkv_proj"] = as_vllm(trace)[f"{L3}.self_attn.qkv_proj"]
    ours = {name: trace[name] for name in names}
    assert align(Recording("ours", ours), opened(tmp_path, theirs)) == names[:1]
    recording = opened(tmp_path, theirs)
    assert align(Recording("ours", ours), recording, CONFIG) == names
    for name in names:
        np.testing.assert_allclose(recording.array(name), trace[name], rtol=1e-6)


def test_two_recordings_with_the_same_fused_tensor_compare_it_whole(
    tmp_path: Path, trace: Trace
) -> None:
    fused = opened(tmp_path, as_vllm(trace))
    assert f"{L3}.self_attn.qkv_proj" in align(fused, Recording("other", as_vllm(trace)))
    native = as_transformers(trace, FACTOR, np.random.default_rng(0))
    common = align(opened(tmp_path, native), Recording("other", native))
    assert f"{L3}.moe.unscaled" in common and f"{L3}.moe" not in common


def test_a_beginning_is_what_would_be_recorded_of_it_alone(trace: Trace) -> None:
    depths = {int(at.split(".")[-1]): k for k, at in enumerate(layers_of(trace, "eh_proj"), 1)}
    for end in (1, 3, len(TOKENS)):
        alone = record(TOKENS[:end], WEIGHTS[FOLDER], CONFIG)
        for form in (trace, {name: x[None] for name, x in trace.items()}):
            found = Recording("ours", form, TOKENS).beginning(end, depths)
            assert (found.tokens, found.rows, found.names) == (TOKENS[:end], end, [*alone])
            for name, x in alone.items():
                assert found.shape(name) == x.shape, name
                np.testing.assert_allclose(found.array(name), x, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("first", ["lm_head", f"{L3}.eh_proj", f"{L3}.self_attn.probs", "odd"])
def test_the_prompt_is_as_long_as_the_states_of_a_main_layer(first: str) -> None:
    """Logits may be of one token, an MTP layer has fewer rows or more, whichever comes first."""
    other = np.zeros((1, 1, 64) if first.endswith("probs") else (1, 64), np.float32)
    for state in (np.zeros((7, 64), np.float32), np.zeros((1, 7, 64), np.float32)):
        there = Recording("theirs", {first: other, f"{L3}.enorm": other, "layers.0": state})
        assert there.rows == 7 and Recording("theirs", {first: other}).rows is None


def test_weights_are_mapped_too(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    gate, up, down = (rng.standard_normal((4, 6, 5)).astype(np.float32) for _ in range(3))
    q, k, v = (rng.standard_normal((rows, 5)).astype(np.float32) for rows in (8, 4, 4))
    theirs = {
        f"{L3}.moe.experts.routed_experts.w13_weight": np.concatenate((gate, up), axis=1),
        f"{L3}.moe.experts.routed_experts.w2_weight": down,
        f"{L3}.self_attn.qkv_proj.weight": np.concatenate((q, k, v)),
    }
    ours = {
        f"{L3}.self_attn.q_proj.weight": q,
        f"{L3}.self_attn.v_proj.weight": v,
        f"{L3}.moe.gate_proj.weight": gate,
        f"{L3}.moe.up_proj.weight": up,
        f"{L3}.moe.down_proj.weight": down,
    }
    recording = opened(tmp_path, theirs)
    assert align(Recording("ours", ours), recording) == list(ours)
    for name, x in ours.items():
        np.testing.assert_array_equal(recording.array(name), x)


def test_a_module_and_its_last_part_are_one_tensor(tmp_path: Path) -> None:
    part, module = np.zeros((5, 8), np.float32), np.ones((5, 8), np.float32)
    for wrapper, name in {
        f"{L3}.self_attn": f"{L3}.self_attn.o_proj",
        f"{L3}.self_attn.0": f"{L3}.self_attn.o_proj",
        f"{L3}.0": L3,
        f"{L3}.mtp_block": L3,
        f"{L3}.shared_head": f"{L3}.shared_head.norm",
    }.items():
        for pair in ({wrapper: module, name: part}, {name: part, wrapper: module}):
            recording = opened(tmp_path, pair)
            assert [recording.source(name) for name in recording.names] == [name]
        assert len(opened(tmp_path, {wrapper: module}).names) == 1


def test_one_tensor_at_a_time_is_copied(tmp_path: Path) -> None:
    bits = BF16Array(to_bf16(np.arange(12, dtype=np.float32).reshape(3, 4)))
    recording = opened(tmp_path, {"lm_head": bits, "a": np.ones(2, np.float32)})
    x = recording.array("lm_head")
    assert x.flags.owndata and x.flags.writeable and x.dtype == np.float32
    x[:] = 0
    assert recording.array("lm_head")[2, 3] == 11


def test_parts_that_do_not_fit_are_refused(tmp_path: Path, trace: Trace) -> None:
    shared, name = trace[f"{L3}.share_expert"], f"{L3}.mlp"
    theirs = opened(tmp_path, trace | {f"{L3}.share_expert": shared[:-1]})
    assert name in align(Recording("ours", {name: shared}), theirs)
    with pytest.raises(InputError, match=r"layers.3.mlp has parts of shape .* expected the same"):
        theirs.array(name)
    theirs = opened(tmp_path, trace | {f"{L3}.moe.ids": trace[f"{L3}.moe.ids"][:, :-1]})
    with pytest.raises(InputError, match=r"moe.weights has parts of shape .* expected the same"):
        theirs.array(f"{L3}.moe.weights")


def test_odd_shapes_of_fused_tensors_are_left_as_they_are(tmp_path: Path) -> None:
    flat = {f"{L3}.self_attn.qkv_proj.weight": np.ones(8, np.float32), "lm_head": np.ones((2, 2))}
    flat |= {f"{L3}.mlp.gate_up_proj.weight": np.ones(8, np.float32)}
    recording = opened(tmp_path, flat)
    weight = f"{L3}.self_attn.q_proj.weight"
    ours = Recording("ours", {weight: np.ones((4, 2)), "lm_head": np.ones((2, 2))})
    assert align(ours, recording) == ["lm_head"]
    assert align(ours, recording, CONFIG) == [weight, "lm_head"]
    assert recording.shape(weight) == recording.shape(f"{L3}.mlp.up_proj.weight") == (8,)


@pytest.mark.parametrize(
    "metadata, words",
    [
        ({"tokens": "5,17"}, ("tokens", "5,17", "expected a JSON list")),
        ({"tokens": "[5, 1.5]"}, ("tokens", "expected a JSON list")),
        ({"tokens": "[5, -1]"}, ("tokens", "expected a JSON list")),
        ({"tokens": "[[5, 1]]"}, ("tokens", "expected a JSON list")),
        ({"tokens": "{}"}, ("tokens", "expected a JSON list")),
        ({"tokens": "[" * 100_000}, ("tokens", "expected a JSON list")),
        ({"dtype": "int4"}, ("dtype", "int4", "bfloat16")),
    ],
)
def test_bad_metadata_is_refused(
    tmp_path: Path, metadata: dict[str, str], words: tuple[str, ...]
) -> None:
    with pytest.raises(InputError) as refused:
        opened(tmp_path, {"lm_head": np.ones((1, 2), np.float32)}, **metadata)
    for word in ("theirs.safetensors", *words):
        assert word in str(refused.value)
    assert len(str(refused.value)) < 400 and "\n" not in str(refused.value)


@pytest.mark.parametrize("metadata", [["tokens"], {"tokens": [1]}, "tokens", 7])
def test_metadata_that_is_not_texts_by_name_is_refused(tmp_path: Path, metadata: Any) -> None:
    text = json.dumps({"__metadata__": metadata}).encode()
    (tmp_path / "a").write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(InputError, match="a: header is malformed: __metadata__.* expected"):
        open_recording(tmp_path / "a")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused_with_its_place(
    tmp_path: Path, dtype: str, value: float
) -> None:
    x = np.ones((1, 5, 8), np.float32)
    x[0, 2, 3] = x[0, 4, 0] = value
    bits = BF16Array((x.view(np.uint32) >> 16).astype(np.uint16))
    theirs = {"layers.3": bits if dtype == "bfloat16" else x.astype(dtype), "norm": x[:, :2]}
    recording = opened(tmp_path, theirs)
    with pytest.raises(InputError) as refused:
        recording.array(L3)
    for word in ("theirs.safetensors", "layers.3", str(value), "[2, 3]", "expected finite"):
        assert word in str(refused.value)
    recording.array("model.norm")


def test_two_tensors_with_one_name_of_ours_are_refused(tmp_path: Path) -> None:
    x = np.ones((5, 8), np.float32)
    with pytest.raises(InputError) as refused:
        opened(tmp_path, {"layers.3.input_layernorm": x, f"{L3}.input_layernorm": x})
    for word in ("layers.3.input_layernorm and ", f"{L3}.input_layernorm are both", "expected one"):
        assert word in str(refused.value)


def test_a_dtype_that_no_recording_has_is_refused(tmp_path: Path) -> None:
    path = save({"lm_head": np.ones((4, 2), np.int32)}, tmp_path / "a")
    path.write_bytes(path.read_bytes().replace(b'"I32", "shape": [4', b'"F8_E4M3", "shape": [16'))
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little") + len(b"F8_E4M3") - len(b"I32") + 1
    path.write_bytes(length.to_bytes(8, "little") + data[8:])
    with pytest.raises(InputError, match="tensor lm_head has dtype F8_E4M3, expected one of F64"):
        open_recording(path)


@pytest.mark.parametrize("missing", [1, 100, 2000])
def test_a_truncated_file_is_refused_when_it_is_opened(
    tmp_path: Path, trace: Trace, missing: int
) -> None:
    path = save(trace, tmp_path / "a")
    path.write_bytes(path.read_bytes()[:-missing])
    with pytest.raises(InputError, match="truncated|expected"):
        open_recording(path)


def test_what_has_no_elements_or_no_axes_is_no_trouble(tmp_path: Path) -> None:
    recording = opened(tmp_path, {"a": np.zeros((0, 4), np.float32), "b": np.float32(3.0)})
    assert recording.array("a").shape == (0, 4) and recording.array("b") == 3.0
