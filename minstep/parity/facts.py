"""What a trace's metadata says beside its tensors: the layers, tokens as text, and the drafts.

Checked by: tests/explore/test_view.py, tests/parity/test_diff.py
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from minstep.config import FULL, SLIDING, Config
from minstep.errors import InputError
from minstep.parity.engine_tensors import Recording
from minstep.parity.names import mtp_depths
from minstep.store.stages import split


class LayerFacts(NamedTuple):
    """What shapes do not say of a layer. `depth`: 0 in a main layer; `experts`: 0 in a dense one.

    `window`: None in a full-attention layer.
    """

    name: str
    depth: int
    kind: str
    heads: int
    groups: int
    window: int | None
    experts: int


class Facts(NamedTuple):
    """What the metadata says, None for what it does not.

    `layers`: main, then MTP layers; `pieces`: the text of tokens and drafts by their ids; `passes`:
    those that gave the end of the text, the prompt's own first, each with the fields of a
    text.continuation.Pass.
    """

    layers: list[LayerFacts] | None = None
    pieces: dict[int, str] | None = None
    passes: list[dict[str, Any]] | None = None


def layer_facts(config: Config) -> list[LayerFacts]:
    """The facts of every main layer and then every MTP layer."""
    depths = [0] * len(config.layers) + [*range(1, len(config.mtp_layers) + 1)]
    return [
        LayerFacts(
            s.name, depth, s.kind, s.heads, s.groups, s.window, s.moe.experts if s.moe else 0
        )
        for depth, s in zip(depths, config.layers + config.mtp_layers, strict=True)
    ]


def metadata(
    config: Config, pieces: Mapping[int, str] | None = None, passes: Sequence[Any] = ()
) -> dict[str, str]:
    """The facts as metadata. No `pieces` without a tokenizer, no `passes` where there were none."""
    facts = {"layers": json.dumps([each._asdict() for each in layer_facts(config)])}
    if pieces is not None:
        facts["pieces"] = json.dumps(pieces)
    if passes:
        facts["passes"] = json.dumps([each._asdict() for each in passes])
    return facts


def read_facts(recording: Recording) -> Facts:
    """The facts in a recording's metadata. Raises InputError for what is malformed."""
    found, count = recording.metadata, len(recording.tokens or [])

    def parsed(key: str, expected: str, parse: Callable[[Any], Any]) -> Any:
        if key not in found:
            return None
        try:
            return parse(json.loads(found[key]))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            message = f"metadata {key} is {found[key]!r:.80}, expected {expected}"
            raise InputError(f"{recording.path}: {message}") from None

    def passes(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
        reached = 0  # tokens
        for entry in entries:
            _require(entry.keys() == {"before", "drafts", "accepted", "new"})
            numbers = [entry["before"], entry["accepted"], entry["new"], *entry["drafts"]]
            _require(all(type(n) is int and n >= 0 for n in numbers))
            _require(entry["accepted"] <= len(entry["drafts"]))
            _require(entry["new"] <= entry["accepted"] + 1 and entry["before"] == reached)
            reached += entry["new"]
        _require(reached < max(count, 1))
        return entries

    return Facts(
        parsed("layers", "a JSON list of layers, as trace writes it", _layers),
        parsed("pieces", "a JSON object of texts by token id", _pieces),
        parsed("passes", "a JSON list of passes that gave the end of the text", passes),
    )


def common_part(
    ours: Recording, theirs: Recording, config: Config | None
) -> tuple[Recording, Recording, int | None]:
    """Two recordings of one prompt as far as they have the same tokens, and how many these are.

    None where one prompt was continued alike, or not at all: then all of both is the same text.
    Raises InputError where they were recorded from different prompts, or nothing tells whether
    they were.
    """
    shared = _common_beginning(ours, theirs)
    if shared is None:
        return ours, theirs, None
    depths = mtp_depths((*ours.forms, *theirs.forms), config)
    for each in () if config else (ours, theirs):
        numbered = ((split(facts.name)[0], facts) for facts in read_facts(each).layers or ())
        depths |= {n: facts.depth for n, facts in numbered if n is not None and facts.depth}
    return ours.beginning(shared, depths), theirs.beginning(shared, depths), shared


def _common_beginning(ours: Recording, theirs: Recording) -> int | None:
    """How many tokens two recordings share that continue one prompt differently, else None."""
    a, b, another = ours.tokens, theirs.tokens, f"{theirs.path}: was recorded from another prompt"
    if a is None or b is None or a == b:
        if None not in (ours.rows, theirs.rows) and ours.rows != theirs.rows:
            counts = f"{theirs.rows} rows, expected {ours.rows}"
            raise InputError(f"{another}: {counts} as in {ours.path}")
        return None
    shorter = min(len(a), len(b))
    n = next((n for n in range(shorter) if a[n] != b[n]), shorter)
    prompts = [length for each in (ours, theirs) if (length := _prompt_length(each)) is not None]
    if prompts and 0 < max(prompts) <= n:
        return n
    if n == shorter:
        raise InputError(f"{another}: {len(b)} tokens, expected {len(a)} as in {ours.path}")
    differs = f"token {n} is {b[n]}, expected {a[n]}"
    if prompts or n == 0:
        raise InputError(f"{another}: {differs} as in {ours.path}")
    advice = "trace both without --max-tokens to compare"
    raise InputError(f"{theirs.path}: begins as {ours.path} does, but {differs}: {advice}")


def _prompt_length(recording: Recording) -> int | None:
    """How many tokens were given and not continued by the model; None where nothing tells."""
    passes = read_facts(recording).passes
    if passes is None and recording.metadata.get("format") != "minstep-trace":
        return None
    return len(recording.tokens or ()) - sum(each["new"] for each in passes or ())


def _layers(entries: list[dict[str, Any]]) -> list[LayerFacts]:
    read = [LayerFacts(**entry) for entry in entries]
    for each in read:
        numbers = [each.depth, each.heads, each.groups, each.experts]
        numbers += [] if each.window is None else [each.window]
        _require(all(type(n) is int and n >= 0 for n in numbers))
        _require(each.window != 0 and type(each.name) is str and each.kind in (FULL, SLIDING))
    return read


def _pieces(entries: dict[str, str]) -> dict[int, str]:
    _require(all(type(text) is str for text in entries.values()))
    return {int(token): text for token, text in entries.items()}


def _require(holds: bool) -> None:
    if not holds:
        raise ValueError
