"""Decoding and prefill of whole models, beside transformers' own Step model on the same weights.

`tiny` and `mid` have random weights, `trained` is the shipped model as its file is: bfloat16, which
our side converts whenever it multiplies, and transformers once when it loads. `drafts` has the
shipped model beside itself, with drafts and without.
Checked by: tests/bench/test_bench.py, tests/bench/test_peer.py
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from minstep.bench.peer import FLOATS, PeerError, Setup
from minstep.bench.timing import Block, Curve, Found, Row, rounds
from minstep.config import Config, parse_config
from minstep.explore.acceptance import beginnings
from minstep.generate import steps
from minstep.model import ModelWeights
from minstep.store.checkpoint import open_checkpoint
from minstep.store.config_file import find_config, read_config
from minstep.store.output import check_space
from minstep.store.random_checkpoint import Form, needed_space, save_random
from minstep.text.tokenizer import load_tokenizer
from minstep.train.data import encode_documents, read_corpus

PROMPT, NEW = 64, 128  # tokens given, and tokens continued one at a time
LONG = 512  # tokens of a prompt whose reading is timed
CONTEXTS = (64, 256, 1024, 2048)  # tokens before those whose time a curve shows
AFTER = 16  # tokens decoded at each place of a curve
PROMPTS = 8  # beginnings of held-out documents, for drafts
MID: dict[str, Any] = {  # tiny's config with other sizes: about 0.3B parameters
    "hidden_size": 1024,
    "intermediate_size": 2560,
    "num_attention_heads": 16,
    "num_attention_groups": 4,
    "head_dim": 64,
    "num_nextn_predict_layers": 0,
    "vocab_size": 4096,
    "sliding_window": 128,
    "attention_other_setting": {
        "attention_type": "sliding_attention",
        "num_attention_heads": 16,
        "num_attention_groups": 4,
    },
    "moe_layers_enum": "0,1,2,3,4,5,6,7",
    "moe_num_experts": 32,
    "moe_top_k": 8,
    "moe_intermediate_size": 320,
    "share_expert_dim": 320,
}
PER_LAYER = ("layer_types", "rope_theta", "partial_rotary_factors")


class TimedModel(NamedTuple):
    """A model to time, and where its files are."""

    folder: Path
    weights: ModelWeights
    config: Config


def tiny(setup: Setup) -> Found:
    """The tiny configuration: small enough that calls cost more than arithmetic."""
    raw, config, _ = read_config("tiny")
    return timed("tiny", made(raw, config, setup), setup)


def mid(setup: Setup) -> Found:
    """A model between: its matrices leave the cache, its layers still take milliseconds."""
    raw = mid_config()
    fewer = setup._replace(rounds=min(setup.rounds, 3))
    return timed("mid", made(raw, parse_config(raw), setup), fewer)


def trained(setup: Setup) -> Found:
    """The model that is shipped, from its file of bfloat16."""
    return timed("trained", find_config("trained"), setup, has_curve=False)


def mid_config() -> dict[str, Any]:
    """The config.json of the model between; it has no MTP layers."""
    raw, _, _ = read_config("tiny")
    layers = raw["num_hidden_layers"]
    cut = {key: raw[key][:layers] for key in PER_LAYER}
    limits = {key: [0.0] * layers for key in ("swiglu_limits", "swiglu_limits_shared")}
    return raw | cut | limits | MID


def made(raw: dict[str, Any], config: Config, setup: Setup) -> Path:
    """A folder with a checkpoint of random float32 weights."""
    folder = setup.folder / f"model-{config.hidden_size}"
    check_space(folder, needed_space(config, Form()))
    save_random(raw, config, np.random.default_rng(setup.seed), folder)
    return folder


def timed(case: str, folder: Path, setup: Setup, has_curve: bool = True) -> Found:
    """Rows of decoding and of prefill, and the curve of a token's cost over its context.

    Errors where transformers, in float32 with our weights, continues with other tokens.
    """
    checkpoint = open_checkpoint(folder)
    model = TimedModel(folder, checkpoint.weights(0), checkpoint.config)
    rng = np.random.default_rng(setup.seed)
    long = rng.integers(model.config.vocab_size, size=max(LONG, *CONTEXTS)).tolist()
    peers, errors = _loaded(case, model, setup)
    ours, sides = list[list[int]](), dict[str, list[list[int]]]()

    def side(name: str | None, do: str, prompt: Sequence[int]) -> Block:
        if name is None:
            return _ours(model, do, prompt, ours)
        return _theirs(name, case, do, prompt, setup, sides.setdefault(name, []))

    rows = []
    for do, what, prompt in (
        ("decode", "decode, a token", long[:PROMPT]),
        ("prefill", f"prefill of {LONG}", long[:LONG]),
    ):
        blocks = {"ours": side(None, do, prompt)} | {name: side(name, do, prompt) for name in peers}
        times = rounds(blocks, setup.rounds)
        rows.append(Row(case, what, times.pop("ours"), times))
        for name in peers:
            first = _first_difference(ours[-1], sides[name][-1])
            if name == FLOATS[0] and first is not None:
                errors.append(f"{case}, {what}: {name} has another token at {first + 1}")
    curve = _curve(case, model, long, setup, peers) if has_curve and not setup.quick else []
    if setup.peer:
        setup.peer.ask("drop")
    return Found(rows, errors, curves=curve)


def _loaded(case: str, model: TimedModel, setup: Setup) -> tuple[list[str], list[str]]:
    """The dtypes in which the peer holds the model, and why not where it cannot."""
    names, errors = list[str](), list[str]()
    for dtype in FLOATS if setup.peer else ():
        assert setup.peer
        try:
            setup.peer.ask("text", name=f"{case} {dtype}", folder=str(model.folder), dtype=dtype)
            names.append(dtype)
        except PeerError as error:
            errors.append(f"{case}: {dtype}: {error}")
    return names, errors


def _ours(model: TimedModel, do: str, prompt: Sequence[int], answers: list[list[int]]) -> Block:
    """A block of ours: the seconds of a token, or of a whole prompt up to the next token."""
    count = NEW if do == "decode" else 0

    def block() -> float:
        continued(model, prompt[:PROMPT], 8)  # warms up
        first, rest, tokens = continued(model, prompt, count)
        answers.append(tokens)
        return rest / count if count else first

    return block


def _theirs(
    name: str,
    case: str,
    do: str,
    prompt: Sequence[int],
    setup: Setup,
    answers: list[list[int]],
) -> Block:
    """The same block, run by the peer in the dtype `name`."""
    how = {"count": NEW} if do == "decode" else {}

    def block() -> float:
        assert setup.peer
        answer = setup.peer.ask(do, name=f"{case} {name}", prompt=list(prompt), **how)
        answers.append(answer["tokens"])
        return float(answer["seconds"])

    return block


def continued(
    model: TimedModel,
    prompt: Sequence[int],
    count: int,
    drafts: int = 0,
) -> tuple[float, float, list[int]]:
    """Continue greedily by 1 + count tokens: seconds to the first, seconds of the rest, and all."""
    rng, tokens = np.random.default_rng(0), list[int]()  # greedy steps draw nothing
    how: dict[str, Any] = {"ignore_eos": True, "num_draft_tokens": drafts, "chunk": LONG}
    started = first = time.perf_counter()
    for step in steps(prompt, model.weights, model.config, rng, 1 + count, **how):
        first = first if tokens else time.perf_counter()
        tokens += step.tokens
    return first - started, time.perf_counter() - first, tokens


def drafts(setup: Setup) -> Found:
    """Seconds of a new token, the drafts' share in them, against decoding one at a time.

    Held out is part of the documentation inside this Python. Errors where a text is not the same.
    """
    folder = find_config("trained")
    checkpoint, tokenizer = open_checkpoint(folder), load_tokenizer(folder)
    assert tokenizer
    model = TimedModel(folder, checkpoint.weights(), checkpoint.config)
    documents = read_corpus().held_out
    texts = [encode_documents([each], tokenizer).tolist()[:-1] for each in documents]  # but for eos
    rng = np.random.default_rng(setup.seed)
    prompts = beginnings(texts, 2 if setup.quick else PROMPTS, PROMPT, rng)
    depths = len(model.config.mtp_layers)
    greedy: dict[int, list[list[int]]] = {}  # by the number of drafts

    def side(count: int) -> Block:
        def block() -> float:
            continued(model, prompts[0], 8, count)
            runs = [continued(model, prompt, NEW, count) for prompt in prompts]
            greedy[count] = [tokens for _, _, tokens in runs]
            return sum(rest for _, rest, _ in runs) / sum(len(each) - 1 for each in greedy[count])

        return block

    blocks = {"ours": side(depths), "one draft": side(1), "without": side(0)}
    times = rounds(blocks, setup.rounds)
    row = Row("drafts", f"with drafts, {depths} a pass", times.pop("ours"), times)
    same = all(texts == greedy[0] for texts in greedy.values())
    return Found([row], [] if same else ["drafts: they change a greedy text"])


def _first_difference(ours: Sequence[int], theirs: Sequence[int]) -> int | None:
    pairs = enumerate(zip(ours, theirs, strict=False))
    return next((n for n, (a, b) in pairs if a != b), None)


def _curve(
    case: str, model: TimedModel, text: Sequence[int], setup: Setup, peers: list[str]
) -> list[Curve]:
    """What a token costs after so many others, ours and the peer's in float32."""
    lines: dict[str, list[tuple[float, float]]] = {"ours": []}
    for length in CONTEXTS:
        _, rest, _ = continued(model, text[:length], AFTER)
        lines["ours"].append((length, rest / AFTER * 1e3))
    if setup.peer and FLOATS[0] in peers:
        lines[FLOATS[0]] = []
        for length in CONTEXTS:
            asked = {"name": f"{case} {FLOATS[0]}", "prompt": text[:length]}
            answer = setup.peer.ask("decode", count=AFTER, **asked)
            lines[FLOATS[0]].append((length, answer["seconds"] * 1e3))
    return [Curve(f"{case}: milliseconds a token over its context", lines)]
