"""Which tensors a recording is to have: layers and globs, held against what the model computes.

Checked by: tests/parity/test_record.py
"""

from collections.abc import Sequence
from fnmatch import fnmatchcase

import numpy as np

from minstep.config import Config, LayerSpec, RopeSpec
from minstep.errors import InputError
from minstep.parity.trace import Recorder, Trace, walk
from minstep.store.stages import EMBEDDING, HEAD, Stage, stages
from minstep.weights import random_weights

ASIDE = (".probs", ".input")  # recorded only where a glob names them


def names_of(config: Config, count: int) -> list[str]:
    """Every name that recording a prompt of `count` tokens can give, in order of computation.

    The model itself says them, cut down to the smallest sizes that keep its structure.
    """
    small = config._replace(
        hidden_size=1,
        vocab_size=1,
        layers=tuple(map(_smallest, config.layers)),
        mtp_layers=tuple(map(_smallest, config.mtp_layers)),
    )
    tokens, trace = [0] * min(count, len(config.mtp_layers) + 1), Trace()
    weights = random_weights(small, np.random.default_rng(0))
    walk(tokens, weights, small, np.float32, Recorder(trace))
    names: list[str] = []
    for stage in stages(config, count):
        inputs = [] if stage.name in (EMBEDDING, HEAD) else [f"{stage.name}.input"]
        names += inputs + [name for name in trace if stage.has(name)]
    return names


def _smallest(spec: LayerSpec) -> LayerSpec:
    moe = spec.moe
    if moe is not None:
        experts = 2 if moe.top_k < moe.experts else 1
        moe = moe._replace(experts=experts, top_k=1, width=1, shared_width=1)
    rope = RopeSpec(1.0, 2, None)
    return spec._replace(heads=1, groups=1, head_dim=2, rope=rope, mlp_width=1, moe=moe)


def choose(
    config: Config, count: int, layers: Sequence[int] | None, globs: Sequence[str]
) -> list[str]:
    """The names to record of a prompt of `count` tokens, in order of computation.

    Those that `globs` match, without any glob all but attention probabilities; with `layers` of
    these layers alone, and the input of each that is not the output of another one. Raises
    InputError for a glob that matches nothing, and a layer that the prompt is too short for.
    """
    every, order = stages(config, count), names_of(config, count)
    modules = [s.name for s in every] if layers is None else [f"model.layers.{n}" for n in layers]
    for module in modules:
        if module not in [stage.name for stage in every]:
            k = int(module.rpartition(".")[2]) - len(config.layers) + 1
            message = f"MTP depth {k} has no position left, expected at least {k + 1} tokens"
            raise InputError(f"{module}: in a prompt of {count} tokens {message}")
    open_to = [n for n in order if any(s.has(n) for s in every if s.name in modules)]
    for glob in globs:
        if not any(fnmatchcase(name, glob) for name in open_to):
            scope = "" if layers is None else " of the layers given"
            message = f"matches no name{scope}, expected such as {open_to[-1]}"
            raise InputError(f"--names {glob}: {message}")
    chosen = {n for n in open_to if not n.endswith(ASIDE)}
    if globs:
        chosen = {n for n in open_to if any(fnmatchcase(n, glob) for glob in globs)}
    for number, stage in enumerate(every):
        if layers is not None and stage.name in modules and before(every, number) not in chosen:
            chosen.add(f"{stage.name}.input")
    return [name for name in order if name in chosen]


def before(every: Sequence[Stage], number: int) -> str:
    """The tensor that a stage takes its state from: the output of the stage before, not the head's.

    The embedding has none: "".
    """
    return next((s.name for s in reversed(every[:number]) if s.name != HEAD), "")
