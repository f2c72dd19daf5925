"""Every shape stated in the model files holds in a model whose sizes are all different."""

import json
from importlib import import_module
from itertools import product
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest

import minstep
from minstep import attention
from minstep.config import parse_config
from minstep.fast import threads as parallel
from minstep.fast.bf16 import BF16Array, to_bf16
from minstep.linear import Weight
from minstep.parity.trace import Recorder
from minstep.sampling import Sampling
from minstep.weights import assemble, random_tensors
from tests.support.lend import lent
from tests.support.shapes import Shapes
from tests.support.tiers import cases

FILES = "linear activations norm rope cache attention mlp moe model mtp sampling generate".split()
PATHS = [Path(minstep.__file__).parent / f"{name}.py" for name in FILES]
SOURCES = {str(path): path.read_text(encoding="utf-8") for path in PATHS}
# The odd configuration with sizes that are all different, also from those of experts.
CHANGES = {"vocab_size": 97, "head_dim": 60, "moe_top_k": 4, "sliding_window": 9}
CHANGES |= {"moe_intermediate_size": 38, "share_expert_dim": 44}
OTHER = {"attention_type": "sliding_attention", "num_attention_heads": 10}
OTHER |= {"num_attention_groups": 2}
SIZES = {"D": {40}, "V": {97}, "E": {7}, "A": {4}, "G": {2}, "H": {6, 10}, "R": {3, 5}}
SIZES |= {"K": {60}, "P": {15, 30}, "F": {38, 44, 52}}


def run(sources: dict[str, str], dtype: str = "float32", stored: str = "bfloat16") -> Shapes:
    """Run every part of a model, and hold it to what the sources state."""
    odd = json.loads((minstep.find_config("odd") / "config.json").read_text(encoding="utf-8"))
    config = parse_config(odd | CHANGES | {"attention_other_setting": OTHER})
    drawn: dict[str, Weight] = dict(random_tensors(config, np.random.default_rng(0)))
    if stored == "bfloat16":
        drawn = {name: BF16Array(to_bf16(np.asarray(x))) for name, x in drawn.items()}
    weights = assemble(config, lambda name, _: drawn[name])
    rng = np.random.default_rng(0)
    prompt = rng.integers(config.vocab_size, size=23).tolist()
    shapes, tap = Shapes(sources, SIZES, dtype), Recorder({})
    with shapes.watching(), patch.object(parallel, "THREADS", 1):  # one thread is watched
        hidden = minstep.decoder(prompt, weights, config, dtype, tap=tap)
        minstep.head(hidden, weights, config, tap)
        minstep.mtp_forward(prompt, hidden, weights, config, tap)
        how = Sampling(0.8, top_k=30, top_p=0.9, min_p=0.001, repetition_penalty=1.2)
        # The prompt is attended to in blocks, what comes after it is not.
        with patch.multiple(attention, LARGE=800, ROWS=20, KEYS=8, FEW=19):
            new = minstep.generate(
                prompt, weights, config, rng, 3, how, dtype=dtype, chunk=12, ignore_eos=True
            )
            assert len(list(new)) == 3
    return shapes


def findings(name: str, right: str, wrong: str) -> list[str]:
    """What is found in one model file, once a fragment of it is replaced."""
    path = str(PATHS[FILES.index(name)])
    assert SOURCES[path].count(right) == 1
    source = SOURCES[path].replace(right, wrong)
    with lent(import_module(f"minstep.{name}"), source):
        shapes = run({path: source})
    never = [f"never run: {shapes.stated[place]}" for place in shapes.unmet()]
    return [*shapes.wrong.values(), *never]


DTYPES = [("float32", "float32"), ("float64", "bfloat16")]  # of activations and of stored weights
ALL_DTYPES = list(product(("float32", "float64"), ("float32", "bfloat16")))


@pytest.mark.parametrize("dtypes", cases([DTYPES], [ALL_DTYPES]), ids=len)
def test_every_stated_shape_holds_and_none_is_missing_or_never_run(
    dtypes: list[tuple[str, str]],
) -> None:
    runs = [run(SOURCES, *how) for how in dtypes]
    for shapes in runs:
        assert not shapes.wrong
    assert not set.intersection(*(shapes.unmet() for shapes in runs))


@pytest.mark.parametrize(
    ("name", "right", "wrong", "found"),
    [
        ("moe", "# [T, E]", "# [T, A]", "states [T, A], but makes [23, 7]"),
        ("mlp", "up_proj)  # [..., F]", "up_proj)  # [F]", "states [F], but makes [23, 52]"),
        ("attention", "swapaxes(0, 1)  # [T, H, K]", "swapaxes(0, 1)  # [H, T, K]", "states [H, T, K], but makes [23, 6, 60]"),
        ("attention", "-np.inf)  # [G, R, T, C]", "-np.inf)  # [G, R, C, T]", "states [G, R, C, T], but makes [2, 3, 2, 25]"),
        ("rope", "  # [T, 1, P]", "", "states no shape for (23, 1, 15)"),
        ("mlp", "gate_proj))  # [..., F]", "gate_proj))", "states no shape for (23, 52)"),
        ("rope", "table [T, P]", "table [T, K]", "states [T, K], but makes [23, 15]"),
        ("norm", "Returns [..., N]", "Returns [N]", "states [N], but makes [23, 40]"),
        ("attention", "# [G*K, D]\n    v_", "# [H*K, D]\n    v_", "states [H*K, D], but makes [120, 40]"),
        ("attention", "grouped * K**-0.5 @", "grouped * np.float64(K) ** -0.5 @", "makes float64"),
        ("attention", "g, c:d])  # [R*B, C]", "g, c:d])  # [B, C]", "states [B, C], but makes [18, 6]"),
        ("sampling", "  # [fewer]", "", "states no shape for (25,)"),
        ("generate", "logits[: accepted + 1]", "logits", "states [1+accepted, V], but makes [2, 97]"),
        ("generate", "[V] float64", "[V]", "makes float64"),
        ("mlp", "weights.down_proj)  # [..., D]", "weights.down_proj)  # [..., D]\n    x = x  # [D, T]", "never run: ['[D, T]']"),
    ],
)  # fmt: skip
def test_a_wrong_shape_is_found(name: str, right: str, wrong: str, found: str) -> None:
    assert found in findings(name, right, wrong)
