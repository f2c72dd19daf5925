"""The logit lens: what the model's own head makes of the state after each layer.

Source: the idea, "interpreting GPT: the logit lens", nostalgebraist, 2020.
Checked by: tests/explore/test_view.py
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from minstep.activations import softmax
from minstep.config import Config
from minstep.errors import InputError
from minstep.model import ModelWeights, head
from minstep.parity.engine_tensors import Recording
from minstep.parity.facts import Facts, layer_facts
from minstep.store.checkpoint import Checkpoint
from minstep.store.shards import some_weights
from minstep.store.stages import EMBEDDING, HEAD, split
from minstep.tap import Array
from minstep.text.tokenizer import load_tokenizer

TOP = 3  # likeliest tokens of each state
CLOSE = 0.05  # of the largest logit: other weights are off by more, bfloat16 by less


class LensModel(NamedTuple):
    """The head that states go through: nothing but `norm` and `lm_head` is in the weights."""

    weights: ModelWeights
    config: Config
    tokenizer: Tokenizer | None


class Guesses(NamedTuple):
    """The likeliest tokens after each position, best first, and how likely the text's own is."""

    ids: Array  # [T, TOP]
    probs: Array  # [T, TOP]
    true: Array  # [T], nan where the text has ended


def open_lens(checkpoint: Checkpoint, recording: Recording, facts: Facts) -> LensModel:
    """The head of a checkpoint, which the recording must be of.

    Raises InputError where layers or sizes differ, and where it makes other logits of the last
    state. Of the weights, only those of the head are needed and read.
    """
    path, config = checkpoint.path, checkpoint.config
    layers = layer_facts(config)
    if facts.layers not in (None, layers):
        message = f"is of other layers than the {len(layers)} of {path}, expected its own model"
        raise InputError(f"{recording.path}: {message}")
    sized = {EMBEDDING, HEAD, *(each.name for each in layers)}
    for name in (name for name in recording.names if name in sized):
        width = config.vocab_size if name == HEAD else config.hidden_size
        if (found := recording.shape(name)[-1:]) != (width,):
            message = f"has width {[*found]}, expected {[width]} by {path}"
            raise InputError(f"{recording.path}: tensor {name} {message}")
    output = EMBEDDING if config.tie_word_embeddings else HEAD
    weights = some_weights(checkpoint, {"model.norm.weight", f"{output}.weight"})
    state, logits = recording.if_any(config.layers[-1].name, 2), recording.if_any(HEAD, 2)
    if state is not None and logits is not None and len(state) == len(logits):
        error = np.abs(head(state, weights, config) - logits).max()
        if error > CLOSE * np.abs(logits).max():
            message = f"is not what {path} makes of the last state, expected its own model"
            raise InputError(f"{recording.path}: tensor {HEAD} {message}")
    return LensModel(weights, config, load_tokenizer(path))


def lens(
    recording: Recording, depths: Mapping[int, int], model: LensModel | None
) -> dict[str, Guesses]:
    """Guesses by the name of what they come from, in the model's order.

    With a model the states after the embedding and each main layer; the recorded logits where the
    last layer is not among these; those of MTP depths, each about one token further on. `depths`:
    of each layer, 0 for a main one. Raises InputError for a token that logits have no column for.
    """
    named, tokens = dict[str, Guesses](), recording.tokens or []
    for name in recording.names:
        layer, part = split(name)
        depth = 0 if layer is None else depths.get(layer, 0)
        is_state = name == EMBEDDING or (layer is not None and part == "" and not depth)
        is_output = name == HEAD and recording.shape(name)[:-1] == (recording.rows,)
        if is_output and model and model.config.layers[-1].name in named:
            continue
        if is_state and model:
            logits = head(recording.array(name), model.weights, model.config)  # [T, V]
        elif part == "transformer.shared_head.output" or is_output:
            logits = recording.array(name)  # [T-depth, V]
        else:
            continue
        if (V := logits.shape[-1]) <= max(tokens, default=0):
            message = f"token id {max(tokens)} is out of range, expected 0 to {V - 1} by {name}"
            raise InputError(f"{recording.path}: {message}")
        named[name] = guesses(logits, tokens[1 + depth :])
    return named


def guesses(logits: Array, following: Sequence[int]) -> Guesses:
    """What logits [T, V] say; `following`: the tokens they are about, as far as there are any."""
    probs = softmax(logits)  # [T, V]
    ids = np.argsort(-probs, axis=-1, kind="stable")[:, :TOP]  # [T, TOP]
    true = np.full(len(probs), np.nan, probs.dtype)  # [T]
    known = np.array(following[: len(probs)], np.intp)
    true[: len(known)] = probs[np.arange(len(known)), known]
    return Guesses(ids, np.take_along_axis(probs, ids, axis=-1), true)
