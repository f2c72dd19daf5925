"""What a run leaves: a checkpoint in hub layout, and the state from which it can go on."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer

from minstep.errors import InputError
from minstep.fast.bf16 import to_bf16
from minstep.store.files import atomic_file, open_file, os_reason
from minstep.store.header import Data, write_tensors
from minstep.tap import Array
from minstep.validation import flaw

STATE = "training.state"  # a safetensors file; the ending keeps it apart from a model's tensors
# What a damaged file raises; a dtype that NumPy lacks is a TypeError or an AttributeError.
DAMAGES = (SafetensorError, KeyError, TypeError, ValueError, AttributeError, RecursionError)


def save_checkpoint(
    folder: Path, tensors: dict[str, Array], raw: dict[str, Any], tokenizer: Tokenizer
) -> None:
    """Write config.json, tokenizer.json and model.safetensors into `folder`, each whole.

    Tensors are bfloat16, router biases float32, as on the hub. `raw` is the config's JSON. Raises
    InputError where a file cannot be written.
    Checked by: tests/train/test_saved.py
    """
    data = {
        name: Data.of(x)
        if name.endswith("router_bias")
        else Data("BF16", x.shape, [to_bf16(x).data])
        for name, x in tensors.items()
    }
    with atomic_file(folder / "model.safetensors") as temporary:
        write_tensors(temporary, data, {"format": "pt"})
    said = json.dumps(raw | {"torch_dtype": "bfloat16", "can_chat": False}, indent=1)
    write_text(folder / "config.json", said + "\n")
    write_text(folder / "tokenizer.json", tokenizer.to_str(pretty=False) + "\n")


def write_text(file: Path, text: str) -> None:
    """Write a text file whole. Raises InputError where it cannot be written."""
    with atomic_file(file) as temporary:
        temporary.write_text(text, encoding="utf-8")


def save_state(folder: Path, state: dict[str, Array], facts: dict[str, Any]) -> None:
    """Write a run's arrays, and the JSON `facts` that they go with, bit for bit."""
    data = {name: Data.of(np.asarray(x)) for name, x in state.items()}
    with atomic_file(folder / STATE) as temporary:
        write_tensors(temporary, data, {"facts": json.dumps(facts)})


def load_state(folder: Path) -> tuple[dict[str, Array], dict[str, Any]]:
    """What save_state wrote, all of it finite. Raises InputError where it is missing or damaged."""
    file = folder / STATE
    if not os.path.exists(file):
        raise InputError(f"{file}: is missing, expected what an unfinished run leaves")
    open_file(file).close()  # the package would wait for a pipe
    try:
        with safe_open(file, framework="numpy") as opened:
            facts = json.loads((opened.metadata() or {})["facts"])
            if not isinstance(facts, dict) or not isinstance(facts.get("plan", {}), dict):
                raise ValueError("its facts are no object with a plan")
            state = {name: opened.get_tensor(name) for name in opened.keys()}
        for name, x in state.items():
            if what := flaw(x):
                raise ValueError(f"{name} {what}")
        return state, facts
    except DAMAGES as error:
        message = f"is damaged: {error}, expected what an unfinished run leaves"
        raise InputError(f"{file}: {message}") from error
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {os_reason(error)}") from error
