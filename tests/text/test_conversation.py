"""A conversation: its history, commands and interruptions, piped and on a terminal."""

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import minstep
from minstep.cli.generate import CONTINUES, SHIPPED
from minstep.cli.main import main
from minstep.cli.terminal import Display
from minstep.errors import InputError
from minstep.generate import Step
from minstep.text.conversation import HELP, WELCOME, Conversation, Story, obey, talk
from minstep.text.prompt import render
from minstep.text.tokenizer import byte_level_tokenizer
from tests.conftest import Refused, Run

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


# Commands


def test_reset_forgets_everything_but_the_system_text() -> None:
    conversation, model = Conversation(TOKENIZER, "Be brief."), Model("a</think>b", "c")
    ask(conversation, "Hi", model)
    assert obey(conversation, "/reset\n") == "forgotten, but for the system text"
    assert conversation.messages == []
    ask(conversation, "Again", model)
    assert model.prompts[1] == render([{"role": "system", "content": "Be brief."}, user("Again")])
    assert obey(Conversation(TOKENIZER), "/reset") == "forgotten"


def test_system_sets_the_text_or_shows_it() -> None:
    conversation, model = Conversation(TOKENIZER), Model("a</think>b", "c")
    ask(conversation, "Hi", model)
    assert obey(conversation, "/system") == "the system text is: none"
    told = obey(conversation, "/system \t Be brief, 日本語.  \n")
    assert told == "the system text is now: Be brief, 日本語."
    assert obey(conversation, "/system \n") == "the system text is: Be brief, 日本語."
    ask(conversation, "And?", model)
    system = {"role": "system", "content": "Be brief, 日本語."}
    assert model.prompts[1] == render([system, user("Hi"), said("b", "a"), user("And?")])


def test_a_system_text_that_cannot_be_encoded_leaves_the_old_one() -> None:
    conversation = Conversation(TOKENIZER, "Old.")
    with pytest.raises(InputError, match="cannot be encoded"):
        obey(conversation, "/system \udcff")
    assert conversation.system == "Old."


def test_help_names_every_command_and_an_unknown_one_leads_to_it() -> None:
    conversation = Conversation(TOKENIZER)
    assert obey(conversation, "/help") == HELP
    for name in ("/reset", "/system", "/exit"):
        assert name in HELP
    for line in ("/nope", "/", "/Reset", "/systematic x"):
        hint = obey(conversation, line)
        assert hint and hint.startswith(f"{line.split()[0]} is no command") and "\n" not in hint
    assert obey(conversation, "/exit") is None
    assert conversation.messages == []


# The loop


def talked(
    model: Model, *lines: str | type[BaseException], is_interactive: bool = True
) -> Conversation:
    """A conversation after the user's lines and Ctrl-C's; after the last comes the end of input."""
    conversation = Conversation(TOKENIZER)
    typed = iter(lines)

    def read() -> str:
        line = next(typed, EOFError)
        if isinstance(line, str):
            return line
        raise line

    talk(conversation, model, Display(), is_interactive, read)
    assert next(typed, None) is None, "it left before the end"
    return conversation


def test_lines_are_answered_until_the_end_and_empty_ones_ignored(
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = Model("a</think>Hello", "c</think>Bye\n")
    conversation = talked(model, "Hi\n", "\n", "  \t\n", " /etc is what? \n")
    assert conversation.messages[::2] == [user("Hi"), user("/etc is what?")]
    out, err = capsys.readouterr()
    assert out == "<think>\na\n</think>\nHello\n<think>\nc\n</think>\nBye\n"
    notes = err.splitlines()
    assert notes[0] == WELCOME and notes[3] == "" and len(notes) == 4
    assert all(note.startswith("prompt ") and note.endswith("stop: eos") for note in notes[1:3])


def test_commands_are_obeyed_and_never_sent(capsys: pytest.CaptureFixture[str]) -> None:
    model = Model("a</think>b", "c</think>d")
    lines = ("/system Be brief.\n", "Hi\n", "/nope\n", "/reset\n", "/help\n", "And?\n", "/exit\n")
    conversation = talked(model, *lines)
    assert conversation.messages[0] == user("And?") and len(model.prompts) == 2
    out, err = capsys.readouterr()
    assert "now: Be brief." in err and "/nope is no command" in err and HELP in err
    assert "/" not in out.replace("</think>", "")


def test_ctrl_c_in_an_answer_stops_it_and_the_conversation_goes_on(
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = Model("Hm.</think>Hal^C", "x</think>Whole.")
    conversation = talked(model, "Hi\n", KeyboardInterrupt, "And?\n")
    kept = [user("Hi"), said("Hal", "Hm."), user("And?"), said("Whole.", "x")]
    assert conversation.messages == kept
    out, err = capsys.readouterr()
    assert "Hal\n" in out and "stop: interrupted\n" in err


def test_ctrl_c_before_the_first_token_takes_the_question_back(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert talked(Model(BREAK), "Hi\n").messages == []
    assert "taken back" in capsys.readouterr().err


def test_ctrl_c_twice_in_a_row_leaves_but_not_with_a_line_between(
    capsys: pytest.CaptureFixture[str],
) -> None:
    between = [KeyboardInterrupt, "\n", KeyboardInterrupt, "/help\n", KeyboardInterrupt]
    talked(Model(), *between, KeyboardInterrupt)
    assert capsys.readouterr().err.count("(Ctrl-C again, or Ctrl-D, leaves)") == 3


def test_what_is_refused_is_told_and_the_conversation_goes_on(
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = Model(InputError("the prompt is long"), "a</think>b")
    conversation = talked(model, "Hi\n", "And?\n", "/system \udcff\n", "\udcff\n")
    assert conversation.messages == [user("And?"), said("b", "a")]
    errors = [line for line in capsys.readouterr().err.splitlines() if "minstep: " in line]
    assert errors[0] == "minstep: the prompt is long"
    assert len(errors) == 3 and all("cannot be encoded" in error for error in errors[1:])


@pytest.mark.parametrize("raised", [KeyboardInterrupt, InputError])
def test_where_nobody_sits_at_a_terminal_it_ends_at_what_goes_wrong(
    raised: type[BaseException], capsys: pytest.CaptureFixture[str]
) -> None:
    answer = "a^C" if raised is KeyboardInterrupt else InputError("the prompt is long")
    with pytest.raises(raised):
        talked(Model(answer), "Hi\n", "And?\n", is_interactive=False)
    assert capsys.readouterr().err == ""


# The command


def test_chat_is_refused_before_the_work(
    tmp_path: Path, run: Run, refused: Refused, single: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "tools.json"
    file.write_text("[1]")
    refused("chat", "--tools", file, naming=(f"{file}[0]", "int"))
    refused("chat", "--tools", tmp_path / "no.json", naming=("no.json",))
    refused("chat", "--num-draft-tokens", 4, naming=("--num-draft-tokens", "3 MTP layers"))
    refused("chat", "--model", single, naming=("tokenizer.json", "missing", "chat"))
    refused("chat", "--stop", "", naming=("--stop",))
    monkeypatch.setattr(sys, "stdin", None)
    refused("chat", naming=("stdin is closed",))
    assert "(2048; 100 where" in " ".join(run("chat", "--help").out.split())


@pytest.fixture(scope="module")
def noisy(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model with random weights: it is taken for one that answers."""
    folder = tmp_path_factory.mktemp("noisy") / "model"
    assert main(["make-tiny", "tiny", "--out", str(folder)]) == 0
    return str(folder)


def piped(
    model: str | None, said: bytes, *arguments: str, **more: str
) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "minstep", "chat", *arguments]
    command += ["--model", model] if model else []
    environment = os.environ | {"PYTHONIOENCODING": "utf-8"} | more
    return subprocess.run(command, input=said, capture_output=True, check=False, env=environment)


def test_piped_lines_are_answered_without_prompts_or_colours(noisy: str) -> None:
    said = "Héllo\n\n/system Be brief.\n/nope\nAgain".encode()
    ran = piped(noisy, said, "--max-tokens", "12", "--ignore-eos", "--seed", "3")
    assert ran.returncode == 0
    out, err = ran.stdout.decode(), ran.stderr.decode()
    assert out.startswith("<think>\n") and out.endswith("\n</think>\n")
    assert out.count("<think>") == 2
    assert "\x1b[" not in out + err and "\ufffd" not in out
    assert err.count("12 new at ") == 2 and err.count("stop: length") == 2
    assert "/nope is no command" in err and "Traceback" not in err


def test_a_seed_gives_the_same_conversation_but_not_the_same_answer_twice(noisy: str) -> None:
    arguments = (b"Hi\n/reset\nHi\n", "--max-tokens", "12", "--temp", "1", "--seed", "3")
    first, again = piped(noisy, *arguments).stdout, piped(noisy, *arguments).stdout  # type: ignore[arg-type]
    assert first == again
    answers = first.split(b"</think>\n")
    assert len(answers) == 3 and answers[0] != answers[1]


def test_the_shipped_model_says_that_it_only_continues(refused: Refused, tmp_path: Path) -> None:
    ran = piped(None, b"The with statement\nIt", "--max-tokens", "12", "--temp", "0")
    out, err = ran.stdout.decode(), ran.stderr.decode().splitlines()
    assert ran.returncode == 0 and "<think>" not in out and len(out.split()) > 5
    assert err[:2] == [SHIPPED, f"{CONTINUES}; Ctrl-C stops it"]
    file = tmp_path / "tools.json"
    file.write_text("[]")
    assert piped(None, b"Hi", "--tools", str(file), "--max-tokens", "2").returncode == 0
    file.write_text(json.dumps([TOOL]))
    refused("chat", "--tools", file, naming=("--tools", "can_chat"))


def test_an_answer_may_be_longer_than_a_text_that_only_goes_on(
    noisy: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    most: list[int] = []

    def decode(args: Any, *_: Any) -> Iterator[Step]:
        most.append(args.max_tokens)
        return iter(())

    monkeypatch.setattr(minstep.cli.generate, "decode_steps", decode)
    monkeypatch.setattr(minstep.cli.generate, "talk", lambda _, decode, *rest: list(decode([5])))
    for model in (("--model", noisy), ()):
        for flags in ((), ("--max-tokens", 7)):
            assert run("chat", *model, *flags).code == 0
    assert most == [2048, 7, 100, 7]


def test_a_piped_line_that_cannot_be_answered_ends_with_two(noisy: str) -> None:
    first = piped(noisy, b"x" * 4096 + b"\nHi\n")
    second = piped(noisy, b"\xff\xfe\nHi\n")
    for ran, naming in ((first, "tokens, expected at most"), (second, "cannot be encoded")):
        assert (ran.returncode, ran.stdout) == (2, b"")
        assert naming in ran.stderr.decode().splitlines()[-1]
        assert len(ran.stderr.splitlines()) == 1


class Typist:
    """A process on a terminal of its own, and who types there."""

    def __init__(self, *arguments: str) -> None:
        pty = pytest.importorskip("pty", reason="needs pseudo-terminals")
        environment = {**os.environ, "TERM": "xterm", "PYTHONIOENCODING": "utf-8"}
        environment.pop("NO_COLOR", None)
        command = [sys.executable, "-m", "minstep", *arguments]
        self.process, self.terminal = pty.fork()
        if self.process == 0:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs ignore it
            os.execve(command[0], command, environment)
        self.seen = ""
        self._read = 0

    def waits_for(self, text: str, seconds: float = 20) -> None:
        """Read until `text` has come behind what was waited for before."""
        deadline = time.monotonic() + seconds
        while text not in self.seen[self._read :]:
            assert time.monotonic() < deadline, self.seen
            if select.select([self.terminal], [], [], 0.1)[0]:
                self.seen += os.read(self.terminal, 65536).decode("utf-8", "replace")
        self._read = self.seen.index(text, self._read) + len(text)

    def types(self, text: str) -> None:
        os.write(self.terminal, text.encode())

    def leaves(self) -> int:
        """The exit code, once the process has ended."""
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            try:
                if select.select([self.terminal], [], [], 0.05)[0]:
                    self.seen += os.read(self.terminal, 65536).decode("utf-8", "replace")
            except OSError:  # Linux says so when the other side has closed
                break
            ended, status = os.waitpid(self.process, os.WNOHANG)
            if ended:
                return os.waitstatus_to_exitcode(status)
        return os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1])


@pytest.mark.skipif(sys.platform == "win32", reason="needs pseudo-terminals")
def test_on_a_terminal_ctrl_c_stops_an_answer_and_ctrl_d_leaves(noisy: str) -> None:
    typist = Typist("chat", "--model", noisy, "--max-tokens", "20000", "--ignore-eos", "--no-mtp")
    try:
        typist.waits_for("> ")
        typist.types("Hello\r")
        typist.waits_for("\x1b[2m")
        time.sleep(0.1)
        typist.types("\x03")
        typist.waits_for("stop: interrupted")
        typist.waits_for("> ")
        typist.types("half a line")
        typist.waits_for("half a line")
        time.sleep(0.1)  # readline misses a signal that comes while it is not yet waiting
        typist.types("\x03")
        typist.waits_for("leaves)")
        typist.waits_for("> ")
        typist.types("/system\r")
        typist.waits_for("the system text is: none")  # the half line is gone
        typist.waits_for("> ")
        typist.types("\x04")
        assert typist.leaves() == 0
    except BaseException:
        os.kill(typist.process, signal.SIGKILL)
        raise
    finally:
        os.close(typist.terminal)
    assert "Traceback" not in typist.seen
