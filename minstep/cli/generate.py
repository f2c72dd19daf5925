"""generate and chat: from their arguments to what they print; no maths."""

import io
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

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
from minstep.sampling import Sampling
from minstep.store.checkpoint import Checkpoint, open_checkpoint
from minstep.store.config_file import find_config
from minstep.store.json_file import read_json
from minstep.text.continuation import Continuation
from minstep.text.conversation import Conversation, Story, talk
from minstep.text.prompt import parse, render
from minstep.text.tokenizer import StreamingText, encode, load_tokenizer, text_of
from minstep.text.tool_calls import objects
from minstep.validation import check_prompt

SHIPPED = "minstep: no --model: the small model shipped here, trained on Python's documentation"
DRAFTS = " after  drafts, those that were kept in [] -> new tokens"  # above lines of drafts_line
ANSWER, PIECE = 2048, 100  # most tokens of a chat's answer, and of a text that only goes on
CONTINUES = "minstep: this model has learned to continue a text, not to answer"


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
            _drafts(args),
            bar,
        )


def _drafts(args: Namespace) -> int | None:
    """How many tokens to draft; None: one for each MTP layer."""
    drafts: int | None = args.num_draft_tokens if args.mtp else 0
    return drafts


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
    weights, rng = model.load(_drafts(args)), np.random.default_rng(args.seed)
    if args.chat_messages and not model.config.can_chat:
        note(CONTINUES)
    stream = StreamingText(model.tokenizer, args.stop) if model.tokenizer else None
    decoded = decode_steps(args, prompt, weights, model.config, rng)
    said, display = Continuation(decoded, stream, args.logprobs), Display()
    try:
        for n, piece in enumerate(said):
            if not n and args.prompt and not args.json:  # after the bar, which empties its line
                display.prompt(args.prompt)
            if not args.json:
                comma = "," if len(said.tokens) > 1 else ""
                display.put(piece if stream else f"{comma}{said.tokens[-1]}")
    except KeyboardInterrupt:
        if not args.json:
            display.put("\n")
            note(summary(said.stats(prompt)))
        raise
    if args.json:
        print_json(_result(args, prompt, said, tools))
        return
    display.put("\n")
    word = partial(_word, model.tokenizer)
    for entry in said.logprobs:
        chosen, *likely = (_logged(each, word) for each in (entry, *entry["top"]))
        print_text(f"token {chosen} of {', '.join(likely)}")
    if args.show_drafts:
        print_text(DRAFTS, *(drafts_line(each, said.tokens, word) for each in said.passes))
    note(summary(said.stats(prompt)))


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
    args: Namespace, prompt: list[int], said: Continuation, tools: list[Any] | None
) -> dict[str, Any]:
    """What --json prints."""
    result: dict[str, Any] = {"prompt_tokens": prompt, "tokens": said.tokens, "text": said.text}
    result |= {"stats": said.stats(prompt), "mtp_trace": said.mtp_trace}
    if args.logprobs:
        result["logprobs"] = said.logprobs
    if args.chat_messages:
        result["message"] = parse(said.text, tools).as_dict()
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


def run_chat(args: Namespace) -> None:
    """Talk with the model in a terminal, or answer each line of stdin."""
    if sys.stdin is None:
        raise InputError("stdin is closed, expected the lines of a conversation")
    model = open_model(args.model)
    tokenizer = needed_tokenizer(args, model.tokenizer, "chat")
    tools = read_tools(args.tools)
    if tools and not model.config.can_chat:
        raise InputError(f"--tools {args.tools}: the model only continues text (can_chat is false)")
    kind = Conversation if model.config.can_chat else Story
    conversation = kind(tokenizer, args.system, tools, args.stop, args.special_tokens)
    check_drafts(args, model.config)
    weights, rng = model.load(_drafts(args)), np.random.default_rng(args.seed)
    if not model.config.can_chat:
        note(f"{CONTINUES}; Ctrl-C stops it")
    if args.max_tokens is None:
        args.max_tokens = ANSWER if model.config.can_chat else PIECE

    def decode(prompt: list[int]) -> Iterator[Step]:
        return decode_steps(args, prompt, weights, model.config, rng)

    is_interactive = sys.stdin.isatty()
    if is_interactive:
        with suppress(ImportError):
            import readline  # noqa: F401  (lets input() edit lines and remember them)
    elif isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # so that encode refuses what is no UTF-8
    talk(conversation, decode, Display(args.hide_thinking), is_interactive)
