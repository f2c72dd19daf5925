"""A conversation: its history, what an answer is, and what is refused."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import minstep
from minstep.cli.chat import obey
from minstep.errors import InputError
from minstep.generate import Step
from minstep.text.conversation import Conversation, Story
from minstep.text.prompt import render
from minstep.text.tokenizer import byte_level_tokenizer

TOKENIZER = byte_level_tokenizer()
TOOL = {
    "name": "weather",
    "parameters": {"type": "object", "properties": {"days": {"type": "integer"}}},
}
CALL = (
    "<tool_call>\n<function=weather>\n<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>"
)
BREAK = "^C"  # in a scripted answer: here the user presses Ctrl-C
END = "<|im_end|>"


class Model:
    """Answers in turn what it was given, three tokens a step, and remembers the prompts."""

    def __init__(self, *answers: str | Exception) -> None:
        self.prompts: list[str] = []
        self._answers = iter(answers)

    def __call__(self, prompt: list[int]) -> Iterator[Step]:
        self.prompts.append(TOKENIZER.decode(prompt, skip_special_tokens=False))
        answer = next(self._answers)
        if isinstance(answer, Exception):
            raise answer
        text, broken, _ = answer.partition(BREAK)
        ids = TOKENIZER.encode(text).ids
        for n in range(0, len(ids), 3):
            stop = None if broken or n + 3 < len(ids) else "eos"
            yield Step(ids[n : n + 3], np.zeros((3, 320)), ids[n + 1 : n + 3], 2, stop)
        if broken:
            raise KeyboardInterrupt


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def said(content: str, thinking: str = "", **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, "reasoning_content": thinking, **more}


def ask(conversation: Conversation, text: str, model: Model) -> list[tuple[str, Any]]:
    """The events of an answer, neighbours of a kind joined."""
    events: list[tuple[str, Any]] = []
    for kind, payload in conversation.ask(text, model):
        if events and events[-1][0] == kind and kind != "tool_call":
            payload = events.pop()[1] + payload
        events.append((kind, payload))
    return events


# What an answer is


def test_an_answer_comes_in_pieces_and_then_stands_in_the_history() -> None:
    conversation, model = Conversation(TOKENIZER), Model(f"Well.\n</think>\nHéllo 🙂{END}")
    events = list(conversation.ask("Hi", model))
    assert len(events) > 5
    assert conversation.messages == [user("Hi"), said("Héllo 🙂", "Well.")]
    assert "".join(event.payload for event in events) == "Well.Héllo 🙂"
    assert conversation.stats["stop"] == "eos" and conversation.stats["acceptance"] == [1, 1]


def test_every_prompt_is_the_whole_history_rendered() -> None:
    conversation = Conversation(TOKENIZER, "Be brief.", [TOOL])
    model = Model("Hm.\n</think>\nHello", f"Look.\n</think>\nWait.{CALL}{END}", "\n</think>\nSun.")
    system = {"role": "system", "content": "Be brief."}
    result = "<tool_response>sunny</tool_response>"
    assert ask(conversation, "Hi", model) == [("thinking", "Hm."), ("content", "Hello")]
    events = ask(conversation, "Weather?", model)
    assert events == [
        ("thinking", "Look."),
        ("content", "Wait."),
        ("tool_call", ("weather", {"days": 3})),
    ]
    ask(conversation, result, model)
    history = [system, user("Hi"), said("Hello", "Hm."), user("Weather?")]
    call = {"type": "function", "function": {"name": "weather", "arguments": {"days": 3}}}
    after = [*history, said("Wait.", "Look.", tool_calls=[call]), user(result)]
    assert conversation.messages[3] == after[4]
    assert model.prompts == [render(each, [TOOL]) for each in (history[:2], history, after)]
    assert "Hm." not in model.prompts[1]
    assert "<think>\nLook.\n</think>\nWait.<tool_call>" in model.prompts[2]


def test_a_stop_text_ends_an_answer() -> None:
    conversation = Conversation(TOKENIZER, stops=["END", "\n\n"])
    assert ask(conversation, "Hi", Model("a</think>b EN c END d")) == [
        ("thinking", "a"),
        ("content", "b EN c "),
    ]
    assert conversation.stats["stop"] == "stop"
    assert conversation.messages[-1] == said("b EN c ", "a")


def test_a_model_that_only_continues_is_given_one_growing_text() -> None:
    story = Story(TOKENIZER, "A tale.", stops=["END"])
    model = Model(f" grew.</think> <tool_call>{END}", "On^C", "x ENDy")
    assert ask(story, "The with statement", model) == [("content", " grew.</think> <tool_call>")]
    with pytest.raises(KeyboardInterrupt):
        list(story.ask("And", model))
    assert ask(story, "then", model) == [("content", "x ")]
    told = ["A tale.", "The with statement", " grew.</think> <tool_call>", "And", "On", "then"]
    assert model.prompts == ["\n\n".join(told[:n]) for n in (2, 4, 6)]
    assert story.messages[-1] == said("x ")
    assert obey(story, "/reset") == "forgotten, but for the system text"
    assert story.messages == []


@pytest.mark.parametrize(
    ("answer", "kept"),
    [
        ("Hm, l^C", said("", "Hm, l")),
        ("Hm.\n</think>\nHal^C", said("Hal", "Hm.")),
        ("Hm.\n</thi^C", said("", "Hm.\n</thi")),
        ("Hm.</think>a <tool_c^C", said("a <tool_c", "Hm.")),
        (f"Hm.</think>a{CALL[:60]}^C", said(f"a{CALL[:60]}", "Hm.")),
        ("Hm.</think>é🙂 EN^C", said("é🙂 EN", "Hm.")),
    ],
)
def test_an_interrupted_answer_is_what_was_said_so_far(answer: str, kept: dict[str, Any]) -> None:
    conversation = Conversation(TOKENIZER, stops=["END"])
    model = Model(answer, "\n</think>\nGo on.")
    with pytest.raises(KeyboardInterrupt):
        list(conversation.ask("Hi", model))
    assert conversation.messages == [user("Hi"), kept]
    assert conversation.stats["stop"] == "interrupted"
    ask(conversation, "And?", model)
    assert model.prompts[1] == render([user("Hi"), kept, user("And?")])


def test_an_answer_that_is_closed_before_its_end_is_what_was_said_so_far() -> None:
    conversation = Conversation(TOKENIZER)
    events = conversation.ask("Hi", Model("abcdefghijklmnopqrstuvwxyz"))
    next(events)
    events.close()
    assert len(conversation.messages) == 2
    thinking = conversation.messages[1]["reasoning_content"]
    assert thinking and "abcdefghijklmnopqrstuvwxyz".startswith(thinking)


@pytest.mark.parametrize("answer", [BREAK, InputError("too long"), MemoryError()])
def test_a_question_without_any_answer_is_taken_back(answer: str | Exception) -> None:
    conversation = Conversation(TOKENIZER)
    ask(conversation, "Hi", Model("\n</think>\nHello"))
    before = list(conversation.messages)
    with pytest.raises((KeyboardInterrupt, InputError, MemoryError)):
        list(conversation.ask("And?", Model(answer)))
    assert conversation.messages == before


def test_a_prompt_over_the_context_is_refused_and_a_shorter_one_answered() -> None:
    config = minstep.load_config(minstep.find_config("tiny"))._replace(max_positions=100)
    rng = np.random.default_rng(0)
    weights = minstep.random_weights(config, rng)
    conversation = Conversation(TOKENIZER)

    def decode(prompt: list[int]) -> Iterator[Step]:
        return minstep.steps(prompt, weights, config, rng, 5, ignore_eos=True)

    with pytest.raises(InputError, match=r"the prompt has 1\d\d tokens, expected at most .* 100"):
        list(conversation.ask("x" * 90, decode))
    assert conversation.messages == []
    list(conversation.ask("x", decode))
    assert len(conversation.messages) == 2 and conversation.stats["new_tokens"] == 5


@pytest.mark.parametrize(
    ("options", "naming"),
    [
        ({"system": "\udcff"}, "cannot be encoded"),
        ({"tools": ["weather"]}, r"tools\[0\] is of type str"),
        ({"tools": [{"name": object()}]}, r"tools\[0\] cannot be written as JSON"),
    ],
)
def test_what_no_prompt_can_hold_is_refused_at_the_start(
    options: dict[str, Any], naming: str
) -> None:
    with pytest.raises(InputError, match=naming):
        Conversation(TOKENIZER, **options)
