"""Chat: the prompt character for character, the model's text in any cut, and one from the other."""

import json
import random
from typing import Any

import pytest

from minstep.errors import InputError
from minstep.text.prompt import BOS, render
from minstep.text.reply import ChatStream, Event, Message, parse
from minstep.text.tool_calls import ToolCall, typed
from tests.support.tiers import cases

USER = {"role": "user", "content": "Hi"}
ASKED = f"{BOS}<|im_start|>user\nHi<|im_end|>\n"
OPEN = "<|im_start|>assistant\n<think>\n"
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "天气 <now>",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
WEATHER_LINE = (
    '{"type": "function", "function": {"name": "weather", "description": "天气 <now>", '
    '"parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}}'
)
TOOLS_TEXT = f"""# Tools

You have access to the following functions in JSONSchema format:

<tools>
{WEATHER_LINE}
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
</IMPORTANT><|im_end|>
"""


def system(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "system", "content": content, **more}


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: Any = None, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def tool(content: Any) -> dict[str, Any]:
    return {"role": "tool", "content": content, "tool_call_id": "call_1"}


def called(arguments: Any, name: str = "f") -> dict[str, Any]:
    return {"id": "call_1", "type": "function", "function": {"name": name, "arguments": arguments}}


def test_a_prompt_begins_with_bos_and_ends_inside_the_thinking() -> None:
    assert BOS == "<｜begin▁of▁sentence｜>"
    assert render([USER]) == ASKED + OPEN
    assert render([USER], add_generation_prompt=False) == ASKED


# What stands between the user's "Hi" and the end, for the messages that follow it.
AFTER_THE_QUESTION = {
    "thinking is kept": (
        [assistant("Yo", reasoning_content="Hm.")],
        "<|im_start|>assistant\n<think>\nHm.\n</think>\nYo<|im_end|>\n",
    ),
    "no thinking is an empty one": (
        [assistant("Yo")],
        "<|im_start|>assistant\n<think>\n\n</think>\nYo<|im_end|>\n",
    ),
    "thinking comes out of the content, its newlines stripped but not its spaces": (
        [assistant("<think>\n\n a \n\n</think>\n\n b \n")],
        "<|im_start|>assistant\n<think>\n a \n</think>\n b \n<|im_end|>\n",
    ),
    "between two closing tags text is dropped, and before the last opening one": (
        [assistant("x<think>y<think>a</think>lost</think>b")],
        "<|im_start|>assistant\n<think>\na\n</think>\nb<|im_end|>\n",
    ),
    "thinking that came by itself leaves the content alone": (
        [assistant("</think>\nb", reasoning_content="")],
        "<|im_start|>assistant\n<think>\n\n</think>\n</think>\nb<|im_end|>\n",
    ),
    "no content at all": (
        [{"role": "assistant"}],
        "<|im_start|>assistant\n<think>\n\n</think>\n<|im_end|>\n",
    ),
    "results that follow each other share a block": (
        [tool("1"), tool("2 \n"), assistant("Yo"), tool(None)],
        "<|im_start|>tool_response\n<tool_response>1</tool_response><tool_response>2 \n"
        "</tool_response><|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\nYo<|im_end|>\n"
        "<|im_start|>tool_response\n<tool_response></tool_response><|im_end|>\n",
    ),
    "a later system message stays in its place, and may be an observation": (
        [system("S"), system("O", name="observation"), system("B", name="bob")],
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>observation\nO<|im_end|>\n"
        "<|im_start|>system\nB<|im_end|>\n",
    ),
    "a user message that is a tool result is no new question": (
        [assistant("a", reasoning_content="t"), user("<tool_response>1</tool_response>")],
        "<|im_start|>assistant\n<think>\nt\n</think>\na<|im_end|>\n"
        "<|im_start|>user\n<tool_response>1</tool_response><|im_end|>\n",
    ),
    "one that goes on behind the tool result is a question": (
        [assistant("a", reasoning_content="t"), user("<tool_response>1</tool_response>\n")],
        "<|im_start|>assistant\na<|im_end|>\n"
        "<|im_start|>user\n<tool_response>1</tool_response>\n<|im_end|>\n",
    ),
    "a new question drops earlier thinking, also from the content": (
        [assistant("t</think>a"), assistant("b", reasoning_content="t"), user("")],
        "<|im_start|>assistant\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
        "<|im_start|>user\n<|im_end|>\n",
    ),
    "parts follow without a separator, an image is a patch, other types are left out": (
        [
            user(
                [
                    {"type": "text", "text": "a"},
                    {"type": "image", "image": "x.png"},
                    {"type": "image_url", "image_url": {"url": "x.png"}},
                    {"type": "text", "value": "b", "text": "c"},
                ]
            )
        ],
        "<|im_start|>user\na<im_patch>b<|im_end|>\n",
    ),
    "calls follow content and each other without a separator": (
        [assistant("Look:", tool_calls=[called({}), called({"x": "1\n2"}, name="g")])],
        "<|im_start|>assistant\n<think>\n\n</think>\nLook:<tool_call>\n<function=f>\n</function>\n"
        "</tool_call><tool_call>\n<function=g>\n<parameter=x>\n1\n2\n</parameter>\n</function>\n"
        "</tool_call><|im_end|>\n",
    ),
    "a call may come without the object around it, and without arguments": (
        [assistant(tool_calls=[{"name": "f"}])],
        "<|im_start|>assistant\n<think>\n\n</think>\n<tool_call>\n<function=f>\n</function>\n"
        "</tool_call><|im_end|>\n",
    ),
}


@pytest.mark.parametrize("case", AFTER_THE_QUESTION)
def test_after_the_question(case: str) -> None:
    messages, expected = AFTER_THE_QUESTION[case]
    assert render([USER, *messages]) == ASKED + expected + OPEN


def test_without_any_question_no_thinking_is_shown() -> None:
    prompt = render([tool("1"), assistant("a", reasoning_content="t")], add_generation_prompt=False)
    assert prompt == (
        f"{BOS}<|im_start|>tool_response\n<tool_response>1</tool_response><|im_end|>\n"
        "<|im_start|>assistant\na<|im_end|>\n"
    )


def test_tools_stand_in_the_system_block_behind_its_own_text() -> None:
    asked = "<|im_start|>user\nHi<|im_end|>\n"
    assert (
        render([system(" S\n"), USER], [])
        == f"{BOS}<|im_start|>system\n S\n<|im_end|>\n{asked}{OPEN}"
    )
    assert render([USER], [WEATHER]) == f"{BOS}<|im_start|>system\n{TOOLS_TEXT}{asked}{OPEN}"
    with_both = render([system("S", name="observation"), USER], [WEATHER])
    assert with_both == f"{BOS}<|im_start|>system\nS\n\n{TOOLS_TEXT}{asked}{OPEN}"
    assert render([system(None), USER], [WEATHER]).startswith(
        f"{BOS}<|im_start|>system\n\n\n# Tools"
    )
    late = render([USER, system("S")], [WEATHER], add_generation_prompt=False)
    assert late == f"{BOS}<|im_start|>system\n{TOOLS_TEXT}{asked}<|im_start|>system\nS<|im_end|>\n"


ARGUMENTS = {
    "text": "é\n<b>",
    "yes": True,
    "none": None,
    "whole": 3,
    "real": 0.5,
    "map": {"a": [1, {"é": None}], "b": False},
    "list": [],
}


@pytest.mark.parametrize("arguments", [ARGUMENTS, json.dumps(ARGUMENTS)], ids=["object", "JSON"])
def test_strings_stand_raw_mappings_and_lists_as_json_the_rest_as_python_prints_it(
    arguments: Any,
) -> None:
    prompt = render([USER, assistant(tool_calls=[called(arguments)])], add_generation_prompt=False)
    assert prompt.endswith(
        "<parameter=text>\né\n<b>\n</parameter>\n<parameter=yes>\nTrue\n</parameter>\n"
        "<parameter=none>\nNone\n</parameter>\n<parameter=whole>\n3\n</parameter>\n"
        "<parameter=real>\n0.5\n</parameter>\n"
        '<parameter=map>\n{"a": [1, {"é": null}], "b": false}\n</parameter>\n'
        "<parameter=list>\n[]\n</parameter>\n</function>\n</tool_call><|im_end|>\n"
    )


BAD_INPUT: list[tuple[Any, Any, str]] = [
    ([], None, "messages is empty, expected at least one message"),
    ("Hi", None, "messages is of type str, expected a list of objects"),
    ([USER, "Hi"], None, "messages[1] is of type str, expected an object"),
    ([{"content": "Hi"}], None, "messages[0] has the role None, expected one of system, user"),
    ([USER, {"role": "dev"}], None, "messages[1] has the role 'dev', expected one of system, user"),
    ([user(5)], None, "messages[0].content is of type int, expected a list of objects"),
    ([user(["a"])], None, "messages[0].content[0] is of type str, expected an object"),
    ([user([{"text": "a"}])], None, "messages[0].content[0] has no type, expected text or image"),
    ([user([{"type": "text"}])], None, "messages[0].content[0] has the text None, expected a str"),
    (
        [assistant(tool_calls=3)],
        None,
        "messages[0].tool_calls is of type int, expected a list of objects",
    ),
    (
        [assistant(tool_calls=[3])],
        None,
        "messages[0].tool_calls[0] is of type int, expected an object",
    ),
    ([assistant(tool_calls=[{}])], None, "messages[0].tool_calls[0] has the name None, expected a"),
    (
        [assistant(tool_calls=[{"function": None}])],
        None,
        "messages[0].tool_calls[0].function is None, expected an object",
    ),
    (
        [assistant(tool_calls=[called("{a")])],
        None,
        "messages[0].tool_calls[0] arguments is not valid JSON: Expecting",
    ),
    (
        [assistant(tool_calls=[called("[1]")])],
        None,
        "messages[0].tool_calls[0] arguments is of type list, expected an object or its JSON",
    ),
    (
        [assistant(tool_calls=[called({1: "a"})])],
        None,
        "messages[0].tool_calls[0] arguments has the key 1, expected a string",
    ),
    (
        [assistant(tool_calls=[called({"x": [object()]})])],
        None,
        "messages[0].tool_calls[0] arguments.x cannot be written as JSON: Object of type object",
    ),
    ([USER], ["weather"], "tools[0] is of type str, expected an object"),
    ([USER], [{"a": {1}}], "tools[0] cannot be written as JSON: Object of type set"),
]


@pytest.mark.parametrize(("messages", "tools", "expected"), BAD_INPUT)
def test_bad_input_is_refused_in_one_line_that_names_the_place(
    messages: Any, tools: Any, expected: str
) -> None:
    with pytest.raises(InputError) as refusal:
        render(messages, tools)
    assert str(refusal.value).startswith(expected)
    assert "\n" not in str(refusal.value)


SCHEMA_TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "f",
            "parameters": {
                "type": "object",
                "properties": {
                    "text": {"type": "string"},
                    "whole": {"type": "integer"},
                    "real": {"type": "number"},
                    "yes": {"type": "boolean"},
                    "none": {"type": "null"},
                    "map": {"type": "object"},
                    "list": {"type": "array"},
                    "maybe": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
                },
            },
        },
    }
]


def value(text: str) -> str:
    """A call of f with one parameter."""
    parameter = f"<parameter=text>\n{text}\n</parameter>\n"
    return f"<tool_call>\n<function=f>\n{parameter}</function>\n</tool_call>"


PARSED = {
    "nothing": ("", Message("", "", ())),
    "unfinished thinking": ("Hm.\n", Message("Hm.\n", "", ())),
    "thinking and an answer": ("Hm.\n</think>\nYo.", Message("Hm.", "Yo.", ())),
    "a leading tag": ("<think>\nHm.\n</think>\nYo.", Message("Hm.", "Yo.", ())),
    "no newlines": ("<think>Hm.</think>Yo.", Message("Hm.", "Yo.", ())),
    "one newline is layout, others are not": (
        "<think>\n\nHm.\n\n</think>\n\nYo.\n",
        Message("\nHm.\n", "\nYo.\n", ()),
    ),
    "later tags are content": (
        "a</think>b<think>c</think>d",
        Message("a", "b<think>c</think>d", ()),
    ),
    "a call while thinking is a thought": (value("1"), Message(value("1"), "", ())),
    "a call": (
        "a\n</think>\nb" + value("1"),
        Message("a", "b", (ToolCall("f", {"text": "1"}),)),
    ),
    "white space between calls and behind them is dropped": (
        "</think>\n" + value("1") + "\n\n" + value("2") + "\n",
        Message("", "", (ToolCall("f", {"text": "1"}), ToolCall("f", {"text": "2"}))),
    ),
    "text behind a call is content with its white space": (
        "</think>\nb\n" + value("1") + "\nc\n",
        Message("", "b\n\nc\n", (ToolCall("f", {"text": "1"}),)),
    ),
    "inner newlines and spaces of a string are its own": (
        "</think>\n" + value("\n  a\n\nb \n"),
        Message("", "", (ToolCall("f", {"text": "\n  a\n\nb \n"}),)),
    ),
    "an empty string": ("</think>" + value(""), Message("", "", (ToolCall("f", {"text": ""}),))),
    "a string may hold single tags": (
        "</think>" + value("a</parameter>b</function>c</tool_call>d<tool_call>e"),
        Message(
            "",
            "",
            (ToolCall("f", {"text": "a</parameter>b</function>c</tool_call>d<tool_call>e"}),),
        ),
    ),
    "a call without parameters on one line": (
        "</think><tool_call><function=g></function></tool_call>",
        Message("", "", (ToolCall("g", {}),)),
    ),
    "parameters on one line": (
        "</think><tool_call><function=f><parameter=whole>5</parameter><parameter=x>6</parameter>"
        "</function></tool_call>",
        Message("", "", (ToolCall("f", {"whole": 5, "x": "6"}),)),
    ),
}


@pytest.mark.parametrize("case", PARSED)
def test_parse(case: str) -> None:
    text, expected = PARSED[case]
    assert parse(text, SCHEMA_TOOLS) == expected


MALFORMED = {
    "never closed": "<tool_call>\n<function=f>\n<parameter=text>\n1",
    "garbage": "<tool_call>garbage</tool_call>",
    "JSON instead": '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>',
    "an unclosed function": value("1").replace("</function>\n", ""),
    "an unclosed parameter": "<tool_call><function=f><parameter=text>1</function></tool_call>",
    "an unclosed name": value("1").replace("=f>", "=f"),
    "no name": "<tool_call>\n<function=>\n</function>\n</tool_call>",
    "no parameter name": "<tool_call><function=f><parameter=>1</parameter></function></tool_call>",
    "a tag in the name": "<tool_call><function=f<b></function></tool_call>",
    "a tag in a parameter": value("1").replace("=text>", "=te<xt>"),
    "text between the tags": "<tool_call>\n<function=f>\noops\n</function>\n</tool_call>",
    "a parameter twice": value("1").replace(
        "</function>", "<parameter=text>2</parameter></function>"
    ),
    "a lone end": "</parameter></function></tool_call>",
    "a string with the end of a call": value("a</function></tool_call>b"),
}
# With these a second call looks like one quoted inside them, and quoted calls must not run.
NEVER_ENDING = ("never closed", "an unclosed function")


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_call_is_content_as_it_stands(case: str) -> None:
    bad, good = MALFORMED[case], value("good")
    assert parse(f"</think>\na{bad}") == Message("", f"a{bad}", ())
    call = ToolCall("f", {"text": "good"})
    assert parse(f"</think>{good}\n{bad}") == Message("", f"\n{bad}", (call,))
    rest = Message("", bad + good, ()) if case in NEVER_ENDING else Message("", bad, (call,))
    assert parse(f"</think>{bad}{good}") == rest


def test_calls_quoted_in_a_value_are_part_of_the_value() -> None:
    quoted = value("1").replace("</function>", "<parameter=b>\n2\n</parameter>\n</function>")
    text = f"Write\n{quoted}{value(quoted)}\nto call."
    assert parse("</think>" + value(text)) == Message("", "", (ToolCall("f", {"text": text}),))
    unfinished = value(text)[:-60]
    assert parse("</think>" + unfinished) == Message("", unfinished, ())


TYPED: list[tuple[str, Any, Any]] = [
    ("5", {"type": "string"}, "5"),
    ("True", {"type": "string"}, "True"),
    ("5", {"type": "integer"}, 5),
    ("5.0", {"type": "integer"}, 5),
    ("5.5", {"type": "integer"}, "5.5"),
    ("5.0", {"type": "number"}, 5.0),
    ("5", {"type": "number"}, 5),
    ("-1e3", {"type": "number"}, -1000.0),
    ("NaN", {"type": "number"}, "NaN"),
    ("1e999", {"type": "number"}, "1e999"),
    ("9" * 5000, {"type": "integer"}, "9" * 5000),
    ("1", {"type": "boolean"}, "1"),
    ("true", {"type": "boolean"}, True),
    (" False ", {"type": "boolean"}, False),
    ("True", {"type": "integer"}, "True"),
    ("None", {"type": "null"}, None),
    ("null", {"type": "null"}, None),
    ('{"a": [1, null]}', {"type": "object"}, {"a": [1, None]}),
    ("{'a': 1}", {"type": "object"}, "{'a': 1}"),
    ("[1]", {"type": "object"}, "[1]"),
    ('\n["é"]\n', {"type": "array"}, ["é"]),
    ("[" * 100_000, {"type": "array"}, "[" * 100_000),
    ("None", {"type": ["string", "null"]}, None),
    ("nobody", {"type": ["string", "null"]}, "nobody"),
    ("5", {"type": ["string", "integer"]}, 5),
    ("5", {"anyOf": [{"type": "string"}, {"type": "integer"}]}, 5),
    ("[]", {"oneOf": [{"anyOf": [{"type": "array"}]}, {"type": "null"}]}, []),
    ("5", {"enum": [5, 6]}, 5),
    ("7", {"enum": ["7", "8"]}, "7"),
    ("5", {"const": 5}, 5),
    ("[1]", {"allOf": [{"type": "array"}]}, [1]),
    ('{"a": 1}', {"$ref": "#/$defs/Place"}, {"a": 1}),
    ('{"a": 1}', {"anyOf": [{"$ref": "#/$defs/Place"}, {"type": "null"}]}, {"a": 1}),
    ("5", {"$ref": "#/$defs/Loop"}, "5"),
    ("5", {"$ref": "#/$defs/a~1b"}, 5),
    ("5", {"$ref": "#/$defs/a~0b"}, 5),
    ("5", {"$ref": "#/$defs/~01"}, 5),
    ("5.0", {"type": ["integer", "number"]}, 5.0),
    ("1", {"type": ["boolean", "string"]}, "1"),
    ("[null]", {"enum": [[None], 3]}, [None]),
    ("5", {"$ref": "#/nowhere/at/all"}, "5"),
    ("5", {"$ref": "https://example.org/schema"}, "5"),
    ("5", {"type": "date"}, "5"),
    ("5", {"type": [3, {}], "anyOf": 7, "oneOf": [None]}, "5"),
    ("5", True, "5"),
    ("5", None, "5"),
]


@pytest.mark.parametrize(("text", "schema", "expected"), TYPED)
def test_a_value_gets_a_type_of_its_schema_or_stays_text(
    text: str, schema: Any, expected: Any
) -> None:
    definitions: dict[str, Any] = {"Place": {"type": "object"}, "Loop": {"$ref": "#/$defs/Loop"}}
    definitions |= dict.fromkeys(("a/b", "a~b", "~1"), {"type": "integer"})  # RFC 6901's escapes
    got = typed(text, schema, {"$defs": definitions})
    assert (got, type(got)) == (expected, type(expected))


@pytest.mark.parametrize("length", [1, 2, 5, 10, 20])
@pytest.mark.parametrize("by", ["$ref", "anyOf", "allOf", "both"])
def test_a_long_chain_of_references_leads_to_its_type(by: str, length: int) -> None:
    """Each definition refers to the next one, as it stands or inside a choice of one."""

    def to(n: int) -> Any:
        reference = {"$ref": f"#/$defs/{n}"}
        if by == "$ref" or (by == "both" and n % 2):
            return reference
        return {"oneOf" if by == "both" else by: [reference]}

    count = length if by == "$ref" else (length + 1) // 2  # a choice is a step of its own
    definitions = {str(n): to(n + 1) for n in range(1, count)} | {str(count): {"type": "integer"}}
    got = [typed(text, to(1), {"$defs": definitions}) for text in ("5", "five")]
    assert got == [5, "five"]


def test_a_schema_that_refers_to_itself_ends_with_the_types_beside_the_loop() -> None:
    loop = {"anyOf": [{"$ref": "#/$defs/Loop"}, {"type": "integer"}]}
    there = {"allOf": [{"$ref": "#/$defs/Back"}]}
    back = {"type": ["null", "boolean"], "$ref": "#/$defs/There"}
    root = {"$defs": {"Loop": loop, "There": there, "Back": back}, "type": "object"}
    for name, text, expected in (
        ("Loop", "5", 5),
        ("Loop", "true", "true"),
        ("There", "true", True),
        ("There", "None", None),
        ("Back", "true", True),
        ("Back", "5", "5"),
    ):
        got = typed(text, {"$ref": f"#/$defs/{name}"}, root)
        assert (got, type(got)) == (expected, type(expected)), (name, text)
    root = {"properties": {"self": {"$ref": "#/properties/self"}}}
    assert typed("5", {"$ref": "#/properties/self"}, root) == "5"


@pytest.mark.parametrize(
    "tools", [[3], [{}], [{"function": 3}], [{"name": "f"}], [{"name": "f", "parameters": None}]]
)
def test_tools_that_say_nothing_leave_arguments_as_strings(tools: Any) -> None:
    assert parse("</think>" + value("5"), tools).tool_calls == (ToolCall("f", {"text": "5"}),)


def joined(events: list[Event]) -> Message:
    """The message that events make together."""
    said = {kind: [e.payload for e in events if e.kind == kind] for kind in ("thinking", "content")}
    calls = tuple(event.payload for event in events if event.kind == "tool_call")
    return Message("".join(said["thinking"]), "".join(said["content"]), calls)


PIECES = """<think> </think> </think> <tool_call> </tool_call> <function=f> <function= </function> \
<parameter=whole> <parameter=text> </parameter> < > </ <tool_ think> word é""".split()
PIECES += [" ", "\n", "\n", "\n\n", "</think>\n", value("1")[:60], *[value("1"), value("\n")] * 4]
PIECES += ["<tool_call>\n<function=f>\n", "\n</parameter>\n", "\n</function>\n</tool_call>"]


@pytest.mark.parametrize("count", cases([500], [5000]))
@pytest.mark.parametrize("longest", [1, 3, 40], ids=["characters", "tokens", "drafts"])
def test_however_the_text_is_cut_the_events_join_to_the_same_message(
    longest: int, count: int
) -> None:
    rng = random.Random(longest)
    calls = 0
    for _ in range(count):
        pieces = rng.choices(PIECES, k=rng.randrange(12))
        text = "".join(pieces)
        whole = parse(text, SCHEMA_TOOLS)
        stream, events, start = ChatStream(SCHEMA_TOOLS), [], 0
        while start < len(text):
            end = start + rng.randint(1, longest)
            events += stream.feed(text[start:end])
            start = end
        events += stream.finish()
        assert joined(events) == whole, text
        assert all(event.payload for event in events)
        kept = "".join([whole.thinking, whole.content, *map(repr, whole.tool_calls)])
        assert kept.count("word") == text.count("word"), text
        calls += len(whole.tool_calls)
    assert calls > count // 10


def test_text_is_given_out_at_once_unless_it_may_begin_a_tag() -> None:
    stream = ChatStream()
    fed = ["H", "m\n", "</th", "en", "\n</think>", "\n", "a <", "b", "<tool_call", ">", "\n<f", "x"]
    given = [[(event.kind, event.payload) for event in stream.feed(text)] for text in fed]
    assert given == [
        [("thinking", "H")],
        [("thinking", "m")],
        [],
        [("thinking", "\n</then")],
        [],
        [],
        [("content", "a ")],
        [("content", "<b")],
        [],
        [],
        [],
        [("content", "<tool_call>"), ("content", "\n<fx")],
    ]
    assert stream.finish() == []


def test_one_draft_may_bring_the_end_of_thinking_and_several_calls() -> None:
    stream = ChatStream()
    events = stream.feed("m.\n</think>\nYo." + value("1") + value("2") + "<tool_c")
    assert [event.kind for event in events] == ["thinking", "content", "tool_call", "tool_call"]
    assert stream.finish() == [Event("content", "<tool_c")]


def test_a_message_becomes_openais_and_has_no_key_for_calls_without_any() -> None:
    assert parse("a</think>b" + value("1")).as_dict() == {
        "role": "assistant",
        "content": "b",
        "reasoning_content": "a",
        "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"text": "1"}}}],
    }
    assert parse("a</think>b").as_dict() == assistant("b", reasoning_content="a")


WORDS = [
    "",
    "a",
    "é ",
    "\n",
    " \n\n",
    "<b>",
    "</tool_call>",
    "</parameter>",
    "True",
    "5",
    '{"a": 1}',
]


def drawn_arguments(rng: random.Random) -> dict[str, Any]:
    """Arguments that fit SCHEMA_TOOLS, some of them left out."""
    text = "".join(rng.choices(WORDS, k=rng.randrange(4)))
    drawn = {
        "text": text,
        "whole": rng.randrange(-(10**20), 10**20),
        "real": rng.choice([0.1, -0.0, 1e22, 3]),
        "yes": rng.choice([True, False]),
        "none": None,
        "map": {text: [text, None, {"é": rng.random()}]},
        "list": [text, [], True],
        "maybe": rng.choice([None, 7]),
        "unknown": text,
    }
    return {key: drawn[key] for key in rng.sample(sorted(drawn), k=rng.randrange(len(drawn)))}


def test_what_was_rendered_parses_back_and_what_was_parsed_renders_back() -> None:
    rng = random.Random(0)
    before = render([USER])
    for _ in range(1000):
        thinking, content = ("".join(rng.choices(WORDS, k=3)) for _ in range(2))
        calls = tuple(ToolCall("f", drawn_arguments(rng)) for _ in range(rng.randrange(3)))
        message = Message(thinking, content, calls)
        prompt = render([USER, message.as_dict()], add_generation_prompt=False)
        text = prompt.removeprefix(before).removesuffix("<|im_end|>\n")
        assert before + text + "<|im_end|>\n" == prompt
        assert parse(text, SCHEMA_TOOLS) == message
        for tools in (SCHEMA_TOOLS, None):  # also raw strings render back to the same characters
            again = parse(text, tools).as_dict()
            assert render([USER, again], add_generation_prompt=False) == prompt
