"""`minstep generate`, and what every command shares that runs a model: flags, prompt, steps."""

import argparse
from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
from tokenizers import Tokenizer

from minstep.cli.arguments import (
    FLOATS,
    add_model,
    add_prompt,
    at_least,
    not_empty,
    number,
    path,
    seed,
)
from minstep.cli.terminal import (
    Display,
    Progress,
    drafts_line,
    note,
    print_json,
    print_text,
    summary,
)
from minstep.config import Config
from minstep.errors import InputError
from minstep.generate import Step, steps
from minstep.model import ModelWeights
from minstep.sampling import LIMITS, Sampling
from minstep.store.checkpoint import Checkpoint, open_checkpoint
from minstep.store.config_file import find_config
from minstep.store.json_file import read_json
from minstep.text.continuation import Continuation
from minstep.text.prompt import SpecialTokens, render
from minstep.text.reply import parse
from minstep.text.tokenizer import StreamingText, encode, load_tokenizer, text_of
from minstep.text.tool_calls import objects
from minstep.validation import check_prompt

SHIPPED = "minstep: no --model: the small model shipped here, trained on Python's documentation"
DRAFTS = " after  drafts, those that were kept in [] -> new tokens"  # above lines of drafts_line
CONTINUES = "minstep: this model has learned to continue a text, not to answer"


def decoding_flags(
    add: argparse.ArgumentParser, temp: float, top_p: float, most: int | None, limit: str
) -> None:
    """The flags of every command that generates; named as in mlx-lm where it has them."""
    add_model(add)
    text = f"most tokens to generate ({limit})"
    add.add_argument("--max-tokens", type=at_least(0), default=most, metavar="N", help=text)
    text = "end before this text; may be given several times"
    add.add_argument(
        "--stop", type=not_empty, action="append", default=[], metavar="TEXT", help=text
    )
    add.add_argument("--ignore-eos", action="store_true", help="go on after an end token")

    how = add.add_argument_group("sampling")
    text = f"0 is greedy ({temp:g})"
    from_zero = number(*LIMITS["temperature"])
    how.add_argument("--temp", type=from_zero, default=temp, metavar="T", help=text)
    above, text = number(*LIMITS["top_p"]), f"keep this much probability ({top_p:g})"
    how.add_argument("--top-p", type=above, default=top_p, metavar="P", help=text)
    text = "keep the K likeliest tokens (0, all)"
    how.add_argument("--top-k", type=at_least(0), default=0, metavar="K", help=text)
    within, text = number(*LIMITS["min_p"]), "as a share of the likeliest (0)"
    how.add_argument("--min-p", type=within, default=0.0, metavar="P", help=text)
    text = "of tokens in the text so far (1, none)"
    positive = number(*LIMITS["repetition_penalty"])
    how.add_argument("--repetition-penalty", type=positive, default=1.0, metavar="X", help=text)
    how.add_argument("--seed", type=seed, default=0, metavar="N", help="of the draws (0)")

    run = add.add_argument_group("decoding")
    text = "draft with the MTP layers; greedy text stays the same (on where there are any)"
    run.add_argument("--mtp", action=argparse.BooleanOptionalAction, default=True, help=text)
    text = "drafts a step (one for each MTP layer)"
    run.add_argument("--num-draft-tokens", type=at_least(0), metavar="N", help=text)
    run.add_argument("--dtype", **FLOATS, help="of every activation")
    text = "prompt tokens at a time, which bounds memory (512)"
    run.add_argument("--prefill-chunk", type=at_least(1), default=512, metavar="N", help=text)


def special_tokens_flag(add: argparse.ArgumentParser, where: str) -> None:
    """What becomes of special tokens that stand in messages."""
    choices = get_args(SpecialTokens)
    text = f"keep special tokens that {where}, as the released template does, "
    text += "take them for plain text, or refuse them (released)"
    add.add_argument("--special-tokens", choices=choices, default=choices[0], help=text)


class Model(NamedTuple):
    """What --model names, its weights a call away: what they warn of comes after every refusal.

    `load` takes the number of MTP layers that will draft, None for all.
    """

    load: Callable[[int | None], ModelWeights]
    config: Config
    tokenizer: Tokenizer | None
    checkpoint: Checkpoint


def open_model(path: Path | None) -> Model:
    """The checkpoint at `path`, or the one that is shipped."""
    folder = find_config("trained") if path is None else path
    checkpoint = open_checkpoint(folder)

    def load(depths: int | None) -> ModelWeights:
        note_shipped(path)
        return checkpoint.weights(depths)

    return Model(load, checkpoint.config, load_tokenizer(folder), checkpoint)


def note_shipped(path: Path | None) -> None:
    """Tell the user which model runs where none was named."""
    if path is None:
        note(SHIPPED)


def needed_tokenizer(
    args: Namespace, tokenizer: Tokenizer | None, flag: str, command: str = "generate"
) -> Tokenizer:
    """The tokenizer, which `flag` cannot do without."""
    if tokenizer is None:
        file = args.model / "tokenizer.json"
        without = f"{command} --tokens does without"
        raise InputError(f"{file}: is missing, expected for {flag} ({without})")
    return tokenizer


def prompt_tokens(args: Namespace, tokenizer: Tokenizer | None, command: str) -> list[int]:
    """The prompt's tokens, from --tokens or --prompt. Raises InputError where it has no text."""
    if args.tokens is not None:
        return list(args.tokens)
    if args.prompt == "":  # a tokenizer that puts bos in front would make a token of it
        raise InputError("the prompt is empty, expected some text")
    return encode(needed_tokenizer(args, tokenizer, "--prompt", command), args.prompt)


def read_tools(file: Path | None) -> list[Any] | None:
    """The tools in a JSON file, None without one."""
    return None if file is None else list(objects(read_json(file, list), str(file)))


def check_drafts(args: Namespace, config: Config) -> None:
    """Raise InputError where more drafts are wanted than there are MTP layers."""
    depths = len(config.mtp_layers)
    if (args.num_draft_tokens or 0) > depths:
        message = f"the model has {depths} MTP layers, expected at most that many"
        raise InputError(f"--num-draft-tokens {args.num_draft_tokens}: {message}")


def decode_steps(
    args: Namespace,
    prompt: list[int],
    weights: ModelWeights,
    config: Config,
    rng: np.random.Generator,
) -> Iterator[Step]:
    """The steps that the decoding flags ask for, with a bar while a long prompt is read."""
    how = Sampling(args.temp, args.top_k, args.top_p, args.min_p, args.repetition_penalty)
    with Progress("prompt", len(prompt), "tokens") as bar:
        yield from steps(
            prompt,
            weights,
            config,
            rng,
            args.max_tokens,
            how,
            np.dtype(args.dtype),
            args.prefill_chunk,
            args.ignore_eos,
            drafts_wanted(args),
            bar,
        )


def drafts_wanted(args: Namespace) -> int | None:
    """How many tokens to draft; None: one for each MTP layer."""
    drafts: int | None = args.num_draft_tokens if args.mtp else 0
    return drafts


def add_commands(command: Callable[..., Any]) -> None:
    """Add it to the parser; `command` adds one: name, what runs it, help, example."""
    example = '--prompt "Once" --max-tokens 20'
    add = command("generate", run_generate, "continue a prompt", example)
    messages = "a conversation, as a JSON array of messages"
    add_prompt(add).add_argument("--chat-messages", type=path, metavar="FILE.json", help=messages)
    tools = "what the model may call, as a JSON array; with --chat-messages"
    add.add_argument("--tools", type=path, metavar="FILE.json", help=tools)
    special_tokens_flag(add, "stand in --chat-messages and --tools")
    decoding_flags(add, temp=0.0, top_p=1.0, most=100, limit="100")
    logs = "log-probabilities of each token and of the N likeliest"
    add.add_argument("--logprobs", type=at_least(0), default=0, metavar="N", help=logs)
    show = "print each forward pass: its drafts, those that were kept in [], and its tokens"
    add.add_argument("--show-drafts", action="store_true", help=show)
    add.add_argument("--json", action="store_true", help="print one JSON object")


def run_generate(args: Namespace) -> None:
    """Continue a prompt or answer a conversation: text as it comes, or one JSON object."""
    if args.tools and not args.chat_messages:
        raise InputError("--tools goes with --chat-messages")
    if args.special_tokens != "released" and not args.chat_messages:
        raise InputError("--special-tokens goes with --chat-messages")
    model = open_model(args.model)
    tools = read_tools(args.tools)
    prompt = _prompt(args, model, tools)
    check_prompt(prompt, model.config)
    if args.stop:
        needed_tokenizer(args, model.tokenizer, "--stop")
    check_drafts(args, model.config)
    weights, rng = model.load(drafts_wanted(args)), np.random.default_rng(args.seed)
    if args.chat_messages and not model.config.can_chat:
        note(CONTINUES)
    stream = StreamingText(model.tokenizer, args.stop) if model.tokenizer else None
    decoded = decode_steps(args, prompt, weights, model.config, rng)
    answer, display = Continuation(decoded, stream, args.logprobs), Display()
    try:
        for n, piece in enumerate(answer):
            if not n and args.prompt and not args.json:  # after the bar, which empties its line
                display.prompt(args.prompt)
            if not args.json:
                comma = "," if len(answer.tokens) > 1 else ""
                display.put(piece if stream else f"{comma}{answer.tokens[-1]}")
    except KeyboardInterrupt:
        if not args.json:
            display.put("\n")
            note(summary(answer.stats(prompt)))
        raise
    if args.json:
        print_json(_result(args, prompt, answer, tools))
        return
    display.put("\n")
    word = partial(_word, model.tokenizer)
    for entry in answer.logprobs:
        chosen, *likely = (_logged(each, word) for each in (entry, *entry["top"]))
        print_text(f"token {chosen} of {', '.join(likely)}")
    if args.show_drafts:
        print_text(DRAFTS, *(drafts_line(each, answer.tokens, word) for each in answer.passes))
    note(summary(answer.stats(prompt)))


def _word(tokenizer: Tokenizer | None, token: int) -> str:
    """A token's text in quotes, or its number where it has none."""
    text = text_of(tokenizer, token)
    return str(token) if text is None else repr(text)


def _logged(entry: dict[str, Any], word: Callable[[int], str]) -> str:
    """A token's number, its text where it has one, and its log-probability."""
    token = entry["token"]
    named = dict.fromkeys((str(token), word(token)))
    return f"{' '.join(named)} {entry['logprob']:.4f}"


def _result(
    args: Namespace, prompt: list[int], answer: Continuation, tools: list[Any] | None
) -> dict[str, Any]:
    """What --json prints."""
    result: dict[str, Any] = {
        "prompt_tokens": prompt,
        "tokens": answer.tokens,
        "text": answer.text,
    }
    result |= {"stats": answer.stats(prompt), "mtp_trace": answer.mtp_trace}
    if args.logprobs:
        result["logprobs"] = answer.logprobs
    if args.chat_messages:
        result["message"] = parse(answer.text, tools).as_dict()
    return result


def _prompt(args: Namespace, model: Model, tools: list[Any] | None) -> list[int]:
    """The prompt's tokens, from whichever flag gave it."""
    if args.chat_messages is None:
        return prompt_tokens(args, model.tokenizer, "generate")
    tokenizer = needed_tokenizer(args, model.tokenizer, "--chat-messages")
    messages = read_json(args.chat_messages, list)
    try:
        text = render(messages, tools, special_tokens=args.special_tokens)
        return encode(tokenizer, text, is_rendered=True)
    except InputError as error:
        raise InputError(f"{args.chat_messages}: {error}") from error
