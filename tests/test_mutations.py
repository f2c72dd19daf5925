"""Bugs that ports of this model have had, each planted as a one-line mutation, must not go unseen.

A mutation replaces one fragment of one source file, compiles the file again, and lends the code of
the changed functions to the real ones: whoever imported them meets the bug.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import FunctionType, ModuleType
from typing import NamedTuple

import numpy as np
import pytest
from safetensors.numpy import load_file

import minstep
from minstep.lab.trace import record

GOLDEN = Path(__file__).parent / "golden"
SEEN = 100 * 2e-5  # a hundred times the float32 tolerance, relative to the largest value


class Mutation(NamedTuple):
    """One bug: where it is planted, and the golden model that shows it."""

    bug: str
    module: str
    right: str
    wrong: str
    golden: str = "tiny"
    refused: bool = False  # the bug cannot run at all: a shape or a file does not fit


MUTATIONS = [
    Mutation("norm weight used as w", "norm", "(1 + as_float(weight, x.dtype))", "as_float(weight, x.dtype)"),
    Mutation("1 added twice to the norm weight", "norm", "(1 + as", "(2 + as"),
    Mutation("norm subtracts the mean", "norm", "np.square(x)", "np.square(x - x.mean(-1, keepdims=True))"),
    Mutation("scaling on sliding layers too", "config", "scaling if kind in scaled_kinds else None", "scaling"),
    Mutation("scaling on no layer", "config", "scaling if kind in scaled_kinds else None", "None"),
    Mutation("scaling divides every frequency", "rope", "keep * inv_freq + (1 - keep) * inv_freq / factor", "inv_freq / factor"),
    Mutation("first rope_theta for all layers", "config", "float(thetas[n])", "float(thetas[0])"),
    Mutation("head count of full layers everywhere", "config", "settings[kind] = other", "pass", refused=True),
    Mutation("rotary exponent over head_dim", "rope", "dtype=dtype) / spec.rotary_dim", "dtype=dtype) / spec.rotary_dim / 2"),
    Mutation("whole head rotated", "config", "int(head_dim * factor)", "head_dim"),
    Mutation("interleaved rotation", "rope", "x[..., :pairs], x[..., pairs : 2 * pairs]", "x[..., : 2 * pairs : 2], x[..., 1 : 2 * pairs : 2]"),
    Mutation("rotation the other way round", "rope", "np.sin(angles)", "-np.sin(2 * angles)"),
    Mutation("QK-norm after rotation", "attention", "rms_norm(q, weights.q_norm, eps)", "rotate(rms_norm(rotate(q, table), weights.q_norm, eps), Rotation(table.cos, -table.sin))"),
    Mutation("no QK-norm on keys", "attention", "rms_norm(k, weights.k_norm, eps)", "k"),
    Mutation("gate as SiLU", "attention", "gate = sigmoid(tap(", "gate = (lambda z: z * sigmoid(z))(tap("),
    Mutation("gate after o_proj", "attention", "heads * gate[:, :, None]", "heads * gate.mean()"),
    Mutation("gate forgotten", "attention", "heads * gate[:, :, None]", "heads"),
    Mutation("window one too wide", "attention", "query - key < window", "query - key <= window"),
    Mutation("window one too narrow", "attention", "query - key < window", "query - key < window - 1"),
    Mutation("future visible", "attention", "mask = key <= query", "mask = key <= query + 1"),
    Mutation("heads grouped in stripes", "attention", "q.reshape(T, G, R, K).transpose(1, 2, 0, 3)", "q.reshape(T, R, G, K).transpose(2, 1, 0, 3)"),
    Mutation("scores scaled by 1/K", "attention", "K**-0.5", "K**-1.0"),
    Mutation("clamp before SiLU", "mlp", "gate = np.minimum(gate, limit)", "gate = silu(np.minimum(linear(x, weights.gate_proj), limit))"),
    Mutation("up capped above only", "mlp", "np.clip(up, -limit, limit)", "np.minimum(up, limit)"),
    Mutation("no clamp", "mlp", "if limit is not None", "if False"),
    Mutation("routed clamp for the shared expert", "model", "weights.share_expert, spec.swiglu_limit_shared", "weights.share_expert, spec.swiglu_limit"),
    Mutation("shared clamp for the routed experts", "model", "spec.moe, spec.swiglu_limit,", "spec.moe, spec.swiglu_limit_shared,"),
    Mutation("biased scores as weights", "moe", "np.take_along_axis(scores, ids", "np.take_along_axis(biased, ids"),
    Mutation("bias forgotten in selection", "moe", "np.argsort(-biased", "np.argsort(-scores"),
    Mutation("weights not normalised", "moe", "chosen / total", "chosen"),
    Mutation("softmax router", "moe", "scores = sigmoid(logits)", "scores = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)"),
    Mutation("scaling factor forgotten", "moe", "chosen / total * spec.scaling_factor", "chosen / total"),
    Mutation("scaling factor on the shared expert too", "model", 'tap("share_expert", shared)', 'tap("share_expert", shared * spec.moe.scaling_factor)'),
    Mutation("shared expert forgotten", "model", 'routed + tap("share_expert", shared)', "routed"),
    Mutation("shards found by -of-", "checkpoint", "file not in files:", 'file not in files and "-of-" in shard:', refused=True),
    Mutation("MTP head replaced by lm_head", "checkpoint", "assemble(self.config, self.get, own)", "assemble(self.config, self.get, False)"),
    Mutation("MTP hidden passed on after the norm", "mtp", "hidden = tap(spec.name, hidden)", "hidden = rms_norm(tap(spec.name, hidden), layer.shared_head_norm, config.rms_norm_eps)"),
    Mutation("every depth fed the main model's state", "mtp", "hidden[: len(tokens) - k],", "(first := hidden if k == 1 else first)[: len(tokens) - k],"),
    Mutation("embedding and hidden halves swapped", "mtp", "(embedding, state)", "(state, embedding)"),
    Mutation("MTP fed the same token instead of the next", "mtp", "tokens[k:],", "tokens[: len(tokens) - k],"),
]  # fmt: skip
# Single digits read the same either way, so only a model with more than ten layers shows this one.
CHARACTERS = Mutation(
    "moe_layers_enum read as characters",
    "config",
    'listed.split(",") if i.strip()',
    "listed if i.isdigit()",
)


@contextmanager
def planted(mutation: Mutation) -> Iterator[None]:
    """The package with one bug in it, for the length of the block."""
    module = import_module(f"minstep.{mutation.module}")
    assert module.__file__
    source = Path(module.__file__).read_text(encoding="utf-8")
    assert source.count(mutation.right) == 1, f"{mutation.bug}: the fragment is no longer unique"
    wrong = ModuleType("mutant")
    wrong.__dict__.update(module.__dict__)
    exec(
        compile(source.replace(mutation.right, mutation.wrong), module.__file__, "exec"),
        wrong.__dict__,
    )
    before = {}
    for real, mutant in pairs(module, wrong):
        if real.__code__ != mutant.__code__:
            before[real] = real.__code__
            real.__code__ = mutant.__code__
    assert before, f"{mutation.bug}: no function changed"
    try:
        yield
    finally:
        for real, code in before.items():
            real.__code__ = code


def pairs(module: ModuleType, wrong: ModuleType) -> Iterator[tuple[FunctionType, FunctionType]]:
    """Each function and method that the module defines, with its mutant."""
    for name, real in vars(module).items():
        if getattr(real, "__module__", None) != module.__name__:
            continue
        if isinstance(real, FunctionType):
            yield real, vars(wrong)[name]
        elif isinstance(real, type):
            for key, method in vars(real).items():
                if isinstance(method, FunctionType) and method.__module__ == module.__name__:
                    yield method, vars(vars(wrong)[name])[key]


def worst_error(golden: str) -> float:
    """The largest departure from any golden tensor, relative to that tensor's largest value."""
    folder = GOLDEN / golden
    checkpoint = minstep.open_checkpoint(folder / "bf16")
    prompt = json.loads((folder / "meta.json").read_text())["prompt"]
    trace = record(prompt, checkpoint.weights(), checkpoint.config, np.float64)
    expected = load_file(folder / "golden_f64.safetensors")
    missing = set(expected) - set(trace)
    errors = [
        np.abs(trace[n] - x).max() / np.abs(x).max() for n, x in expected.items() if n in trace
    ]
    return float("inf") if missing else float(max(errors))


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.bug)
def test_a_bug_moves_a_golden_tensor_by_a_hundred_tolerances(mutation: Mutation) -> None:
    with planted(mutation):
        if mutation.refused:
            with pytest.raises((minstep.InputError, KeyError)):
                worst_error(mutation.golden)
        else:
            assert worst_error(mutation.golden) > SEEN
    assert worst_error(mutation.golden) < 1e-10


def test_a_mutation_whose_line_has_gone_is_reported() -> None:
    with (
        pytest.raises(AssertionError, match="no longer unique"),
        planted(Mutation("stale", "norm", "this line is not there", "")),
    ):
        pass


def test_a_mutation_that_changes_nothing_is_not_taken_for_a_bug() -> None:
    with planted(Mutation("harmless", "norm", "(1 + as", "(1.0 + as")):
        assert worst_error("tiny") < 1e-10


def test_layer_numbers_read_as_characters_make_the_wrong_layers_dense() -> None:
    folder = minstep.find_config("step-3.5-flash")

    def moe_layers() -> list[int]:
        layers = minstep.load_config(folder).layers
        return [n for n, spec in enumerate(layers) if spec.moe is not None]

    assert moe_layers() == list(range(3, 45))
    with planted(CHARACTERS):
        assert moe_layers() != list(range(3, 45))
