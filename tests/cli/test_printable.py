"""What a file or an argument says reaches the terminal escaped, whichever command shows it."""

import argparse
import ast
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import minstep.cli.bench
from minstep.bench.timing import Found
from minstep.cli.main import _parser
from minstep.cli.terminal import DIM, ERASE, PLAIN, json_text, note, print_text
from minstep.store.checkpoint import INDEX
from minstep.store.config_file import read_config
from minstep.store.header import read_header
from minstep.store.output import Data, write_tensors
from minstep.store.random_checkpoint import Form, save_random
from tests.conftest import Run
from tests.support.recordings import save

PACKAGE = Path(__file__).parents[2] / "minstep"
# Escape sequences, C1, bidirectional controls, a separator of lines, half a character and a line
# that would be somebody else's.
HOSTILE = "a\x1b[2J\x1b]0;t\x07\x9b31m\u061c\u200f\u202e\u2066\u2028\x7f\r\udcff\nFORGED"
TOKENS = "261,5,262,9,261,17"  # two of them are hostile text


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every kind of file whose content names something."""
    said = HOSTILE.replace("\udcff", "")  # no text, but a file may have it in its name
    top = tmp_path_factory.mktemp("place") / said
    top.mkdir()
    raw, config, folder = read_config("tiny")
    raw |= {said: said, "architectures": [said]}
    save_random(raw, config, np.random.default_rng(0), top / "model", Form("bfloat16", shards=3))
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    added = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    tokenizer["added_tokens"] += [
        added | {"id": 261 + n, "content": f"{n}{said}", "special": False} for n in range(2)
    ]
    (top / "model" / "tokenizer.json").write_text(json.dumps(tokenizer))
    index = json.loads((top / "model" / INDEX).read_text())
    files = sorted({*index["weight_map"].values()})
    for file in files[:2]:  # the third is missing
        (top / "model" / file).rename(top / "model" / f"{said}{file}")
    names = {name: f"{said}{file}" for name, file in index["weight_map"].items()}
    shard = top / "model" / f"{said}{files[0]}"
    tensors = read_header(shard)
    content = shard.read_bytes()
    data = {
        name: Data(t.dtype, t.shape, [content[t.offset : t.offset + t.nbytes]])
        for name, t in tensors.items()
    }
    data[said] = Data.of(np.zeros(3, np.float32))
    write_tensors(shard, data, {"format": "pt", said: said})
    names[said] = shard.name
    (top / "model" / INDEX).write_text(json.dumps(index | {"weight_map": names}))
    save_random(raw, config, np.random.default_rng(0), top / "whole", Form("float32"))
    (top / "whole" / "tokenizer.json").write_text(json.dumps(tokenizer))
    words = "".join(f"Line {n} tells of the number {n * n}.\n\n" for n in range(300))
    (top / "text.txt").write_text(words)
    (top / "bad.json").write_text(json.dumps([{"role": said, "content": said}]))
    trace = {f"model.layers.{n}": np.ones((6, 64), np.float32) * n for n in range(3)}
    trace |= {"model.embed_tokens": np.ones((6, 64), np.float32), said: np.ones(3, np.float32)}
    line = said.replace("\n", "")
    trace |= {f"model.layers.1.{line}": np.ones((6, 64), np.float32)}
    pieces = {token: said for token in TOKENS.split(",")}
    facts = {"tokens": list(map(int, TOKENS.split(","))), "pieces": pieces, said: said}
    save(trace, top / "one.safetensors", **facts)
    trace |= {f"{said}2": trace[said] * 2, "model.layers.2": trace["model.layers.1"]}
    save(trace, top / "two.safetensors", **facts)
    return top


# Each command of the parser with arguments that show names, of which the last ones may go on in
# the next line. @ is the folder, HOSTILE a name.
CASES = """
generate: --model @/whole --tokens 261,5 --max-tokens 6 --ignore-eos --temp 2
     --logprobs 2 --show-drafts
generate: --model @/whole --tokens 261,5 --max-tokens 30 --ignore-eos --temp 2 --logprobs 2 --json
generate: --model @/none --tokens 4
generate: --model @/model --tokens 4
generate: --prompt HOSTILE --stop HOSTILE
generate: --model @/whole --chat-messages @/bad.json
generate: --chat-messages @/text.txt
chat: --model @/none
chat: --model @/model --tools @/bad.json
chat: --model @/whole --max-tokens 3
walk: --model @/whole --tokens 261,5,262 --layer 2
walk: --model @/whole --tokens 262,261
walk: --model @/whole --tokens 262,261 --json
walk: --model @/model --tokens 4
trace: --model @/whole --tokens 261,5 --out @/made.safetensors
trace: --model @/whole --tokens 261 --out @/no/HOSTILE
trace: --model @/model --tokens 4 --out @/x
view: @/one.safetensors --model @/whole --out @/page.html
view: @/text.txt --out @/x
inspect: @/model
inspect: @/model --shards
inspect: @/model --first 9
inspect: @/model --layer 3
inspect: @/none
inspect: @/model --json
inspect: @/model --shards --json
inspect: @/model --first 9 --json
inspect: @/whole --shards
lab mtp: --model @/none
lab mtp: --text @/none
lab mtp: --model @/whole --text @/text.txt --tokens 64 --prompts 1 --prompt-tokens 8
     --max-tokens 3 --out @/mtp.svg
lab router: --model @/none
lab router: --text @/none
lab router: --model @/whole --text @/text.txt --tokens 64 --out @/router.svg
lab router: --model @/whole --text @/text.txt --tokens 64 --layer 2
lab bits: --model @/none
lab bits: --text @/none
lab bits: --out HOSTILE
bench: --only tiny --quick --peer HOSTILE --out @/bench
bench: --only tiny --quick --peer HOSTILE --json
bench: --only HOSTILE
bench: --model @/none
cost: --config @/whole
cost: --config @/whole --json
cost: --config @/whole --hardware h200 --out @/cost.svg
cost: --config @/none
cost: --hardware HOSTILE
record: --model @/whole --tokens 261,5 --layers 0-1 --out @/recorded
record: --model @/model --tokens 5 --out @/x
record: --model @/whole --tokens 5 --names HOSTILE --out @/x
record: --model @/whole --tokens 5,6 --input @/one.safetensors --layers 1 --out @/x
check-layer: @/whole --all --against @/one.safetensors
check-layer: @/whole --all --against @/one.safetensors --json
check-layer: @/model --layer 1 --against @/two.safetensors
check-layer: @/whole --layer 1 --against @/text.txt
check-layer: @/none --all --against @/x
diff: @/one.safetensors @/two.safetensors
diff: @/one.safetensors @/two.safetensors --json
diff: @/one.safetensors @/two.safetensors --model @/whole
diff: @/two.safetensors @/one.safetensors --names HOSTILE
diff: @/one.safetensors @/none
exercise: 1 --out @/exercise
exercise: 1 --out @/text.txt
exercise: --out HOSTILE
footgun list: HOSTILE
footgun show: HOSTILE
footgun run: HOSTILE
footgun run: window-off-by-one --model @/none
make-tiny: @/whole --out @/again
make-tiny: @/none --out @/x
make-tiny: tiny --only HOSTILE --out @/x
make-tiny: tiny --out @/text.txt
train: --config @/whole --text @/text.txt --out @/run --steps 1 --length 8 --sequences 1
train: --text @/none --out @/x
train: --text @/text.txt --out @/text.txt
train: --text @/text.txt --out @/model
train: --resume --out @/whole
train: --config HOSTILE --out @/x
"""


def cases() -> Iterator[tuple[str, list[str]]]:
    """Each case: its command, and its arguments."""
    for line in CASES.replace("\n     ", " ").strip().splitlines():
        command, _, arguments = line.partition(": ")
        yield command, arguments.split()


def leaves(parser: argparse.ArgumentParser, *before: str) -> Iterator[tuple[str, Any]]:
    """Every command of the parser that has none within, with its own parser."""
    inner = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    if not inner:
        yield " ".join(before), parser
    for action in inner:
        for name, each in action.choices.items():
            yield from leaves(each, *before, name)


LEAVES = dict(leaves(_parser()))


def without_own(text: str) -> str:
    """What a terminal got, without minstep's own sequences."""
    for own in (DIM, PLAIN, ERASE):
        text = text.replace(own, "")
    return text


def check(text: str) -> None:
    """Nothing but printable characters and ends of lines, and no line that a name has begun."""
    bad = {c for c in text if not c.isprintable() and c != "\n"}
    assert not bad, (bad, text[-2000:])
    assert not any(line.startswith("FORGED") for line in text.splitlines()), text[-2000:]


@pytest.fixture
def quick_case(monkeypatch: pytest.MonkeyPatch) -> None:
    """A case of bench that takes no time."""
    monkeypatch.setitem(minstep.cli.bench.CASES, "tiny", lambda _: Found([], ["nothing"]))


def test_every_command_is_covered() -> None:
    assert {command for command, _ in cases()} == {*LEAVES}


@pytest.mark.skipif(sys.platform != "linux", reason="needs names of any bytes")
@pytest.mark.parametrize("command", sorted(LEAVES))
def test_names_from_files_are_printed_escaped(
    command: str, place: Path, run: Run, quick_case: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", open("/dev/null"))
    if command == "generate":  # elsewhere a model's text is given as it is
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    was_shown = False
    for words in (arguments for name, arguments in cases() if name == command):
        given = [word.replace("@", str(place)).replace("HOSTILE", HOSTILE) for word in words]
        ran = run(*command.split(), *given)
        text = without_own(ran.out + ran.err)
        check(text)
        was_shown |= "\\x1b[2J" in text
        if "--json" in words and ran.out:
            json.loads(ran.out)
    assert was_shown, "no case shows a name"


@pytest.mark.parametrize("command", sorted(LEAVES))
def test_arguments_are_quoted_escaped_where_they_are_refused(command: str, run: Run) -> None:
    parser, start = LEAVES[command], command.split()
    flags = [a.option_strings[-1] for a in parser._actions if a.option_strings and a.nargs is None]
    wrong = [[flag, HOSTILE] for flag in flags if not flag.startswith("--no-")]
    for words in [[HOSTILE, HOSTILE, HOSTILE], [f"--{HOSTILE}"], [f"--{HOSTILE}=4"], *wrong]:
        ran = run(*start, *words, "--undefined")
        assert ran.code == 2 and ran.out == "" and ran.err.count("\n") == 1
        check(ran.err)


def test_a_terminal_gets_no_control_character_of_a_model(
    place: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    how = ("--model", place / "whole", "--prompt", HOSTILE.replace("\udcff", ""), "--temp", 2)
    ran = run("generate", *how, "--max-tokens", 200, "--ignore-eos", "--seed", 10**40)
    assert ran.code == 0
    text = without_own(ran.out).replace("\t", "")
    turning = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u2028\u2029"
    assert not {c for c in text if (c < " " and c != "\n") or "\x7f" <= c < "\xa0" or c in turning}


def test_json_keeps_letters_and_escapes_what_is_not_printable() -> None:
    letters = 'é字😀 "\\'
    value = {letters: [letters, HOSTILE, "\U000e0041", 1.5, None]}
    text = json_text(value)
    assert text.isprintable() and "字😀" in text and json.loads(text) == value
    assert json_text(value, is_utf8=False).isascii()
    assert json.loads(json_text(value, is_utf8=False)) == value


def test_reports_and_notes_are_escaped_whoever_made_them(
    capsys: pytest.CaptureFixture[str],
) -> None:
    line = HOSTILE.replace("\n", "")
    print_text("first", line)
    note(f"minstep: {line}\nlast")
    for text in capsys.readouterr():
        check(text)
        assert "\\x1b[2J" in text and text.count("\n") == 2


def test_warnings_are_printed_escaped(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def warns(*_: object) -> None:
        import warnings

        warnings.warn(HOSTILE, stacklevel=1)

    monkeypatch.setattr("minstep.cli.learn.exhibit_text", lambda _: warns() or "")
    ran = run("footgun", "show", "window-off-by-one")
    assert "\\x1b[2J" in ran.err
    check(ran.err.replace("\nFORGED", ""))


def test_a_page_holds_no_markup_from_a_recording(place: Path, run: Run, tmp_path: Path) -> None:
    bad = "</script><script>alert(1)</script><!--"
    tokens = [1, 2, 3]
    trace = {"model.layers.0": np.ones((3, 64), np.float32), bad: np.ones(2, np.float32)}
    file = save(trace, tmp_path / "t", tokens=tokens, pieces={n: bad for n in tokens})
    assert run("view", file, "--out", tmp_path / "page.html").code == 0
    page = (tmp_path / "page.html").read_text()
    assert page.count("<script") == page.count("</script>") and "alert(1)</script>" not in page
    assert "<!--" not in page


def test_only_one_module_prints() -> None:
    allowed = {
        PACKAGE / "cli" / "terminal.py",
        PACKAGE / "bench" / "torch_peer.py",
    }  # the peer answers a pipe
    for path in sorted({*PACKAGE.rglob("*.py")} - allowed):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("print", "sys.stdout.write", "sys.stderr.write"), path
