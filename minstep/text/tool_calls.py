"""Step's tool calls: written into a prompt, and read back with the types of the tool's schema."""

import json
import re
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple
from urllib.parse import unquote

from minstep.errors import InputError, shown

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
PYTHON_WORDS = {"True": True, "False": False, "None": None}
TAGS = (CALL, END_CALL, FUNCTION, END_FUNCTION, END_PARAMETER)
TAG = re.compile("|".join(TAGS))
SPACE = re.compile(r"\s*")
VALUE_ENDS = re.compile(
    rf"\s*(?:{PARAMETER}|\Z)"
)  # what stands behind a `</parameter>` that counts

Tools = Sequence[Mapping[str, Any]] | None


class Piece(NamedTuple):
    """A piece of a prompt: the template's own, or with the place in the messages it is from."""

    text: str
    place: str = ""


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


def short(value: Any) -> str:
    """A value of any type as a message shows it: deep and wide ones only in part."""
    try:
        return reprlib.repr(value)
    except ValueError:  # an integer of thousands of digits
        return f"of type {type(value).__name__}"


def json_line(value: Any, place: str) -> str:
    """`value` as JSON on one line, non-ASCII kept. Raises InputError where JSON cannot hold it."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{place} cannot be written as JSON: {error}") from error


def write_call(call: Mapping[str, Any], place: str) -> list[Piece]:
    """The prompt text of an entry of `tool_calls`, found at `place`, as pieces.

    `arguments` is an object or the JSON text of one; without it there are no parameters. Strings
    stand as they are, objects and lists as JSON, other values as Python prints them: True, None.
    Raises InputError naming the place of what cannot be written.
    Source: the released chat template.
    Differs: the template fails on JSON text, which OpenAI's clients send (llama.cpp #19635).
    Checked by: tests/text/test_prompt.py
    """
    function = call.get("function", call)
    if not isinstance(function, Mapping):
        raise InputError(f"{place}.function is {short(function)}, expected an object")
    name = function.get("name")
    if not isinstance(name, str):
        raise InputError(f"{place} has the name {short(name)}, expected a string")
    pieces = [Piece(f"{CALL}\n{FUNCTION}"), Piece(name, f"{place} name"), Piece(">\n")]
    place += " arguments"
    for key, value in _arguments(function.get("arguments", {}), place).items():
        if not isinstance(key, str):
            raise InputError(f"{place} has the key {short(key)}, expected a string")
        inner = f"{place}.{shown(key)}"
        pieces += [Piece(PARAMETER), Piece(key, inner), Piece(">\n")]
        pieces += [Piece(_written(value, inner), inner), Piece(f"\n{END_PARAMETER}\n")]
    return [*pieces, Piece(f"{END_FUNCTION}\n{END_CALL}")]


def _written(value: Any, place: str) -> str:
    """An argument as the template writes it."""
    if isinstance(value, (Mapping, list, tuple)):
        return json_line(value, place)
    try:
        return str(value)
    except ValueError as error:  # an integer of thousands of digits
        raise InputError(f"{place} cannot be written: {error}") from error


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


class CallText:
    """The text of a call that has begun, as it comes, up to the `</tool_call>` that ends it.

    That is the first one behind a `</function>` that closes no call quoted in a value. So a value
    may speak of either tag and quote whole calls, which then are neither run nor an end.
    However the text is cut, each character is looked at once, but for a tag that is not yet whole.
    """

    def __init__(self) -> None:
        self._pieces: list[str] = []
        self._quoted = 0  # calls that have begun inside this one
        self._last = ""  # the tag before, if nothing but white space stands behind it
        self._rest = ""  # the beginning of a tag at the end of what came

    def add(self, text: str, at: int = 0) -> int:
        """Take `text` from `at` on: where in it the call has ended, or -1."""
        known, shift = len(self._rest), 0
        if known:
            text, at, shift = self._rest + text[at:], 0, at - known
        begin = at + known
        for found in TAG.finditer(text, at):
            tag, last = found[0], self._last
            if text[at : found.start()].strip():
                last = ""
            at, self._last = found.end(), tag
            if tag == FUNCTION and last == CALL:
                self._quoted += 1
            elif tag == END_CALL and last == END_FUNCTION:
                if not self._quoted:
                    self._pieces.append(text[begin:at])
                    return at + shift
                self._quoted -= 1
        self._pieces.append(text[begin:])
        rest = max(at, text.rfind("<", at))
        if not any(tag.startswith(text[rest:]) for tag in TAGS):
            rest = len(text)
        if text[at:rest].strip():
            self._last = ""
        self._rest = text[rest:]
        return -1

    @property
    def text(self) -> str:
        """All that came, with its end once it has one."""
        return "".join(self._pieces)


def read_call(text: str, signatures: "Signatures") -> ToolCall | None:
    """The call in `text`, which stood between `<tool_call>` and `</tool_call>`.

    None where it is not well formed: a tag or a name is missing, a parameter comes twice, or other
    text stands between the tags. White space there is free. One newline at each end of a value is
    layout, the rest of it is the value's own. A value may hold `</parameter>` unless `<parameter=`
    or the end of the function follows, and anything inside a quoted call.
    Source: the released chat template, read backwards.
    Checked by: tests/text/test_prompt.py, tests/text/test_reply.py
    """
    text = text.strip()
    if not text.startswith(FUNCTION) or not text.endswith(END_FUNCTION):
        return None
    text = text[len(FUNCTION) : -len(END_FUNCTION)]
    name, closed, _ = text.partition(">")
    if not closed or not _is_name(name):
        return None
    types = signatures.types(name)
    arguments: dict[str, Any] = {}
    at = behind_space(text, len(name) + 1)
    while at < len(text):
        begin = text.find(">", at) + 1
        key = text[at:begin].removeprefix(PARAMETER)[:-1]
        end = _value_end(text, begin) if begin else -1
        if not text.startswith(PARAMETER, at) or end < 0 or not _is_name(key) or key in arguments:
            return None
        raw = text[begin:end].removeprefix("\n").removesuffix("\n")
        arguments[key] = _value(raw, types.get(key, set()))
        at = behind_space(text, end + len(END_PARAMETER))
    return ToolCall(name, arguments)


def _is_name(text: str) -> bool:
    """Whether `text` can name a function or parameter; with a newline or `<` it swallowed a tag."""
    return bool(text) and "\n" not in text and "<" not in text


def behind_space(text: str, at: int) -> int:
    """Where the white space ends that begins at `at`."""
    found = SPACE.match(text, at)
    return found.end() if found else at


def _value_end(text: str, at: int) -> int:
    """Where the `</parameter>` stands that ends the value that begins at `at`; -1 if missing."""
    open_calls, last = 0, ""  # the tag before, if nothing but white space stands behind it
    for found in TAG.finditer(text, at):
        tag = found[0]
        if text[at : found.start()].strip():
            last = ""
        if tag == END_PARAMETER and not open_calls and VALUE_ENDS.match(text, found.end()):
            return found.start()
        open_calls += (tag == FUNCTION and last == CALL) - (
            tag == END_CALL and last == END_FUNCTION
        )
        at, last = found.end(), tag
    return -1


class Signatures:
    """The types that the tools' parameters allow, by tool and parameter.

    They are found when a tool is first called, all at once: in a time linear in its schemas, even
    where those refer to each other in circles.
    """

    def __init__(self, tools: Tools = None) -> None:
        self._parameters: dict[str, Mapping[str, Any]] = {}  # the schema of all of a tool's
        self._types: dict[str, dict[str, set[str]]] = {}
        for tool in tools if isinstance(tools, (list, tuple)) else ():
            function = _mapping(_mapping(tool).get("function", tool))
            if isinstance(name := function.get("name"), str):  # of two tools the first counts
                self._parameters.setdefault(name, _mapping(function.get("parameters")))

    def types(self, name: str) -> dict[str, set[str]]:
        """For each parameter of the tool `name` the types that it allows; none of another tool."""
        if name not in self._types:
            parameters = self._parameters.get(name, {})
            self._types[name] = _types(_mapping(parameters.get("properties")), parameters)
        return self._types[name]


def typed(text: str, schema: Any, root: Any = None) -> Any:
    """The value that `text` stands for under the JSON Schema of its parameter.

    The types are those of `type`, `enum`, `const`, `anyOf`, `oneOf`, `allOf`, and of a `$ref` into
    `root`, the schema of all parameters. Where none is known, or none but string fits, the value is
    the text itself: nothing is ever lost. Other types go before string, so "5" is a number where
    both are allowed: the other way round that choice could never be made.
    Differs: True, False and None count as true, false and null, since prompts spell them so.
    Checked by: tests/text/test_prompt.py
    """
    return _value(text, _types({"": schema}, root)[""])


def _value(text: str, types: set[str]) -> Any:
    """The value that `text` stands for as one of `types`."""
    try:
        word = text.strip()
        value = PYTHON_WORDS[word] if word in PYTHON_WORDS else json.loads(word)
        # Refuses NaN and the infinities, which are no JSON but Python's, and half a character.
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError):
        return text
    if isinstance(value, float) and value.is_integer() and "number" not in types:
        value = int(value)  # JSON Schema counts 5.0 as an integer
    fits = any(type(value) in PYTHON_TYPES[kind] for kind in types)
    return value if fits else text


def _types(schemas: Mapping[str, Any], root: Any) -> dict[str, set[str]]:
    """For each of `schemas` the names of the types, string apart, that it allows at its top.

    Every schema that is reached is looked at once. Its types then go to those that refer to it, and
    on from there as long as they are new.
    """
    reached: dict[int, Mapping[str, Any]] = {}  # by identity: they may be large, and go in circles
    users: dict[int, list[int]] = {}
    ahead = [schema for schema in schemas.values() if isinstance(schema, Mapping)]
    while ahead:
        schema = ahead.pop()
        if id(schema) in reached:
            continue
        reached[id(schema)] = schema
        inner = [each for each in _alternatives(schema, root) if isinstance(each, Mapping)]
        for each in inner:
            users.setdefault(id(each), []).append(id(schema))
        ahead += inner
    types = {number: _own_types(schema) for number, schema in reached.items()}
    grown = [*reached]
    while grown:
        number = grown.pop()
        for user in users.get(number, ()):
            if not types[number] <= types[user]:
                types[user] |= types[number]
                grown.append(user)
    return {key: types.get(id(schema), set()) for key, schema in schemas.items()}


def _own_types(schema: Mapping[str, Any]) -> set[str]:
    """The types that a schema names itself."""
    kinds = schema.get("type")
    kinds = kinds if isinstance(kinds, list) else [kinds]
    names = {kind for kind in kinds if isinstance(kind, str) and kind in PYTHON_TYPES}
    values = schema.get("enum", [schema["const"]] if "const" in schema else [])
    found = {type(value) for value in values} if isinstance(values, list) else set()
    return names | {kind for kind, types in PYTHON_TYPES.items() if found.intersection(types)}


def _alternatives(schema: Mapping[str, Any], root: Any) -> list[Any]:
    """The schemas that a schema is made of, and the one that it refers to."""
    choices = [schema.get(key) for key in ("anyOf", "oneOf", "allOf")]
    inner = [choice for listed in choices if isinstance(listed, list) for choice in listed]
    return [*inner, _referred(schema, root)]


def _referred(schema: Mapping[str, Any], root: Any) -> Any:
    """What the `$ref` of a schema, such as `#/$defs/Place`, stands for in `root`; else nothing."""
    path = schema.get("$ref")
    if not isinstance(path, str) or path[:2] not in ("#", "#/"):
        return None
    for key in unquote(path).split("/")[1:]:
        if isinstance(root, list):
            is_index = re.fullmatch("[0-9]{1,9}", key) and int(key) < len(root)
            root = root[int(key)] if is_index else None
        else:
            root = _mapping(root).get(key.replace("~1", "/").replace("~0", "~"))
    return root


def _mapping(value: Any) -> Mapping[str, Any]:
    """`value` if it is an object, else an empty one: a tool's schema may be anything."""
    return value if isinstance(value, Mapping) else {}
