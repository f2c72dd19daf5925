"""Step's tool calls: written into a prompt, and read back with the types of the tool's schema."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from minstep.files import InputError

CALL, END_CALL = "<tool_call>", "</tool_call>"
FUNCTION, END_FUNCTION = "<function=", "</function>"
PARAMETER, END_PARAMETER = "<parameter=", "</parameter>"

# What JSON Schema's types are in Python, string apart. Exact types: True is no integer.
PYTHON_TYPES: dict[str, tuple[type, ...]] = {
    "null": (type(None),),
    "boolean": (bool,),
    "integer": (int,),
    "number": (int, float),
    "object": (dict,),
    "array": (list,),
}
MOST_REFERENCES = 20
PYTHON_WORDS = {"True": True, "False": False, "None": None}

Tools = Sequence[Mapping[str, Any]] | None


class ToolCall(NamedTuple):
    """A function's name and its arguments, as values that JSON can hold."""

    name: str
    arguments: dict[str, Any]


def objects(value: Any, place: str) -> Sequence[Mapping[str, Any]]:
    """`value`, found at `place`, if it is a list of objects. Raises InputError otherwise."""
    if not isinstance(value, (list, tuple)):
        raise InputError(f"{place} is of type {type(value).__name__}, expected a list of objects")
    for n, item in enumerate(value):
        if not isinstance(item, Mapping):
            found = type(item).__name__
            raise InputError(f"{place}[{n}] is of type {found}, expected an object")
    return value


def json_line(value: Any, place: str) -> str:
    """`value` as JSON on one line, non-ASCII kept. Raises InputError where JSON cannot hold it."""
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{place} cannot be written as JSON: {error}") from error


def write_call(call: Mapping[str, Any], place: str) -> str:
    """The prompt text of an entry of `tool_calls`, found at `place`.

    `arguments` is an object or the JSON text of one; without it there are no parameters. Strings
    stand as they are, objects and lists as JSON, other values as Python prints them: True, None.
    Raises InputError naming the place of what cannot be written.
    Source: the released chat template.
    Differs: the template fails on JSON text, which OpenAI's clients send (llama.cpp #19635).
    Checked by: tests/test_chat.py
    """
    function = call.get("function", call)
    if not isinstance(function, Mapping):
        raise InputError(f"{place}.function is {function!r:.80}, expected an object")
    name = function.get("name")
    if not isinstance(name, str):
        raise InputError(f"{place} has the name {name!r:.80}, expected a string")
    text = f"{CALL}\n{FUNCTION}{name}>\n"
    place += " arguments"
    for key, value in _arguments(function.get("arguments", {}), place).items():
        if not isinstance(key, str):
            raise InputError(f"{place} has the key {key!r:.80}, expected a string")
        nested = isinstance(value, (Mapping, list, tuple))
        written = json_line(value, f"{place}.{key}") if nested else str(value)
        text += f"{PARAMETER}{key}>\n{written}\n{END_PARAMETER}\n"
    return f"{text}{END_FUNCTION}\n{END_CALL}"


def _arguments(value: Any, place: str) -> Mapping[str, Any]:
    """Arguments as an object, from an object, from JSON text, or from nothing at all."""
    if isinstance(value, str):
        try:
            value = json.loads(value or "{}")
        except (ValueError, RecursionError) as error:
            raise InputError(f"{place} is not valid JSON: {error}") from error
    if not isinstance(value, (Mapping, type(None))):
        found = type(value).__name__
        raise InputError(f"{place} is of type {found}, expected an object or its JSON")
    return value or {}


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
    Checked by: tests/test_chat.py
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
    Checked by: tests/test_chat.py
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
