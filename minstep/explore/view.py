"""`minstep view`: a recording as one HTML page, which needs neither a network nor a library.

The page, its style and its script are the files of viewer/; here is what it shows, as JSON.
Checked by: tests/explore/test_view.py
"""

import html
import json
import re
from base64 import b64encode
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

import numpy as np

from minstep.activations import sigmoid
from minstep.attention import visible
from minstep.errors import InputError
from minstep.explore.logit_lens import LensModel, lens
from minstep.parity.engine_tensors import Recording, check_forms
from minstep.parity.facts import Facts, LayerFacts, layer_facts
from minstep.parity.names import axes, mtp_depths
from minstep.store.stages import EMBEDDING, split
from minstep.tap import Array
from minstep.text.tokenizer import BACK, FRONT, piece

LEVELS = {"u1": 255, "<u2": 65535}  # what stands for 1 in a packed share
SCRIPT = "base grid layers text attention experts states lens begin".split()  # in this order
NO_LENS = "No lens: this trace is not of the shipped model; name its own with --model."


def page(data: Mapping[str, Any]) -> str:
    """The page that shows `data`, as page_data gives it: the same text for the same data."""
    # no text of a token may end the script element that the JSON stands in
    text = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    script = "\n".join(_viewer(f"{name}.js") for name in SCRIPT)
    blanks = {"title": html.escape(data["title"]), "data": text}
    blanks |= {"style": _viewer("style.css"), "script": script}
    return re.sub(r"\{\{(\w+)\}\}", lambda blank: blanks[blank[1]], _viewer("page.html"))


def _viewer(name: str) -> str:
    """A file of viewer/, which are the page without its data."""
    return (files("minstep.explore") / "viewer" / name).read_text("utf-8").rstrip("\n")


def page_data(recording: Recording, facts: Facts, model: LensModel | None = None) -> dict[str, Any]:
    """Everything that the page shows, as JSON values. Numbers are rounded to 4 digits.

    `model`: the one that the recording is of, for the logit lens. Raises InputError for a recording
    that holds nothing of a layer, for a tensor whose rows do not fit the text, and as check_forms
    does.
    """
    check_forms((recording,))
    recorded = {n for name in recording.names if axes(name) and (n := split(name)[0]) is not None}
    mtp = mtp_depths(recording.names)
    depths = {n: mtp.get(n, 0) for n in recorded}
    known = facts.layers or (layer_facts(model.config) if model else [])
    by_number = {n: each for each in known if (n := split(each.name)[0]) is not None}
    depths |= {n: each.depth for n, each in by_number.items()}
    T = recording.rows
    if T is None or not recorded:
        message = "holds nothing that a layer computed over a text, expected what trace writes"
        raise InputError(f"{recording.path}: {message}")
    for name in recording.names:
        _check_rows(recording, name, T, depths)
    tokens, words = recording.tokens, dict(facts.pieces or {})
    seen = lens(recording, depths, model)
    ids = {n for each in seen.values() for n in each.ids.ravel().tolist()} | {*(tokens or ())}
    ids |= {draft for each in facts.passes or () for draft in each["drafts"]}
    for n in ids - words.keys():
        words[n] = piece(model.tokenizer if model else None, n)
    shown = (words[token] for token in tokens or () if words[token] not in (*FRONT, *BACK))
    text = " ".join("".join(shown).split())
    return {
        "title": f"Trace of “{text[:40]}{'…' * (len(text) > 40)}”" if text else "Trace",
        "count": T,
        "tokens": tokens,
        "words": {n: words[n] for n in sorted(ids)},
        "dtype": recording.engine_dtype,
        "passes": facts.passes or None,
        "embedding": _norms(recording, EMBEDDING),
        "layers": [_layer(recording, n, depths[n], by_number.get(n)) for n in sorted(depths)],
        "lens": {
            name: {
                "ids": each.ids.tolist(),
                "probs": _rounded(each.probs),
                "true": _rounded(each.true),
            }
            for name, each in seen.items()
        },
        "no_lens": None if model else NO_LENS,
    }


def _check_rows(recording: Recording, name: str, T: int, depths: Mapping[int, int]) -> None:
    """The embedding and main layers have the positions of the text, MTP depths may have fewer."""
    count, layer = axes(name), split(name)[0]
    if count is None or (layer is None and name != EMBEDDING) or name.endswith(".input"):
        return
    depth = 0 if layer is None else depths[layer]
    shape = recording.shape(name)
    rows = {*shape[1:]} if name.endswith(".probs") else {*shape[:1]}  # of probs [H, T, T]: both
    fits = len(rows) == 1 and all(0 < n <= T if depth else n == T for n in rows)
    if len(shape) != count or not fits:
        at_most = "at most " if depth else ""
        message = f"has shape {list(shape)}, expected {count} axes and {at_most}{T} positions"
        raise InputError(f"{recording.path}: tensor {name} {message}")


def _layer(recording: Recording, n: int, depth: int, facts: LayerFacts | None) -> dict[str, Any]:
    """What one layer computed; None for what is not in the recording."""
    name = f"model.layers.{n}"
    probs = _array(recording, f"{name}.self_attn.probs")
    gate = _array(recording, f"{name}.self_attn.g_proj")
    scores = _array(recording, f"{name}.moe.gate")
    ids, weights = (_array(recording, f"{name}.moe.{part}") for part in ("ids", "weights"))
    margin = _array(recording, f"{name}.moe.margin")
    mlp = _norms(recording, f"{name}.mlp")
    if mlp is None:
        mlp = _norms(recording, f"{name}.moe", f"{name}.share_expert")
    known: dict[str, Any] = dict.fromkeys(LayerFacts._fields) if facts is None else facts._asdict()
    if scores is not None:
        known["experts"] = scores.shape[-1]
    elif ids is not None:
        known["experts"] = max(known["experts"] or 0, int(ids.max()) + 1)
    return {
        **known,
        "n": n,
        "name": name,
        "depth": depth,
        "state": _norms(recording, name),
        "attention": _norms(recording, f"{name}.self_attn.o_proj"),
        "mlp": mlp,
        **({} if probs is None else _attention(probs, known["window"])),
        "gate": None if gate is None else packed(sigmoid(gate), "u1"),
        "scores": None if scores is None else packed(sigmoid(scores), "u1"),
        "ids": None if ids is None else ids.tolist(),
        "weights": None if weights is None else _rounded(weights),
        "margin": None if margin is None else _rounded(margin),
    }


def _array(recording: Recording, name: str) -> Array | None:
    """A tensor, None where the recording does not have it; one that is not finite is refused."""
    return recording.array(name) if name in recording.forms else None


def _attention(probs: Array, window: int | None) -> dict[str, Any]:
    """Probabilities [H, T, T] that the layer may have, row by row, and the largest of all others.

    `unseen` is 0 unless a mask is wrong.
    """
    H, T, _ = probs.shape
    seen = visible(0, T, 0, T, window)  # [T, T]
    others = probs[:, ~seen].max(initial=0)
    shown = packed(probs[:, seen], "<u2")
    return {"heads": H, "queries": T, "probs": shown, "unseen": _rounded(others)}


def _norms(recording: Recording, *names: str) -> list[float | None] | None:
    """The length of each row of a tensor, or of several in sum; None where one is not there."""
    parts = [x for name in names if (x := _array(recording, name)) is not None]
    if len(parts) < len(names):
        return None
    if len({x.shape for x in parts}) > 1:
        shapes = " and ".join(str(list(x.shape)) for x in parts)
        message = f"have shapes {shapes}, expected one, since they are added up"
        raise InputError(f"{recording.path}: tensors {' and '.join(names)} {message}")
    return _rounded(np.linalg.norm(np.sum(parts, axis=0, dtype=np.float64), axis=-1))


def packed(shares: Array, dtype: str) -> str:
    """Numbers from 0 to 1 as base64 of 8- or 16-bit integers, the largest of which stands for 1."""
    steps = np.rint(np.clip(shares, 0, 1) * LEVELS[dtype])
    return b64encode(steps.astype(dtype).tobytes()).decode()


def _rounded(x: Any) -> Any:
    """An array as nested lists of numbers with 4 digits, None for what is not finite."""
    if isinstance(x, np.ndarray):
        return [_rounded(row) for row in x]
    return float(f"{x:.4g}") if np.isfinite(x) else None
