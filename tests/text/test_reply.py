"""The model's text back to a message: as the plain way does it, in a time linear in the text."""

import json
import random
import time
from collections.abc import Callable, Iterable
from typing import Any

import pytest

from minstep.errors import InputError
from minstep.text.prompt import render
from minstep.text.reply import ChatStream, Event, Message, parse
from minstep.text.tool_calls import CallText, Signatures, read_call, typed
from tests.support.plain_reply import PlainChatStream
from tests.support.plain_reply import typed as plainly_typed

PROPERTIES = {"a": {"type": "integer"}, "b": {"anyOf": [{"type": "object"}, {"type": "null"}]}}
TOOLS = [{"name": "f", "parameters": {"type": "object", "properties": PROPERTIES}}]
SCRAPS = ["<tool_call>", "</tool_call>", "<function=", "</function>", "<parameter="]
SCRAPS += ["</parameter>", "<tool_call>\n<function=f>\n", "\n</function>\n</tool_call>", "f>"]
SCRAPS += ["<parameter=b>\n5\n</parameter>", "<parameter=a>", "a>", "</think>", "<think>"]
SCRAPS += ["\n", " \n\u2003", "<", ">", "/"]
SCRAPS += ["text", "<tool", "</func", "</tool_call", "=", "5", "\x1c", "é"]
CALL = "<tool_call>\n<function=f>\n<parameter=a>\n{}\n</parameter>\n</function>\n</tool_call>"


def joined(events: Iterable[Event]) -> list[Event]:
    """Neighbours of a kind as one, calls apart."""
    found: list[Event] = []
    for event in events:
        if found and found[-1].kind == event.kind != "tool_call":
            event = Event(event.kind, found.pop().payload + event.payload)
        found.append(event)
    return found


def test_any_text_in_any_pieces_is_read_as_the_plain_way_reads_it() -> None:
    rng = random.Random(3)
    calls = 0
    for n in range(1500):
        text = "</think>" * (n % 4 > 0) + "".join(rng.choices(SCRAPS, k=rng.randrange(1, 24)))
        if n % 3 == 0:
            inner = "".join(rng.choices(SCRAPS, k=rng.randrange(8)))
            text += CALL.format(inner) + rng.choice(SCRAPS)
        size = rng.choice([1, 1, 2, 5, 13, len(text)])
        ours, plain = ChatStream(TOOLS), PlainChatStream(TOOLS)
        for begin in range(0, len(text), size):
            piece = text[begin : begin + size]
            assert joined(ours.feed(piece)) == joined(plain.feed(piece)), (text, size, begin)
        assert joined(ours.finish()) == joined(plain.finish()), (text, size)
        calls += bool(parse(text, TOOLS).tool_calls)
    assert calls > 150


# What a looping model may write, n times over.
LOOPS: dict[str, Callable[[int], str]] = {
    "calls that begin": lambda n: "</think>" + "<tool_call>\n<function=" * n,
    "calls that end": lambda n: "</think><tool_call><function=f>" + "</tool_call>" * n,
    "functions and calls that end": lambda n: (
        "</think>" + "<tool_call><function=f>" * n + "</function></tool_call>" * n
    ),
    "parameters that end": lambda n: (
        "</think>" + CALL.format("<tool_call><function=" + "</parameter>" * n)
    ),
    "parameters that end at once": lambda n: "</think>" + CALL.format("</parameter>\n" * n + "x"),
    "tags that do not end": lambda n: "</think><tool_call><function=f>" + "</tool_cal" * n,
    "white space in a call": lambda n: "</think><tool_call>" + " \n" * n,
    "white space behind a function": lambda n: (
        "</think><tool_call><function=f></function>" + " \n" * n
    ),
    "white space behind a call": lambda n: "</think>" + CALL.format(1) + " \n" * n,
    "tags without a call": lambda n: "</think>" + "<tool_call>" * n,
    "tags and white space without a call": lambda n: "</think>" + "<tool_call>  <f" * n,
    "whole calls": lambda n: "</think>" + CALL.format(1) * n,
    "parameters": lambda n: (
        "</think>" + CALL.format("".join(f"1</parameter><parameter=a{m}>" for m in range(n)))
    ),
    "thinking": lambda n: "</thin\n" * n,
    "angles": lambda n: "</think>" + "<" * n,
}


@pytest.mark.parametrize("name", LOOPS)
@pytest.mark.parametrize(("length", "size"), [(40_000, 1), (400_000, 10**9)], ids=["cut", "whole"])
def test_what_a_looping_model_writes_takes_no_longer_than_text_does(
    name: str, length: int, size: int
) -> None:
    loop, stream = LOOPS[name], ChatStream(TOOLS)
    text = loop(100 * length // len(loop(100)))
    begin = time.perf_counter()
    for at in range(0, len(text), size):
        stream.feed(text[at : at + size])
    stream.finish()
    assert time.perf_counter() - begin < 8  # a second at most; the plain way may take minutes


def test_a_call_that_is_fed_in_pieces_is_looked_at_once() -> None:
    call, end = CallText(), "</function> \n</tool_call>"
    text = "<function=f>" + "<tool_call><function=g></function></tool_call>" * 50 + end
    given = [call.add(letter) for letter in text]
    assert given == [-1] * (len(text) - 1) + [1] and call.text == text
    assert CallText().add(f"__{text}__", 2) == len(text) + 2


# Types of parameters


def choices(depth: int, key: str) -> Any:
    """A schema that says itself twice at each of `depth` levels."""
    inner: Any = {"type": "integer"}
    for _ in range(depth):
        inner = {key: [inner, inner]}
    return inner


def chain(length: int) -> dict[str, Any]:
    """Definitions each of which refers to the next one."""
    links = {f"d{n}": {"$ref": f"#/$defs/d{n + 1}"} for n in range(length)}
    return {"$defs": {**links, f"d{length}": {"type": "integer"}}}


LOOP = {"anyOf": [{"$ref": "#/$defs/loop"}] * 5 + [{"$ref": "#/$defs/back"}, {"type": "null"}]}
BACK = {"allOf": [{"$ref": "#/$defs/loop"}] * 5, "oneOf": [{"type": "integer"}]}
ROOT = {"type": "object", "$defs": {"loop": LOOP, "back": BACK, "self": {"$ref": "#/$defs/self"}}}
REFER: dict[str, tuple[Any, Any, str, Any]] = {
    "twice at each level": (choices(5_000, "anyOf"), None, "5", 5),
    "deep": (choices(100_000, "allOf"), None, "5", 5),
    "in circles": ({"$ref": "#/$defs/loop"}, ROOT, "5", 5),
    "in circles, from the other side": ({"$ref": "#/$defs/back"}, ROOT, "null", None),
    "to itself": ({"$ref": "#/$defs/self"}, ROOT, "5", "5"),
    "to the whole": ({"$ref": "#"}, ROOT, "{}", {}),
    "along a chain": ({"$ref": "#/$defs/d0"}, chain(30_000), "5", 5),
    "to a place in a list": ({"$ref": "#/$defs/loop/anyOf/6"}, ROOT, "null", None),
    "past a list": ({"$ref": "#/$defs/loop/anyOf/7"}, ROOT, "null", "null"),
    "into a list by a name": ({"$ref": "#/$defs/loop/anyOf/x"}, ROOT, "null", "null"),
    "with escapes": (
        {"$ref": "#/a~1b~0c%20d"},
        {"a/b~c d": {"type": "boolean"}},
        "true",
        True,
    ),
    "elsewhere": ({"$ref": "https://example.org/#/a"}, {"a": {"type": "integer"}}, "5", "5"),
    "a wide enum": ({"enum": [*range(10**6), None]}, None, "null", None),
    "many types": ({"type": ["t"] * 10**5 + ["integer"]}, None, "5", 5),
    "half a character": ({"type": "array"}, None, '["\\ud800"]', '["\\ud800"]'),
}


@pytest.mark.parametrize("name", REFER)
def test_types_are_found_through_references_of_every_kind(name: str) -> None:
    schema, root, text, expected = REFER[name]
    begin = time.perf_counter()
    found = typed(text, schema, root)
    assert (found, type(found)) == (expected, type(expected))
    assert time.perf_counter() - begin < 10


def test_types_are_those_that_the_plain_way_finds() -> None:
    rng = random.Random(5)

    def drawn(depth: int) -> Any:
        if depth == 0 or rng.random() < 0.3:
            kinds = ["string", "integer", "number", "boolean", "null", "object", "array", "odd", 7]
            return rng.choice(
                [
                    {"type": rng.choice(kinds)},
                    {"type": rng.choices(kinds, k=2)},
                    {"enum": rng.choices([1, 0.5, "a", None, True, [], {}], k=2)},
                    {"const": rng.choice([1, None])},
                    {"$ref": f"#/$defs/{rng.choice('abc')}"},
                    rng.choice([None, 5, [], "x"]),
                ]
            )
        return {rng.choice(["anyOf", "oneOf", "allOf"]): [drawn(depth - 1) for _ in range(2)]}

    for _ in range(150):
        root = {"$defs": {name: drawn(2) for name in "abc"}}
        schema = drawn(3)
        for text in ("5", "5.0", "0.5", "true", "None", "[]", "{}", '"a"', "a", "NaN"):
            found, expected = typed(text, schema, root), plainly_typed(text, schema, root)
            assert (found, type(found)) == (expected, type(expected)), (schema, root)


@pytest.mark.parametrize("order", ["ab", "ba"])
def test_parameters_that_refer_to_each_other_in_a_circle_have_all_its_types(order: str) -> None:
    parts = {
        "a": {"anyOf": [{"$ref": "#/properties/b"}]},
        "b": {"anyOf": [{"$ref": "#/properties/a"}], "type": "null"},
    }
    parameters = {"properties": {name: parts[name] for name in order}}
    values = "".join(f"<parameter={name}>null</parameter>" for name in "ab")
    text = f"</think><tool_call><function=f>{values}</function></tool_call>"
    call = parse(text, [{"name": "f", "parameters": parameters}]).tool_calls[0]
    assert call.arguments == {"a": None, "b": None}


def test_many_parameters_of_one_large_schema_are_looked_up_once() -> None:
    count = 3000
    shared = {"anyOf": [{"type": "null"} for _ in range(count)]}
    properties = {f"p{n}": {"$ref": "#/$defs/shared"} for n in range(count)}
    parameters = {"properties": properties, "$defs": {"shared": shared}}
    values = "".join(f"<parameter=p{n}>null</parameter>" for n in range(count))
    call = f"<tool_call><function=f>{values}</function></tool_call>"
    begin = time.perf_counter()
    found = parse("</think>" + call * 5, [{"name": "f", "parameters": parameters}])
    assert [len(each.arguments) for each in found.tool_calls] == [count] * 5
    assert {*found.tool_calls[4].arguments.values()} == {None}
    assert time.perf_counter() - begin < 10


def test_of_two_tools_of_a_name_the_first_counts_and_odd_ones_none() -> None:
    odd: list[Any] = [None, 5, "f", {"name": ["f"]}, {"function": None}, {"name": "g"}]
    other = {"name": "f", "parameters": {"properties": {"a": {"type": "string"}}}}
    call = parse("</think>" + CALL.format(5), [*odd, *TOOLS, other]).tool_calls[0]
    assert call.arguments == {"a": 5}
    for tools in (odd, 5, "tools", {"name": "f"}):
        read = parse("</think>" + CALL.format(5), tools)  # type: ignore[arg-type]
        assert read.tool_calls[0].arguments == {"a": "5"}


def test_a_call_by_itself_is_read() -> None:
    assert read_call("<function=f></function>", Signatures()) == ("f", {})
    assert read_call("<function=f></function> x", Signatures()) is None
    assert read_call("<function=f</function>", Signatures()) is None


# Odd messages


class Odd:
    """What cannot even be shown."""

    def __repr__(self) -> str:
        raise ValueError


DEEP: list[Any] = []
for _ in range(100_000):
    DEEP = [DEEP]


def said(**more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": "", **more}


def called(name: Any = "f", **more: Any) -> dict[str, Any]:
    return said(tool_calls=[{"function": {"name": name, **more}}])


ODD: list[Any] = [None, 5, b"a", DEEP, Odd(), 10**5000, float("nan"), {1: 2}, "\ud800"]


@pytest.mark.parametrize("odd", ODD, ids=[*range(len(ODD))])
def test_what_is_odd_is_refused_or_rendered(odd: Any) -> None:
    messages: list[Any] = [{"role": "user", "content": odd}, {"role": odd}, odd, called(odd)]
    messages += [said(content=[{"type": "text", "text": odd}, {"type": odd}, odd])]
    messages += [said(reasoning_content=odd), said(tool_calls=odd), said(tool_calls=[odd])]
    messages += [said(tool_calls=[{"function": odd}]), called(arguments=odd)]
    messages += [called(arguments={"a": odd}), called(arguments={"a": [odd]})]
    messages += [called(arguments={"a": {"b": odd}}), called(arguments={5: odd})]
    for message in messages:
        for tools in (None, [odd], odd, [{"name": odd}]):
            try:
                assert isinstance(render([{"role": "user"}, message], tools), str)
            except InputError as error:
                assert len(str(error)) < 500
    try:
        render(odd)
    except InputError as error:
        assert str(error).startswith("messages")


def test_a_prompt_of_many_messages_is_written_in_linear_time() -> None:
    calls = [{"name": "f", "arguments": {f"a{n}": "<|im_end|>" for n in range(1000)}}] * 10
    turns = [{"role": "user", "content": [{"type": "text", "text": "a"}] * 1000}, called()]
    begin = time.perf_counter()
    prompt = render([*turns * 2000, said(tool_calls=calls)], TOOLS * 2000)
    assert len(prompt) > 2_000_000 and time.perf_counter() - begin < 20


def test_json_arguments_that_json_cannot_hold_are_refused() -> None:
    with pytest.raises(InputError, match="arguments.a cannot be written as JSON: Out of range"):
        render([called(arguments={"a": [float("inf")]})])
    with pytest.raises(InputError, match="arguments.a cannot be written: Exceeds the limit"):
        render([called(arguments={"a": 10**5000})])


def test_an_answer_that_was_parsed_can_be_a_prompt_again() -> None:
    read = parse("</think>" + CALL.format(json.dumps("\ud800")), TOOLS)
    assert read.as_dict()["tool_calls"]
    render([{"role": "user"}, read.as_dict()]).encode()
    assert isinstance(read, Message)
