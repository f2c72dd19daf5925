"""Chat: messages and tools to Step's prompt text."""

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from operator import itemgetter
from typing import Any, Literal, NamedTuple, get_args

from minstep.errors import InputError
from minstep.text.reply import END_THINK, THINK
from minstep.text.tool_calls import (
    CALL,
    END_CALL,
    Piece,
    Tools,
    json_line,
    objects,
    short,
    write_call,
)

SpecialTokens = Literal["released", "plain", "refuse"]

BOS = "<｜begin▁of▁sentence｜>"
START, END = "<|im_start|>", "<|im_end|>"
RESPONSE, END_RESPONSE = "<tool_response>", "</tool_response>"
IMAGE = "<im_patch>"
GENERATION = "<|im_start|>assistant\n<think>\n"
ROLES = ("system", "user", "assistant", "tool")
# This model's special tokens, and the tags that count as such where a tokenizer has them.
SPECIAL = (BOS, "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>", START, END, "<|EOT|>")
TEMPLATE_TAGS = (THINK, END_THINK, CALL, END_CALL, RESPONSE, END_RESPONSE)

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


class Prompt(str):
    """A prompt that remembers which of its text came from messages and tools, and from where.

    `encode` needs that where the special tokens in such text are not to count. What is cut out of
    a prompt, or joined to one, is a plain str again, and encoded as one.
    """

    __slots__ = ("contents", "special_tokens")
    contents: tuple[tuple[int, int, str], ...]  # begin, end and place of each, in order
    special_tokens: SpecialTokens

    @classmethod
    def of(cls, pieces: Sequence[Piece], special_tokens: SpecialTokens) -> "Prompt":
        """The prompt of these pieces. Raises InputError for another word than it knows."""
        known = get_args(SpecialTokens)
        if special_tokens not in known:
            expected = f"expected one of {', '.join(known)}"
            raise InputError(f"special_tokens is {short(special_tokens)}, {expected}")
        prompt = cls("".join(piece.text for piece in pieces))
        ends = [*accumulate(len(piece.text) for piece in pieces)]
        prompt.contents = tuple(
            (end - len(piece.text), end, piece.place)
            for piece, end in zip(pieces, ends, strict=True)
            if piece.place and piece.text
        )
        prompt.special_tokens = special_tokens
        return prompt

    @property
    def template(self) -> str:
        """The prompt without what came from messages and tools."""
        begins = [0, *(end for _, end, _ in self.contents)]
        ends = [*(begin for begin, _, _ in self.contents), len(self)]
        return "".join(self[begin:end] for begin, end in zip(begins, ends, strict=True))

    def place(self, begin: int, end: int) -> str:
        """Which message or tool the text from `begin` to `end` is from; empty for the template's.

        Where it is from several, the first.
        """
        n = bisect_right(self.contents, begin, key=itemgetter(1))  # the first that ends behind it
        overlaps = n < len(self.contents) and self.contents[n][0] < end
        return self.contents[n][2] if overlaps else ""

    def foreign(self, tokens: Iterable[str]) -> list[tuple[int, int, str]]:
        """Where `tokens` stand that the template has not written: begin, end, place; in order.

        Such a token may begin in the template's text and end in a message's.
        """
        found = []
        for token in tokens:
            at = self.find(token)
            while at >= 0:
                end = at + len(token)
                if place := self.place(at, end):
                    found.append((at, end, place))
                at = self.find(token, at + 1)
        return sorted(found)


def render(
    messages: Sequence[Mapping[str, Any]],
    tools: Tools = None,
    add_generation_prompt: bool = True,
    special_tokens: SpecialTokens = "released",
) -> Prompt:
    """The prompt for a conversation in OpenAI's format, beginning with the bos characters.

    A message may spell special tokens, such as one that ends its turn. "released" leaves them, as
    the released template does, and `encode` makes tokens of them. "plain" has `encode` take them
    for ordinary text. "refuse" raises InputError for those of this model, and has `encode` do so
    for all that its tokenizer has.
    Raises InputError, naming the message, for what the template cannot render or would leave out:
    an empty conversation, an unknown role, content that is no text, a malformed tool call.
    Source: the released chat template (5,004 bytes, SHA-256 b18b99df...).
    Differs: thinking of earlier turns goes, except after the last real question: while the model
        works through tool calls it sees its own thoughts. Nothing is stripped from contents.
    Checked by: tests/text/test_prompt.py, tests/text/test_special_tokens.py
    """
    turns = [_turn(n, message) for n, message in enumerate(objects(messages, "messages"))]
    if not turns:
        raise InputError("messages is empty, expected at least one message")
    question = _last_question(turns)
    pieces = [Piece(BOS), *_head(turns[0], tools)]
    for n, turn in enumerate(turns):
        content = Piece(turn.text, f"{turn.place}.content")
        if turn.role == "tool":
            begins = n == 0 or turns[n - 1].role != "tool"
            ends = n + 1 == len(turns) or turns[n + 1].role != "tool"
            pieces.append(Piece(f"{START}tool_response\n" if begins else ""))
            pieces += [Piece(RESPONSE), content, Piece(END_RESPONSE)]
            pieces.append(Piece(f"{END}\n" if ends else ""))
        elif turn.role == "assistant":
            pieces += _assistant(turn, with_thinking=n > question)
        elif n > 0 or turn.role != "system":  # the first system message is in the head
            pieces += [Piece(f"{START}{turn.role}\n"), content, Piece(f"{END}\n")]
    pieces.append(Piece(GENERATION if add_generation_prompt else ""))
    prompt = Prompt.of(pieces, special_tokens)
    if special_tokens == "refuse":
        refuse_foreign(prompt, SPECIAL)
    return prompt


def refuse_foreign(prompt: Prompt, tokens: Iterable[str]) -> None:
    """Raise InputError, naming the place, where a message or a tool spells one of `tokens`."""
    for begin, end, place in prompt.foreign(tokens):
        token = str(prompt[begin:end])
        raise InputError(f"{place} has the special token {token}, expected text without any")


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
        raise InputError(f"{place} has the role {short(role)}, expected one of {', '.join(ROLES)}")
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
    texts = []
    for n, part in enumerate(objects(content, place)):
        if not isinstance(part.get("type"), str):
            raise InputError(f"{place}[{n}] has no type, expected text or image")
        if part["type"] == "text":
            texts.append(_words(part, f"{place}[{n}]"))
        elif part["type"] == "image":
            texts.append(IMAGE)
    return "".join(texts)


def _words(part: Mapping[str, Any], place: str) -> str:
    """The text of a part, under `value` or else under `text`."""
    words = part.get("value", part.get("text"))
    if not isinstance(words, str):
        raise InputError(f"{place} has the text {short(words)}, expected a string")
    return words


def _head(first: _Turn, tools: Tools) -> list[Piece]:
    """The system block: the first message's text if it is a system message, and the tools."""
    is_system = first.role == "system"
    system = [Piece(first.text, f"{first.place}.content")] if is_system else []
    if not tools:
        return [Piece(f"{START}system\n"), *system, Piece(f"{END}\n")] if is_system else []
    pieces = [Piece(f"{START}system\n"), *system, Piece("\n\n" if is_system else "")]
    pieces.append(Piece(TOOLS_BEFORE))
    for n, tool in enumerate(objects(tools, "tools")):
        pieces += [Piece("\n"), Piece(json_line(tool, f"tools[{n}]"), f"tools[{n}]")]
    return [*pieces, Piece(f"{TOOLS_AFTER}{END}\n")]


def _last_question(turns: list[_Turn]) -> int:
    """The index of the last user message that is no tool result in disguise.

    Without one it is the last message's, so that no thinking is shown.
    """
    for n in reversed(range(len(turns))):
        disguised = turns[n].text.startswith(RESPONSE) and turns[n].text.endswith(END_RESPONSE)
        if turns[n].role == "user" and not disguised:
            return n
    return len(turns) - 1


def _assistant(turn: _Turn, with_thinking: bool) -> list[Piece]:
    """An earlier answer. Thinking in its text is taken out unless it came by itself."""
    thinking, text = turn.message.get("reasoning_content"), turn.text
    if not isinstance(thinking, str):
        thinking = ""
        if END_THINK in text:
            before = text.partition(END_THINK)[0].rstrip("\n")
            thinking = before.rpartition(THINK)[2].lstrip("\n")
            text = text.rpartition(END_THINK)[2].lstrip("\n")
    pieces = [Piece(f"{START}assistant\n")]
    if with_thinking:
        thought = Piece(thinking, f"{turn.place}.reasoning_content")
        pieces += [Piece(f"{THINK}\n"), thought, Piece(f"\n{END_THINK}\n")]
    pieces.append(Piece(text, f"{turn.place}.content"))
    place = f"{turn.place}.tool_calls"
    for n, call in enumerate(objects(turn.message.get("tool_calls") or (), place)):
        pieces += write_call(call, f"{place}[{n}]")
    return [*pieces, Piece(f"{END}\n")]
