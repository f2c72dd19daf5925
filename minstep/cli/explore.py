"""Watching a model at work: `walk`, `view` and `lab`, from arguments to what is printed; no maths.

Checked by: tests/explore/test_walk.py, tests/explore/test_view.py, tests/cli/test_lab.py
"""

from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from minstep.cli.arguments import FLOATS, add_command, add_model, add_prompt, at_least, path, seed
from minstep.cli.generate import Model, note_shipped, open_model, prompt_tokens
from minstep.cli.terminal import Progress, note, print_json, print_text, wrote
from minstep.config import Config
from minstep.errors import InputError
from minstep.explore.acceptance import (
    WAYS,
    agreements,
    beginnings,
    draft,
    mtp_chart,
    mtp_report,
    mtp_table,
)
from minstep.explore.baselines import bits_report, bits_table
from minstep.explore.expert_loads import (
    WITH,
    WITHOUT,
    layer_table,
    routed,
    router_chart,
    router_report,
    router_table,
    without_bias,
)
from minstep.explore.logit_lens import open_lens
from minstep.explore.view import page, page_data
from minstep.explore.walk import last_stage, take_walk, walk_report, walk_text, walk_weights
from minstep.parity.engine_tensors import open_recording
from minstep.parity.facts import read_facts
from minstep.store.checkpoint import open_checkpoint
from minstep.store.config_file import find_config, read_config
from minstep.store.json_file import read_json
from minstep.store.output import atomic_file, check_output
from minstep.store.shards import numbered
from minstep.store.stages import spans
from minstep.text.tokenizer import text_of
from minstep.train.data import encode_documents, read_corpus
from minstep.train.documents import file_documents
from minstep.validation import check_prompt

WINDOW = 512  # tokens read at once, as long as the model has positions for them
WALKED = "The with statement"  # the prompt of a walk where none is given


def add_commands(command: Callable[..., Any]) -> None:
    """Add `walk`, `view` and `lab`; `command` adds one: name, what runs it, help, example."""
    _add_walk(command)
    _add_view(command)
    _add_labs(command)


def _add_walk(command: Callable[..., Any]) -> None:
    """Add `walk` to the parser."""
    text, example = "follow one token through the model, step by step", "--layer 4"
    add = command("walk", run_walk, text, example)
    add_model(add)
    add_prompt(add, WALKED)
    text = "every step inside this layer; MTP layers come after the main ones"
    add.add_argument("--layer", type=at_least(0), metavar="N", help=text)
    text = "which token of the prompt to follow, from 0 (the last one)"
    add.add_argument("--position", type=at_least(0), metavar="N", help=text)
    add.add_argument("--dtype", **FLOATS, help="of every activation")
    add.add_argument("--json", action="store_true", help="print one JSON object")


def run_walk(args: Namespace) -> None:
    """Print the steps of one token, and what comes next."""
    model = open_model(args.model)
    config, folder = model.config, model.checkpoint.path
    raw, tokens = read_config(str(folder))[0], prompt_tokens(args, model.tokenizer, "walk")
    check_prompt(tokens, config)
    position = len(tokens) - 1 if args.position is None else args.position
    if position >= len(tokens):
        message = f"the prompt has {len(tokens)} tokens, expected 0 to {len(tokens) - 1}"
        raise InputError(f"--position {position}: {message}")
    if args.layer is not None:
        numbered([range(args.layer, args.layer + 1)], config, "--layer")
    weights = walk_weights(model.checkpoint, args.layer)
    note_shipped(args.model)
    if raw != read_json(folder / "config.json"):
        note("minstep: config.json has transformers' keys, the walk names the hub's in their place")
    with Progress("walking", last_stage(config, args.layer) + 1, "layers") as bar:
        dtype = np.dtype(args.dtype)
        walk = take_walk(tokens, weights, config, position, args.layer, dtype, bar)
    if args.layer is not None and not any(step.name.endswith(".probs") for step in walk.steps):
        note("minstep: self_attn.probs is left out: for this many tokens it is too large to hold")
    report = walk_report(walk, position, args.layer, config, raw, model.tokenizer)
    print_json(report) if args.json else print_text(walk_text(report))


def _add_view(command: Callable[..., Any]) -> None:
    """Add `view` to the parser."""
    text, example = "show a trace as one HTML page", "trace.safetensors --out page.html"
    add = command("view", run_view, text, example)
    add.add_argument("trace", type=path, metavar="TRACE", help="what `trace` or `record` wrote")
    text = "checkpoint of the trace, whose head the logit lens uses (the shipped one, if it fits)"
    add_model(add, text)
    add.add_argument("--out", type=path, required=True, metavar="FILE.html")


def run_view(args: Namespace) -> None:
    """Write the page."""
    recording = open_recording(args.trace)
    facts, checkpoint = read_facts(recording), open_checkpoint(args.model or find_config("trained"))
    if checkpoint.owns(args.out):
        raise InputError(f"--out {args.out}: belongs to the checkpoint, expected another file")
    try:
        model = open_lens(checkpoint, recording, facts)
    except InputError:
        if args.model:
            raise
        model = None
    with atomic_file(args.out) as temporary:
        temporary.write_bytes(page(page_data(recording, facts, model)).encode(errors="replace"))
    wrote(args.out, ": open it in a browser")


def _add_labs(command: Callable[..., Any]) -> None:
    """Add `lab` and its own commands to the parser."""
    text = "watch what a trained model's drafts and experts do"
    labs = command("lab", run_lab_mtp, text, "mtp").add_subparsers(required=True, metavar="LAB")

    def lab(name: str, run: Callable[..., int | None], text: str) -> Any:
        add = add_command(labs, name, run, text, f"lab {name} --json")
        add_model(add)
        text = "held-out text of your own (part of Python's documentation)"
        add.add_argument("--text", type=path, nargs="+", metavar="FILE", help=text)
        text = "of the text, read with every token before being the true one (16384)"
        add.add_argument("--tokens", type=at_least(2), default=16384, metavar="N", help=text)
        add.add_argument("--dtype", **FLOATS, help="of every activation")
        add.add_argument("--json", action="store_true", help="print one JSON object")
        text = f"write a chart: to this file, or to {name}.svg in this folder"
        add.add_argument("--out", type=path, metavar="FILE.svg", help=text)
        return add

    add = lab("mtp", run_lab_mtp, "how many drafts the main model keeps, and what spoils them")
    add.add_argument("--prompts", type=at_least(1), default=24, metavar="N", help="prompts (24)")
    text = "tokens of each prompt (64)"
    add.add_argument("--prompt-tokens", type=at_least(1), default=64, metavar="N", help=text)
    text = "most tokens to continue each by (48)"
    add.add_argument("--max-tokens", type=at_least(2), default=48, metavar="N", help=text)
    add.add_argument("--seed", type=seed, default=0, metavar="N", help="of the places (0)")
    add = lab("router", run_lab_router, "which expert gets which tokens, and how many")
    text = "show each expert of this layer"
    add.add_argument("--layer", type=at_least(0), metavar="N", help=text)

    lab("bits", run_lab_bits, "bits a byte of held-out text, beside compressors and n-grams")


def run_lab_bits(args: Namespace) -> None:
    """Print what the model is worth on held-out text, and what it has to beat."""
    if args.out:
        raise InputError(f"--out {args.out}: there is no chart of bits a byte")
    model = open_model(args.model)
    tokenizer = text_tokenizer(args, model)
    corpus = read_corpus(args.text)
    size = sum(document.nbytes for document in corpus.held_out)
    weights = model.load(0)
    with Progress("reading", size, "bytes") as bar:
        dtype = np.dtype(args.dtype)
        report = bits_report(corpus, tokenizer, weights, model.config, dtype, bar)
    print_json(report) if args.json else print_text(bits_table(report))


def run_lab_mtp(args: Namespace) -> int:
    """Print what drafts are worth on held-out text: 0, or 1 where a way to draft changes text."""
    model = open_model(args.model)
    config, dtype = model.config, np.dtype(args.dtype)
    if not config.mtp_layers:
        raise InputError("the model has no MTP layers, expected one that drafts")
    texts = _texts(args, text_tokenizer(args, model))
    rng, length = np.random.default_rng(args.seed), args.prompt_tokens
    prompts = beginnings([text[:-1] for text in texts], args.prompts, length, rng)  # but for eos
    windows = _windows(texts, args.tokens, config)
    with _chart(args, "mtp.svg") as chart:
        weights, drafted = model.load(None), {}
        for way in WAYS:
            with Progress(way.name, len(prompts), "prompts") as bar:
                ran = draft(prompts, weights, config, way, args.max_tokens, dtype, bar)
            drafted[way.name] = ran
        with Progress("reading", sum(map(len, windows)), "tokens") as bar:
            guessed = agreements(windows, weights, config, WAYS, dtype, bar)
        report = mtp_report(drafted, guessed)
        if chart:
            chart.write_bytes(mtp_chart(report).encode())
    print_json(report) if args.json else print_text(mtp_table(report))
    return 0 if report["is_lossless"] else 1


def run_lab_router(args: Namespace) -> None:
    """Print how the experts share the work on held-out text."""
    model = open_model(args.model)
    config, dtype = model.config, np.dtype(args.dtype)
    numbers = [n for n, spec in enumerate(config.layers) if spec.moe]
    if args.layer is not None and args.layer not in numbers:
        listed = ", ".join(spans(numbers)) or "another model"
        raise InputError(f"--layer {args.layer}: no MoE layer, expected one of {listed}")
    tokenizer = text_tokenizer(args, model)
    windows = _windows(_texts(args, tokenizer), args.tokens, config)
    tokens = [token for window in windows for token in window]
    with _chart(args, "router.svg") as chart:
        weights, chosen = model.load(0), {}
        for name, each in ((WITH, weights), (WITHOUT, without_bias(weights))):
            with Progress(name, len(tokens), "tokens") as bar:
                chosen[name] = routed(windows, each, config, dtype, bar)
        words = partial(_words, tokenizer)
        report = router_report(tokens, chosen[WITH], chosen[WITHOUT], weights, config, words)
        if chart:
            chart.write_bytes(router_chart(report).encode())
    if args.json:
        print_json(report)
    elif args.layer is None:
        print_text(router_table(report))
    else:
        print_text(layer_table(report["layers"][numbers.index(args.layer)]))


def text_tokenizer(args: Namespace, model: Model) -> Tokenizer:
    """The tokenizer, which text is read with. Raises InputError where there is none."""
    if model.tokenizer is None:
        raise InputError(f"{args.model}: has no tokenizer.json, expected one to read text with")
    return model.tokenizer


def _texts(args: Namespace, tokenizer: Tokenizer) -> list[list[int]]:
    """The token ids of each held-out document, from a bos to an eos."""
    documents = file_documents(args.text) if args.text else read_corpus().held_out
    return [encode_documents([document], tokenizer).tolist() for document in documents]


def _windows(texts: Sequence[list[int]], most: int, config: Config) -> list[list[int]]:
    """Windows of all texts in a row, evenly spread, that together have at most `most` tokens."""
    stream = [token for text in texts for token in text]
    size = min(WINDOW, config.max_positions, most, len(stream))
    every = [stream[start : start + size] for start in range(0, len(stream) - size + 1, size)]
    count = min(len(every), most // size)
    return [every[n * len(every) // count] for n in range(count)]


def _words(tokenizer: Tokenizer, token: int) -> str:
    """A token's text, or its number where it is no whole character."""
    return text_of(tokenizer, token) or f"token {token}"


@contextmanager
def _chart(args: Namespace, name: str) -> Iterator[Path | None]:
    """Where to write a chart: --out, or `name` in that folder; None where none is wanted."""
    out: Path | None = args.out
    if out is None:
        yield None
        return
    if not out.is_dir() and out.suffix != ".svg":
        raise InputError(f"{out}: expected a file that ends in .svg, or a folder that is there")
    file = out / name if out.is_dir() else out
    check_output(file, [*(args.text or []), *([args.model] if args.model else [])])
    with atomic_file(file) as temporary:
        yield temporary
