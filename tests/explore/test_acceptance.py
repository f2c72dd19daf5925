"""The MTP lab: a model made by hand whose drafts are all right, and what a mistake does to it."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

import minstep
from minstep.config import Config
from minstep.errors import InputError
from minstep.explore.acceptance import (
    AS_IT_IS,
    MAIN,
    WAYS,
    Agreement,
    Drafted,
    Way,
    agreements,
    beginnings,
    draft,
    first_difference,
    mtp_report,
    mtp_table,
    worth,
)
from minstep.model import BlockWeights, ModelWeights
from minstep.parity.variants import variant
from minstep.store.config_file import shipped_folder
from minstep.tap import Array
from minstep.text.continuation import Pass
from minstep.text.tokenizer import load_tokenizer
from minstep.train.data import encode_documents, hold_out
from minstep.train.documents import Document
from tests.support.tiers import cases

TINY = minstep.load_config(minstep.find_config("tiny"))._replace(eos_token_ids=())
WEIGHTS = minstep.random_weights(TINY, np.random.default_rng(0))
LM_HEAD, NORMED, MAIN_STATE, NO_DRAFTS = WAYS[1:]
STEP = 7  # in the text of the model made by hand, token t is followed by t + STEP
TRAINED = shipped_folder() / "trained"


def made_by_hand(config: Config) -> ModelWeights:
    """A model that continues t with t + STEP, and whose depths see that from the state alone.

    Its layers add nothing. Depth k turns the state once more, so its head must fit k turns; the
    final norm and the norms of heads flip signs, so that a state behind one is another.
    """
    D, V, rng = config.hidden_size, config.vocab_size, np.random.default_rng(3)
    embedding, none = rng.standard_normal((V, D)), np.zeros(D)
    turn = np.linalg.qr(rng.standard_normal((D, D)))[0]  # [D, D]
    signs = rng.permuted(np.tile([-1.0, 1.0], (1 + len(WEIGHTS.mtp), D // 2)), axis=1)  # [1+M, D]

    def idle(block: BlockWeights) -> BlockWeights:
        out = np.zeros_like(block.self_attn.o_proj)
        block = block._replace(self_attn=block.self_attn._replace(o_proj=out))
        parts = {
            name: part._replace(down_proj=np.zeros_like(part.down_proj))
            for name in ("mlp", "moe", "share_expert")
            if (part := getattr(block, name)) is not None
        }
        return block._replace(**parts)

    def head(state_of: Array, k: int) -> Array:
        """Row v fits the state [V, D] of the token that stands k + 1 before v."""
        return np.roll(state_of, STEP * (k + 1), axis=0) * signs[k]

    state, depths = embedding, []
    for k, depth in enumerate(WEIGHTS.mtp, start=1):
        state = state @ turn.T
        norms = {"enorm": none, "hnorm": none, "shared_head_norm": signs[k] - 1}
        eh_proj = np.concatenate((np.zeros((D, D)), turn), axis=1)
        own = {"eh_proj": eh_proj, "shared_head_output": head(state, k)}
        depths.append(depth._replace(**norms, **own, block=idle(depth.block)))
    main = {"embed_tokens": embedding, "lm_head": head(embedding, 0), "norm": signs[0] - 1}
    layers = tuple(map(idle, WEIGHTS.layers))
    return WEIGHTS._replace(**main, layers=layers, mtp=tuple(depths))


def text(start: int, count: int) -> list[int]:
    return [(start + STEP * n) % TINY.vocab_size for n in range(count)]


HAND = made_by_hand(TINY)
PROMPTS = [text(start, 5) for start in (3, 100, 211)]


def report(ways: Sequence[Way] = WAYS) -> dict[str, Any]:
    drafted = {way.name: draft(PROMPTS, HAND, TINY, way, 13) for way in ways}
    return mtp_report(drafted, agreements([text(9, 40)], HAND, TINY, ways))


def test_each_mistake_spoils_the_depths_that_it_touches_and_never_the_text() -> None:
    found = report()
    assert found["is_lossless"] and found["main_model"] == 1.0
    kept = {name: way["kept"] for name, way in found["ways"].items()}
    assert kept["as it is"] == [1.0, 1.0, 1.0]
    assert kept[LM_HEAD.name][0] < 0.2 and kept[NORMED.name][0] < 0.2
    assert kept[MAIN_STATE.name][0] == 1.0, "the first depth is fed the main state anyway"
    assert kept[MAIN_STATE.name][1] < 0.2
    assert kept[NO_DRAFTS.name] == []
    texts = draft(PROMPTS, HAND, TINY, NORMED, 13).texts
    assert texts == [text(prompt[-1] + STEP, 13) for prompt in PROMPTS]


def test_where_all_drafts_are_kept_a_pass_gives_four_tokens_and_without_drafts_one() -> None:
    ways = report()["ways"]
    assert ways["as it is"]["mean_accepted"] == 3.0
    assert ways["as it is"]["tokens_per_pass"] == 4.0  # 12 tokens after the prompt's, in 3 passes
    assert ways["as it is"]["passes"] == 3 * len(PROMPTS)
    assert ways[NO_DRAFTS.name]["tokens_per_pass"] == 1.0
    assert ways[NO_DRAFTS.name]["mean_accepted"] == 0.0


def test_with_true_tokens_the_same_depths_are_spoilt() -> None:
    ways = report()["ways"]
    for which in ("main", "text"):
        assert ways["as it is"][which] == [1.0, 1.0, 1.0]
        assert ways[LM_HEAD.name][which][0] < 0.2 and ways[NORMED.name][which][0] < 0.2
        assert ways[MAIN_STATE.name][which][0] == 1.0
        assert max(ways[MAIN_STATE.name][which][1:]) < 0.2
    assert ways[NO_DRAFTS.name]["main"] == []


@pytest.mark.parametrize("way", WAYS[:-1], ids=lambda way: way.name)
@pytest.mark.parametrize("weights", [WEIGHTS, HAND], ids=["random", "hand"])
def test_a_mistake_is_the_same_in_the_drafter_and_with_true_tokens(
    weights: ModelWeights, way: Way
) -> None:
    rng = np.random.default_rng(1)
    prompts = rng.integers(TINY.vocab_size, size=(9, 6)).tolist()
    drafted = draft(prompts, weights, TINY, way, 2, np.float64)
    for prompt, new, each in zip(prompts, drafted.texts, drafted.passes, strict=True):
        tokens = [*prompt, new[0], *each.drafts[:-1]]  # what each depth saw at the prompt's end
        hidden = minstep.decoder(tokens, weights, TINY, np.float64)
        forward = variant(way.forward).mtp.mtp_forward
        depths = forward(tokens, hidden, way.weights(weights), TINY)
        assert each.drafts == [int(logits[len(prompt) - 1].argmax()) for logits in depths]


def test_agreement_compares_the_same_token_of_both_and_counts_each_that_is_there() -> None:
    window = text(9, 40)
    window[20] = 5  # a token that nobody expects
    found = agreements([window, text(1, 3)], HAND, TINY, [AS_IT_IS])
    # Wrong are the guess of token 20, and the one that is made from its state.
    assert found[MAIN] == [Agreement(39 + 2, 39 + 2, 39 + 2 - 2)]
    depths = found[AS_IT_IS.name]
    assert [depth.guesses for depth in depths] == [38 + 1, 37, 36]
    assert [depth.guesses - depth.text for depth in depths] == [2, 2, 2]
    # Depth k at i and the main model at i + k part where one of them starts from token 20.
    assert [depth.guesses - depth.main for depth in depths] == [2, 2, 2]


def test_a_depth_may_agree_with_the_main_model_where_both_miss_the_text() -> None:
    """At the end of each run of tokens that follow each other, what comes next is another's."""
    window, V = [token for start in (9, 100, 31, 250) for token in text(start, 6)], TINY.vocab_size
    found, T = agreements([window], HAND, TINY, [AS_IT_IS]), len(window)
    for k, depth in enumerate(found[AS_IT_IS.name], start=1):
        guess = [(token + STEP * (k + 1)) % V for token in window]
        choice = [(token + STEP) % V for token in window]
        main = sum(guess[i] == choice[i + k] for i in range(T - k - 1))
        same = sum(guess[i] == window[i + k + 1] for i in range(T - k - 1))
        assert depth == Agreement(T - k - 1, main, same) and same < main < T - k - 1


def test_progress_is_told_of_prompts_and_of_tokens() -> None:
    done: list[int] = []
    draft(PROMPTS, HAND, TINY, max_tokens=2, progress=done.append)
    agreements([text(1, 4), text(2, 5)], HAND, TINY, [AS_IT_IS], progress=done.append)
    assert done == [1, 2, 3, 4, 9]


def test_shares_are_counted_over_drafts_and_over_those_that_were_reached() -> None:
    # Four passes with three drafts each, one with a single draft as at the end of the context.
    accepted = [(3, 3), (1, 3), (0, 3), (2, 3), (1, 1)]
    passes = [Pass(0, [4] * tried, kept, kept + 1) for kept, tried in accepted]
    found = worth(Drafted([[0] * 9, [0] * 5], passes))
    assert found["kept"] == [0.8, 0.5, 0.25]  # 4 of 5, 2 of 4, 1 of 4
    assert found["once_reached"] == [0.8, 0.6667, 0.5]  # 4 of 5, 2 of 3, 1 of 2
    assert found["mean_accepted"] == 1.4 and found["tokens_per_pass"] == 2.4
    assert worth(Drafted([[0, 0]], [Pass(0, [4, 4], 0, 1)]))["once_reached"] == [0.0, None]


def test_a_text_that_differs_is_reported_with_its_place() -> None:
    one = Drafted([[1, 2, 3], [4, 5, 6]], [Pass(1, [9], 0, 1)])
    other = Drafted([[1, 2, 3], [4, 5, 7]], [Pass(1, [9], 0, 1)])
    assert first_difference(one, one) is None and first_difference(one, other) == (1, 2)
    guessed = {MAIN: [Agreement(4, 4, 1)], "a": [Agreement(3, 2, 1)], "b": [Agreement(0, 0, 0)]}
    found = mtp_report({"a": one, "b": other}, guessed)
    assert not found["is_lossless"] and found["ways"]["b"]["difference"] == (1, 2)
    assert found["ways"]["a"]["main"] == [0.6667] and found["ways"]["b"]["text"] == [None]
    table = mtp_table(found)
    assert "NOT the same text: b differs in prompt 2 at new token 3" in table


def test_the_table_fits_a_hundred_columns_and_says_that_nothing_is_lost() -> None:
    lines = mtp_table(report()).splitlines()
    assert all(len(line) <= 100 for line in lines)
    assert any(line.startswith("the same text in all 5 ways") for line in lines)
    assert any(line.startswith("as it is") and "3.00    4.00" in line for line in lines)


def test_prompts_are_beginnings_of_texts_and_later_pieces_only_where_those_are_too_few() -> None:
    texts = [list(range(n * 100, n * 100 + length)) for n, length in enumerate((9, 4, 3, 12))]
    starts = [0, 100, 300]
    for seed in range(5):
        few = beginnings(texts, 2, 4, np.random.default_rng(seed))
        assert all(len(piece) == 4 and piece[0] in starts for piece in few)
        assert few == beginnings(texts, 2, 4, np.random.default_rng(seed))
    drawn = {str(beginnings(texts, 2, 4, np.random.default_rng(seed))) for seed in range(9)}
    assert len(drawn) > 1, "the seed changes nothing"
    every = beginnings(texts, 6, 4, np.random.default_rng(0))
    assert sorted(piece[0] for piece in every) == [0, 4, 100, 300, 304, 308]
    for count, length in ((7, 4), (1, 13)):
        with pytest.raises(InputError, match=f"pieces of {length} tokens, expected at least"):
            beginnings(texts, count, length, np.random.default_rng(0))


def test_continuations_that_end_at_once_are_an_input_error() -> None:
    with pytest.raises(InputError, match="one token long"):
        mtp_report({"a": Drafted([[2]], [])}, {MAIN: [Agreement(1, 1, 1)]})


@pytest.mark.skipif(not any(TRAINED.glob("*.safetensors")), reason="no trained model is shipped")
@pytest.mark.parametrize("count", cases([4], [24]))
def test_the_shipped_models_drafts_are_kept_and_with_the_wrong_head_they_are_not(
    count: int,
    documents: list[Document],
) -> None:
    checkpoint = minstep.open_checkpoint(TRAINED)
    weights, config = checkpoint.weights(None), checkpoint.config
    tokenizer = load_tokenizer(TRAINED)
    assert tokenizer
    held_out = hold_out(documents).held_out
    texts = [encode_documents([document], tokenizer)[:-1].tolist() for document in held_out]
    prompts = beginnings(texts, count, 64, np.random.default_rng(0))
    right, wrong = (draft(prompts, weights, config, way, 48) for way in (AS_IT_IS, LM_HEAD))
    assert right.texts == wrong.texts
    assert worth(right)["mean_accepted"] >= 1.0
    assert worth(wrong)["mean_accepted"] < worth(right)["mean_accepted"] / 2
