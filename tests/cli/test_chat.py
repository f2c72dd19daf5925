"""`minstep chat`: its commands and interruptions, piped and on a terminal."""

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

import pytest

import minstep.cli.chat
from minstep.cli.chat import HELP, WELCOME, obey, talk
from minstep.cli.generate import CONTINUES, SHIPPED
from minstep.cli.main import main
from minstep.cli.terminal import Display
from minstep.errors import InputError
from minstep.generate import Step
from minstep.text.conversation import Conversation
from minstep.text.prompt import render
from tests.conftest import Refused, Run
from tests.text.test_conversation import BREAK, TOKENIZER, TOOL, Model, ask, said, user

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

    monkeypatch.setattr(minstep.cli.chat, "decode_steps", decode)
    monkeypatch.setattr(minstep.cli.chat, "talk", lambda _, decode, *rest: list(decode([5])))
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
