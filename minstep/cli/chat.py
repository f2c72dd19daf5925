"""`minstep chat`: its flags, and a conversation at a terminal or line by line from stdin."""

import io
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from typing import Any

import numpy as np

from minstep.cli.arguments import path
from minstep.cli.generate import (
    CONTINUES,
    check_drafts,
    decode_steps,
    decoding_flags,
    drafts_wanted,
    needed_tokenizer,
    open_model,
    read_tools,
    special_tokens_flag,
)
from minstep.cli.terminal import Display, note, read_line, summary
from minstep.errors import InputError
from minstep.generate import Step
from minstep.text.conversation import Conversation, Decode, Story

ANSWER, PIECE = 2048, 100  # most tokens of a chat's answer, and of a text that only goes on
WELCOME = "/help lists the commands; Ctrl-C stops an answer, Ctrl-D leaves"
HELP = """\
/reset        forget everything but the system text
/system TEXT  set the system text; without TEXT show it
/exit         leave, as Ctrl-D does
A line that begins with a space is sent as it is, even with a / next.
A tool's result is a line such as <tool_response>RESULT</tool_response>."""


def add_commands(command: Callable[..., Any]) -> None:
    """Add it to the parser; `command` adds one: name, what runs it, help, example."""
    example = '--system "Answer briefly" --hide-thinking'
    add = command("chat", run_chat, "talk with the model", example)
    text = "what the model is told before all else"
    add.add_argument("--system", "--system-prompt", metavar="TEXT", help=text)
    tools = "what the model may call, as a JSON array"
    add.add_argument("--tools", type=path, metavar="FILE.json", help=tools)
    special_tokens_flag(add, "stand in messages")
    text = "show answers without the thinking before them"
    add.add_argument("--hide-thinking", action="store_true", help=text)
    most = f"{ANSWER}; {PIECE} where the model only continues a text"
    decoding_flags(add, temp=0.6, top_p=0.95, most=None, limit=most)


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
    weights, rng = model.load(drafts_wanted(args)), np.random.default_rng(args.seed)
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


def obey(conversation: Conversation, line: str) -> str | None:
    """Do what a line that begins with a slash says: what to tell the user, None to leave."""
    name, *rest = line.split(maxsplit=1)
    text = rest[0].strip() if rest else ""
    if name == "/exit":
        return None
    if name == "/help":
        return HELP
    if name == "/reset":
        conversation.messages.clear()
        return "forgotten" + (", but for the system text" if conversation.system else "")
    if name == "/system" and text:
        conversation.system = text
        return f"the system text is now: {text}"
    if name == "/system":
        return f"the system text is: {conversation.system or 'none'}"
    return f"{name} is no command; /help lists them, and a space before it sends it as it is"


def talk(
    conversation: Conversation,
    decode: Decode,
    display: Display,
    is_interactive: bool,
    read: Callable[[], str] = read_line,
) -> None:
    """Answer the user's lines until they end, obeying those that begin with a slash.

    Ctrl-C stops an answer; without one it clears the line, and twice in a row it leaves. Where
    nobody sits at a terminal it is raised, and so is InputError: there nobody can try again.
    """
    was_interrupted = False
    if is_interactive:
        note(WELCOME)
    while True:
        try:
            line = read()
            was_interrupted = False
            if line.startswith("/"):
                answer = obey(conversation, line)
                if answer is None:
                    return
                note(answer)
            elif line.strip():
                _answer(conversation, line.strip(), decode, display, is_interactive)
        except InputError as error:
            if not is_interactive:
                raise
            note(f"minstep: {error}")
        except EOFError:
            if is_interactive:
                note("")
            return
        except KeyboardInterrupt:
            if not is_interactive:
                raise
            note("" if was_interrupted else "\n(Ctrl-C again, or Ctrl-D, leaves)")
            if was_interrupted:
                return
            was_interrupted = True


def _answer(
    conversation: Conversation, text: str, decode: Decode, display: Display, is_interactive: bool
) -> None:
    """Show the answer to `text`, and what it cost."""
    try:
        with closing(conversation.ask(text, decode)) as events:
            for event in events:
                display.show(event)
    except KeyboardInterrupt:
        if not is_interactive:
            raise
    finally:
        display.end()
    if conversation.stats.get("new_tokens"):
        note(summary(conversation.stats), is_dim=True)
    else:
        note("nothing was said, so your message is taken back")
