"""The model's text back to a message: thinking, content and tool calls, whole or as it comes."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from minstep.text.tool_calls import (
    CALL,
    END_CALL,
    FUNCTION,
    CallText,
    Signatures,
    ToolCall,
    Tools,
    behind_space,
    read_call,
)

THINK, END_THINK = "<think>", "</think>"


class Message(NamedTuple):
    """What the model said."""

    thinking: str
    content: str
    tool_calls: tuple[ToolCall, ...]

    def as_dict(self) -> dict[str, Any]:
        """The message in OpenAI's format, as `render` takes it; without calls there is no such key.

        `reasoning_content` is there even when empty: render would else look for it in the content.
        """
        message = {"role": "assistant", "content": self.content, "reasoning_content": self.thinking}
        calls = [{"type": "function", "function": call._asdict()} for call in self.tool_calls]
        return {**message, "tool_calls": calls} if calls else message


class Event(NamedTuple):
    """A piece of a message: some thinking or content, or one whole tool call."""

    kind: Literal["thinking", "content", "tool_call"]
    payload: Any  # a str, or for tool_call a ToolCall


def parse(text: str, tools: Tools = None) -> Message:
    """The message in what the model wrote after `render`'s prompt, by the rules of ChatStream.

    Never raises, whatever the text. `tools` as for `render`: without them arguments stay strings.
    Checked by: tests/text/test_prompt.py
    """
    return gathered(ChatStream(tools), text)


def gathered(stream: "ChatStream | PlainStream", text: str) -> Message:
    """The message in a whole text, as `stream`, a new one, reads it."""
    events = [*stream.feed(text), *stream.finish()]
    thinking = "".join(event.payload for event in events if event.kind == "thinking")
    content = "".join(event.payload for event in events if event.kind == "content")
    calls = tuple(event.payload for event in events if event.kind == "tool_call")
    return Message(thinking, content, calls)


class PlainStream:
    """Takes text for what it is: content, with no tags in it."""

    def feed(self, text: str) -> list[Event]:
        """Give out what came."""
        return [Event("content", text)]

    def finish(self) -> list[Event]:
        """Nothing was held back."""
        return []


class ChatStream:
    """Reads the model's text as it comes and gives out each piece as soon as it is certain.

    However the text is cut, the pieces join to the same message. What may yet turn out to be a tag
    is held back, and so is a tool call until it is whole.
    The text begins inside the thinking (a `<think>` is taken off) and leaves it at the first
    `</think>`; one newline on each side of that tag is layout. Text that never leaves it is all
    thinking. Then come content and calls. A call that is not well formed is content as it stands;
    one that does not end is, with all behind it, content when the text is finished; a `<tool_call>`
    without a `<function=` is just content. White space after a call is dropped unless content
    follows.
    Source: the released chat template, read backwards.
    Differs: parsers that expect one token at a time lose calls when an accepted draft brings
        several tags at once (vLLM #33690). llama.cpp lets a `<tool_call>` end the thinking too.
    Checked by: tests/text/test_prompt.py
    """

    def __init__(self, tools: Tools = None) -> None:
        self._signatures = Signatures(tools)
        self._text, self._at = "", 0  # what came last, and how far it has been read
        self._space: list[str] = []  # white space behind the `<tool_call>` that came last
        self._call = CallText()  # the call that has begun
        self._gap: list[str] | None = None  # white space behind a call; None when not behind one
        self._newline_is_layout = False
        self._events: list[Event] = []
        self._read: Callable[[], bool] = self._read_start

    def feed(self, text: str) -> list[Event]:
        """Take more text and give out what it makes certain."""
        self._text, self._at = self._text[self._at :] + text, 0
        while self._read():  # each reader takes what it can, and says whether another should go on
            pass
        return self._take()

    def finish(self) -> list[Event]:
        """Give out what was held back: the text has ended, so it is no tag and no whole call."""
        rest, self._text, self._at = self._text[self._at :], "", 0
        if self._read in (self._read_start, self._read_thinking):
            self._add("thinking", rest)
        else:
            if self._read != self._read_content:
                call = self._call.text if self._read == self._read_call else ""
                rest = "".join((CALL, *self._space, call, rest))
            self._add_content(rest)
            self._read = self._read_content
        return self._take()

    def _take(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    def _read_start(self) -> bool:
        """Before anything: take off a `<think>`."""
        if len(self._text) < len(THINK) and THINK.startswith(self._text):
            return False
        self._newline_is_layout = self._text.startswith(THINK)
        self._at = len(THINK) if self._newline_is_layout else 0
        self._read = self._read_thinking
        return True

    def _read_thinking(self) -> bool:
        """Thinking up to `</think>`."""
        self._skip_newline()
        before, found, _ = self._text[self._at :].partition(END_THINK)
        if found:
            self._add("thinking", before.removesuffix("\n"))
            self._at += len(before) + len(END_THINK)
            self._newline_is_layout = True
            self._read = self._read_content
            return True
        certain = min(unfinished(before, END_THINK), unfinished(before, "\n" + END_THINK))
        self._add("thinking", before[:certain])
        self._at += certain
        return False

    def _read_content(self) -> bool:
        """Content up to a `<tool_call>`."""
        self._skip_newline()
        end = self._text.find(CALL, self._at)
        if end < 0:
            rest = self._text[self._at :]
            certain = unfinished(rest, CALL)
            self._add_content(rest[:certain])
            self._at += certain
            return False
        self._add_content(self._text[self._at : end])
        self._at = end + len(CALL)
        self._space = []
        self._read = self._read_opening
        return True

    def _read_opening(self) -> bool:
        """Behind a `<tool_call>`: with a `<function=` a call begins, else it was content."""
        begin = behind_space(self._text, self._at)
        ahead = self._text[begin : begin + len(FUNCTION)]
        if ahead == FUNCTION:
            self._call = CallText()
            self._read = self._read_call
            return True
        if FUNCTION.startswith(ahead):
            self._space.append(self._text[self._at : begin])
            self._at = begin
            return False
        if self._space:
            self._text, self._at = "".join(self._space) + self._text[self._at :], 0
        self._add_content(CALL)
        self._read = self._read_content
        return True

    def _read_call(self) -> bool:
        """A call up to its end."""
        end = self._call.add(self._text, self._at)
        self._at = end if end >= 0 else len(self._text)
        if end < 0:
            return False
        self._add_call("".join((CALL, *self._space, self._call.text)))
        self._read = self._read_content
        return True

    def _skip_newline(self) -> None:
        """Take off the one newline that belongs to the tag before it, once it is there to see."""
        if self._newline_is_layout and self._at < len(self._text):
            self._at += self._text.startswith("\n", self._at)
            self._newline_is_layout = False

    def _add_content(self, text: str) -> None:
        """Give out content, but white space behind a call only together with what follows it."""
        if self._gap is not None:
            self._gap.append(text)
            if not text.strip():
                return
            text, self._gap = "".join(self._gap), None
        self._add("content", text)

    def _add_call(self, text: str) -> None:
        """Give out the call that `text` is with its tags, or where it is none the text."""
        call = read_call(text[len(CALL) : -len(END_CALL)], self._signatures)
        if call is None:
            self._add_content(text)
        else:
            self._add("tool_call", call)
            self._gap = []

    def _add(self, kind: Literal["thinking", "content", "tool_call"], payload: Any) -> None:
        if payload:
            self._events.append(Event(kind, payload))


def unfinished(text: str, tag: str) -> int:
    """Where the end of `text` that may become `tag` begins; the length of `text` without one."""
    starts = range(max(0, len(text) - len(tag) + 1), len(text))
    return next((n for n in starts if tag.startswith(text[n:])), len(text))
