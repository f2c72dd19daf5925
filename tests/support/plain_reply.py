"""The model's text back to a message, the plain way: all that came is looked at again each time.

The reference for minstep/text/reply.py and minstep/text/tool_calls.py. It takes the square of a
text's length or worse.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any, Literal

from minstep.text.reply import END_THINK, THINK, Event
from minstep.text.tool_calls import (
    CALL,
    END_CALL,
    END_FUNCTION,
    END_PARAMETER,
    FUNCTION,
    PARAMETER,
    PYTHON_TYPES,
    PYTHON_WORDS,
    ToolCall,
    Tools,
)

MOST_REFERENCES = 20


class PlainChatStream:
    """As ChatStream."""

    def __init__(self, tools: Tools = None) -> None:
        self._tools = tools
        self._held = ""
        self._gap: str | None = None  # white space behind a call; None when not behind one
        self._newline_is_layout = False
        self._events: list[Event] = []
        self._read: Callable[[], bool] = self._read_start

    def feed(self, text: str) -> list[Event]:
        """Take more text and give out what it makes certain."""
        self._held += text
        while self._read():  # each reader takes what it can, and says whether another should go on
            pass
        return self._take()

    def finish(self) -> list[Event]:
        """Give out what was held back: the text has ended, so it is no tag and no whole call."""
        if self._read == self._read_content:
            self._add_content(self._held)
        else:
            self._add("thinking", self._held)
        self._held = ""
        return self._take()

    def _take(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    def _read_start(self) -> bool:
        """Before anything: take off a `<think>`."""
        if len(self._held) < len(THINK) and THINK.startswith(self._held):
            return False
        self._newline_is_layout = self._held.startswith(THINK)
        self._held = self._held.removeprefix(THINK)
        self._read = self._read_thinking
        return True

    def _read_thinking(self) -> bool:
        """Thinking up to `</think>`."""
        self._skip_newline()
        before, found, after = self._held.partition(END_THINK)
        if found:
            self._add("thinking", before.removesuffix("\n"))
            self._held, self._newline_is_layout = after, True
            self._read = self._read_content
            return True
        certain = min(unfinished(before, END_THINK), unfinished(before, "\n" + END_THINK))
        self._add("thinking", before[:certain])
        self._held = before[certain:]
        return False

    def _read_content(self) -> bool:
        """Content up to a `<tool_call>`, and the call with it."""
        self._skip_newline()
        before, found, after = self._held.partition(CALL)
        certain = len(before) if found else unfinished(before, CALL)
        self._add_content(before[:certain])
        self._held = self._held[certain:]
        if not found:
            return False
        ahead = after.lstrip()
        if not ahead.startswith(FUNCTION):
            if FUNCTION.startswith(ahead):
                return False
            self._add_content(CALL)
            self._held = after
            return True
        end = call_end(after)
        if end < 0:
            return False
        self._held = after[end + len(END_CALL) :]
        self._add_call(after[:end])
        return True

    def _skip_newline(self) -> None:
        """Take off the one newline that belongs to the tag before it, once it is there to see."""
        if self._newline_is_layout and self._held:
            self._held, self._newline_is_layout = self._held.removeprefix("\n"), False

    def _add_content(self, text: str) -> None:
        """Give out content, but white space behind a call only together with what follows it."""
        if self._gap is not None:
            self._gap += text
            if not self._gap.strip():
                return
            text, self._gap = self._gap, None
        self._add("content", text)

    def _add_call(self, text: str) -> None:
        """Give out the call in `text`, or where it is none the text and its tags as content."""
        call = read_call(text, self._tools)
        if call is None:
            self._add_content(f"{CALL}{text}{END_CALL}")
        else:
            self._add("tool_call", call)
            self._gap = ""

    def _add(self, kind: Literal["thinking", "content", "tool_call"], payload: Any) -> None:
        if payload:
            self._events.append(Event(kind, payload))


def unfinished(text: str, tag: str) -> int:
    """Where the end of `text` that may become `tag` begins; the length of `text` without one."""
    starts = range(max(0, len(text) - len(tag) + 1), len(text))
    return next((n for n in starts if tag.startswith(text[n:])), len(text))


def call_end(text: str) -> int:
    """Where the `</tool_call>` stands that ends the call `text` begins with; -1 if missing.

    It is the first one behind a `</function>` that closes no call quoted in a value. So a value may
    speak of either tag and quote whole calls, which then are neither run nor an end.
    """
    end = text.find(END_CALL)
    while end >= 0 and not (text[:end].rstrip().endswith(END_FUNCTION) and _balanced(text[:end])):
        end = text.find(END_CALL, end + 1)
    return end


def _balanced(text: str) -> bool:
    """Whether as many calls end in `text` as begin in it."""
    begun = sum(piece.lstrip().startswith(FUNCTION) for piece in text.split(CALL)[1:])
    ended = sum(piece.rstrip().endswith(END_FUNCTION) for piece in text.split(END_CALL)[:-1])
    return begun == ended


def read_call(text: str, tools: Tools = None) -> ToolCall | None:
    """The call in `text`, which stood between `<tool_call>` and `</tool_call>`.

    None where it is not well formed: a tag or a name is missing, a parameter comes twice, or other
    text stands between the tags. White space there is free. One newline at each end of a value is
    layout, the rest of it is the value's own. A value may hold `</parameter>` unless `<parameter=`
    or the end of the function follows, and anything inside a quoted call.
    Source: the released chat template, read backwards.
    Checked by: tests/text/test_prompt.py
    """
    text = text.strip()
    name, closed, rest = text.removeprefix(FUNCTION).removesuffix(END_FUNCTION).partition(">")
    whole = text.startswith(FUNCTION) and text.endswith(END_FUNCTION) and closed
    if not whole or not _is_name(name):
        return None
    parameters = _parameters(name, tools)
    schemas = _mapping(parameters.get("properties"))
    arguments: dict[str, Any] = {}
    while rest := rest.strip():
        key, _, value = rest.removeprefix(PARAMETER).partition(">")
        end = _value_end(value)
        if not rest.startswith(PARAMETER) or end < 0 or not _is_name(key) or key in arguments:
            return None
        raw = value[:end].removeprefix("\n").removesuffix("\n")
        arguments[key] = typed(raw, schemas.get(key), parameters)
        rest = value[end + len(END_PARAMETER) :]
    return ToolCall(name, arguments)


def _is_name(text: str) -> bool:
    """Whether `text` can name a function or parameter; with a newline or `<` it swallowed a tag."""
    return bool(text) and "\n" not in text and "<" not in text


def _value_end(text: str) -> int:
    """Where the `</parameter>` stands that ends the value `text` begins with; -1 if missing."""
    end = text.find(END_PARAMETER)
    while end >= 0:
        after = text[end + len(END_PARAMETER) :].lstrip()
        if (not after or after.startswith(PARAMETER)) and _balanced(text[:end]):
            break
        end = text.find(END_PARAMETER, end + 1)
    return end


def _parameters(name: str, tools: Tools) -> Mapping[str, Any]:
    """The schema of all parameters of the tool `name`; an empty one where it is not known."""
    for tool in tools or ():
        function = _mapping(_mapping(tool).get("function", tool))
        if function.get("name") == name:
            return _mapping(function.get("parameters"))
    return {}


def typed(text: str, schema: Any, root: Any = None) -> Any:
    """The value that `text` stands for under the JSON Schema of its parameter.

    The types are those of `type`, `enum`, `const`, `anyOf`, `oneOf`, `allOf`, and of a `$ref` into
    `root`, the schema of all parameters. Where none is known, or none but string fits, the value is
    the text itself: nothing is ever lost. Other types go before string, so "5" is a number where
    both are allowed: the other way round that choice could never be made.
    Differs: True, False and None count as true, false and null, since prompts spell them so.
    Checked by: tests/text/test_prompt.py
    """
    types = _types(schema, root)
    try:
        word = text.strip()
        value = PYTHON_WORDS[word] if word in PYTHON_WORDS else json.loads(word)
        json.dumps(value, allow_nan=False)  # refuses NaN and the infinities: no JSON, but Python's
    except (ValueError, RecursionError):
        return text
    if isinstance(value, float) and value.is_integer() and "number" not in types:
        value = int(value)  # JSON Schema counts 5.0 as an integer
    fits = any(type(value) in PYTHON_TYPES.get(kind, ()) for kind in types)
    return value if fits else text


def _types(schema: Any, root: Any, depth: int = 0) -> set[str]:
    """The names of the types that `schema` allows at its top."""
    schema = _mapping(schema)
    if depth > MOST_REFERENCES:  # a reference may lead back to itself
        return set()
    kinds = schema.get("type")
    kinds = kinds if isinstance(kinds, list) else [kinds]
    names = {kind for kind in kinds if isinstance(kind, str)}
    values = schema.get("enum", [schema["const"]] if "const" in schema else [])
    for value in values if isinstance(values, list) else ():
        names.update(kind for kind, types in PYTHON_TYPES.items() if type(value) in types)
    choices = [schema.get(key) for key in ("anyOf", "oneOf", "allOf")]
    inner = [choice for listed in choices if isinstance(listed, list) for choice in listed]
    return names.union(*(_types(s, root, depth + 1) for s in [*inner, _referred(schema, root)]))


def _referred(schema: Mapping[str, Any], root: Any) -> Any:
    """What the `$ref` of a schema, such as `#/$defs/Place`, stands for in `root`; else nothing."""
    path = schema.get("$ref")
    if not isinstance(path, str) or not path.startswith("#/"):
        return None
    for key in path[2:].split("/"):
        root = _mapping(root).get(key.replace("~1", "/").replace("~0", "~"))
    return root


def _mapping(value: Any) -> Mapping[str, Any]:
    """`value` if it is an object, else an empty one: a tool's schema may be anything."""
    return value if isinstance(value, Mapping) else {}
