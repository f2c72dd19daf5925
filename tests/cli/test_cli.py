"""The command line: what each command prints and writes, and how it refuses in one line."""

import argparse
import errno
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

import minstep.cli.bench
import minstep.cli.generate
import minstep.cli.parity
import minstep.store.random_checkpoint
from minstep import find_config, load_config
from minstep.bench.timing import Found
from minstep.cli.main import GROUPS, _parser
from minstep.cli.terminal import DIM, PLAIN
from minstep.text.prompt import render
from minstep.text.tokenizer import load_tokenizer
from minstep.weights import tensor_shapes
from tests.conftest import GOLDEN, Refused, Run

MODEL = GOLDEN / "odd" / "fp32"
META = json.loads((GOLDEN / "odd" / "meta.json").read_text())
PROMPT = ",".join(map(str, META["prompt"]))
NOTHING: list[str] = []


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def tiny(tmp_path: Path, run: Run) -> Path:
    """A fresh tiny checkpoint with its tokenizer."""
    assert run("make-tiny", "tiny", "--out", tmp_path / "tiny").code == 0
    return tmp_path / "tiny"


def changed(folder: Path, **keys: Any) -> Path:
    """Change keys of the config.json in `folder`."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))
    return folder


# What is right


def test_generate_prints_one_json_object(run: Run) -> None:
    ran = run("generate", "--model", MODEL, "--tokens", PROMPT, "--max-tokens", 24, "--json")
    assert (ran.code, ran.err) == (0, "")
    result = json.loads(ran.out)
    assert list(result) == ["prompt_tokens", "tokens", "text", "stats", "mtp_trace"]
    assert result["prompt_tokens"] == META["prompt"]
    assert result["tokens"] == META["greedy"][: len(result["tokens"])]
    assert result["text"] == "" and result["stats"]["stop"] in ("eos", "length")


def test_generate_without_a_tokenizer_prints_token_ids(run: Run) -> None:
    ran = run("generate", "--model", MODEL, "--tokens", PROMPT, "--max-tokens", 5, "--ignore-eos")
    assert ran.code == 0
    assert ran.out == ",".join(map(str, META["greedy"][:5])) + "\n"
    assert ran.err.startswith("prompt ") and "stop: length" in ran.err


def test_generate_without_a_model_uses_the_one_that_is_shipped(run: Run) -> None:
    arguments = ("generate", "--prompt", "The with statement", "--max-tokens", 30)
    plain, again, told = run(*arguments), run(*arguments), run(*arguments, "--json")
    assert plain.code == 0 and plain.err.startswith(minstep.cli.generate.SHIPPED + "\n")
    assert plain.out == again.out
    result = json.loads(told.out)
    assert result["text"] + "\n" == plain.out
    words = result["text"].split()
    assert len({*words}) > 8 and any(word in ("is", "the", "a", "of") for word in words)
    assert run(*arguments, "--temp", 1, "--seed", 4).out != plain.out


def test_generation_stops_at_an_end_token_unless_told_otherwise(single: Path, run: Run) -> None:
    changed(single, eos_token_id=META["greedy"][2])
    arguments = ("generate", "--model", single, "--tokens", PROMPT, "--max-tokens", 6, "--json")
    stopped, went_on = run(*arguments), run(*arguments, "--ignore-eos")
    assert json.loads(stopped.out)["tokens"] == META["greedy"][:3]
    assert json.loads(stopped.out)["stats"]["stop"] == "eos"
    assert json.loads(went_on.out)["tokens"] == META["greedy"][:6]
    assert json.loads(went_on.out)["stats"]["stop"] == "length"


def test_generation_stops_where_the_context_ends(single: Path, run: Run) -> None:
    changed(single, max_position_embeddings=16, max_seq_len=16)
    arguments = ("generate", "--model", single, "--json", "--ignore-eos", "--tokens")
    result = json.loads(run(*arguments, ",".join("4" * 14)).out)
    assert len(result["tokens"]) == 2 and result["stats"]["stop"] == "context"
    full = json.loads(run(*arguments, ",".join("4" * 16)).out)
    assert full["tokens"] == [] and full["stats"]["stop"] == "context"


def test_nothing_is_generated_where_nothing_is_wanted(run: Run) -> None:
    ran = run("generate", "--model", MODEL, "--tokens", "4", "--max-tokens", 0)
    assert (ran.code, ran.out) == (0, "\n")


@pytest.mark.parametrize("flags", [(), ("--num-draft-tokens", 1), ("--no-mtp",)])
@pytest.mark.parametrize("name", ["tiny", "odd", "drafts"])
def test_drafts_are_told_and_change_no_token(name: str, flags: tuple[Any, ...], run: Run) -> None:
    meta = json.loads((GOLDEN / name / "meta.json").read_text())
    prompt, count = ",".join(map(str, meta["prompt"])), len(meta["greedy"])
    arguments = ("--model", GOLDEN / name / "bf16", "--tokens", prompt, "--max-tokens", count)
    result = json.loads(run("generate", *arguments, "--ignore-eos", "--json", *flags).out)
    assert result["tokens"] == meta["greedy"]
    depths = len(result["mtp_trace"][0][1]) if result["mtp_trace"] else 0
    assert depths == (0 if "--no-mtp" in flags else 1 if flags or name == "odd" else 3)
    assert len(result["stats"]["acceptance"]) == depths
    if not flags:
        assert result["mtp_trace"] == meta["mtp_trace"]


def test_drafts_are_shown_pass_by_pass(run: Run) -> None:
    meta = json.loads((GOLDEN / "tiny" / "meta.json").read_text())
    prompt = ",".join(map(str, meta["prompt"]))
    arguments = ("--model", GOLDEN / "tiny" / "bf16", "--tokens", prompt, "--max-tokens", 24)
    ran = run("generate", *arguments, "--ignore-eos", "--show-drafts")
    lines = ran.out.splitlines()
    assert lines[0] == ",".join(map(str, meta["greedy"]))
    assert lines[1] == minstep.cli.generate.DRAFTS
    new = [str(n) for n in meta["greedy"]]
    assert lines[2].split() == ["0", "no", "drafts", "->", new[0]]
    assert lines[5].split() == ["3", "[78]", "156", "286", "->", *new[3:5]]
    assert f"15  [113] [163] [39] -> {' '.join(new[15:19])}\n" in ran.out
    assert "drafts kept" in ran.err and "tokens per forward pass" in ran.err


def test_tokens_are_shown_as_text_where_there_is_a_tokenizer(run: Run) -> None:
    arguments = ("generate", "--prompt", "The with statement", "--max-tokens", 12)
    ran = run(*arguments, "--ignore-eos", "--show-drafts", "--logprobs", 2)
    result = json.loads(run(*arguments, "--ignore-eos", "--json", "--logprobs", 2).out)
    tokenizer = load_tokenizer(find_config("trained"))
    assert tokenizer
    texts = [tokenizer.decode([token], skip_special_tokens=False) for token in result["tokens"]]
    _, drafts = ran.out.split(f"{minstep.cli.generate.DRAFTS}\n")
    assert drafts.splitlines()[0] == f"     0  no drafts -> {texts[0]!r}"
    given = [line.split(" -> ")[1] for line in drafts.splitlines()]
    assert " ".join(given) == " ".join(map(repr, texts))
    first = result["logprobs"][0]
    chosen = f"{first['token']} {texts[0]!r} {first['logprob']:.4f}"
    assert f"\ntoken {chosen} of {chosen}, " in ran.out


def test_on_a_terminal_the_prompt_stands_dimmed_before_its_continuation(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("generate", "--prompt", "Once", "--max-tokens", 3)
    piped = run(*arguments).out
    monkeypatch.setattr("minstep.cli.terminal._can_dim", lambda stream: True)
    assert run(*arguments).out == f"{DIM}Once{PLAIN}{piped}"
    assert json.loads(run(*arguments, "--json").out)["text"] + "\n" == piped
    tokens = ",".join(map(str, json.loads(run(*arguments, "--json").out)["prompt_tokens"]))
    assert run("generate", "--tokens", tokens, "--max-tokens", 3).out == piped


def test_generation_stops_before_a_stop_text(run: Run) -> None:
    prompt = "The with statement"
    arguments = ("generate", "--prompt", prompt, "--max-tokens", 60, "--json", "--ignore-eos")
    whole = json.loads(run(*arguments).out)
    stop = re.findall("[a-z]{3}", whole["text"])[1]
    result = json.loads(run(*arguments, "--stop", "nowhere to be found", "--stop", stop).out)
    assert result["text"] == whole["text"][: whole["text"].index(stop)]
    assert result["stats"]["stop"] == "stop"
    assert result["tokens"] == whole["tokens"][: len(result["tokens"])]


def test_log_probabilities_are_given_for_each_token(run: Run) -> None:
    arguments = (
        "generate",
        "--model",
        MODEL,
        "--tokens",
        PROMPT,
        "--max-tokens",
        5,
        "--logprobs",
        3,
    )
    result = json.loads(run(*arguments, "--json", "--ignore-eos").out)
    assert [entry["token"] for entry in result["logprobs"]] == META["greedy"][:5]
    for entry in result["logprobs"]:
        assert [top["token"] for top in entry["top"]][0] == entry["token"]
        logs = [top["logprob"] for top in entry["top"]]
        assert (
            len(logs) == 3
            and logs == sorted(logs, reverse=True)
            and logs[0] == entry["logprob"] < 0
        )
    assert run(*arguments, "--ignore-eos").out.count("\ntoken ") == 5


def test_each_sampling_flag_changes_what_is_drawn(run: Run) -> None:
    arguments = ("generate", "--prompt", "Once", "--max-tokens", 40, "--ignore-eos", "--temp", 1.5)
    drawn = {
        flags: tuple(json.loads(run(*arguments, "--json", *flags).out)["tokens"])
        for flags in [
            (),
            ("--top-p", 0.2),
            ("--top-k", 3),
            ("--min-p", 0.7),
            ("--repetition-penalty", 1.8),
            ("--seed", 1),
        ]
    }
    assert len(set(drawn.values())) == len(drawn)
    greedy = json.loads(run(*arguments[:-1], 0, "--json").out)["tokens"]
    for flags in (("--top-k", 1), ("--top-p", 1e-9), ("--min-p", 1)):
        assert json.loads(run(*arguments, "--json", *flags).out)["tokens"] == greedy


TOOL = {"type": "function", "function": {"name": "add", "parameters": {"properties": {}}}}


def test_a_conversation_is_answered_by_a_parsed_message(run: Run, tmp_path: Path) -> None:
    conversation, tools = tmp_path / "messages.json", tmp_path / "tools.json"
    conversation.write_text(json.dumps([{"role": "user", "content": "Grüße"}]), encoding="utf-8")
    tools.write_text(json.dumps([TOOL]))
    arguments = ("generate", "--chat-messages", conversation, "--max-tokens", 30, "--json")
    plain = json.loads(run(*arguments).out)
    with_tools = json.loads(run(*arguments, "--tools", tools).out)
    assert plain["message"]["role"] == "assistant"
    assert plain["message"]["reasoning_content"].strip("\n") == plain["text"].strip("\n")
    tokenizer = load_tokenizer(find_config("trained"))
    assert tokenizer
    text = tokenizer.decode(plain["prompt_tokens"], skip_special_tokens=False)
    assert text == render([{"role": "user", "content": "Grüße"}])
    assert len(with_tools["prompt_tokens"]) > len(plain["prompt_tokens"]) + 300


@pytest.mark.parametrize("name", ["tiny", "odd", "no_extras", "drafts"])
def test_a_trace_holds_every_golden_name_in_the_order_of_computation(
    name: str, run: Run, tmp_path: Path
) -> None:
    prompt = json.loads((GOLDEN / name / "meta.json").read_text())["prompt"]
    out = tmp_path / "trace.safetensors"
    tokens = ",".join(map(str, prompt))
    ran = run("trace", "--model", GOLDEN / name / "bf16", "--tokens", tokens, "--out", out)
    assert (ran.code, ran.out) == (0, "") and ran.err.startswith(f"wrote {out} (")
    written = load_file(out)
    assert set(load_file(GOLDEN / name / "golden_f64.safetensors")) <= set(written)
    with safe_open(out, "numpy") as opened:
        metadata = opened.metadata()
    assert json.loads(metadata["tokens"]) == prompt
    order = json.loads(metadata["order"])
    assert sorted(order) == sorted(written) and "embed" in order[0]
    assert names(tmp_path) == ["trace.safetensors"]


def test_make_tiny_takes_a_name_a_folder_or_a_file(tmp_path: Path, run: Run) -> None:
    config = find_config("odd")
    for n, source in enumerate(("odd", config, config / "config.json")):
        assert run("make-tiny", source, "--out", tmp_path / str(n)).code == 0
    first = {path.name: path.read_bytes() for path in (tmp_path / "0").iterdir()}
    for other in ("1", "2"):
        assert {path.name: path.read_bytes() for path in (tmp_path / other).iterdir()} == first
    ran = run("generate", "--model", tmp_path / "0", "--tokens", "4", "--max-tokens", 1)
    assert ran.code == 0


def commands(*before: str) -> Iterator[tuple[str, ...]]:
    """Every command of the parser, those of commands too."""
    parser = _parser()
    for word in before:
        parser = inner(parser)[word]
    for word in inner(parser):
        yield (*before, word)
        yield from commands(*before, word)


def inner(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The commands that a parser has itself, each with its own."""
    actions = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    return dict(actions[0].choices) if actions else {}


@pytest.mark.parametrize("command", list(commands()), ids=" ".join)
def test_the_help_of_each_command_has_an_example_that_parses(
    command: tuple[str, ...], run: Run
) -> None:
    ran = run(*command, "--help")
    text = " ".join(ran.out.split())
    _, given, example = text.partition("example: minstep ")
    assert ran.code == 0 and given and f"{example} ".startswith(f"{' '.join(command)} ")
    assert _parser().parse_args(shlex.split(example)).run


@pytest.mark.parametrize("command", list(commands()), ids=" ".join)
def test_a_model_may_be_a_shipped_name_wherever_one_is_taken(command: tuple[str, ...]) -> None:
    parser = _parser()
    for word in command:
        parser = inner(parser)[word]
    kinds = [action.type for action in parser._actions if action.dest == "model"]
    if command != ("inspect",):  # takes configurations too, and says which it was given
        assert all(callable(kind) and kind("trained") == find_config("trained") for kind in kinds)


def test_a_shipped_name_opens_the_model_unless_a_file_has_that_name(
    run: Run, refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("--prompt", "Once", "--max-tokens", 3)
    monkeypatch.chdir(tmp_path)
    named, default = run("generate", "--model", "trained", *arguments), run("generate", *arguments)
    assert (named.code, named.out) == (0, default.out)
    assert minstep.cli.generate.SHIPPED not in named.err
    recording = ("--model", "trained", "--prompt", "Once", "--out", "r.safetensors")
    assert run("record", *recording, "--layers", 0).code == 0
    check = ("check-layer", "trained", "--layer", 0, "--against", "r.safetensors")
    assert run(*check).code == 0
    assert run("diff", "r.safetensors", "r.safetensors", "--model", "trained").code == 0
    (tmp_path / "trained").mkdir()
    refused("generate", "--model", "trained", *arguments, naming=("trained/config.json",))


def test_the_help_lists_every_command_once_in_its_group(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    told, alone = run("--help"), run()
    assert alone == told and (told.code, told.err) == (0, "")
    listed = re.findall(r"^  ([a-z-]{2,}) +\S", told.out.partition("options:")[0], re.M)
    assert sorted(listed) == sorted(inner(_parser()))
    assert listed == " ".join(GROUPS.values()).split()
    assert all(f"\n{group}:\n" in told.out for group in GROUPS)
    assert max(map(len, told.out.splitlines())) <= 80
    assert "start with: minstep walk" in told.out


def test_the_version_is_the_package_s(run: Run) -> None:
    assert run("--version") == (0, f"minstep {minstep.__version__}\n", "")


# What is wrong


def test_a_configuration_without_weights_says_how_to_make_some(refused: Refused) -> None:
    naming = ("minstep: tiny: ", "no weights", "minstep make-tiny tiny --out DIR")
    refused("generate", "--model", "tiny", "--tokens", 4, naming=naming)


@pytest.mark.parametrize("name", ["traned", "x" * 5000, "a\0b"])
def test_a_model_that_is_not_there_is_refused(name: str, refused: Refused) -> None:
    refused("generate", "--model", name, "--tokens", 4, naming=("",))


@pytest.mark.parametrize("command", ["generate", "trace"])
@pytest.mark.parametrize(
    ("tokens", "naming"),
    [
        ("", ("empty",)),
        (" ", ("empty",)),
        ("4,999999", ("999999", "position 1", "0 to ")),
        ("4,-3", ("-3", "position 1", "0 to ")),
        ("-3", ("-3",)),
        ("9" * 400, ("out of range",)),
        ("9" * 5000, ("--tokens", "not a list of token ids")),
        ("4,x", ("--tokens", "'4,x'", "5,17,9")),
        ("4,,5", ("--tokens", "'4,,5'")),
        ("4.0", ("--tokens", "'4.0'")),
        ("4\nx", ("--tokens",)),
        (",".join("4" * 17), ("17 tokens", "max_position_embeddings", "16")),
    ],
)
def test_wrong_tokens_are_refused(
    command: str, tokens: str, naming: tuple[str, ...], single: Path, refused: Refused
) -> None:
    changed(single, max_position_embeddings=16, max_seq_len=16)
    out = ("--out", single.parent / "out") if command == "trace" else ()
    refused(command, "--model", single, "--tokens", tokens, *out, naming=naming)
    assert names(single.parent) == ["single"]


@pytest.mark.parametrize(
    ("prompt", "naming"),
    [
        ("", ("prompt is empty",)),
        ("\udcff", ("prompt", "cannot be encoded")),
        ("x" * 4097, ("4097 tokens", "max_position_embeddings' 4096")),
    ],
)
def test_a_wrong_prompt_is_refused(
    prompt: str, naming: tuple[str, ...], tiny: Path, refused: Refused
) -> None:
    refused("generate", "--model", tiny, "--prompt", prompt, naming=naming)
    if len(prompt) < 4097:  # the shipped tokenizer has longer tokens
        refused("generate", "--prompt", prompt, naming=naming)


def test_a_prompt_as_text_needs_a_tokenizer(refused: Refused) -> None:
    naming = (str(MODEL / "tokenizer.json"), "missing", "--tokens")
    refused("generate", "--model", MODEL, "--prompt", "Once", naming=naming)


@pytest.mark.parametrize(
    ("content", "naming"),
    [
        ("{}", ("JSON array",)),
        ("[", ("not valid JSON",)),
        ("[]", ("empty",)),
        ('["hello"]', ("messages[0]", "object")),
        ('[{"role": "wizard", "content": "a"}]', ("messages[0]", "wizard", "user")),
        ('[{"role": "user", "content": 3}]', ("messages[0].content",)),
    ],
)
def test_a_wrong_conversation_is_refused(
    content: str, naming: tuple[str, ...], tmp_path: Path, refused: Refused
) -> None:
    file = tmp_path / "messages.json"
    file.write_text(content)
    refused("generate", "--chat-messages", file, naming=(str(file), *naming))


def test_missing_conversations_and_tools_are_refused(tmp_path: Path, refused: Refused) -> None:
    file, tools = tmp_path / "messages.json", tmp_path / "tools.json"
    refused("generate", "--chat-messages", file, naming=(str(file), "cannot be read"))
    file.write_text('[{"role": "user", "content": "a"}]')
    naming = (str(tools), "cannot be read")
    refused("generate", "--chat-messages", file, "--tools", tools, naming=naming)
    tools.write_text("[3]")
    refused("generate", "--chat-messages", file, "--tools", tools, naming=(f"{tools}[0]", "object"))
    refused("generate", "--prompt", "a", "--tools", tools, naming=("--tools", "--chat-messages"))
    naming = (str(MODEL / "tokenizer.json"), "--chat-messages")
    refused("generate", "--model", MODEL, "--chat-messages", file, naming=naming)


def test_more_drafts_than_mtp_layers_are_refused(refused: Refused) -> None:
    arguments = ("generate", "--model", MODEL, "--tokens", "4", "--num-draft-tokens")
    refused(*arguments, 2, naming=("--num-draft-tokens 2", "1 MTP layers"))
    naming = (str(MODEL / "tokenizer.json"), "--stop")
    refused(*arguments, 1, "--stop", "a", naming=naming)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"{}", b"[]", b"\xff\xfe", b'{"model": {"type": "BPE"}}', b"\0" * 9]
)
def test_a_malformed_tokenizer_is_refused(content: bytes, tiny: Path, refused: Refused) -> None:
    (tiny / "tokenizer.json").write_bytes(content)
    naming = (str(tiny / "tokenizer.json"), "is not a tokenizer")
    refused("generate", "--model", tiny, "--prompt", "Once", naming=naming)


def test_a_tokenizer_of_another_model_is_refused_by_its_token(tiny: Path, refused: Refused) -> None:
    shutil.copytree(GOLDEN / "odd" / "fp32", tiny, dirs_exist_ok=True)
    content = json.loads((tiny / "tokenizer.json").read_text())
    content["model"]["vocab"]["O"] = 5000
    (tiny / "tokenizer.json").write_text(json.dumps(content))
    naming = ("token id 5000", "position 0", "expected 0 to")
    refused("generate", "--model", tiny, "--prompt", "Once", naming=naming)


@pytest.mark.parametrize(
    ("arguments", "naming"),
    [
        (("dance",), ("dance", "generate", "walk")),
        (("genrate",), ("minstep: genrate: no such command, did you mean generate?",)),
        (("lab", "ruter"), ("minstep lab: ruter: ", "did you mean router?", "minstep lab --help")),
        (("--chart",), ("--chart", "(see minstep --help)")),
        (
            ("generate", "--tokens", "4", "--max_tokens=5"),
            ("--max_tokens=5, did you mean --max-tokens?", "minstep generate --help"),
        ),
        (("generate",), ("--prompt", "--tokens")),
        (("generate", "--prompt", "a", "--tokens", "4"), ("--tokens", "--prompt")),
        (("generate", "--tokens", "4", "--temp", "nan"), ("--temp", "nan")),
        (("generate", "--tokens", "4", "--temp", "-1"), ("--temp", "-1")),
        (("generate", "--tokens", "4", "--max-tokens", "-1"), ("--max-tokens", "-1")),
        (("generate", "--tokens", "4", "--max-tokens", "1.5"), ("--max-tokens", "1.5")),
        (("generate", "--tokens", "4", "--prefill-chunk", "0"), ("--prefill-chunk", "0")),
        (("generate", "--tokens", "4", "--seed", "x"), ("--seed", "x")),
        (("generate", "--tokens", "4", "--top-p", "0"), ("--top-p", "0", "above 0")),
        (("generate", "--tokens", "4", "--top-p", "1.1"), ("--top-p", "1.1", "at most 1")),
        (("generate", "--tokens", "4", "--min-p", "-0.1"), ("--min-p", "-0.1")),
        (("generate", "--tokens", "4", "--top-k", "1.5"), ("--top-k", "1.5")),
        (("generate", "--tokens", "4", "--repetition-penalty", "0"), ("--repetition-penalty",)),
        (("generate", "--tokens", "4", "--temp", "inf"), ("--temp", "inf")),
        (("generate", "--tokens", "4", "--stop", ""), ("--stop", "not empty")),
        (("generate", "--tokens", "4", "--logprobs", "-1"), ("--logprobs", "-1")),
        (("generate", "--tokens", "4", "--chat-messages", "x"), ("--chat-messages", "--tokens")),
        (("generate", "--tokens", "4", "--dtype", "float16"), ("--dtype", "float16", "float64")),
        (("generate", "--tokens", "4", "a\nb"), ("unrecognized", "a b")),
        (("trace", "--tokens", "4"), ("--out",)),
        (("make-tiny", "tiny"), ("--out",)),
        (("make-tiny", "tiny", "--out", "x", "--shards", "0"), ("--shards", "0")),
        (("make-tiny", "tiny", "--out", "x", "--dtype", "float64"), ("--dtype", "bfloat16")),
        (("inspect",), ("DIR",)),
        (("inspect", ""), ("not empty",)),
        (("trace", "--model", "", "--tokens", "4", "--out", "x"), ("--model", "not empty")),
        (("generate", "--tok", "4"), ("--tokens",)),
        (("generate", "--tokens", "1_0"), ("--tokens", "1_0")),
        (("generate", "--tokens", "٣"), ("--tokens", "٣")),
        (("generate", "--tokens", "4", "--seed", "9" * 5000), ("--seed", "whole number")),
        (("generate", "--tokens", "4", "--repetition-penalty", "1e-320"), ("from 0.01",)),
    ],
)
def test_wrong_use_is_refused_in_one_line(
    arguments: tuple[str, ...], naming: tuple[str, ...], refused: Refused
) -> None:
    assert "--help" in refused(*arguments, naming=naming)


@pytest.mark.parametrize("place", ["no/parent", "file/below", "folder"])
def test_a_trace_that_cannot_be_written_is_refused_before_the_work(
    place: str, tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    monkeypatch.setattr(minstep.cli.parity, "record", lambda *_: pytest.fail("the work was done"))
    out = tmp_path / place
    naming = (str(out), "cannot be written")
    refused("trace", "--model", MODEL, "--tokens", "4", "--out", out, naming=naming)
    assert names(tmp_path) == ["file", "folder"] and names(tmp_path / "folder") == NOTHING


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("command", ["trace", "record"])
def test_no_output_replaces_a_file_of_the_checkpoint_through_links_or_other_names(
    command: str, tmp_path: Path, refused: Refused
) -> None:
    blobs, snap = tmp_path / "blobs", tmp_path / "snap"
    shutil.copytree(GOLDEN / "tiny" / "bf16", blobs)
    snap.mkdir()
    (snap / "config.json").write_text((blobs / "config.json").read_text())
    index = json.loads((blobs / "model.safetensors.index.json").read_text())
    other = {
        file: f"part{n}.bin" for n, file in enumerate(sorted(set(index["weight_map"].values())))
    }
    index["weight_map"] = {name: other[file] for name, file in index["weight_map"].items()}
    (snap / "model.safetensors.index.json").write_text(json.dumps(index))
    for file, name in other.items():
        (snap / name).symlink_to(blobs / file)
    before = contents(blobs)
    shard = next(iter(other))
    (tmp_path / "link").symlink_to(blobs / shard)
    for out in (snap / other[shard], blobs / shard, tmp_path / "link", snap / "tokenizer.json"):
        how = (command, "--model", snap, "--tokens", "5", "--out", out)
        refused(*how, naming=(str(out), "belongs to the checkpoint"))
    assert contents(blobs) == before


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_device_is_never_replaced_by_a_trace(tmp_path: Path, refused: Refused) -> None:
    out = tmp_path / "pipe"
    os.mkfifo(out)
    refused("trace", "--model", MODEL, "--tokens", "4", "--out", out, naming=(str(out), "device"))
    assert out.is_fifo() and names(tmp_path) == ["pipe"]


@pytest.mark.parametrize("place", ["no/parent", "file/below", "file"])
def test_a_checkpoint_that_cannot_be_written_is_refused(
    place: str, tmp_path: Path, refused: Refused
) -> None:
    (tmp_path / "file").write_text("mine")
    out = tmp_path / place
    refused("make-tiny", "tiny", "--out", out, naming=(str(out), "cannot be written"))
    assert names(tmp_path) == ["file"] and (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("name", ["notes.txt", ".hidden", "model.safetensors/"])
def test_a_folder_with_foreign_files_is_refused_and_left_alone(
    name: str, tiny: Path, refused: Refused
) -> None:
    (tiny / "model.safetensors").unlink()
    if name.endswith("/"):
        (tiny / name).mkdir()
    else:
        (tiny / name).write_text("mine")
    before = names(tiny)
    refused("make-tiny", "odd", "--out", tiny, naming=(str(tiny), name.rstrip("/"), "empty"))
    assert names(tiny) == before and names(tiny.parent) == ["tiny"]


def test_a_checkpoint_of_another_maker_is_never_replaced(
    single: Path, tmp_path: Path, refused: Refused
) -> None:
    before = {path.name: path.read_bytes() for path in single.iterdir()}
    naming = (str(single), "model.safetensors", "did not write")
    refused("make-tiny", "tiny", "--out", single, naming=naming)
    out = single / "model.safetensors"
    arguments = ("trace", "--model", single, "--tokens", "4", "--out")
    refused(*arguments, out, naming=(str(out), "belongs to the checkpoint"))
    (tmp_path / "link").symlink_to(out)
    refused(*arguments, tmp_path / "link", naming=("link", "belongs to the checkpoint"))
    assert {path.name: path.read_bytes() for path in single.iterdir()} == before


def test_a_config_alone_is_never_replaced(tmp_path: Path, refused: Refused) -> None:
    shutil.copy(find_config("tiny") / "config.json", tmp_path)
    refused("make-tiny", tmp_path, "--out", tmp_path, naming=("is an input",))
    assert names(tmp_path) == ["config.json"]


def test_an_output_that_is_a_link_is_followed(tmp_path: Path, run: Run, refused: Refused) -> None:
    kept, link, loop = tmp_path / "kept", tmp_path / "link", tmp_path / "loop"
    kept.write_text("old")
    link.symlink_to(kept)
    loop.symlink_to(loop)
    assert run("trace", "--model", MODEL, "--tokens", "4", "--out", link).code == 0
    assert link.is_symlink() and "lm_head" in load_file(kept)
    naming = (str(loop), "cannot be written")
    refused("trace", "--model", MODEL, "--tokens", "4", "--out", loop, naming=naming)
    (tmp_path / "folder").mkdir()
    (tmp_path / "to folder").symlink_to(tmp_path / "folder")
    assert run("make-tiny", "odd", "--out", tmp_path / "to folder").code == 0
    assert (tmp_path / "to folder").is_symlink() and names(tmp_path / "folder")


def test_more_shards_than_tensors_are_refused(tmp_path: Path, refused: Refused) -> None:
    count = len(tensor_shapes(load_config(find_config("tiny"))))
    naming = ("--shards 9999", f"expected 1 to {count}")
    refused("make-tiny", "tiny", "--out", tmp_path / "out", "--shards", 9999, naming=naming)
    assert names(tmp_path) == NOTHING


def test_an_unknown_configuration_is_refused(tmp_path: Path, refused: Refused) -> None:
    naming = ("huge", "tiny", "step-3.5-flash")
    refused("make-tiny", "huge", "--out", tmp_path / "out", naming=naming)
    assert names(tmp_path) == NOTHING


def test_what_no_disk_can_hold_is_refused_before_the_work(tmp_path: Path, refused: Refused) -> None:
    shutil.copy(find_config("tiny") / "config.json", tmp_path)
    changed(tmp_path, hidden_size=2**31 - 1, vocab_size=2**31 - 1)
    out = tmp_path / "out"
    refused("make-tiny", tmp_path, "--out", out, naming=(str(out), "bytes", "free"))
    assert names(tmp_path) == ["config.json"]


FILE_OUT = {  # commands that write a file, each with inputs that are files of its own
    "trace": "--model MODEL/ --tokens 4 --out OUT",
    "record": "--model MODEL/ --tokens 4 --layers 1 --input RECORDING --out OUT",
    "view": "RECORDING --model MODEL/ --out OUT",
    "cost": "--config MODEL/config.json --hardware h200 --out OUT",
    "lab mtp": "--model MODEL/ --text TEXT --tokens 64 --prompts 1 --prompt-tokens 8 "
    "--max-tokens 2 --out OUT",
    "lab router": "--model MODEL/ --text TEXT --tokens 64 --out OUT",
}
FOLDER_OUT = {
    "make-tiny": "MODEL/ --out OUT",
    "train": "--config MODEL/config.json --text TEXT --length 8 --sequences 1 --steps 1 --out OUT",
    "bench": "--only tiny --out OUT",
    "exercise": "1 --out OUT",
}
NO_OUT = "lab bits"  # refuses --out


@pytest.fixture
def inputs(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model, a recording and a text."""
    monkeypatch.setitem(minstep.cli.bench.CASES, "tiny", lambda _: Found([], []))
    assert run("make-tiny", "tiny", "--out", tmp_path / "model").code == 0
    model = ("--model", tmp_path / "model", "--tokens", 4, "--out", tmp_path / "recording")
    assert run("trace", *model).code == 0
    words = "".join(f"Line {n} tells of {n * n}.\n\n" for n in range(300))
    (tmp_path / "text.svg").write_text(words)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def filled(arguments: str, inputs: Path, out: Path | str) -> list[str]:
    """The arguments with paths in place of words."""
    places = {"MODEL/": f"{inputs / 'model'}/", "RECORDING": str(inputs / "recording")}
    places |= {"TEXT": str(inputs / "text.svg"), "OUT": str(out)}
    for word, place in places.items():
        arguments = arguments.replace(word, place)
    return shlex.split(arguments)


def test_every_command_with_an_output_is_tried() -> None:
    writing = set()
    for command in commands():
        parser = _parser()
        for word in command:
            parser = inner(parser)[word]
        if any(action.dest == "out" for action in parser._actions):
            writing.add(" ".join(command))
    assert writing == {*FILE_OUT, *FOLDER_OUT, NO_OUT}


@pytest.mark.parametrize("command", sorted(FILE_OUT))
def test_no_output_replaces_an_input_under_any_name(
    command: str, inputs: Path, refused: Refused
) -> None:
    if command.startswith("lab"):  # .svg names a file
        own = [inputs / "text.svg"]
    else:
        own = [inputs / "model" / "config.json", inputs / "model" / "model.safetensors"]
        own += [inputs / "recording"] * ("RECORDING" in FILE_OUT[command])
        own = own[:1] if command == "cost" else own
    before = {path: path.read_bytes() for path in inputs.rglob("*") if path.is_file()}
    for n, file in enumerate(own):
        link, hard, far = (inputs / f"{kind}{n}.svg" for kind in ("link", "hard", "far"))
        link.symlink_to(file)
        far.symlink_to(link)
        hard.hardlink_to(file)
        relative = os.path.relpath(file)
        roundabout = f"./model/../{relative}"
        swapped = file.with_name(file.name.upper())
        for out in (file, link, far, hard, relative, roundabout, *[swapped] * swapped.exists()):
            refused(*command.split(), *filled(FILE_OUT[command], inputs, out), naming=("--out",))
        for each in (link, far, hard):
            each.unlink()
    after = {path: path.read_bytes() for path in inputs.rglob("*") if path.is_file()}
    assert after == before


def test_a_chart_in_a_folder_replaces_no_text_there(inputs: Path, refused: Refused) -> None:
    text = (inputs / "text.svg").rename(inputs / "mtp.svg")
    arguments = FILE_OUT["lab mtp"].replace("TEXT", str(text))
    refused("lab", "mtp", *filled(arguments, inputs, inputs), naming=(str(text), "is an input"))


@pytest.mark.parametrize("command", sorted(FOLDER_OUT))
def test_an_output_folder_that_is_an_input_is_refused(
    command: str, inputs: Path, refused: Refused
) -> None:
    before = contents(inputs / "model")
    out = inputs / "text.svg" if command in ("bench", "exercise") else inputs / "model"
    refused(*command.split(), *filled(FOLDER_OUT[command], inputs, out), naming=(str(out),))
    assert contents(inputs / "model") == before


@pytest.mark.parametrize("command", sorted(FILE_OUT | FOLDER_OUT))
def test_a_name_may_be_as_long_as_the_file_system_allows(
    command: str, inputs: Path, run: Run, refused: Refused
) -> None:
    names = ("n" * 251 + ".svg", "é" * 125 + ".svg")  # 255 and 254 bytes
    for name in names[command in ("bench", "train") :]:  # which take long
        arguments = (FILE_OUT | FOLDER_OUT)[command].replace("--input RECORDING", "")
        assert run(*command.split(), *filled(arguments, inputs, inputs / name)).code == 0
    refused(*command.split(), *filled(arguments, inputs, "n" * 252 + ".svg"), naming=("too long",))
    left = {path.name for path in inputs.iterdir()}
    assert left - {names[0]} == {"model", "recording", "text.svg", names[1]}


@pytest.mark.parametrize("command", list(commands()), ids=" ".join)
def test_numbers_are_plain_digits_and_finite(
    command: tuple[str, ...], refused: Refused, run: Run
) -> None:
    parser = _parser()
    for word in command:
        parser = inner(parser)[word]
    bad_numbers = ("٣", "1_0", "nan", "inf", "-inf", "1e400", "-1", "0x1", "9" * 5000, "", "1\0")
    numbers = ("N", "X", "P", "K", "T", "MS")
    actions = [a for a in parser._actions if a.metavar in numbers and a.option_strings]
    for n, action in enumerate(actions):
        for bad in bad_numbers[n % 3 :: 3]:  # each of them for one of three flags
            refused(*command, action.option_strings[0], bad, naming=(action.option_strings[0],))


def test_a_seed_may_have_a_hundred_digits(run: Run, refused: Refused, tmp_path: Path) -> None:
    arguments = ("generate", "--model", MODEL, "--tokens", 4, "--max-tokens", 1, "--temp", 1)
    for number in (2**63, 2**64 - 1, 10**18, 10**99):
        assert run(*arguments, "--seed", number).code == 0
        assert run("make-tiny", "odd", "--out", tmp_path / "out", "--seed", number).code == 0
    refused(*arguments, "--seed", 10**100, naming=("--seed", "at most 100 digits"))


@pytest.mark.parametrize("flag", ["--prompt", "--tokens"])
def test_a_prompt_from_stdin_is_bounded(
    flag: str, run: Run, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Endless(io.RawIOBase):
        def readable(self) -> bool:
            return True

        def readinto(self, buffer: Any) -> int:
            buffer[:] = b"4" * len(buffer)
            return len(buffer)

    def endless() -> io.TextIOWrapper:
        return io.TextIOWrapper(io.BufferedReader(Endless()), encoding="utf-8")

    for module in ("minstep.cli.arguments", "minstep.cli.terminal"):
        monkeypatch.setattr(f"{module}.LONGEST_TEXT", 10_000)
    monkeypatch.setattr(sys, "stdin", endless())
    refused("generate", flag, "-", naming=(flag, "more than 10,000 characters"))
    monkeypatch.setattr(sys, "stdin", endless())
    ran = run("chat", "--max-tokens", 1)
    assert ran.code == 2 and "a line has more than 10,000 characters" in ran.err
    monkeypatch.setattr(sys, "stdin", io.StringIO("4,5"))
    assert run("generate", flag, "-", "--max-tokens", 1).code == 0


READING = {  # commands that only read
    "generate": "--model MODEL/ --tokens 4 --max-tokens 1",
    "walk": "--model MODEL/ --tokens 4",
    "inspect": "MODEL/",
    "check-layer": "MODEL/ --layer 1 --against RECORDING",
    "diff": "RECORDING RECORDING --model MODEL/",
    "lab bits": "--model MODEL/ --text TEXT",
    "footgun run": "window-off-by-one --model MODEL/ --tokens 8",
    "chat": "--model MODEL/ --tools TEXT",
}


@pytest.mark.parametrize("command", sorted(FILE_OUT | FOLDER_OUT | READING))
def test_what_is_no_path_is_refused_in_one_line(command: str, inputs: Path, run: Run) -> None:
    arguments = (FILE_OUT | FOLDER_OUT | READING)[command]
    for word in {*arguments.split()} & {"MODEL/", "MODEL/config.json", "RECORDING", "TEXT", "OUT"}:
        for bad in ("a\0b", "\ud800", "x" * 5000, "text.svg/x"):
            given = filled(arguments.replace(word, "BAD"), inputs, inputs / "out.svg")
            ran = run(*command.split(), *(bad if each == "BAD" else each for each in given))
            assert (ran.code, ran.out, ran.err.count("\n")) == (2, "", 1), (bad, ran)
            assert not (inputs / "out.svg").exists()


# What is interrupted


@pytest.mark.parametrize(
    ("raised", "code"),
    [
        (KeyboardInterrupt(), 130),
        (OSError(errno.ENOSPC, "No space left on device"), 2),
        (MemoryError(), 2),
    ],
    ids=["Ctrl-C", "full disk", "memory"],
)
@pytest.mark.parametrize("existing", [False, True])
def test_an_interrupted_checkpoint_leaves_what_was_there(
    raised: BaseException,
    code: int,
    existing: bool,
    tmp_path: Path,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"
    if existing:
        assert run("make-tiny", "odd", "--out", out).code == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    write = minstep.store.random_checkpoint._write_shard
    written: list[Path] = []

    def breaks(file: Path, *arguments: Any) -> int:
        if written:
            file.write_bytes(b"half")
            raise raised
        written.append(file)
        return write(file, *arguments)

    monkeypatch.setattr(minstep.store.random_checkpoint, "_write_shard", breaks)
    ran = run("make-tiny", "tiny", "--out", out, "--shards", 3)
    assert written and ran.code == code and ran.out == ""
    assert ran.err.count("\n") == (code == 2)
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert after == before
    assert names(tmp_path) == (["out"] if existing else NOTHING)


def test_ctrl_c_between_the_two_renames_puts_the_old_folder_back(
    tiny: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path.name: path.read_bytes() for path in tiny.iterdir()}
    rename = Path.rename

    def breaks(self: Path, target: Path) -> Path:
        if self.name == "new":
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", breaks)
    assert run("make-tiny", "odd", "--out", tiny).code == 130
    assert {path.name: path.read_bytes() for path in tiny.iterdir()} == before
    assert names(tiny.parent) == ["tiny"]


@pytest.mark.parametrize("function", ["record", "save_trace"])
@pytest.mark.parametrize(
    ("raised", "code"),
    [(KeyboardInterrupt(), 130), (OSError(errno.ENOSPC, "No space left on device"), 2)],
    ids=["Ctrl-C", "full disk"],
)
@pytest.mark.parametrize("existing", [False, True])
def test_an_interrupted_trace_leaves_what_was_there(
    function: str,
    raised: BaseException,
    code: int,
    existing: bool,
    tmp_path: Path,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "trace"
    if existing:
        out.write_text("mine")

    def breaks(*arguments: Any) -> None:
        if function == "save_trace":
            arguments[-1].write_bytes(b"half")
        raise raised

    monkeypatch.setattr(minstep.cli.parity, function, breaks)
    ran = run("trace", "--model", MODEL, "--tokens", "4", "--out", out)
    assert ran.code == code and ran.err.count("\n") == (code == 2)
    assert names(tmp_path) == (["trace"] if existing else NOTHING)
    assert not existing or out.read_text() == "mine"


def test_a_refused_run_leaves_an_existing_trace_alone(
    single: Path, tmp_path: Path, refused: Refused
) -> None:
    out = tmp_path / "trace"
    out.write_text("mine")
    raw = (single / "model.safetensors").read_bytes()
    (single / "model.safetensors").write_bytes(raw[:-1])
    arguments = ("trace", "--model", single, "--tokens", "4", "--out", out)
    refused(*arguments, naming=("truncated",))
    assert out.read_text() == "mine" and names(tmp_path) == ["single", "trace"]


# As a process of its own


def process(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "minstep", *arguments]
    return subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False, **options)


def test_the_module_runs_as_the_command_does() -> None:
    ran = process("inspect", "no-such-model", stdout=subprocess.PIPE)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr.startswith("minstep: no-such-model: ") and ran.stderr.count("\n") == 1


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")
def test_a_terminated_make_tiny_leaves_nothing(tmp_path: Path) -> None:
    large = json.loads((find_config("tiny") / "config.json").read_text())
    large |= {"hidden_size": 1024, "vocab_size": 60_000}
    (tmp_path / "config.json").write_text(json.dumps(large))
    command = [sys.executable, "-m", "minstep", "make-tiny", str(tmp_path), "--out"]
    writing = subprocess.Popen([*command, str(tmp_path / "out")], stderr=subprocess.PIPE)
    while len(names(tmp_path)) == 1 and writing.poll() is None:
        time.sleep(0.01)
    writing.terminate()
    assert writing.wait(60) == 143 and names(tmp_path) == ["config.json"]
    assert writing.stderr and writing.stderr.read() == b""


@pytest.mark.skipif(os.name != "posix", reason="needs a shell that closes streams")
def test_closed_stdin_is_refused_in_one_line() -> None:
    shell = f"'{sys.executable}' -m minstep generate --tokens - <&-"
    ran = subprocess.run(["sh", "-c", shell], capture_output=True, text=True, check=False)
    assert ran.returncode == 2 and "stdin is closed" in ran.stderr and ran.stderr.count("\n") == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_output_is_one_line() -> None:
    with Path("/dev/full").open("w") as full:
        ran = process("inspect", "tiny", stdout=full)
    assert ran.returncode == 2 and ran.stderr == "minstep: stdout: No space left on device\n"


@pytest.mark.skipif(os.name != "posix", reason="needs a shell that closes streams")
@pytest.mark.parametrize("command", ["generate --prompt a --max-tokens 2", "inspect tiny", "chat"])
def test_a_closed_stdout_is_one_line(command: str) -> None:
    shell = f"echo a | '{sys.executable}' -m minstep {command} >&-"
    ran = subprocess.run(["sh", "-c", shell], stderr=subprocess.PIPE, text=True, check=False)
    assert ran.returncode == 2
    assert ran.stderr.startswith("minstep: stdout is closed") and ran.stderr.count("\n") == 1


@pytest.mark.skipif(os.name != "posix", reason="needs a shell that closes streams")
def test_a_closed_stderr_leaves_stdout_as_it_was() -> None:
    shell = f"'{sys.executable}' -m minstep generate --prompt a --max-tokens 2 --json 2>&-"
    ran = subprocess.run(["sh", "-c", shell], stdout=subprocess.PIPE, text=True, check=False)
    assert ran.returncode == 0 and len(json.loads(ran.stdout)["tokens"]) == 2


def test_json_says_the_same_text_in_any_encoding(tiny: Path) -> None:
    its = ("generate", "--model", str(tiny))
    arguments = (*its, "--prompt", "Once", "--max-tokens", "60", "--json", "--ignore-eos")
    texts = []
    for encoding in ("utf-8", "ascii"):
        environment = os.environ | {"PYTHONIOENCODING": encoding}
        command = [sys.executable, "-m", "minstep", *arguments]
        ran = subprocess.run(command, env=environment, capture_output=True, check=True)
        texts.append(json.loads(ran.stdout.decode(encoding))["text"])
    assert texts[0] == texts[1] and not texts[0].isascii()


def test_ctrl_c_while_generating_ends_the_line_and_says_what_was_done(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = minstep.cli.generate.decode_steps

    def breaks(*arguments: Any) -> Any:
        for n, step in enumerate(real(*arguments)):
            if n == 3:
                raise KeyboardInterrupt
            yield step

    monkeypatch.setattr(minstep.cli.generate, "decode_steps", breaks)
    arguments = ("generate", "--model", MODEL, "--tokens", PROMPT, "--ignore-eos", "--no-mtp")
    ran = run(*arguments)
    assert ran.code == 130 and ran.out == ",".join(map(str, META["greedy"][:3])) + "\n"
    assert "stop: interrupted" in ran.err
    assert run(*arguments, "--json") == (130, "", "")


def test_text_that_the_output_cannot_show_is_replaced(tiny: Path) -> None:
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    its = ("generate", "--model", str(tiny))
    arguments = (*its, "--prompt", "é", "--max-tokens", "40", "--temp", "2", "--ignore-eos")
    ran = process(*arguments, env=environment, stdout=subprocess.PIPE)
    assert ran.returncode == 0 and "?" in ran.stdout


def test_a_reader_that_goes_away_ends_the_run_silently() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        ran = process("inspect", "step-3.5-flash", stdout=writing)
    finally:
        os.close(writing)
    assert (ran.returncode, ran.stderr) == (141, "")
