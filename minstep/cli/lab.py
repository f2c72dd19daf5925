"""`minstep lab mtp` and `minstep lab router`: flags, held-out text, and what is printed; no maths.

Checked by: tests/cli/test_lab.py
"""

from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from minstep.cli.arguments import FLOATS, add_command, add_model, at_least, path, seed
from minstep.cli.generate import Model, open_model
from minstep.cli.terminal import Progress, print_json, print_text
from minstep.config import Config
from minstep.draw.charts import bar_chart, load_chart
from minstep.errors import InputError
from minstep.explore.acceptance import WAYS, agreements, beginnings, draft, mtp_report, mtp_table
from minstep.explore.bits import bits_report, bits_table
from minstep.explore.expert_loads import (
    layer_table,
    routed,
    router_report,
    router_table,
    without_bias,
)
from minstep.store.output import atomic_file, check_output
from minstep.store.stages import spans
from minstep.text.tokenizer import text_of
from minstep.train.data import encode_documents, read_corpus
from minstep.train.documents import file_documents

WINDOW = 512  # tokens read at once, as long as the model has positions for them
WITH, WITHOUT = "with the router bias", "without it"


def add_labs(command: Callable[..., Any]) -> None:
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
        for name, its in ((WITH, weights), (WITHOUT, without_bias(weights))):
            with Progress(name, len(tokens), "tokens") as bar:
                chosen[name] = routed(windows, its, config, dtype, bar)
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


def mtp_chart(report: dict[str, Any]) -> str:
    """The share of drafts kept by depth, for each way to draft, as SVG text."""
    groups: dict[str, dict[str, float]] = {}
    for name, way in report["ways"].items():
        for k, kept in enumerate(way["kept"], start=1):
            groups.setdefault(f"depth {k}", {})[name] = kept
    return bar_chart("Share of drafts that the main model keeps", groups)


def router_chart(report: dict[str, Any]) -> str:
    """The load of each expert of each layer, with the router bias and without it, as SVG text."""
    loads = {
        title: {layer["layer"]: np.array(layer[key]["load"]) for layer in report["layers"]}
        for title, key in ((WITH, "on"), (WITHOUT, "off"))
    }
    return load_chart("How many tokens each expert gets", loads)


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
