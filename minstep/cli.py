"""The command line: arguments in, one function per command, results on stdout; no maths."""

import argparse
import io
import json
import math
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from tokenizers import Tokenizer

from minstep.checkpoint import open_checkpoint
from minstep.config import Config, load_config, parse_config
from minstep.configs import find_config
from minstep.files import InputError, abandon_stdout, atomic_file, check_space
from minstep.generate import check_prompt, generate
from minstep.keys import read_json
from minstep.lab.inspect import inspect, table
from minstep.lab.trace import record, save_trace
from minstep.model import ModelWeights
from minstep.tokenizer import StreamingText, encode, load_tokenizer
from minstep.weights import random_weights, save_random, tensor_shapes

NOISE = "minstep: no --model: tiny random weights; the text is noise because it is untrained"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Refuse wrong use in one line; argparse alone would print the whole usage."""
        self.exit(2, f"{self.prog}: {' '.join(message.split())} (see {self.prog} --help)\n")


def main(argv: list[str] | None = None) -> int:
    """Run one command: 0 fine, 2 wrong use or bad input, 130 after Ctrl-C."""
    warnings.showwarning = lambda message, *_: print(f"minstep: {message}", file=sys.stderr)
    args = _parser().parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # its encoding may lack a character
    try:
        args.run(args)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader has gone; nothing more can be said
        abandon_stdout()
        return 141
    except (InputError, OSError, MemoryError) as error:
        print("minstep:", *(str(error) or "out of memory").split(), file=sys.stderr)
        abandon_stdout()
        return 2
    return 0


def _generate(args: argparse.Namespace) -> None:
    load, config, tokenizer = _open(args.model)
    prompt = _prompt(args, tokenizer)
    check_prompt(prompt, config)
    weights = load()
    stream = StreamingText(tokenizer) if tokenizer else None
    rng = np.random.default_rng(args.seed)
    tokens: list[int] = []
    started = first = time.perf_counter()
    for token in generate(
        prompt,
        weights,
        config,
        rng,
        max_tokens=args.max_tokens,
        temperature=args.temp,
        dtype=np.dtype(args.dtype),
        chunk=args.prefill_chunk,
        ignore_eos=args.ignore_eos,
    ):
        first = first if tokens else time.perf_counter()
        tokens.append(token)
        if not args.json:
            shown = stream.add(token) if stream else f"{',' if len(tokens) > 1 else ''}{token}"
            print(shown, end="", flush=True)
    stats = _stats(prompt, tokens, config, args, first - started, time.perf_counter() - first)
    if args.json:
        text = tokenizer.decode(tokens, skip_special_tokens=True) if tokenizer else ""
        result = {"prompt_tokens": prompt, "tokens": tokens, "text": text, "stats": stats}
        print(json.dumps(result, ensure_ascii=False))
    else:
        print()
        print(
            f"prompt {len(prompt)} tokens in {stats['prompt_seconds']} s, "
            f"{len(tokens)} new at {stats['generation_tps']} tokens/s, stop: {stats['stop']}",
            file=sys.stderr,
        )


def _stats(
    prompt: list[int],
    tokens: list[int],
    config: Config,
    args: argparse.Namespace,
    prompt_seconds: float,
    seconds: float,
) -> dict[str, Any]:
    """Counts, times and why it stopped; the first new token belongs to the prompt's time."""
    stop = "length" if len(tokens) == args.max_tokens else "context"
    if tokens and tokens[-1] in config.eos_token_ids and not args.ignore_eos:
        stop = "eos"
    return {
        "prompt_seconds": round(prompt_seconds, 4),
        "prompt_tps": round(len(prompt) / prompt_seconds, 1) if prompt_seconds else 0.0,
        "generation_seconds": round(seconds, 4),
        "generation_tps": round(max(0, len(tokens) - 1) / seconds, 1) if seconds else 0.0,
        "stop": stop,
        "dtype": args.dtype,
        "temperature": args.temp,
        "seed": args.seed,
    }


def _open(model: Path | None) -> tuple[Callable[[], ModelWeights], Config, Tokenizer | None]:
    """The checkpoint at `model`, or the shipped tiny configuration with random weights.

    The weights are a call away, so that what it warns of comes after every refusal.
    """
    if model is not None:
        checkpoint = open_checkpoint(model)
        return checkpoint.weights, checkpoint.config, load_tokenizer(model)
    folder = find_config("tiny")
    config = load_config(folder)

    def draw() -> ModelWeights:
        print(NOISE, file=sys.stderr)
        return random_weights(config, np.random.default_rng(0))

    return draw, config, load_tokenizer(folder)


def _prompt(args: argparse.Namespace, tokenizer: Tokenizer | None) -> list[int]:
    if args.tokens is not None:
        return list(args.tokens)
    if tokenizer is None:
        file = args.model / "tokenizer.json"
        raise InputError(f"{file}: is missing; give the prompt as --tokens")
    return encode(tokenizer, args.prompt)


def _trace(args: argparse.Namespace) -> None:
    load, config, _ = _open(args.model)
    check_prompt(args.tokens, config)
    with atomic_file(args.out) as temporary:  # first, so that a bad path is refused before the work
        trace = record(args.tokens, load(), config, np.dtype(args.dtype))
        save_trace(trace, args.tokens, temporary)


def _make_tiny(args: argparse.Namespace) -> None:
    source = find_config(args.config)
    file = source / "config.json" if source.is_dir() else source
    raw = read_json(file)
    tokenizer = file.parent / "tokenizer.json"
    config = parse_config(raw, str(file))
    count = sum(map(math.prod, tensor_shapes(config).values()))
    check_space(args.out, count * (4 if args.dtype == "float32" else 2))
    beside = tokenizer if tokenizer.exists() else None
    rng = np.random.default_rng(args.seed)
    save_random(raw, config, rng, args.out, args.dtype, args.shards, beside)


def _inspect(args: argparse.Namespace) -> None:
    report = inspect(find_config(args.model))
    print(json.dumps(report) if args.json else table(report))


def _token_ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")] if text.strip() else []
    except ValueError:
        message = f"{text!r} is not a list of token ids, expected such as 5,17,9"
        raise argparse.ArgumentTypeError(message) from None


def _at_least(minimum: int) -> Callable[[str], int]:
    def whole_number(text: str) -> int:
        if not text.strip().isdecimal() or int(text) < minimum:
            message = f"{text!r}: expected a whole number of at least {minimum}"
            raise argparse.ArgumentTypeError(message)
        return int(text)

    return whole_number


def _temperature(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number of at least 0")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="minstep", description="Step 3.5 Flash in plain NumPy.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Callable[..., None], text: str, example: str) -> Any:
        epilog = f"example: minstep {name} {example}"
        added = commands.add_parser(name, help=text, description=text, epilog=epilog)
        added.set_defaults(run=run)
        return added

    floats = {"choices": ("float32", "float64"), "default": "float32"}

    add = command("generate", _generate, "continue a prompt", '--prompt "Once" --max-tokens 20')
    add.add_argument("--model", type=Path, metavar="DIR", help="checkpoint in hub layout")
    prompt = add.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", help="the prompt as text")
    prompt.add_argument("--tokens", type=_token_ids, metavar="IDS", help="the prompt as 5,17,9")
    add.add_argument("--max-tokens", type=_at_least(0), default=100, metavar="N")
    add.add_argument("--temp", type=_temperature, default=0.0, metavar="T", help="0 is greedy")
    add.add_argument("--seed", type=_at_least(0), default=0, metavar="N", help="of the sampling")
    add.add_argument("--dtype", **floats, help="of every activation")
    chunk = "prompt tokens at a time (512): bounds the memory of attention scores"
    add.add_argument("--prefill-chunk", type=_at_least(1), default=512, metavar="N", help=chunk)
    add.add_argument("--ignore-eos", action="store_true", help="go on after an end token")
    add.add_argument("--json", action="store_true", help="print one JSON object")

    add = command(
        "trace",
        _trace,
        "write every named tensor of a forward pass",
        "--model DIR --tokens 5,17,9 --out trace.safetensors",
    )
    add.add_argument("--model", type=Path, required=True, metavar="DIR")
    add.add_argument("--tokens", type=_token_ids, required=True, metavar="IDS")
    add.add_argument("--dtype", **floats)
    add.add_argument("--out", type=Path, required=True, metavar="FILE.safetensors")

    add = command("make-tiny", _make_tiny, "write a random checkpoint", "tiny --out DIR --seed 1")
    add.add_argument("config", metavar="CONFIG_NAME_OR_DIR")
    add.add_argument("--out", type=Path, required=True, metavar="DIR")
    add.add_argument("--seed", type=_at_least(0), default=0, metavar="N")
    add.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    add.add_argument("--shards", type=_at_least(1), default=1, metavar="N")

    add = command("inspect", _inspect, "show layers, shapes, bytes, parameters", "step-3.5-flash")
    add.add_argument("model", metavar="DIR", help="checkpoint, config.json, or a shipped name")
    add.add_argument("--json", action="store_true")
    return parser
