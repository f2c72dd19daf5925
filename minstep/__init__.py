"""Step 3.5 Flash in plain NumPy: every layer is a pure function that reads like its maths.

Read it with the book, docs/README.md; these files have a chapter each:

     1  config
     2  norm
     3  rope
     4  attention
     5  activations, mlp
     6  moe
     7  model
     8  cache
     9  mtp, generate
    10  linear, fast.bf16, fast.fp8, weights, store.checkpoint
    11  parity.compare
    12  train.tape, train.loss
    13  parity.known_bugs
    14  store.inspect, cost.count
    15  text.tokenizer, text.prompt, sampling

What stands in this package itself:

    find_config      the folder of a shipped configuration or model, by its name
    load_config      a config.json as a Config
    open_checkpoint  a checkpoint in hub layout: its config, and its weights a call away
    random_weights   weights that have learned nothing, for a Config
    generate         a prompt's continuation, a token at a time
    steps            the same, a forward pass at a time, with its drafts
    Sampling         how tokens are drawn: temperature, top-k, top-p, min-p, repetition penalty
    decoder          token ids through every layer: the last hidden states
    head             hidden states to logits
    mtp_forward      the logits of each draft layer over a text that is known
    InputError       what is raised for wrong files, configs, numbers and tokens

Imports run one way: the model never imports train, which differentiates it, nor parity and
explore, which look at it from outside. A first run, with random weights:

>>> import numpy as np, minstep
>>> config = minstep.load_config(minstep.find_config("tiny"))
>>> weights = minstep.random_weights(config, np.random.default_rng(0))
>>> hidden = minstep.decoder([5, 17, 9], weights, config)
>>> hidden.shape, minstep.head(hidden, weights, config).shape
((3, 64), (3, 320))

A trained model stands in find_config("trained"): open_checkpoint opens it, generate continues a
text. `minstep --help` lists the commands, each with an example in its own --help.
"""

from __future__ import annotations

import os
import sys
from types import ModuleType

TYPE_CHECKING = False  # typing itself takes a while to load, in which Ctrl-C would be a traceback

# Before NumPy is loaded, or without effect: fast/threads.py has threads of its own, and two kinds
# of them wait for each other.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

if TYPE_CHECKING:
    from typing import Any

    from minstep.errors import InputError
    from minstep.generate import generate, steps
    from minstep.model import decoder, head
    from minstep.mtp import mtp_forward
    from minstep.sampling import Sampling
    from minstep.store.checkpoint import open_checkpoint
    from minstep.store.config_file import find_config, load_config
    from minstep.store.random_checkpoint import random_weights

# The module of each name. It is imported when the name is first used: the command line must be
# ready for Ctrl-C before it loads NumPy.
_MODULES = {
    "open_checkpoint": "store.checkpoint",
    "load_config": "store.config_file",
    "find_config": "store.config_file",
    "InputError": "errors",
    "generate": "generate",
    "steps": "generate",
    "decoder": "model",
    "head": "model",
    "mtp_forward": "mtp",
    "Sampling": "sampling",
    "random_weights": "store.random_checkpoint",
}
__all__ = [
    "InputError",
    "Sampling",
    "decoder",
    "find_config",
    "generate",
    "head",
    "load_config",
    "mtp_forward",
    "open_checkpoint",
    "random_weights",
    "steps",
]
__version__ = "0.1.0"


class _Package(ModuleType):
    """A package whose function `generate` stays, though a module has the same name."""

    def __getattr__(self, name: str) -> Any:
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
        setattr(self, name, value)
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        # Python binds a module to its package once it is imported.
        is_hidden = name in _MODULES and isinstance(value, ModuleType)
        super().__setattr__(name, getattr(value, name) if is_hidden else value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *_MODULES})


sys.modules[__name__].__class__ = _Package
