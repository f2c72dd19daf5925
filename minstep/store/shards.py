"""Which files of a checkpoint hold which layers, which are missing, and what a layer needs of them.

Checked by: tests/store/test_shards.py
"""

import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from minstep.config import Config
from minstep.errors import InputError, shown
from minstep.linear import Weight
from minstep.model import ModelWeights
from minstep.store.checkpoint import INDEX, SINGLE, Checkpoint, open_checkpoint
from minstep.store.config_file import load_config
from minstep.store.inspect import checked, expected
from minstep.store.stages import (
    EMBEDDING,
    EMBEDDING_WEIGHT,
    HEAD,
    HEAD_WEIGHT,
    Stage,
    layer_number,
    spans,
    stages,
)
from minstep.weights import Shape, assemble

AS_NEXT = "embeds the next tokens"
AS_HEAD = "predicts the layer's token, which has no output matrix of its own"
AS_LOGITS = "no layer needs it"
AS_INPUT = "turns the prompt into the layer's input; a recorded input does without"


class Place(NamedTuple):
    """The file that holds a tensor, and the bytes it takes there: by the config where missing."""

    file: Path
    nbytes: int
    is_there: bool


def places(checkpoint: Checkpoint) -> dict[str, Place]:
    """Where each tensor of a checkpoint lies, in the model's order; what is not the model's last.

    One that is neither there nor the model's has 0 bytes. Raises InputError as `checked` does.
    """
    tensors = checked(checkpoint)
    found = {n: Place(t.file, t.nbytes, True) for n, t in checkpoint.tensors.items()}
    for name, file in checkpoint.absent.items():
        if file != checkpoint.path:  # else no file has it
            nbytes = tensors[name].nbytes if name in tensors else 0
            found[name] = Place(file, nbytes, False)
    return {name: found[name] for name in {**tensors, **found} if name in found}


def numbered(ranges: Sequence[range], config: Config, flag: str) -> list[int]:
    """The layer numbers that a flag gave, in order. Raises InputError for one that is too large."""
    last = len(config.layers) + len(config.mtp_layers) - 1
    for each in ranges:
        if each[-1] > last:
            shown = len(each) if flag == "--first" else each[-1]
            raise InputError(f"{flag} {shown}: expected layers of the model, which are 0 to {last}")
    return sorted({number for each in ranges for number in each})


def needs(stage: Stage, config: Config, names: Collection[str]) -> dict[str, str]:
    """The tensors that a stage reads, of those that the checkpoint names: each with what it is for.

    Its own have "". Layers are stages whether or not a prompt is long enough to reach them.
    """
    needed = {name: "" for name in names if stage.has(name)}
    if stage.name == HEAD and config.tie_word_embeddings:
        needed[EMBEDDING_WEIGHT] = AS_LOGITS
    if stage.name in {spec.name for spec in config.mtp_layers}:
        needed[EMBEDDING_WEIGHT] = AS_NEXT
        if f"{stage.last}.weight" not in needed:
            tied = config.tie_word_embeddings
            needed.setdefault(EMBEDDING_WEIGHT if tied else HEAD_WEIGHT, AS_HEAD)
    return needed


def some_weights(checkpoint: Checkpoint, names: Collection[str]) -> ModelWeights:
    """The weights with these tensors in their places, and empty arrays in all others.

    Raises InputError where one of them is missing or does not fit the config.
    """

    def get(name: str, shape: Shape) -> Weight:
        return checkpoint.get(name, shape) if name in names else np.empty(0)

    return assemble(checkpoint.config, get, checkpoint.has_own_heads())


def layers_report(checkpoint: Checkpoint, numbers: Sequence[int]) -> dict[str, Any]:
    """What running the layers takes: files there and missing, and what to download.

    For each layer its own tensors by file, and those outside it, each with the reason; `download`
    lists whole files. Bytes of missing tensors are computed from the config. Only headers are read.
    """
    config, found = checkpoint.config, places(checkpoint)
    whole = _bytes_by_file(found)
    layers = [_layer_report(number, config, found, whole) for number in numbers]
    used = [entry for layer in layers for entry in (*layer["files"], *layer["outside"])]
    download = sorted({entry["file"] for entry in used if not entry["there"]})
    by_name = {file.name: nbytes for file, nbytes in whole.items()}
    is_sharded = (checkpoint.path / INDEX).exists()
    beside = ("config.json", *([INDEX] if is_sharded else []), "tokenizer.json")
    head = needs(Stage(HEAD, HEAD), config, found)
    return {
        "path": str(checkpoint.path),
        "layers": layers,
        "logits": _outside(dict.fromkeys(head, AS_LOGITS), found),
        "download": [{"file": name, "bytes": by_name[name]} for name in download],
        "damaged": list(checkpoint.damaged.values()),
        "beside": {name: (checkpoint.path / name).exists() for name in beside},
    }


def openable(folder: Path, numbers: Sequence[int]) -> Checkpoint:
    """The checkpoint in `folder`. Raises InputError where there is none, which says what the layers
    would need.
    """
    if any((folder / name).exists() for name in (INDEX, SINGLE)):
        return open_checkpoint(folder)
    tensors = expected(load_config(folder))
    scopes = tuple(f"model.layers.{number}." for number in numbers)
    sizes = [tensor.nbytes for name, tensor in tensors.items() if name.startswith(scopes)]
    message = (
        f"{len(sizes)} tensors of {sum(sizes):,} bytes are needed, expected {INDEX} or {SINGLE}"
    )
    raise InputError(f"{folder}: holds no weights: {message}")


def _layer_report(
    number: int, config: Config, found: dict[str, Place], whole: dict[Path, int]
) -> dict[str, Any]:
    """One layer of layers_report; `whole` has the bytes of all tensors of each file."""
    main, name = len(config.layers), f"model.layers.{number}"
    every = stages(config, main + len(config.mtp_layers) + 1)
    stage = next(stage for stage in every if stage.name == name)
    needed = needs(stage, config, found)
    if number == 0:
        needed[EMBEDDING_WEIGHT] = AS_INPUT
    own = {name: found[name] for name, why in needed.items() if not why}
    files = []
    for file, nbytes in _bytes_by_file(own).items():
        count = sum(place.file == file for place in own.values())
        share = nbytes / whole[file] if whole[file] else 0.0
        amounts = {"tensors": count, "bytes": nbytes, "share": round(share, 4)}
        files.append(_file(file, own) | amounts)
    return {
        "layer": number,
        "name": stage.name,
        "tensors": len(own),
        "bytes": sum(place.nbytes for place in own.values()),
        "input": EMBEDDING if number == 0 else f"model.layers.{number - 1}",
        "files": files,
        "outside": _outside({name: why for name, why in needed.items() if why}, found),
    }


def _outside(why: dict[str, str], found: dict[str, Place]) -> list[dict[str, Any]]:
    """Tensors outside a layer, each with the reason why it is needed."""
    return [
        {"tensor": name, "why": reason, "bytes": found[name].nbytes}
        | {"file": found[name].file.name, "there": found[name].is_there}
        for name, reason in why.items()
        if name in found
    ]


def shards_report(checkpoint: Checkpoint) -> dict[str, Any]:
    """Each file of the checkpoint: whether it is there, its bytes, and what it holds."""
    found = places(checkpoint)
    by_file: dict[Path, dict[str, Place]] = {}
    for name, place in found.items():
        by_file.setdefault(place.file, {})[name] = place
    files = []
    for file, held in sorted(by_file.items()):
        nbytes = sum(place.nbytes for place in held.values())
        rest = [name for name in held if layer_number(name) < 0]
        numbers = sorted({layer_number(name) for name in held} - {-1})
        files.append(
            _file(file, held)
            | {"tensors": len(held), "bytes": nbytes, "layers": numbers, "outside_layers": rest}
        )
    damaged = list(checkpoint.damaged.values())
    return {"path": str(checkpoint.path), "files": files, "damaged": damaged}


def layers_table(report: dict[str, Any]) -> str:
    """layers_report as text for a terminal."""
    lines = [shown(report["path"])]

    def outside(entry: dict[str, Any]) -> str:
        what = f"{shown(entry['tensor'])}, {entry['bytes']:,} bytes: {entry['why']}"
        return f"  outside, in {_named(entry)}: {what}"

    for layer in report["layers"]:
        lines.append(f"\n{layer['name']}: {layer['tensors']} tensors, {layer['bytes']:,} bytes")
        lines.append(f"  its input is the output of {layer['input']}")
        for entry in layer["files"]:
            share = f"{entry['bytes']:,} bytes of the layer, {entry['share']:.1%} of the file"
            lines.append(f"  {_named(entry)}: {share}")
        lines += map(outside, layer["outside"])
    lines += ["", "for logits", *map(outside, report["logits"])]
    gone = report["download"]
    lines += ["", *(f"damaged: {why}" for why in report["damaged"])]
    lines.append(f"to download: {len(gone) or 'nothing'}")
    lines += [f"  {shown(e['file'])}, {e['bytes']:,} bytes of tensors by the config" for e in gone]
    beside = [name if there else f"{name} (missing)" for name, there in report["beside"].items()]
    lines.append(f"beside them: {', '.join(beside)}; only --prompt needs the tokenizer")
    return "\n".join(lines)


def shards_table(report: dict[str, Any]) -> str:
    """shards_report as text for a terminal: a line for each file."""
    lines = [shown(report["path"])]
    for entry in report["files"]:
        layers = [f"layers {', '.join(spans(entry['layers']))}"] if entry["layers"] else []
        content = ", ".join([*layers, *map(shown, entry["outside_layers"])])
        lines.append(f"  {_named(entry)}: {entry['bytes']:,} bytes of tensors, {content}")
    return "\n".join(lines + [f"damaged: {why}" for why in report["damaged"]])


def _bytes_by_file(found: dict[str, Place]) -> dict[Path, int]:
    """The files that hold the tensors, and the bytes these take in each."""
    sizes: dict[Path, int] = {}
    for place in found.values():
        sizes[place.file] = sizes.get(place.file, 0) + place.nbytes
    return sizes


def _file(file: Path, found: dict[str, Place]) -> dict[str, Any]:
    """A file's name, whether it is there and whole, its size and what it takes on the disk."""
    is_there = any(place.is_there for place in found.values() if place.file == file)
    entry: dict[str, Any] = {"file": file.name, "there": is_there}
    if not os.path.isfile(file):
        return entry | {"file_bytes": None, "disk_bytes": None}
    stat = file.stat()
    on_disk = getattr(stat, "st_blocks", -(-stat.st_size // 512)) * 512
    return entry | {"file_bytes": stat.st_size, "disk_bytes": on_disk}


def _named(entry: dict[str, Any]) -> str:
    """A file's name, and whether it is there."""
    name = shown(entry["file"])
    if not entry["there"]:
        return f"{name} ({'damaged' if entry.get('file_bytes') else 'missing'})"
    if "disk_bytes" not in entry:
        return name
    return f"{name} ({entry['file_bytes']:,} bytes, {entry['disk_bytes']:,} on disk)"
