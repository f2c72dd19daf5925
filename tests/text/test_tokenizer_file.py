"""tokenizer.json: ordinary ones load, and what the package cannot survive is refused before."""

import copy
import json
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

import minstep
from minstep.cli.main import main
from minstep.errors import InputError
from minstep.text.tokenizer import StreamingText, encode, load_tokenizer, text_of
from minstep.text.tokenizer_file import MOST_ADDED, check_pattern, contained

Json = dict[str, Any]
TEXT = "Héllo <A>, it's 日本語 🙂 e\u0301 ﷺ ㎞ \n\t  a b2024 \0<|im_end|>" + "aab" * 5
STEP: Json = json.loads((minstep.find_config("trained") / "tokenizer.json").read_text("utf-8"))
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+"
)
KIMI = r"[\p{Han}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{M}&&[^\p{Han}]]+"
DEEPSEEK = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BLOOM = r" ?[^(\s|[.,!?…。，、।۔،])]+"
ORDINARY_PATTERNS = [GPT2, LLAMA3, O200K, KIMI, DEEPSEEK, BLOOM, r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+"]


def added(token: str, number: int, **more: Any) -> Json:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": token, **flags, "special": True, **more}


def split(pattern: Json) -> Json:
    return {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}


def replace(pattern: Json, content: str) -> Json:
    return {"type": "Replace", "pattern": pattern, "content": content}


def step(**changes: Any) -> Json:
    """The shipped tokenizer with other parts."""
    return {**copy.deepcopy(STEP), **changes}


def template(single: list[Json], ids: list[int] | None = None) -> Json:
    known = {"x": {"id": "x", "ids": ids or [1], "tokens": ["x"] * len(ids or [1])}}
    return {"type": "TemplateProcessing", "single": single, "pair": [], "special_tokens": known}


A = {"Sequence": {"id": "A", "type_id": 0}}
X = {"SpecialToken": {"id": "x", "type_id": 0}}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
FALLBACK = {f"<0x{byte:02X}>": byte + 3 for byte in range(256)}
STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
ORDINARY: dict[str, Json] = {
    "step's": STEP,
    "deepseek's": step(
        normalizer={"type": "Sequence", "normalizers": []},
        pre_tokenizer={
            "type": "Sequence",
            "pretokenizers": [*(split({"Regex": p}) for p in ORDINARY_PATTERNS), BYTES],
        },
        post_processor={"type": "Sequence", "processors": [BYTES, template([X, A])]},
        padding={"strategy": "BatchLongest", "direction": "Right", "pad_to_multiple_of": None}
        | {"pad_id": 0, "pad_type_id": 0, "pad_token": "x"},
    ),
    "llama's": step(
        normalizer={
            "type": "Sequence",
            "normalizers": [{"type": "Prepend", "prepend": "▁"}, replace({"String": " "}, "▁")],
        },
        pre_tokenizer=None,
        decoder={
            "type": "Sequence",
            "decoders": [
                replace({"String": "▁"}, " "),
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                STRIP,
            ],
        },
        added_tokens=[added("<unk>", 0, normalized=True), added("<s>", 1)],
        model={"type": "BPE", "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True}
        | {"vocab": {"<unk>": 0, "<s>": 1, "▁": 2, **FALLBACK, "a": 300, "b": 301, "ab": 302}}
        | {"merges": ["a b"], "dropout": None, "continuing_subword_prefix": None},
    ),
    "bert's": step(
        normalizer={"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True}
        | {"strip_accents": None, "lowercase": True},
        pre_tokenizer={"type": "BertPreTokenizer"},
        post_processor={"type": "BertProcessing", "sep": ["[SEP]", 1], "cls": ["[CLS]", 2]},
        decoder={"type": "WordPiece", "prefix": "##", "cleanup": True},
        added_tokens=[added("[UNK]", 0), added("[SEP]", 1), added("[CLS]", 2)],
        model={"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##"}
        | {"max_input_chars_per_word": 100}
        | {"vocab": {"[UNK]": 0, "[SEP]": 1, "[CLS]": 2, "a": 3, "##a": 4, "##b": 5}},
    ),
    "unigram": step(
        normalizer={
            "type": "Sequence",
            "normalizers": [{"type": "NFKC"}, replace({"Regex": " {2,}"}, " ")],
        },
        pre_tokenizer=METASPACE,
        decoder=METASPACE,
        post_processor=None,
        added_tokens=[added("<unk>", 0, normalized=True, lstrip=True, single_word=True)],
        model={"type": "Unigram", "unk_id": 0, "byte_fallback": False}
        | {"vocab": [["<unk>", 0.0], ["▁", -2.0], ["a", -3.0], ["ab", -3.5], ["b", -4.0]]},
    ),
}


def written(raw: Any, folder: Path) -> Path:
    """A folder with this tokenizer.json."""
    text = raw if isinstance(raw, str) else json.dumps(raw)
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    return folder


@pytest.mark.parametrize("name", ORDINARY)
def test_an_ordinary_tokenizer_loads_and_encodes_as_the_package_alone(
    name: str, tmp_path: Path
) -> None:
    expected = Tokenizer.from_str(json.dumps(ORDINARY[name]))
    loaded = load_tokenizer(written(ORDINARY[name], tmp_path))
    assert loaded and encode(loaded, TEXT) == expected.encode(TEXT).ids
    assert loaded.decode(encode(loaded, TEXT)) == expected.decode(expected.encode(TEXT).ids)


def test_a_token_of_a_thousand_spaces_is_ordinary(tmp_path: Path) -> None:
    spaces = added(" " * 1024, 2000, special=False)
    loaded = load_tokenizer(written(step(added_tokens=[spaces]), tmp_path))
    number = loaded.token_to_id(" " * 1024) if loaded else None
    assert loaded and encode(loaded, " " * 2048)[1:] == [number, number]


@pytest.mark.parametrize("pattern", ORDINARY_PATTERNS)
def test_the_patterns_of_ordinary_tokenizers_are_taken(pattern: str) -> None:
    assert check_pattern(pattern, "pattern") == 1


def padding(strategy: Any, multiple: int | None = None) -> Json:
    flags = {"direction": "Right", "pad_id": 0, "pad_type_id": 0, "pad_token": "x"}
    return {"strategy": strategy, "pad_to_multiple_of": multiple, **flags}


def truncation(longest: int, stride: int, strategy: str = "LongestFirst") -> Json:
    return {"direction": "Right", "max_length": longest, "stride": stride, "strategy": strategy}


@pytest.mark.parametrize(
    "changes",
    [
        {"padding": padding({"Fixed": 10**9})},
        {"padding": padding({"Fixed": 10**18})},
        {"padding": padding("BatchLongest", 2**60)},
        {"truncation": truncation(4, 9)},
        {"truncation": truncation(4, 0, "OnlySecond")},
    ],
)
def test_padding_and_truncation_are_left_out(changes: Json, tmp_path: Path) -> None:
    loaded, plain = load_tokenizer(written(step(**changes), tmp_path)), Tokenizer.from_str
    assert loaded and encode(loaded, TEXT) == plain(json.dumps(STEP)).encode(TEXT).ids


def test_a_key_that_stands_twice_is_refused_wherever_it_stands(tmp_path: Path) -> None:
    text = json.dumps(STEP)
    for key in ("vocab", "type", "content", "added_tokens", "decoder"):
        for again in (key, rf"\u{ord(key[0]):04x}{key[1:]}"):
            twice = text.replace(f'"{key}": ', f'"{again}": null, "{key}": ', 1)
            assert twice != text
            with pytest.raises(InputError, match=f"key {key} stands twice"):
                load_tokenizer(written(twice, tmp_path))


def test_a_byte_order_mark_before_a_tokenizer_is_skipped(tmp_path: Path) -> None:
    loaded = load_tokenizer(written("\ufeff" + json.dumps(STEP), tmp_path))
    assert loaded and encode(loaded, TEXT) == Tokenizer.from_str(json.dumps(STEP)).encode(TEXT).ids


def sequence(part: str, *inner: Json) -> Json:
    return {"type": "Sequence", part: [*inner]}


def nested(part: str, depth: int) -> str:
    """A normalizer so deep that a program which follows it runs out of its stack."""
    deep = '{"type": "Sequence", "normalizers": [' * depth + "]}" * depth
    return json.dumps(step(normalizer="@")).replace('"@"', deep)


def model(**changes: Any) -> Json:
    return step(model={**STEP["model"], **changes})


HOSTILE: dict[str, Callable[[], Any]] = {
    "nothing": lambda: "",
    "another type": lambda: "[1]",
    "deep": lambda: nested("normalizers", 100_000),
    "deep in a key nobody reads": lambda: '{"x": ' + "[" * 100_000 + "]" * 100_000 + "}",
    "wide": lambda: step(normalizer=sequence("normalizers", *[{"type": "NFC"}] * 100_000)),
    "lists without end": lambda: json.dumps(model(x=0)).replace(
        '"x": 0', '"x": [' + "[]," * 2_000_001 + "[]]"
    ),
    "many added tokens": lambda: step(
        added_tokens=[added(f"<{n}>", 2000 + n) for n in range(MOST_ADDED + 1)]
    ),
    "long added tokens": lambda: step(
        added_tokens=[added(f"{n}" + "x" * 900, 2000 + n) for n in range(2000)]
    ),
    "a long added token": lambda: step(added_tokens=[added("x" * 10**6, 2000)]),
    "an added token that the normalizer takes away": lambda: step(
        added_tokens=[added("<A>", 2000, normalized=True)],
        normalizer=replace({"String": "<A>"}, ""),
    ),
    "a long token": lambda: model(vocab={"x" * 10**6: 0}, merges=[]),
    "a long piece": lambda: model(type="Unigram", unk_id=0, vocab=[["x" * 200, -1.0]]),
    "no model": lambda: step(model=None),
    "two that put tokens around a text": lambda: step(
        post_processor={"type": "Sequence", "processors": [template([X, A])] * 2}
    ),
    "dropout": lambda: model(dropout=0.5),
    "a prefix that merges lack": lambda: model(continuing_subword_prefix="###"),
    "a merge of nothing known": lambda: model(merges=[["a", "nope"]]),
    "an id below 0": lambda: model(vocab={"a": -1}, merges=[]),
    "an id of 64 bits": lambda: model(vocab={"a": 2**63}, merges=[]),
    "an id that is no number": lambda: model(vocab={"a": None}, merges=[]),
    "a vocabulary that is none": lambda: model(vocab=7),
    "words without end": lambda: model(max_input_chars_per_word=10**18),
    "a number of a million digits": lambda: json.dumps(step(version=1)).replace(
        '"version": 1', '"version": ' + "9" * 10**6
    ),
    "an unknown kind": lambda: step(normalizer={"type": "Precompiled"}),
    "a kind of another part": lambda: step(normalizer={"type": "Fuse"}),
    "no kind": lambda: step(decoder={}),
    "an empty pattern": lambda: step(normalizer=replace({"String": ""}, "x")),
    "a pattern that matches nothing": lambda: step(normalizer=replace({"Regex": "a*"}, "x")),
    "a long replacement": lambda: step(normalizer=replace({"String": "a"}, "x" * 10**6)),
    "replacements of replacements": lambda: step(
        normalizer=sequence("normalizers", *[replace({"String": "a"}, "a" * 10)] * 9)
    ),
    "bytes of bytes": lambda: step(pre_tokenizer=sequence("pretokenizers", *[BYTES] * 30)),
    "a long replacement when decoding": lambda: step(decoder=replace({"String": "a"}, "x" * 10**7)),
    "a long beginning": lambda: step(normalizer={"type": "Prepend", "prepend": "x" * 10**6}),
    "an empty beginning": lambda: step(normalizer={"type": "Prepend", "prepend": ""}),
    "a strip of more than there is": lambda: step(decoder={**STRIP, "stop": 10**9}),
    "a long text to look for at each token": lambda: step(
        decoder={"type": "CTC", "pad_token": "a" * 10**6, "word_delimiter_token": "|"}
        | {"cleanup": True}
    ),
    "a long token around a text": lambda: step(
        post_processor={"type": "BertProcessing", "sep": ["x" * 10**6, 1], "cls": ["y", 0]}
    ),
    "a long prefix of each word": lambda: model(
        type="WordPiece", unk_token="a", continuing_subword_prefix="#" * 10**6
    ),
    "a long end of each word": lambda: model(end_of_word_suffix="x" * 10**6),
    "pieces of length 0": lambda: step(pre_tokenizer={"type": "FixedLength", "length": 0}),
    "a template without its token": lambda: step(
        post_processor={**template([X, A]), "special_tokens": {}}
    ),
    "a template of a second text": lambda: step(
        post_processor=template([{"Sequence": {"id": "B", "type_id": 0}}])
    ),
    "a template that repeats": lambda: step(post_processor=template([A] * 50_000)),
    "a template that grows": lambda: step(post_processor=template([X, A] + [X] * 10**4)),
    "a template of many ids": lambda: step(post_processor=template([X, A], [1] * 10**5)),
    "a template that is none": lambda: step(post_processor=template([7, A])),  # type: ignore[list-item]
    "half a character": lambda: json.dumps(STEP).replace('"<|im_end|>"', '"\\ud800"'),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_the_package_would_not_survive_is_refused_in_a_line(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = written(HOSTILE[name](), tmp_path)
    begin = time.perf_counter()
    with pytest.raises(InputError, match="tokenizer.json: "):
        load_tokenizer(folder)
    assert time.perf_counter() - begin < 20
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "pattern",
    [
        "(a+)+$",
        "(a|aa)+$",
        "(?:a|a)" * 40 + "b",
        "(?:a?){30}a{30}",
        "a?" * 30 + "a" * 30,
        ".*.*.*!",
        "((a{100}){100}){100}",
        "a{100000}",
        "a{99999999}",
        "(^)*",
        "(?=a*)*",
        "a**",
        r"(?<x>a\g<x>?b)",
        r"(a+)\1",
        "(?x)a",
        "(" * 6000,
        "(a",
        "a)",
        "a\\",
        "+a",
    ],
)
def test_a_pattern_that_could_take_ages_is_refused(pattern: str) -> None:
    with pytest.raises(InputError, match="place: .*pattern"):
        check_pattern(pattern, "place")


def test_the_least_that_a_pattern_takes_is_known() -> None:
    known = {"": 0, "a|": 0, "a?": 0, "^|a": 0, "(?=a)": 0, "(a|bc)d": 2, "[a-z[0-9]]{2,}": 2}
    known |= {r"\p{L}x*": 1, "(?:ab){3}": 6, "{": 1, "a{,3}": 0, r"\x{41}[]]": 2, "(?i)ab": 2}
    assert {pattern: check_pattern(pattern, "place") for pattern in known} == known


def test_a_refusal_says_what_is_wrong_and_where(tmp_path: Path) -> None:
    raw = step(normalizer=sequence("normalizers", replace({"Regex": "a?|b"}, "c")))
    with pytest.raises(InputError) as refusal:
        load_tokenizer(written(raw, tmp_path))
    expected = "normalizer: Replace: the pattern matches where there is no text"
    assert str(refusal.value) == f"{tmp_path / 'tokenizer.json'}: {expected}"


def test_only_a_regular_file_of_bounded_size_is_read(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    if hasattr(os, "mkfifo"):
        os.mkfifo(file)
        with pytest.raises(InputError, match="a pipe or a device"):
            load_tokenizer(tmp_path)
        file.unlink()
    with file.open("wb") as opened:
        opened.truncate(2**30)
    with pytest.raises(InputError, match="is larger than"):
        load_tokenizer(tmp_path)


class Panic(BaseException):
    """As the package's own: no Exception."""


def test_a_panic_becomes_an_input_error_and_an_interrupt_stays_one() -> None:
    with pytest.raises(InputError, match="^place: what happened$"), contained("place"):
        raise Panic("what happened")
    for kind in (KeyboardInterrupt, SystemExit, GeneratorExit):
        with pytest.raises(kind), contained("place"):
            raise kind


class Panicking:
    """A tokenizer each of whose methods panics."""

    decoder = None

    def get_added_tokens_decoder(self) -> Json:
        return {}

    def __getattr__(self, name: str) -> Any:
        def panic(*_: Any, **__: Any) -> Any:
            raise Panic(name)

        return panic


def test_no_panic_leaves_encoding_decoding_or_streaming(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer: Any = Panicking()
    with pytest.raises(InputError, match="cannot be encoded: encode"):
        encode(tokenizer, "a")
    with pytest.raises(InputError, match="token 5 cannot be decoded: decode"):
        text_of(tokenizer, 5)
    monkeypatch.setattr("minstep.text.tokenizer.DecodeStream", lambda **_: Panicking())
    with pytest.raises(InputError, match="token 5 cannot be decoded: step"):
        StreamingText(tokenizer).add(5)


def test_the_command_line_says_what_is_wrong_with_a_tokenizer_and_exits_with_2(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shipped = minstep.find_config("trained")
    (tmp_path / "config.json").write_bytes((shipped / "config.json").read_bytes())
    for shard in shipped.glob("model*"):
        (tmp_path / shard.name).symlink_to(shard)
    written(step(decoder={**STRIP, "stop": 10**9}), tmp_path)
    assert main(["generate", "--model", str(tmp_path), "--prompt", "a", "--max-tokens", "1"]) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1 and "stop is 1000000000, expected 0" in err


# Mutations

ODD: list[Any] = [None, True, 0, 1, -1, 5, 2**31, 2**32 - 1, 2**63, 10**30, 0.5, 1e308, "", "a"]
ODD += ["▁", "é", "ab", " ", "\ud800", "x" * 99, [], {}, [[]], ["a", 1], {"String": "a"}]
ODD += [{"Regex": r"\s|\S"}, {"Regex": "a?"}, {"String": ""}, {"Fixed": 7}, "Removed", "first"]
COMPONENTS: dict[str, list[Json]] = {
    "normalizer": [
        *({"type": kind} for kind in "NFC NFD NFKC NFKD Nmt Lowercase StripAccents".split()),
        {"type": "Strip", "strip_left": True, "strip_right": True},
        {"type": "Prepend", "prepend": "▁"},
        {"type": "ByteLevel"},
        replace({"String": "a"}, "aé"),
        replace({"Regex": "."}, ""),
        replace({"Regex": r"\s+"}, "<A>"),
    ],
    "pre_tokenizer": [
        *({"type": kind} for kind in "Whitespace WhitespaceSplit BertPreTokenizer".split()),
        {"type": "Digits", "individual_digits": True},
        {"type": "UnicodeScripts"},
        {"type": "Punctuation", "behavior": "MergedWithNext"},
        {"type": "CharDelimiterSplit", "delimiter": "a"},
        {"type": "FixedLength", "length": 3},
        split({"Regex": "a|(?=b)"}),
        split({"String": ""}),
        METASPACE,
        BYTES,
    ],
    "post_processor": [
        {"type": "RobertaProcessing", "sep": ["x", 1], "cls": ["y", 2]}
        | {"trim_offsets": True, "add_prefix_space": True},
        template([X, A, X], [1, 2]),
        BYTES,
    ],
    "decoder": [
        *({"type": kind} for kind in "ByteFallback Fuse".split()),
        {"type": "CTC", "pad_token": "a", "word_delimiter_token": "b", "cleanup": True},
        {"type": "BPEDecoder", "suffix": "</w>"},
        {"type": "WordPiece", "prefix": "", "cleanup": True},
        replace({"String": "a"}, "aé"),
        replace({"Regex": "."}, ""),
        METASPACE,
        BYTES,
        STRIP,
    ],
}


def spots(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths to everything inside, of a long list or object to a few only."""
    keys: list[Any] = [*value] if isinstance(value, dict) else []
    keys = [*range(len(value))] if isinstance(value, list) else keys
    found = [path] if path else []
    for key in keys[:3] + keys[-3:] if len(keys) > 40 else keys:
        found += spots(value[key], (*path, key))
    return found


def mutated(rng: random.Random) -> Json:
    """An ordinary tokenizer with one or two changes, mostly outside of its vocabulary."""
    raw = copy.deepcopy(ORDINARY[rng.choice([*ORDINARY])])
    for _ in range(rng.randrange(1, 3)):
        part = rng.choice([*raw, *(part for part in COMPONENTS if part in raw)])
        paths = spots({part: raw[part]})
        *way, last = rng.choice(paths)
        place: Any = raw
        for key in way:
            place = place[key]
        how = rng.randrange(5)
        if how == 0:
            del place[last]
        elif how == 1 and isinstance(place, list):
            place.insert(last, copy.deepcopy(rng.choice(place)))
        elif how == 2 and part in COMPONENTS:
            place[last] = copy.deepcopy(rng.choice(COMPONENTS[part]))
        elif how == 3 and isinstance(place[last], dict) and place[last]:
            place[last][rng.choice([*place[last]])] = rng.choice(ODD)
        else:
            like = [value for value in ODD if type(value) is type(place[last])]
            place[last] = rng.choice(like if like and rng.random() < 0.8 else ODD)
        if not raw:
            break
    return raw


def outcome(raw: Json, folder: Path) -> str:
    """ "fine" or "refused" for a tokenizer.json and all that is done with one."""
    try:
        tokenizer = load_tokenizer(written(raw, folder))
        assert tokenizer
        for text in ("", " ", TEXT, TEXT[::-1], "aaaaaa"):
            ids = encode(tokenizer, text)
            assert len(ids) < 10_000
            stream = StreamingText(tokenizer, ["ab"])
            for token in (*ids, 0, 1, 5, 300, 2**32 - 1):
                text_of(tokenizer, token)
                stream.add(token)
            with contained("all"):
                tokenizer.decode(ids, skip_special_tokens=False)
    except InputError as error:
        cause = type(error.__cause__)
        assert cause.__name__ != "PanicException", error
        return "refused"
    return "fine"


def test_no_mutation_of_a_tokenizer_makes_the_package_panic(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rng = random.Random(16)
    found = [outcome(mutated(rng), tmp_path) for _ in range(250)]
    assert found.count("fine") > 50 and found.count("refused") > 50
    assert capfd.readouterr() == ("", "")
