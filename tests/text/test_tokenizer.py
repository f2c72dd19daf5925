"""Streaming text: whole characters at once, broken bytes never, special tokens hidden, stops."""

import random
import time
from collections.abc import Iterable

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from minstep.errors import InputError
from minstep.text.tokenizer import (
    BACK,
    BROKEN,
    BYTE_OF,
    FRONT,
    TAGS,
    StreamingText,
    byte_level_tokenizer,
    encode,
)

# Two, three and four bytes, a combining accent, a family and a flag of several characters each.
TEXT = "Héllo, мир — 日本語 🙂 e\u0301 👩‍👩‍👧 🇫🇷\n\t<x>"
BYTES = byte_level_tokenizer()
ID_OF = {byte: BYTES.token_to_id(letter) for letter, byte in BYTE_OF.items()}


def trained() -> Tokenizer:
    """A byte-level BPE whose tokens end in the middle of characters as well."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([TEXT, "🙃🙂😀😁", "日本日曜語話", "étéèàù"] * 3, trainer)
    return tokenizer


TRAINED = trained()


def pieces(tokenizer: Tokenizer, ids: Iterable[int], stops: Iterable[str] = ()) -> list[str]:
    stream = StreamingText(tokenizer, tuple(stops))
    return [*(stream.add(token) for token in ids), stream.finish()]


def test_a_character_is_given_out_with_its_last_byte_and_not_before() -> None:
    expected = []
    for character in TEXT:
        expected += [""] * (len(character.encode()) - 1) + [character]
    assert pieces(BYTES, (ID_OF[byte] for byte in TEXT.encode())) == [*expected, ""]


def test_bytes_have_the_letters_that_the_tokenizers_package_gives_them() -> None:
    for character in map(chr, [*range(256), 0x3042, 0x1F642]):
        assert BYTES.encode(character).ids == [ID_OF[byte] for byte in character.encode()]


def test_tokens_that_end_within_a_character_join_to_the_text() -> None:
    rng = random.Random(0)
    ends_within = 0
    for _ in range(200):
        text = "".join(rng.choices(TEXT + "😀日é", k=rng.randrange(30)))
        ids = encode(TRAINED, text)
        ends_within += any(BROKEN in TRAINED.decode([token]) for token in ids)
        assert "".join(pieces(TRAINED, ids)) == text
    assert ends_within > 50


@pytest.mark.parametrize("seed", range(5))
def test_broken_bytes_are_never_given_out_and_whole_characters_always(seed: int) -> None:
    rng = random.Random(seed)
    scraps = [bytes([byte]) for byte in range(256)] + [c.encode() for c in "é日🙂"] * 40
    for _ in range(300):
        said = b"".join(rng.choices(scraps, k=rng.randrange(20)))
        given = "".join(pieces(BYTES, (ID_OF[byte] for byte in said)))
        assert given == said.decode("utf-8", "ignore") and BROKEN not in given
        ids = [rng.randrange(400) for _ in range(rng.randrange(20))]
        assert "".join(pieces(TRAINED, ids)) == TRAINED.decode(ids).replace(BROKEN, "")


def test_text_before_broken_bytes_in_the_same_token_is_not_lost() -> None:
    tokenizer = Tokenizer(models.BPE(vocab={"Aÿ": 0, "Hiâ": 1, "Ĥ¬": 2, "B": 3}, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    assert pieces(tokenizer, [0]) == ["A", ""]
    assert pieces(tokenizer, [1, 0, 3]) == ["Hi", "A", "B", ""]


def test_a_replacement_character_that_the_model_wrote_is_shown() -> None:
    assert "".join(pieces(BYTES, encode(BYTES, f"a{BROKEN}b"))) == f"a{BROKEN}b"


def test_a_long_run_of_broken_bytes_takes_no_longer_than_text_does() -> None:
    start = time.perf_counter()
    assert "".join(pieces(BYTES, [ID_OF[0xFF]] * 50_000)) == ""
    assert time.perf_counter() - start < 5  # the package's own stream takes minutes


def test_special_tokens_are_never_shown() -> None:
    special = [BYTES.token_to_id(token) for token in (*FRONT, *BACK)]
    assert "".join(pieces(BYTES, special)) == ""
    rng = random.Random(0)
    for _ in range(50):
        ids: list[int] = []
        for character in TEXT:
            ids += encode(BYTES, character) + rng.choices(special, k=rng.randrange(3))
        assert "".join(pieces(BYTES, ids)) == TEXT


def test_the_tags_that_chat_reads_are_shown_even_where_they_are_special() -> None:
    tokenizer = byte_level_tokenizer()
    tokenizer.add_special_tokens([AddedToken(tag, special=True) for tag in TAGS])
    tokenizer.add_tokens([AddedToken("<extra>")])
    text = "a".join((*TAGS, "<extra>", BACK[1]))
    ids = encode(tokenizer, text)
    assert len(ids) == 11
    assert "".join(pieces(tokenizer, ids)) == text.removesuffix(BACK[1])


def test_an_added_token_stands_as_it_is_though_its_letters_could_be_bytes() -> None:
    tokenizer = byte_level_tokenizer()
    tokenizer.add_tokens([AddedToken("éé"), AddedToken("日")])
    ids = encode(tokenizer, "aééb日")
    assert len(ids) == 4 and "".join(pieces(tokenizer, ids)) == "aééb日"


def test_ids_without_a_token_show_nothing() -> None:
    assert pieces(BYTES, [261, 319, 128_895]) == [""] * 4


def test_a_tokenizer_that_is_not_byte_level_streams_whole_characters_too() -> None:
    fallback = {f"<0x{byte:02X}>": byte for byte in range(256)}
    vocabulary = {**fallback, "▁Hi": 256, "▁": 257, "<unk>": 258}
    model = models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps)
    ids = [256, *"🙂".encode(), 0xFF, 256]
    assert pieces(tokenizer, ids) == [" Hi", "", "", "", "🙂", "", " Hi", ""]


# Stop texts

WORDS = ("a", "b", "c", "ab", "ba", "abc", "bcab")
LETTERS = Tokenizer(models.BPE(vocab={word: n for n, word in enumerate(WORDS)}, merges=[]))
LETTERS.decoder = decoders.ByteLevel()


def cut(text: str, stops: Iterable[str]) -> str:
    """The text before the first stop to be complete, letter by letter."""
    for end in range(len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            return text[: end - max(map(len, ending))]
    return text


@pytest.mark.parametrize("seed", range(4))
def test_text_ends_before_a_stop_however_it_is_cut_into_tokens(seed: int) -> None:
    rng = random.Random(seed)
    stopped = 0
    for _ in range(500):
        ids = [rng.randrange(len(WORDS)) for _ in range(rng.randrange(1, 10))]
        text = "".join(WORDS[token] for token in ids)
        stops = ["".join(rng.choices("abc", k=rng.randrange(1, 6))) for _ in range(3)]
        stream = StreamingText(LETTERS, stops)
        given = read = ""
        for token in ids:
            given += stream.add(token)
            read += WORDS[token]
            held = read.removeprefix(given)
            starts = any(stop.startswith(held) and stop != held for stop in stops)
            assert stream.stopped or starts or not held, "what can be no stop was held back"
        assert given + stream.finish() == cut(text, stops)
        assert stream.stopped == any(stop in text for stop in stops)
        stopped += stream.stopped
    assert 100 < stopped < 500


@pytest.mark.parametrize(
    ("stops", "text", "expected"),
    [
        (["END"], "The END.", "The "),
        (["END"], "The EN", "The EN"),
        (["ENDED", "END"], "The ENDED", "The "),
        (["abcd", "bc"], "xabcd", "xa"),
        (["abcd", "cd"], "xabcd", "x"),
        (["aab"], "aaab", "a"),
        (["🙂"], "a🙂b", "a"),
        (["\n\n"], "a\nb\n\nc", "a\nb"),
        (["</think>"], "a</think>b", "a"),
        (["x"], "", ""),
    ],
)
def test_a_stop_is_found_across_tokens(stops: list[str], text: str, expected: str) -> None:
    for tokenizer in (BYTES, TRAINED):
        assert "".join(pieces(tokenizer, encode(tokenizer, text), stops)) == expected


def test_after_a_stop_nothing_more_is_given_out() -> None:
    stream = StreamingText(BYTES, ["b"])
    assert [stream.add(token) for token in encode(BYTES, "abc")] == ["a", "", ""]
    assert stream.stopped and stream.finish() == ""


def test_what_might_have_become_a_stop_is_given_out_at_the_end_once() -> None:
    stream = StreamingText(BYTES, ["END"])
    assert [stream.add(token) for token in encode(BYTES, "EEN")] == ["", "E", ""]
    assert (stream.finish(), stream.finish(), stream.stopped) == ("EN", "", False)


# Stops that the text begins again and again.
LONG = {
    "a stop as long as the text": ("ab" * 20_000 + "END", "ab" * 20_000),
    "a stop of one letter": ("a" * 20_000 + "b", "a" * 40_000),
    "a stop that ends otherwise": ("a" * 500 + "b", "a" * 40_000),
    "a stop that begins otherwise": ("b" + "a" * 500, ("b" + "a" * 499) * 80),
}


@pytest.mark.parametrize("name", LONG)
def test_long_stops_take_no_longer_than_short_ones(name: str) -> None:
    stop, text = LONG[name]
    begin = time.perf_counter()
    stops = [stop, stop[:-1] + "x", "never" * len(stop)]
    stream, ids = StreamingText(BYTES, stops), [ID_OF[b] for b in text.encode()]
    given = [stream.add(token) for token in ids]
    assert "".join([*given, stream.finish()]) == text and not stream.stopped
    assert time.perf_counter() - begin < 10  # a second at most; the square would take minutes


@pytest.mark.parametrize("stops", [[""], ["a", ""], [5], [None], [b"a"]])
def test_a_stop_that_is_no_text_is_refused(stops: list[str]) -> None:
    with pytest.raises(InputError, match="the stop text .*, expected a text that is not empty"):
        StreamingText(BYTES, stops)
