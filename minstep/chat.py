"""Chat: messages and tools to Step's prompt text, and the model's text back to a message."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from minstep.files import InputError
from minstep.reply import END_THINK, THINK, ChatStream, Event, Message, parse
from minstep.toolcalls import ToolCall, Tools, json_line, objects, write_call

__all__ = ["ChatStream", "Event", "Message", "ToolCall", "parse", "render"]

BOS = "<｜begin▁of▁sentence｜>"
START, END = "<|im_start|>", "<|im_end|>"
RESPONSE, END_RESPONSE = "<tool_response>", "</tool_response>"
IMAGE = "<im_patch>"
GENERATION = "<|im_start|>assistant\n<think>\n"
ROLES = ("system", "user", "assistant", "tool")

# Fixed text that the model was trained on, character for character.
TOOLS_BEFORE = """# Tools

You have access to the following functions in JSONSchema format:

<tools>"""
TOOLS_AFTER = """
</tools>

If you choose to call a function ONLY reply in the following format with NO suffix:

<tool_call>
<function=example_function_name>
<parameter=example_parameter_1>
value_1
</parameter>
<parameter=example_parameter_2>
This is the value for the second parameter
that can span
multiple lines
</parameter>
</function>
</tool_call>

<IMPORTANT>
Reminder:
- Function calls MUST follow the specified format: an inner <function=...>
...
</function> block must be nested within <tool_call>
...
</tool_call> XML tags
- Required parameters MUST be specified
</IMPORTANT>"""


def render(
    messages: Sequence[Mapping[str, Any]], tools: Tools = None, add_generation_prompt: bool = True
) -> str:
    """The prompt for a conversation in OpenAI's format, beginning with the bos characters.

    Raises InputError, naming the message, for what the template cannot render or would leave out:
    an empty conversation, an unknown role, content that is no text, a malformed tool call.
    Source: the released chat template (5,004 bytes, SHA-256 b18b99df...).
    Differs: thinking of earlier turns goes, except after the last real question: while the model
        works through tool calls it sees its own thoughts. Nothing is stripped from contents.
    Checked by: tests/test_chat.py
    """
    turns = [_turn(n, message) for n, message in enumerate(objects(messages, "messages"))]
    if not turns:
        raise InputError("messages is empty, expected at least one message")
    question = _last_question(turns)
    prompt = [BOS, _head(turns[0], tools)]
    for n, turn in enumerate(turns):
        if turn.role == "tool":
            begins = n == 0 or turns[n - 1].role != "tool"
            ends = n + 1 == len(turns) or turns[n + 1].role != "tool"
            prompt.append(f"{START}tool_response\n" if begins else "")
            prompt.append(f"{RESPONSE}{turn.text}{END_RESPONSE}")
            prompt.append(f"{END}\n" if ends else "")
        elif turn.role == "assistant":
            prompt.append(_assistant(turn, with_thinking=n > question))
        elif n > 0 or turn.role != "system":  # the first system message is in the head
            prompt.append(f"{START}{turn.role}\n{turn.text}{END}\n")
    return "".join(prompt) + (GENERATION if add_generation_prompt else "")


class _Turn(NamedTuple):
    """A message that has been looked at: the name of its place, its role and its text."""

    place: str
    role: str
    text: str
    message: Mapping[str, Any]


def _turn(n: int, message: Mapping[str, Any]) -> _Turn:
    """Check message `n`'s role and content."""
    place, role = f"messages[{n}]", message.get("role")
    if role not in ROLES:
        raise InputError(f"{place} has the role {role!r:.80}, expected one of {', '.join(ROLES)}")
    if role == "system" and n > 0 and message.get("name") == "observation":
        role = "observation"
    return _Turn(place, role, _text(message.get("content"), f"{place}.content"), message)


def _text(content: Any, place: str) -> str:
    """A content as text: its parts without a separator.

    Parts of other types than text and image are left out, OpenAI's `image_url` too: so the template
    does, and the model takes no images anyway.
    """
    if content is None or isinstance(content, str):
        return content or ""
    if isinstance(content, Mapping):
        return _words(content, place)
    text = ""
    for n, part in enumerate(objects(content, place)):
        if not isinstance(part.get("type"), str):
            raise InputError(f"{place}[{n}] has no type, expected text or image")
        if part["type"] == "text":
            text += _words(part, f"{place}[{n}]")
        elif part["type"] == "image":
            text += IMAGE
    return text


def _words(part: Mapping[str, Any], place: str) -> str:
    """The text of a part, under `value` or else under `text`."""
    words = part.get("value", part.get("text"))
    if not isinstance(words, str):
        raise InputError(f"{place} has the text {words!r:.80}, expected a string")
    return words


def _head(first: _Turn, tools: Tools) -> str:
    """The system block: the first message's text if it is a system message, and the tools."""
    system = first.text if first.role == "system" else None
    if not tools:
        return "" if system is None else f"{START}system\n{system}{END}\n"
    before = "" if system is None else f"{system}\n\n"
    listed = [json_line(tool, f"tools[{n}]") for n, tool in enumerate(objects(tools, "tools"))]
    return f"{START}system\n{before}" + "\n".join([TOOLS_BEFORE, *listed]) + f"{TOOLS_AFTER}{END}\n"


def _last_question(turns: list[_Turn]) -> int:
    """The index of the last user message that is no tool result in disguise.

    Without one it is the last message's, so that no thinking is shown.
    """
    for n in reversed(range(len(turns))):
        disguised = turns[n].text.startswith(RESPONSE) and turns[n].text.endswith(END_RESPONSE)
        if turns[n].role == "user" and not disguised:
            return n
    return len(turns) - 1


def _assistant(turn: _Turn, with_thinking: bool) -> str:
    """An earlier answer. Thinking in its text is taken out unless it came by itself."""
    thinking, text = turn.message.get("reasoning_content"), turn.text
    if not isinstance(thinking, str):
        thinking = ""
        if END_THINK in text:
            before = text.partition(END_THINK)[0].rstrip("\n")
            thinking = before.rpartition(THINK)[2].lstrip("\n")
            text = text.rpartition(END_THINK)[2].lstrip("\n")
    thought = f"{THINK}\n{thinking}\n{END_THINK}\n" if with_thinking else ""
    place = f"{turn.place}.tool_calls"
    given = objects(turn.message.get("tool_calls") or (), place)
    calls = "".join(write_call(call, f"{place}[{n}]") for n, call in enumerate(given))
    return f"{START}assistant\n{thought}{text}{calls}{END}\n"
