"""What a person sees: the bar and its end, answers dimmed, hidden or plain, lines of figures."""

import io
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace

import pytest

from minstep.cli import terminal
from minstep.cli.terminal import DIM, PLAIN, Display, Progress, drafts_line, note, summary, wrote
from minstep.text.continuation import Pass
from minstep.text.reply import ChatStream, Event
from minstep.text.tool_calls import ToolCall


class Terminal(io.StringIO):
    """A stream that says it is a terminal, and knows what its screen shows."""

    def isatty(self) -> bool:
        return True

    @property
    def screen(self) -> str:
        """The text with carriage returns and erasing done, styles left out."""
        shown = []
        for line in self.getvalue().replace(DIM, "").replace(PLAIN, "").split("\n"):
            cells = ""
            for part in line.split("\r"):
                erases = part.startswith("\x1b[K")
                part = part.removeprefix("\x1b[K")
                cells = part if erases else part + cells[len(part) :]
            shown.append(cells.removesuffix("\x1b[K"))
        return "\n".join(shown)


@pytest.fixture(autouse=True)
def colour(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)


@pytest.fixture
def out(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    stream = Terminal()
    monkeypatch.setattr(terminal, "sys", SimpleNamespace(stdout=stream))
    return stream


@pytest.fixture
def err(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    stream = Terminal()
    monkeypatch.setattr(terminal, "sys", SimpleNamespace(stderr=stream))
    return stream


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(terminal, "time", clock)
    return clock


# The bar


def test_progress_prints_nothing_where_stderr_is_no_terminal(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    bar = Progress("prompt", 10, "tokens")
    for done in range(11):
        clock.now += 5
        bar(done)
    bar.erase()
    assert capsys.readouterr() == ("", "")


def test_progress_prints_nothing_for_what_takes_a_moment(clock: Clock, err: Terminal) -> None:
    bar = Progress("prompt", 10, "tokens")
    for done in range(11):
        clock.now += 0.09
        bar(done)
    bar.erase()
    assert err.getvalue() == ""


def test_progress_shows_a_bar_and_erases_it_at_the_end(clock: Clock, err: Terminal) -> None:
    bar = Progress("prompt", 2048, "tokens")
    clock.now += 2
    bar(512)
    assert err.screen == "prompt ██████░░░░░░░░░░░░░░░░░░ 512/2,048 tokens, 256/s, 0:06 left"
    clock.now += 2
    bar(1024)
    assert err.screen == "prompt ████████████░░░░░░░░░░░░ 1,024/2,048 tokens, 256/s, 0:04 left"
    clock.now += 4
    bar(2048)
    assert err.screen == ""
    written = err.getvalue()
    bar.erase()
    assert err.getvalue() == written


def test_a_bar_is_erased_when_the_work_is_interrupted(clock: Clock, err: Terminal) -> None:
    bar = Progress("prompt", 1000, "tokens")
    clock.now += 200
    bar(1)
    assert "999" not in err.screen and "3330:00 left" in err.screen
    bar.erase()
    assert err.screen == ""


def test_a_bar_of_bytes_counts_gigabytes_and_may_change_on_the_way(
    clock: Clock, err: Terminal
) -> None:
    bar = Progress("model.layers.0", 394_000_000_000, "GB", 1e9)
    clock.now += 0.5
    bar(500_000_000)
    assert err.getvalue() == ""
    clock.now += 3.5
    bar.label = "model.layers.17"
    bar(6_000_000_000)
    cells = "░" * 24
    amounts = "6.0/394.0 GB, 1.5 GB/s, 4:18 left"
    assert err.screen == f"model.layers.17 {cells} {amounts}"
    bar.total = 12_000_000_000
    bar(6_000_000_000)
    cells, drawn = "█" * 12 + "░" * 12, err.getvalue().rpartition("\r")[2]
    assert drawn == f"model.layers.17 {cells} 6.0/12.0 GB, 1.5 GB/s, 0:04 left\x1b[K"
    bar.erase()
    assert err.screen == ""


# Answers

CALL = Event("tool_call", ToolCall("weather", {"city": "北京", "days": [1, 2]}))
CALL_LINE = '{"name": "weather", "arguments": {"city": "北京", "days": [1, 2]}}\n'
ANSWER = (
    Event("thinking", "First\n"),
    Event("thinking", "this."),
    Event("content", "Hello"),
    Event("content", " there."),
    CALL,
    CALL,
)


def shown(events: Iterable[Event], hide_thinking: bool = False) -> None:
    display = Display(hide_thinking)
    for event in events:
        display.show(event)
    display.end()


def test_thinking_is_dim_and_calls_are_lines_on_a_terminal(out: Terminal) -> None:
    shown(ANSWER)
    thinking, content = f"{DIM}First\nthis.{PLAIN}\n\n", f"Hello there.\n{CALL_LINE}{CALL_LINE}"
    assert out.getvalue() == thinking + content


@pytest.mark.parametrize("no_color", ["1", "yes"])
def test_without_colours_thinking_stands_between_its_tags(
    no_color: str, out: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_COLOR", no_color)
    shown(ANSWER)
    content = f"Hello there.\n{CALL_LINE}{CALL_LINE}"
    assert out.getvalue() == f"<think>\nFirst\nthis.\n</think>\n{content}"


def test_there_are_no_colours_where_stdout_is_no_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    shown(ANSWER)
    content = f"Hello there.\n{CALL_LINE}{CALL_LINE}"
    assert capsys.readouterr().out == f"<think>\nFirst\nthis.\n</think>\n{content}"
    shown(ANSWER, hide_thinking=True)
    assert capsys.readouterr().out == content


def test_hidden_thinking_leaves_a_sign_until_it_is_over(out: Terminal) -> None:
    display = Display(hide_thinking=True)
    display.show(ANSWER[0])
    display.show(ANSWER[1])
    assert out.screen == "thinking…"
    display.show(ANSWER[2])
    assert out.screen == "Hello"
    display.end()
    assert out.screen == "Hello\n" and "First" not in out.getvalue()


@pytest.mark.parametrize("hide_thinking", [False, True])
def test_an_answer_cut_short_leaves_no_style_and_no_open_line(
    hide_thinking: bool, out: Terminal
) -> None:
    for count in range(len(ANSWER) + 1):
        out.truncate(0)
        out.seek(0)
        shown(ANSWER[:count], hide_thinking)
        written = out.getvalue()
        assert written.count(DIM) == written.count(PLAIN)
        assert out.screen == "" or out.screen.endswith("\n")


def test_an_answer_that_ends_its_line_gets_no_second_end(out: Terminal) -> None:
    shown([Event("content", "Hello\n")])
    assert out.getvalue() == "Hello\n"


def test_control_characters_are_shown_on_a_terminal_and_never_obeyed(out: Terminal) -> None:
    shown([Event("content", "a\x1b[2Jb\x07\tc\r\x7f\x9b1m\nd")])
    assert out.getvalue() == "a␛[2Jb␇\tc␍␡␦1m\nd\n"


def test_a_pipe_gets_what_the_model_said(capsys: pytest.CaptureFixture[str]) -> None:
    shown([Event("content", "a\x1b[2Jb\r\n")])
    assert capsys.readouterr().out == "a\x1b[2Jb\r\n"


def test_an_answer_looks_the_same_however_it_comes(out: Terminal) -> None:
    text = "Thought.\n</think>\nHello\n<tool_call>\n<function=f>\n</function>\n</tool_call> bye"
    shown(ChatStream().feed(text))
    whole = out.getvalue()
    out.truncate(0)
    out.seek(0)
    stream = ChatStream()
    shown(event for letter in text for event in stream.feed(letter))
    assert out.getvalue() == whole


def test_a_note_is_dim_where_stderr_is_a_terminal(err: Terminal) -> None:
    note("figures", is_dim=True)
    note("told")
    assert err.getvalue() == f"{DIM}figures{PLAIN}\ntold\n"


def test_a_note_is_plain_elsewhere(capsys: pytest.CaptureFixture[str]) -> None:
    note("figures", is_dim=True)
    assert capsys.readouterr() == ("", "figures\n")


# Lines of figures

STATS = {
    "prompt_tokens": 12345,
    "prompt_tps": 6789.0,
    "new_tokens": 200,
    "generation_tps": 12.5,
    "acceptance": [0.8, 0.617, 0.0],
    "tokens_per_forward": 2.4,
    "peak_memory_bytes": 1_234_567_890,
    "stop": "eos",
}


@pytest.mark.parametrize(
    ("size", "said"),
    [(999, "999 bytes"), (1000, "1 KB"), (131_400, "131 KB"), (2_340_000, "2.3 MB")],
)
def test_what_was_written_is_told_with_its_size(
    size: int, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "inner").mkdir()
    (file := tmp_path / "inner" / "page.html").write_bytes(b"x" * size)
    wrote(file, ": open it in a browser")
    assert capsys.readouterr() == ("", f"wrote {file} ({said}): open it in a browser\n")
    wrote(tmp_path)
    assert capsys.readouterr() == ("", f"wrote {tmp_path} ({said})\n")


def test_the_summary_is_one_line_of_figures() -> None:
    assert summary(STATS) == (
        "prompt 12,345 tokens at 6,789.0/s; 200 new at 12.5 tokens/s; "
        "drafts kept 80%, 62%, 0%, 2.4 tokens per forward pass; "
        "peak memory 1,235 MB; stop: eos"
    )


def test_the_summary_leaves_out_what_there_is_not() -> None:
    stats = STATS | {"acceptance": [], "peak_memory_bytes": None, "stop": "length"}
    expected = "prompt 12,345 tokens at 6,789.0/s; 200 new at 12.5 tokens/s; stop: length"
    assert summary(stats) == expected


def test_drafts_that_were_kept_stand_in_brackets() -> None:
    tokens = [*range(7), 5, 250, 8]
    assert drafts_line(Pass(7, [5, 250, 9], 2, 3), tokens) == "     7  [5] [250] 9 -> 5 250 8"
    assert drafts_line(Pass(7, [5, 250, 9], 2, 1), tokens) == "     7  [5] 250 9 -> 5"
    assert drafts_line(Pass(1234, [5], 0, 1), [6] * 1235) == "  1234  5 -> 6"
    assert drafts_line(Pass(0, [], 0, 1), tokens) == "     0  no drafts -> 0"
    assert drafts_line(Pass(1, [2], 1, 2), [0, 2, 3], "abcd".__getitem__) == "     1  [c] -> c d"


def test_a_prompt_is_dimmed_and_where_it_cannot_be_left_out(
    out: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    Display().prompt("Once\x1b")
    assert out.getvalue() == f"{DIM}Once\u241b{PLAIN}"
    monkeypatch.setenv("NO_COLOR", "1")
    Display().prompt("Once")
    assert out.getvalue().count("Once") == 1
