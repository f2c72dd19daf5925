"""float8_e4m3fn: all 256 codes, blocks of scales, what is refused, and checkpoints that hold it."""

import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from minstep import InputError, find_config, open_checkpoint
from minstep.config import parse_config, parse_quantization
from minstep.fast.bf16 import BF16Array, to_bf16
from minstep.fast.fp8 import LARGEST, FP8Array, to_fp8
from minstep.linear import as_float, linear
from minstep.parity.trace import record
from minstep.store.json_file import read_json
from minstep.store.output import Data, write_tensors
from minstep.weights import assemble, blocks, tensor_shapes
from tests.conftest import Refused, Run

RNG = np.random.default_rng(0)
TOKENS = ("--tokens", "5,17,9", "--max-tokens", "4")
SCALES = ".moe.up_proj.weight_scale_inv"


def value(code: int) -> float:
    """A code's value by the definition: sign, 4 bits of exponent, 3 of mantissa."""
    sign, exponent, mantissa = (-1) ** (code >> 7), code >> 3 & 15, code & 7
    size = 2.0 ** (exponent - 7) * (1 + mantissa / 8) if exponent else 2.0**-6 * mantissa / 8
    return sign * size


def fp8(codes: Any, scales: Any, block: tuple[int, int], name: str = "w") -> FP8Array:
    return FP8Array(np.asarray(codes, np.uint8), np.asarray(scales, np.float32), block, name)


@pytest.mark.parametrize("scale", [1.0, 2.0**-20, 3e-4, 1000.0, 2.0**118])
def test_every_code_has_the_value_of_its_definition(scale: float) -> None:
    for code in range(256):
        one = fp8([[code]], [[scale]], (1, 1))
        if code & 0x7F == 0x7F:
            with pytest.raises(InputError, match=r"w: is not a number at \[0, 0\]"):
                as_float(one, np.float32)
            continue
        exact = np.float32(value(code)) * np.float32(scale)
        found = as_float(one, np.float32)[0, 0]
        assert found == exact and np.signbit(found) == np.signbit(exact), code
    assert value(0x7E) == LARGEST and value(1) == 2.0**-9


def test_a_scale_of_any_size_gives_each_code_its_exact_product() -> None:
    finite = [code for code in range(256) if code & 0x7F != 0x7F]
    codes, values = np.array([finite], np.uint8), np.array([[*map(value, finite)]], np.float32)
    for exponent in range(-149, 128):
        for mantissa in (1.0, 1.3, 1.99):
            scale = np.float32(mantissa * 2.0**exponent)
            with np.errstate(over="ignore"):
                found = as_float(fp8(codes, [[scale]], (1, codes.size)), np.float32)
                assert np.array_equal(found, values * scale), scale


@pytest.mark.parametrize("shape", [(5, 7), (16, 8), (33, 20), (1, 1), (2, 19, 9)])
@pytest.mark.parametrize("block", [(4, 3), (128, 128), (1, 1), (5, 2), (2**31 - 1, 2**31 - 1)])
def test_each_block_has_its_own_scale_wherever_slices_are_cut(
    shape: tuple[int, ...], block: tuple[int, int]
) -> None:
    codes = RNG.integers(0, 0x7F, shape).astype(np.uint8) | 0x80 * RNG.integers(0, 2, shape)
    scales = RNG.uniform(0.5, 2, blocks(shape, block)).astype(np.float32)
    expected = np.empty(shape, np.float32)
    for place in np.ndindex(shape):
        i, j = place[-2] // block[0], place[-1] // block[1]
        expected[place] = np.float32(value(codes[place])) * scales[(*place[:-2], i, j)]
    stored = fp8(codes, scales, block)
    assert stored.shape == shape and len(stored) == shape[0]
    assert np.array_equal(as_float(stored, np.float32), expected)
    assert np.array_equal(as_float(stored, np.float64), expected.astype(np.float64))
    matrix, whole = (stored, expected) if len(shape) == 2 else (stored[1], expected[1])
    for start in range(len(whole)):
        for stop in (start + 1, start + 4, len(whole)):
            part = matrix[start:stop]
            assert np.array_equal(as_float(part, np.float32), whole[start:stop])
            assert np.array_equal(as_float(part[1:], np.float32), whole[start:stop][1:])
    x = RNG.standard_normal((3, shape[-1]))
    np.testing.assert_allclose(linear(x, matrix), x @ whole.T.astype(np.float64), rtol=1e-13)


def test_a_nan_is_refused_with_its_place_in_the_tensor() -> None:
    codes = np.zeros((3, 300, 5), np.uint8)
    codes[2, 290, 4] = 0xFF
    stored = fp8(codes, np.ones((3, 3, 1)), (128, 128), "file: tensor name")
    with pytest.raises(InputError, match=r"^file: tensor name\[2\]: is not a number at \[290, 4\]"):
        stored[2][200:][50:].into(np.empty((50, 5), np.float32))
    linear(np.ones((1, 5), np.float32), stored[1])
    with pytest.raises(InputError, match=r"\[290, 4\]"):
        linear(np.ones((1, 5), np.float32), stored[2])


def test_rounding_is_to_the_nearest_value_and_ties_go_to_even() -> None:
    finite = np.array([value(code) for code in range(0x7F)], np.float32)
    middles = (finite[1:] + finite[:-1]) / 2
    x = np.concatenate((finite, middles, np.nextafter(middles, 0), np.nextafter(middles, 999)))
    x = np.concatenate((x, -x, [np.float32(LARGEST)]))[None]
    codes, scales = to_fp8(x, (1, x.size))
    assert scales.tolist() == [[1.0]]
    found = as_float(fp8(codes, scales, (1, x.size)), np.float32)
    for wanted, got in zip(x[0], found[0], strict=True):
        errors = abs(finite - abs(wanted))
        nearest = np.flatnonzero(errors == errors.min())
        even = nearest[nearest % 2 == 0][0] if len(nearest) > 1 else nearest[0]
        assert abs(got) == finite[even] and (got == 0 or np.sign(got) == np.sign(wanted))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny FP8 checkpoint whose experts have several blocks, the last ones cut."""
    top = tmp_path_factory.mktemp("fp8")
    raw = read_json(find_config("tiny") / "config.json")
    raw["quantization_config"] = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "weight_block_size": [16, 24],
        "modules_to_not_convert": ["self_attn", "share_expert", "mlp", "moe.gate", "eh_proj"],
    }
    (top / "config.json").write_text(json.dumps(raw))
    from minstep.cli.main import main

    out = str(top / "made")
    assert main(["make-tiny", str(top), "--out", out, "--dtype", "fp8", "--shards", "3"]) == 0
    return top / "made"


@pytest.fixture
def spoilt(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "spoilt")


def test_only_routed_experts_are_stored_in_8_bits(made: Path, run: Run, tmp_path: Path) -> None:
    for folder in (made, tmp_path / "default"):
        if folder != made:
            assert run("make-tiny", "tiny", "--out", folder, "--dtype", "fp8").code == 0
        checkpoint = open_checkpoint(folder)
        for name, shape in tensor_shapes(checkpoint.config).items():
            tensor = checkpoint.tensors[name]
            is_expert = ".moe." in name and name.endswith("_proj.weight")
            assert (tensor.dtype == "F8_E4M3") == is_expert, name
            if is_expert:
                assert checkpoint.config.quantization
                block = checkpoint.config.quantization[:2]
                scales = checkpoint.tensors[f"{name}_scale_inv"]
                assert scales.dtype == "F32" and scales.shape == blocks(shape, block)


def test_an_fp8_checkpoint_computes_what_its_dequantized_weights_do(made: Path) -> None:
    checkpoint = open_checkpoint(made)

    def plain(name: str, shape: tuple[int, ...]) -> NDArray[np.float64]:
        return as_float(checkpoint.get(name, shape), np.float64)

    config = checkpoint.config
    stored = record([5, 17, 9, 200], checkpoint.weights(), config, np.float64)
    exact = record([5, 17, 9, 200], assemble(config, plain), config, np.float64)
    assert stored.keys() == exact.keys()
    for name, x in exact.items():
        np.testing.assert_allclose(stored[name], x, rtol=0, atol=1e-12 * abs(x).max())
    # And the weights are those that bfloat16 has, to 8 bits: 3 of mantissa.
    assert (made / "config.json").read_text().count("quantization_config") == 1


def test_scales_may_be_stored_in_bfloat16(made: Path, spoilt: Path) -> None:
    tensors: dict[str, Data] = {}
    for name, tensor in open_checkpoint(made).tensors.items():
        with tensor.file.open("rb") as opened:
            opened.seek(tensor.offset)
            stored = opened.read(tensor.nbytes)
        dtype = tensor.dtype
        if name.endswith("_scale_inv"):
            dtype, stored = "BF16", to_bf16(np.frombuffer(stored, np.float32)).tobytes()
        tensors[name] = Data(dtype, tensor.shape, [stored])
    for file in spoilt.glob("model*"):
        file.unlink()
    write_tensors(spoilt / "model.safetensors", tensors, {})
    ours, theirs = open_checkpoint(spoilt), open_checkpoint(made)
    for name, shape in tensor_shapes(ours.config).items():
        x, y = (checkpoint.stored(name, shape) for checkpoint in (ours, theirs))
        if isinstance(y, FP8Array):
            short = as_float(BF16Array(to_bf16(y.scales)), np.float32)
            expected = FP8Array(y.bits, short, y.block, name)
            assert np.array_equal(as_float(x, np.float32), as_float(expected, np.float32)), name
            assert not np.array_equal(short, y.scales), name


def test_fp8_is_near_what_it_was_made_from(made: Path, run: Run, tmp_path: Path) -> None:
    assert run("make-tiny", "tiny", "--out", tmp_path / "bf16", "--dtype", "bfloat16").code == 0
    ours, theirs = open_checkpoint(made), open_checkpoint(tmp_path / "bf16")
    for name, shape in tensor_shapes(ours.config).items():
        x, y = (as_float(c.get(name, shape), np.float32) for c in (ours, theirs))
        if ours.tensors[name].dtype == "F8_E4M3":
            assert 0 < np.abs(x - y).max() <= np.abs(y).max() / 16
        else:
            assert np.array_equal(x, y)


def test_inspect_and_generate_read_it(made: Path, run: Run) -> None:
    ran = run("inspect", made, "--json")
    assert ran.code == 0 and '"F8_E4M3"' in ran.out
    assert run("generate", "--model", made, *TOKENS).code == 0


def edit_config(folder: Path, **changes: Any) -> None:
    raw = json.loads((folder / "config.json").read_text())
    raw["quantization_config"] |= changes
    (folder / "config.json").write_text(json.dumps(raw))


@pytest.mark.parametrize(
    ("changes", "naming"),
    [
        ({"quant_method": "awq"}, ("quantization_config: quant_method", "fp8")),
        ({"fmt": "e5m2"}, ("fmt", "e4m3")),
        ({"weight_block_size": None}, ("weight_block_size", "[128, 128]")),
        ({"weight_block_size": [0, 4]}, ("weight_block_size",)),
        ({"weight_block_size": [True, 4]}, ("weight_block_size",)),
        ({"weight_block_size": [10**30, 10**30]}, ("weight_block_size",)),
        ({"weight_block_size": [16, 16]}, (SCALES.replace("up", "gate"), "expected [16, 2, 4]")),
        ({"modules_to_not_convert": "all"}, ("modules_to_not_convert",)),
        ({"modules_to_not_convert": ["moe"]}, ("moe.gate_proj.weight has dtype F8_E4M3", "BF16")),
    ],
)
def test_a_config_that_does_not_fit_is_refused(
    changes: dict[str, Any], naming: tuple[str, ...], spoilt: Path, refused: Refused
) -> None:
    edit_config(spoilt, **changes)
    refused("generate", "--model", spoilt, *TOKENS, naming=naming)


def test_without_a_quantization_config_8_bits_are_refused(spoilt: Path, refused: Refused) -> None:
    raw = json.loads((spoilt / "config.json").read_text())
    del raw["quantization_config"]
    (spoilt / "config.json").write_text(json.dumps(raw))
    refused("generate", "--model", spoilt, *TOKENS, naming=("F8_E4M3", "expected BF16"))


def test_missing_scales_are_named(spoilt: Path, refused: Refused) -> None:
    index = json.loads((spoilt / "model.safetensors.index.json").read_text())
    del index["weight_map"][f"model.layers.3{SCALES}"]
    (spoilt / "model.safetensors.index.json").write_text(json.dumps(index))
    refused("generate", "--model", spoilt, *TOKENS, naming=(f"model.layers.3{SCALES}", "missing"))


@pytest.mark.parametrize("what", ["weight", "scale"])
def test_what_is_not_finite_in_a_file_is_refused_when_it_is_used(
    what: str, spoilt: Path, refused: Refused
) -> None:
    for n in (2, 3, 4, 5, 6, 7):
        name = f"model.layers.{n}{SCALES}"
        name = name if what == "scale" else name.removesuffix("_scale_inv")
        tensor = open_checkpoint(spoilt).tensors[name]
        with tensor.file.open("r+b") as opened:
            opened.seek(tensor.offset)
            bad = b"\xff" * tensor.nbytes if what == "weight" else b"\0\0\xc0\x7f" * 200
            opened.write(bad[: tensor.nbytes])
    naming = ("moe.up_proj.weight", "not a number" if what == "weight" else "scale")
    refused("generate", "--model", spoilt, *TOKENS, naming=naming)


def test_excluded_modules_are_parts_of_names_not_of_words() -> None:
    raw = read_json(find_config("tiny") / "config.json")
    raw["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    raw["quantization_config"]["modules_to_not_convert"] = ["moe.gate", "model.layers.1", "lm_head"]
    quantization = parse_config(raw).quantization
    assert quantization
    for covered in ("model.layers.3.moe.gate_proj.weight", "model.layers.10.mlp.up_proj.weight"):
        assert quantization.covers(covered)
    for kept in ("model.layers.1.mlp.up_proj.weight", "lm_head.weight", "model.norm.weight"):
        assert not quantization.covers(kept)


def test_many_excluded_modules_cost_no_more_than_a_few() -> None:
    excluded = [f"model.layers.{n}.x" for n in range(300_000)]
    config = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    raw = {"quantization_config": config | {"modules_to_not_convert": excluded}}
    quantization = parse_quantization(raw, "config.json")
    assert quantization is not None
    start = time.perf_counter()
    for n in range(2000):
        assert quantization.covers(f"model.layers.{n}.moe.gate_proj.weight")
        assert not quantization.covers(f"model.layers.{n}.x.gate_proj.weight")
    assert time.perf_counter() - start < 10  # looking at each takes minutes
