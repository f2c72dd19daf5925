"""Generation: stopping, sampling, drafts' teacher-forced forward and streaming text."""

import numpy as np
import pytest

import minstep
from minstep.cache import WindowCache, new_caches
from minstep.config import Config
from minstep.generate import prefill
from minstep.model import ModelWeights, decoder, head
from minstep.mtp import Drafter
from minstep.sampling import Sampling
from minstep.text.tokenizer import StreamingText, byte_level_tokenizer, load_tokenizer

CONFIG = minstep.load_config(minstep.find_config("tiny"))
WEIGHTS = minstep.random_weights(CONFIG, np.random.default_rng(0))
PROMPT = [5, 17, 9, 250, 31, 8, 77, 100, 3, 9, 9]


def tokens(
    config: Config = CONFIG, weights: ModelWeights = WEIGHTS, seed: int = 0, **kwargs: object
) -> list[int]:
    rng = np.random.default_rng(seed)
    return list(minstep.generate(PROMPT, weights, config, rng, **kwargs))  # type: ignore[arg-type]


def test_it_stops_after_max_tokens_and_at_the_end_of_the_context() -> None:
    assert len(tokens(max_tokens=7, ignore_eos=True)) == 7
    assert tokens(max_tokens=0) == []
    short = CONFIG._replace(max_positions=len(PROMPT) + 4)
    assert tokens(short, max_tokens=50, ignore_eos=True) == tokens(max_tokens=4, ignore_eos=True)


def test_it_stops_at_an_end_token_unless_told_not_to() -> None:
    free = tokens(max_tokens=12, ignore_eos=True)
    ending = CONFIG._replace(eos_token_ids=(free[4],))
    assert tokens(ending, max_tokens=12) == free[: free.index(free[4]) + 1]
    assert tokens(ending, max_tokens=12, ignore_eos=True) == free


def test_the_same_seed_draws_the_same_tokens_and_another_does_not() -> None:
    first, second, third = (
        tokens(how=Sampling(1.0), max_tokens=20, ignore_eos=True, seed=seed) for seed in (1, 1, 2)
    )
    assert first == second != third


@pytest.mark.parametrize("chunk", [1, 4, 10])
def test_chunks_of_a_prompt_give_the_same_logits(chunk: int) -> None:
    whole = head(decoder(PROMPT, WEIGHTS, CONFIG, np.float64), WEIGHTS, CONFIG)[-1]
    caches = new_caches(CONFIG.layers, np.float64, slack=3, longest=chunk)
    drafter = Drafter(WEIGHTS, CONFIG, 3, np.float64, longest=chunk)
    done = list[int]()
    split = prefill(PROMPT, WEIGHTS, CONFIG, caches, drafter, np.float64, chunk, done.append)
    np.testing.assert_allclose(split, whole[None], rtol=0, atol=1e-12)
    assert done == [*range(chunk, len(PROMPT), chunk), len(PROMPT)]
    assert all(cache.end == len(PROMPT) for cache in caches)
    assert [isinstance(c, WindowCache) for c in caches] == [s.window == 8 for s in CONFIG.layers]


def test_drafts_depend_on_true_tokens_up_to_their_depth_only() -> None:
    hidden = decoder(PROMPT, WEIGHTS, CONFIG, np.float64)
    before = minstep.mtp_forward(PROMPT, hidden, WEIGHTS, CONFIG)
    assert [len(logits) for logits in before] == [len(PROMPT) - k for k in (1, 2, 3)]
    after = minstep.mtp_forward([*PROMPT[:-1], 200], hidden, WEIGHTS, CONFIG)
    for old, new in zip(before, after, strict=True):
        assert np.array_equal(old[:-1], new[:-1]) and not np.allclose(old[-1], new[-1])


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_sequence_too_short_for_a_depth_skips_it(count: int) -> None:
    hidden = decoder(PROMPT[:count], WEIGHTS, CONFIG)
    drafts = minstep.mtp_forward(PROMPT[:count], hidden, WEIGHTS, CONFIG)
    assert [len(logits) for logits in drafts] == list(range(count - 1, 0, -1))


@pytest.mark.parametrize("bad", [-1, 320])
def test_an_id_outside_the_vocabulary_is_refused_by_the_embedding(bad: int) -> None:
    with pytest.raises(minstep.InputError, match=f"token id {bad} at position 1 is out of range"):
        decoder([5, bad], WEIGHTS, CONFIG)


def test_the_shipped_tokenizer_is_what_the_code_makes() -> None:
    file = minstep.find_config("tiny") / "tokenizer.json"
    assert file.read_text(encoding="utf-8") == byte_level_tokenizer().to_str(pretty=True) + "\n"
    assert byte_level_tokenizer().get_vocab_size() <= CONFIG.vocab_size


def test_any_text_comes_back_whole_and_a_character_is_never_split() -> None:
    tokenizer = load_tokenizer(minstep.find_config("tiny"))
    assert tokenizer
    text = "Héllo 日本 🙂\n"
    ids = tokenizer.encode(text + "<|im_end|>").ids
    assert tokenizer.decode(ids) == text
    stream = StreamingText(tokenizer)
    pieces = [stream.add(token) for token in ids]
    assert "".join(pieces) == text and "🙂" in pieces


@pytest.mark.parametrize("tokens", [[], [1.7], ["5"]])
def test_what_are_no_token_ids_is_refused(tokens: list[int]) -> None:
    with pytest.raises(minstep.InputError, match="integer ids"):
        decoder(tokens, WEIGHTS, CONFIG)


def test_weights_that_are_not_numbers_end_in_an_error_and_not_in_tokens() -> None:
    broken = WEIGHTS._replace(norm=np.full_like(np.asarray(WEIGHTS.norm), np.nan))
    with pytest.raises(minstep.InputError, match="after 11 tokens are not finite"):
        list(minstep.generate(PROMPT, broken, CONFIG, np.random.default_rng(0)))


def test_paths_may_be_strings() -> None:
    folder = str(minstep.find_config("odd"))
    assert minstep.load_config(folder) == minstep.load_config(minstep.find_config("odd"))
    with pytest.raises(minstep.InputError, match="holds no weights"):
        minstep.open_checkpoint(folder)
