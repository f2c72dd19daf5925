"""Steps to pieces of text: how they join, why they end, what the drafts were worth."""

from collections.abc import Iterator, Sequence

import numpy as np
import pytest

import minstep
from minstep.generate import Step
from minstep.text.continuation import Continuation
from minstep.text.tokenizer import StreamingText, byte_level_tokenizer, encode

CONFIG = minstep.load_config(minstep.find_config("tiny"))
WEIGHTS = minstep.random_weights(CONFIG, np.random.default_rng(0))
TOKENIZER = byte_level_tokenizer()
PROMPT = encode(TOKENIZER, "Once upon a time")
NO_LOGITS = np.zeros((8, 320))


def scripted(*texts: str, stop: str = "length") -> Iterator[Step]:
    """A step for each text, the last one with the reason; a long text had drafts, all kept."""
    for n, text in enumerate(texts, start=1):
        ids = encode(TOKENIZER, text)
        yield Step(ids, NO_LOGITS, ids[:-1], len(ids) - 1, stop if n == len(texts) else None)


def stepped(seed: int = 0, **options: object) -> Iterator[Step]:
    rng = np.random.default_rng(seed)
    how = minstep.Sampling(temperature=1.0)
    return minstep.steps(PROMPT, WEIGHTS, CONFIG, rng, how=how, **options)  # type: ignore[arg-type]


def streamed(steps: Iterator[Step], *stops: str, logprobs: int = 0) -> Continuation:
    return Continuation(steps, StreamingText(TOKENIZER, stops), logprobs)


def test_pieces_join_to_the_text_and_are_never_empty() -> None:
    said = streamed(scripted("Hé", "llo ", "🙂", "!"))
    pieces = list(said)
    assert pieces == ["H", "é", "l", "l", "o", " ", "🙂", "!"]
    assert said.text == "Héllo 🙂!" and said.tokens == encode(TOKENIZER, said.text)


def test_the_text_of_a_real_model_is_its_tokens_decoded() -> None:
    said = streamed(stepped(max_tokens=60, ignore_eos=True))
    assert "".join(said) == said.text
    assert said.tokens == [
        token for step in stepped(max_tokens=60, ignore_eos=True) for token in step.tokens
    ]
    assert said.text == TOKENIZER.decode(said.tokens).replace("\ufffd", "")
    assert (said.stop, len(said.tokens)) == ("length", 60)


@pytest.mark.parametrize("stop", ["eos", "length", "context"])
def test_it_ends_for_the_reason_that_the_last_step_has(stop: str) -> None:
    said = streamed(scripted("a", "b", stop=stop))
    assert "".join(said) == "ab" and said.stop == stop


@pytest.mark.parametrize("stop", ["eos", "context"])
def test_a_real_model_ends_at_an_end_token_or_where_the_context_does(stop: str) -> None:
    rng = np.random.default_rng(0)
    free = streamed(minstep.steps(PROMPT, WEIGHTS, CONFIG, rng, 12, ignore_eos=True))
    assert "".join(free) == free.text
    end = free.tokens[4]
    ending = CONFIG._replace(eos_token_ids=(end,))
    config = ending if stop == "eos" else CONFIG._replace(max_positions=len(PROMPT) + 3)
    said = streamed(minstep.steps(PROMPT, WEIGHTS, config, rng, 12))
    assert "".join(said) == said.text and said.stop == stop
    assert said.tokens == free.tokens[: free.tokens.index(end) + 1 if stop == "eos" else 3]


def test_until_it_ends_it_is_interrupted_and_holds_what_was_said_so_far() -> None:
    def breaks() -> Iterator[Step]:
        yield from scripted("ab", "c", stop="")
        raise KeyboardInterrupt

    said = streamed(breaks())
    with pytest.raises(KeyboardInterrupt):
        list(said)
    assert (said.text, said.stop, said.stats(PROMPT)["new_tokens"]) == ("abc", "interrupted", 3)


def test_tokens_behind_a_stop_text_are_dropped_within_an_accepted_draft() -> None:
    read: list[str] = []

    def steps() -> Iterator[Step]:
        for step in scripted("one ", "two EN", "D three", "four"):
            read.append(TOKENIZER.decode(step.tokens))
            yield step

    said = streamed(steps(), "END", logprobs=1)
    assert "".join(said) == said.text == "one two "
    assert said.stop == "stop" and read == ["one ", "two EN", "D three"]
    assert said.tokens == encode(TOKENIZER, "one two END")
    assert len(said.logprobs) == len(said.tokens) == said.stats(PROMPT)["new_tokens"]


def test_a_stop_text_wins_over_the_reason_of_the_same_step() -> None:
    said = streamed(scripted("a", "bEND", stop="eos"), "END")
    assert "".join(said) == "ab" and said.stop == "stop"


def test_what_was_held_back_for_a_stop_comes_at_the_end() -> None:
    said = streamed(scripted("aEN"), "END")
    assert list(said) == ["a", "EN"] and said.stop == "length"


def test_the_trace_has_a_row_for_each_pass_with_drafts() -> None:
    steps = [
        Step([5], NO_LOGITS, [], 0, None),
        Step([6, 7], NO_LOGITS, [6, 9, 9], 1, None),
        Step([8], NO_LOGITS, [1], 0, None),
        Step([9], NO_LOGITS, [], 0, None),
        Step([1, 2, 3], NO_LOGITS, [1, 2, 3], 3, "length"),
    ]
    said = Continuation(iter(steps))
    assert list(said) == [""] * 8
    assert said.mtp_trace == [(1, [6, 9, 9], 1), (3, [1], 0), (5, [1, 2, 3], 3)]


def test_stats_count_passes_after_the_prompts_and_drafts_by_depth() -> None:
    steps = [
        Step([5], NO_LOGITS, [], 0, None),
        Step([6, 7], NO_LOGITS, [6, 9, 9], 1, None),
        Step([8], NO_LOGITS, [1], 0, None),
        Step([1, 2, 3], NO_LOGITS, [1, 2, 7], 2, "length"),
    ]
    said = Continuation(iter(steps))
    assert list(said) == [""] * 7
    stats = said.stats(PROMPT)
    assert (stats["prompt_tokens"], stats["new_tokens"], stats["forward_passes"]) == (16, 7, 3)
    assert stats["acceptance"] == [0.667, 0.5, 0.0]
    assert stats["tokens_per_forward"] == 2.0 and stats["stop"] == "length"


@pytest.mark.parametrize("stop", ["eos", "length", "context"])
def test_drafts_behind_the_end_of_the_text_are_not_among_those_kept(stop: str) -> None:
    """The last pass accepts all three drafts, of which `new` - 1, or all, stand in the text."""
    for new in (1, 2, 3, 4):
        last = Step([6, 7, 8, 9][:new], NO_LOGITS, [6, 7, 8], 3, stop)
        said = Continuation(iter([Step([5], NO_LOGITS, [], 0, None), last]))
        assert len(list(said)) == 1 + new
        kept = [1.0] * min(3, new) + [0.0] * (3 - min(3, new))
        assert said.stats(PROMPT)["acceptance"] == kept and said.passes[1].kept == min(3, new)
        assert said.mtp_trace == [(1, [6, 7, 8], 3)]


def test_rates_are_tokens_over_seconds_and_the_first_token_is_the_prompts() -> None:
    said = streamed(stepped(max_tokens=20, ignore_eos=True))
    list(said)
    stats = said.stats(PROMPT)
    assert stats["prompt_tps"] == pytest.approx(16 / said.prompt_seconds, rel=0.01)
    assert stats["generation_tps"] == pytest.approx(19 / said.seconds, rel=0.01)
    assert stats["forward_passes"] == len(said.passes) - 1 >= 19 // 4


def test_seconds_are_split_where_the_first_token_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The prompt takes from the start to the first token; the other tokens the time after that."""
    times = iter([100.0, 104.0, 105.0, 107.5])
    monkeypatch.setattr("minstep.text.continuation.time.perf_counter", lambda: next(times))
    said = streamed(scripted("a", "bc", "d"))
    assert "".join(said) == "abcd" and (said.prompt_seconds, said.seconds) == (4.0, 3.5)
    stats = said.stats(PROMPT)
    assert (stats["prompt_tps"], stats["generation_tps"]) == (16 / 4, round(3 / 3.5, 1))


@pytest.mark.parametrize("steps", [[], [Step([], NO_LOGITS[:0], [], 0, "context")]])
def test_stats_of_nothing_are_zero(steps: Sequence[Step]) -> None:
    said = streamed(iter(steps))
    assert list(said) == [] and said.tokens == [] and said.text == ""
    stats = said.stats(PROMPT)
    assert (stats["new_tokens"], stats["forward_passes"], stats["acceptance"]) == (0, 0, [])
    assert (stats["generation_tps"], stats["tokens_per_forward"]) == (0, 0)


@pytest.mark.parametrize("drafts", [0, 3])
def test_logprobs_are_the_log_softmax_of_the_logits_that_chose_each_token(drafts: int) -> None:
    options = {"max_tokens": 12, "ignore_eos": True, "num_draft_tokens": drafts}
    said = streamed(stepped(**options), logprobs=5)
    list(said)
    rows = [row for step in stepped(**options) for row in step.logits[: len(step.tokens)]]
    assert len(said.logprobs) == len(said.tokens) == len(rows) == 12
    for token, entry, logits in zip(said.tokens, said.logprobs, rows, strict=True):
        logits = logits.astype(np.float64)
        logs = logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())
        assert entry["token"] == token
        assert entry["logprob"] == pytest.approx(logs[token], abs=1e-12)
        top = entry["top"]
        assert [each["token"] for each in top] == np.argsort(-logs, kind="stable")[:5].tolist()
        assert [each["logprob"] for each in top] == pytest.approx(np.sort(logs)[:-6:-1].tolist())
        assert sum(np.exp(each["logprob"]) for each in top) <= 1


def test_without_being_asked_there_are_no_logprobs() -> None:
    said = streamed(scripted("abc"))
    assert list(said) and said.logprobs == []


def test_without_a_tokenizer_there_are_tokens_and_no_text() -> None:
    said = Continuation(scripted("abc"), logprobs=1)
    assert list(said) == ["", "", ""] and said.text == ""
    assert said.tokens == encode(TOKENIZER, "abc") and len(said.logprobs) == 3
