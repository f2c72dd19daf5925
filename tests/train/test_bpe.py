"""The trained tokenizer: its ids, that any text comes back, and that it is the same each time."""

import hashlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from minstep.errors import InputError
from minstep.text.tokenizer import ALPHABET, BACK, FRONT, StreamingText, encode, load_tokenizer
from minstep.train.bpe import train_tokenizer

TEXT = Path(__file__).with_name("test_data.py").read_text(encoding="utf-8")
STRANGE = "Héllo, мир — 日本語 🙂 e\u0301 👩‍👩‍👧\n\t<x>\r\n\0\x7f\u2028 \u00a0 ''\" 'll  end "
SIZE = 500
IN_A_NEW_PROCESS = """
import hashlib, sys
from minstep.train.bpe import train_tokenizer
text = open(sys.argv[1], encoding="utf-8").read()
print(hashlib.sha256(train_tokenizer(text.split("\\n\\n"), 500).to_str().encode()).hexdigest())
"""


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return train_tokenizer(TEXT.split("\n\n"), SIZE)


def test_special_tokens_stand_at_both_ends_and_the_bytes_behind_the_first(
    trained: Tokenizer,
) -> None:
    assert trained.get_vocab_size() == SIZE
    assert [trained.id_to_token(n) for n in range(259)] == [*FRONT, *ALPHABET]
    assert [trained.id_to_token(SIZE - 2), trained.id_to_token(SIZE - 1)] == [*BACK]
    assert sorted(trained.get_vocab().values()) == [*range(SIZE)]
    special = {n for n, token in trained.get_added_tokens_decoder().items() if token.special}
    assert special == {0, 1, 2, SIZE - 2, SIZE - 1}


def test_a_merge_joins_two_tokens_that_were_there_before(trained: Tokenizer) -> None:
    model = json.loads(trained.to_str())["model"]
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split()) for m in model["merges"]]
    assert len(merges) == SIZE - 261
    for n, (left, right) in enumerate(merges, start=259):
        assert model["vocab"][left + right] == n > max(model["vocab"][left], model["vocab"][right])


def test_any_text_comes_back_as_it_was_streamed_or_at_once(trained: Tokenizer) -> None:
    rng = random.Random(0)
    texts = [STRANGE, TEXT, "", " ", "\n\n"]
    texts += ["".join(rng.choices(STRANGE, k=rng.randrange(40))) for _ in range(200)]
    texts += ["".join(chr(rng.randrange(0xD800)) for _ in range(20)) for _ in range(50)]
    for text in texts:
        ids = encode(trained, text)
        assert ids[0] == 0 and min(ids[1:], default=3) > 2 and max(ids) < SIZE - 2
        assert encode(trained, text, is_rendered=True) == ids[1:]
        assert trained.decode(ids) == text
        stream = StreamingText(trained)
        assert "".join([*map(stream.add, ids), stream.finish()]) == text


def test_special_tokens_in_a_text_are_one_id_each_and_hidden_when_streamed(
    trained: Tokenizer,
) -> None:
    ids = encode(trained, f"{FRONT[0]}a{BACK[0]}{BACK[1]}", is_rendered=True)
    assert ids == [0, trained.token_to_id("a"), SIZE - 2, SIZE - 1]
    stream = StreamingText(trained)
    assert "".join(map(stream.add, ids)) == "a"


def test_text_like_what_it_was_trained_on_takes_far_fewer_tokens(trained: Tokenizer) -> None:
    text = Path(__file__).read_text(encoding="utf-8")
    assert len(encode(trained, text)) < 0.6 * len(text.encode())


def test_a_saved_tokenizer_is_the_same(trained: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(trained.to_str(), encoding="utf-8")
    loaded = load_tokenizer(tmp_path)
    assert loaded and encode(loaded, STRANGE) == encode(trained, STRANGE)
    assert loaded.to_str() == trained.to_str()


def test_the_same_texts_give_the_same_bytes_in_any_process(trained: Tokenizer) -> None:
    expected = {hashlib.sha256(trained.to_str().encode()).hexdigest()}
    source = Path(__file__).with_name("test_data.py")
    for seed, threads in (("1", "1"), ("2", "2")):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "RAYON_NUM_THREADS": threads}
        command = [sys.executable, "-c", IN_A_NEW_PROCESS, str(source)]
        ran = subprocess.run(command, env=environment, capture_output=True, check=True, text=True)
        assert {ran.stdout.strip()} == expected


def test_a_text_with_too_little_to_merge_is_refused() -> None:
    assert train_tokenizer(["abab"], 262).get_vocab_size() == 262
    with pytest.raises(InputError, match="gives 262 tokens, expected 300: it is too short"):
        train_tokenizer(["abab"], 300)
    assert train_tokenizer([], 261).get_vocab_size() == 261
    with pytest.raises(InputError, match="a vocabulary of 260 tokens, expected at least 261"):
        train_tokenizer([TEXT], 260)
