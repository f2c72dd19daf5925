"""Step 3.5 Flash in plain NumPy: every layer is a pure function that reads like its maths.

Reading order: config, linear, norm, rope, cache, attention, mlp, moe, model, sampling, mtp,
generate, weights, checkpoint, chat, tokenizer; then train, which differentiates and trains it, and
lab, which looks at it from outside.

>>> import numpy as np, minstep
>>> config = minstep.load_config(minstep.find_config("tiny"))
>>> weights = minstep.random_weights(config, np.random.default_rng(0))
>>> hidden = minstep.decoder([5, 17, 9], weights, config)
>>> hidden.shape, minstep.head(hidden, weights, config).shape
((3, 64), (3, 320))
"""

import os

# Before NumPy is loaded, or without effect: parallel.py has threads of its own, and two kinds of
# them wait for each other.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from minstep.checkpoint import open_checkpoint  # noqa: E402
from minstep.config import load_config
from minstep.configs import find_config
from minstep.files import InputError
from minstep.generate import generate, steps
from minstep.model import decoder, head
from minstep.mtp import mtp_forward
from minstep.sampling import Sampling
from minstep.weights import random_weights

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
