"""Bugs that ports of this model have had, each planted as a one-line mutation, must not go unseen.

A mutation replaces one fragment of one source file, compiles the file again, and lends the code of
the changed functions to the real ones: whoever imported them meets the bug. Then the golden models
are run in float64, and logits must depart by a hundred times the float32 tolerance. Most are the
footguns of minstep/parity/known_bugs.py.

Not in the table, since no logit changes: capping silu(gate) from below too (SiLU never passes
-0.28, limits are larger), and MTP positions counted from k (rotation is relative).

Decoding has two tables of its own. Bugs of drafts change no token, so the golden drafts must
change; bugs that goldens cannot show must fail a test that states the property, named beside them.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from safetensors.numpy import load_file

import minstep
from minstep.parity.decoding_bugs import UNSEEN
from minstep.parity.known_bugs import FOOTGUNS
from minstep.parity.trace import record
from minstep.sampling import Sampling
from tests.model import test_attention, test_cache, test_drafts, test_golden
from tests.support.lend import lent

GOLDEN = Path(__file__).parents[1] / "golden"
FILES = sorted(path.parent for path in GOLDEN.glob("*/*/config.json"))
EXACT = 1e-10  # the float64 tolerance, relative to a tensor's largest value
SEEN = 100 * 2e-5  # a hundred times the float32 tolerance


class Mutation(NamedTuple):
    """One bug: where it is planted, and the golden model that shows it."""

    bug: str
    module: str
    right: str
    wrong: str
    golden: str = "tiny"
    refused: str = ""  # the bug cannot run: what the refusal says of a shape or file that misfits


# The golden model that shows a bug, where that is not "tiny".
GOLDENS = {
    "norm weight used as w, not 1 + w": "no_extras",
    "1 added twice to the norm weight": "no_extras",
    "main model's state fed to every MTP depth": "drafts",
    "interleaved instead of half-split rotation": "no_extras",
    "scaling factor of the experts forgotten": "odd",
    "clamp forgotten": "odd",
}
# More bugs of the forward pass: those of files, and one that no single layer shows.
OTHERS = {
    "head count": [
        Mutation("of full layers everywhere", "config", "settings[kind] = other", "pass", refused="q_proj.weight has shape"),
        Mutation("of full layers everywhere, odd sizes", "config", "settings[kind] = other", "pass", "odd", refused="q_proj.weight has shape"),
    ],
    "rotary width": [
        Mutation("exponent over head_dim, odd sizes", "rope", "dtype=dtype) / spec.rotary_dim", "dtype=dtype) / 12", "odd"),
    ],
    "shards": [
        Mutation(*UNSEEN["shards"][0], refused="is missing"),
    ],
    "moe_layers_enum": [
        Mutation(*UNSEEN["moe_layers_enum"][1], refused="mlp.gate_proj.weight is missing"),
    ],
    "beyond the list": [
        Mutation("one MTP layer for all depths", "mtp", "zip(weights.mtp, config", "zip(weights.mtp[:1] * len(weights.mtp), config", "drafts"),
    ],
}  # fmt: skip
BUGS = {row: [Mutation(*f, GOLDENS.get(f.bug, "tiny")) for f in FOOTGUNS[row]] for row in FOOTGUNS}
BUGS["head count"] = []  # a layer alone may take part of a matrix, a whole model is refused
BUGS = {row: BUGS.get(row, []) + OTHERS.get(row, []) for row in BUGS | OTHERS}
CASES = [pytest.param(m, id=f"{row}: {m.bug}") for row, bugs in BUGS.items() for m in bugs]
ROUTING = {
    "router bias forgotten when experts are chosen",
    "router bias added to the logits",
    "softmax router, not sigmoid",
}


@contextmanager
def planted(mutation: Mutation) -> Iterator[None]:
    """The package with one bug in it, for the length of the block."""
    module = import_module(f"minstep.{mutation.module}")
    assert module.__file__
    source = Path(module.__file__).read_text(encoding="utf-8")
    assert source.count(mutation.right) == 1, f"{mutation.bug}: the fragment is no longer unique"
    with lent(module, source.replace(mutation.right, mutation.wrong)) as changed:
        assert changed, f"{mutation.bug}: no function changed"
        yield


class Departure(NamedTuple):
    """How far a run is from the golden one: largest errors relative to a tensor's largest value."""

    worst: float  # of all activations
    logits: float  # of the main head and the MTP heads
    rerouted: list[str]  # layers that chose other experts, in order


def departure(folder: Path) -> Departure:
    """Run the checkpoint in float64 over the golden prompt, and compare every golden tensor."""
    checkpoint = minstep.open_checkpoint(folder)
    prompt = json.loads((folder.parent / "meta.json").read_text())["prompt"]
    trace = record(prompt, checkpoint.weights(), checkpoint.config, np.float64)
    golden = load_file(folder.parent / "golden_f64.safetensors")
    assert set(golden) <= set(trace)
    ids = {name for name in golden if name.endswith(".ids")}
    errors = {n: float(np.abs(trace[n] - x).max() / np.abs(x).max()) for n, x in golden.items()}
    return Departure(
        max(e for n, e in errors.items() if n not in ids),
        max(e for n, e in errors.items() if n.endswith(("lm_head", "shared_head.output"))),
        [name for name in trace if name in ids and errors[name]],
    )


@pytest.mark.parametrize("folder", FILES, ids=lambda f: f"{f.parent.name}-{f.name}")
def test_without_a_bug_nothing_departs(folder: Path) -> None:
    found = departure(folder)
    assert found.worst < EXACT and not found.rerouted


@pytest.mark.parametrize("mutation", CASES)
def test_a_bug_moves_logits_by_a_hundred_tolerances(mutation: Mutation) -> None:
    with planted(mutation):
        if mutation.refused:
            with pytest.raises(minstep.InputError, match=mutation.refused):
                departure(GOLDEN / mutation.golden / "bf16")
        else:
            found = departure(GOLDEN / mutation.golden / "bf16")
            assert found.logits >= SEEN
            assert (mutation.bug not in ROUTING) or found.rerouted[0] == "model.layers.2.moe.ids"


def test_every_published_bug_is_planted() -> None:
    assert len(BUGS) == 16 + 1 and all(BUGS.values())  # 17 without the tool-call parser's
    assert ROUTING <= {mutation.bug for mutation in BUGS["router"]}


def test_layer_numbers_read_as_characters_make_the_wrong_layers_dense() -> None:
    # Single digits read the same either way: only the released model's two-digit layers show it.
    config = minstep.find_config("step-3.5-flash")
    digits = Mutation(*UNSEEN["moe_layers_enum"][0])

    def moe_layers() -> list[int]:
        return [n for n, spec in enumerate(minstep.load_config(config).layers) if spec.moe]

    assert moe_layers() == list(range(3, 45))
    with planted(digits):
        assert moe_layers() == list(range(10))


def test_a_mutation_whose_line_has_gone_is_reported() -> None:
    stale = Mutation("stale", "norm", "this line is not there", "")
    with pytest.raises(AssertionError, match="no longer unique"), planted(stale):
        pass


def test_harmless_mutations_move_nothing_and_bugs_end_with_their_block() -> None:
    with planted(Mutation("harmless", "norm", "(1 + as", "(1.0 + as")):
        assert departure(FILES[-1]).worst < EXACT
    with planted(Mutation(*FOOTGUNS["norm weight"][0])):
        assert departure(FILES[-1]).worst >= SEEN
    assert departure(FILES[-1]).worst < EXACT


# Decoding.

UNCHECKED, OVERLOOKED, LEFT, STALE = UNSEEN["decoding"]
PROPOSE = "self.states = np.concatenate((self.states, hidden))  # [rows, D]\n        text,"
FEED = "self.states = np.concatenate((self.states, hidden))  # [rows, D]\n        known"
TABLE = "cache.truncate(self.first)\n        table = rotations([spec], self.first,"
# Bugs of the drafts: every token stays as it was, and other drafts are made.
DRAFTS = {
    "head": [
        Mutation("lm_head in its place", "mtp", "mtp_head(x[-1:], self.weights.mtp[k - 1],", "mtp_head(x[-1:], self.weights.mtp[k - 1]._replace(shared_head_output=self.weights.lm_head),"),
        Mutation("final norm before it", "mtp", "mtp_head(x[-1:], self.weights.mtp[k - 1],", "mtp_head(x[-1:], self.weights.mtp[k - 1]._replace(shared_head_norm=self.weights.norm),"),
        Mutation("of the first depth for all", "mtp", "mtp_head(x[-1:], self.weights.mtp[k - 1],", "mtp_head(x[-1:], self.weights.mtp[0],"),
    ],
    "hidden": [
        Mutation("after the final norm", "mtp", PROPOSE, PROPOSE.replace("hidden)", "rms_norm(hidden, self.weights.norm, self.config.rms_norm_eps))")),
        Mutation("of the prompt, after the final norm", "mtp", FEED, FEED.replace("hidden)", "rms_norm(hidden, self.weights.norm, self.config.rms_norm_eps))")),
        Mutation("passed on after the norm", "mtp", "            q.append(", "            x = rms_norm(x, self.weights.mtp[k - 1].shared_head_norm, self.config.rms_norm_eps)\n            q.append("),
        Mutation("h^0 for every depth", "mtp", "text[self.first + k :], x)", "text[self.first + k :], self.states)"),
        Mutation("of rejected drafts, where some are accepted", "generate", "hidden[: accepted + 1]", "hidden[len(hidden) - accepted - 1 :]"),
    ],
    "embedding": [
        Mutation("of the position before", "mtp", "text[self.first + k :]", "text[self.first + k - 1 : -1]"),
        Mutation("of the position before, in the prompt", "mtp", "tokens[self.first + k : self.first + k + known]", "tokens[self.first + k - 1 : self.first + k - 1 + known]"),
        Mutation("of the token after a state, at every depth", "mtp", "text[self.first + k :]", "text[self.first + 1 : self.first + 1 + len(x)]"),
    ],
    "positions": [
        Mutation("counted from where rows are made again", "mtp", "rotations([spec], self.first,", "rotations([spec], 0,"),
        Mutation("after the rows that are rolled back", "mtp", TABLE, "stale = cache.end\n        " + TABLE.replace("self.first,", "stale,")),
    ],
    "cache": [
        Mutation("not rolled back", "mtp", "cache.truncate(self.first)", "pass"),
        Mutation("one for all depths", "mtp", "self.caches[k - 1]", "self.caches[0]"),
        Mutation(*STALE),
        Mutation("one row from a draft kept", "mtp", "self._settle(len(tokens) - self.count - self.first)", "self._settle(len(tokens) + 1 - self.count - self.first)"),
        Mutation("states of the prompt's end dropped", "mtp", "self._settle(known)", "self._settle(known); self.states = 0 * self.states"),
    ],
    "weights": [
        Mutation("of the first depth for all", "mtp", "layer, embed_tokens = self.weights.mtp[k - 1]", "layer, embed_tokens = self.weights.mtp[0]"),
        Mutation("of the depth before", "mtp", "layer, embed_tokens = self.weights.mtp[k - 1]", "layer, embed_tokens = self.weights.mtp[max(0, k - 2)]"),
    ],
}  # fmt: skip
# Bugs of the main model's side: the tokens change, for some count of drafts.
TOKENS = [
    (3, Mutation(*LEFT, "drafts")),
    (3, Mutation("cache rolled back by one too few", "generate", "cache.truncate(len(tokens) + accepted)", "cache.truncate(min(cache.end, len(tokens) + accepted + 1))", "drafts")),
    (3, Mutation("first cache alone rolled back", "generate", "for cache in caches:\n            cache", "for cache in caches[:1]:\n            cache", "drafts")),
    (0, Mutation("positions one too far after the prompt", "model", "first = caches[0].end if caches else 0", "first = caches[0].end + (caches[0].end > 0) if caches else 0", "drafts")),
    (0, Mutation("positions one too near after the prompt", "model", "first = caches[0].end if caches else 0", "first = max(0, caches[0].end - 1) if caches else 0", "drafts")),
    (0, Mutation("window cache too short by one", "cache", "self.keep = self.sees + slack", "self.keep = self.sees - 1 + slack", "tiny")),
    (3, Mutation("draft verified by the next row", "sampling", "distribution(logits[j],", "distribution(logits[j + 1],", "drafts")),
    (3, Mutation("draft verified by the first row", "sampling", "distribution(logits[j],", "distribution(logits[0],", "drafts")),
    (3, Mutation("last token from the row before", "sampling", "distribution(logits[len(drafts)],", "distribution(logits[len(drafts) - 1],")),
    (3, Mutation("first kept draft lost", "sampling", "return j, draw(rest, rng)", "return max(0, j - 1), draw(rest, rng)", "drafts")),
    (3, Mutation(*UNCHECKED, "drafts")),
    (3, Mutation("last token not run", "generate", "decoder([tokens[-1], *drafts]", "decoder([tokens[-2], *drafts]", "drafts")),
]  # fmt: skip


def patching(test: Callable[..., None], *arguments: object) -> Callable[[], None]:
    """A test that patches, as a function of nothing."""

    def runs() -> None:
        with pytest.MonkeyPatch.context() as patch:
            test(*arguments, patch)

    return runs


def blocks() -> None:
    """Attention in blocks, over a few draws of sizes, windows and block ends."""
    for seed in range(30):
        patching(test_attention.test_where_blocks_end_changes_nothing, seed)()


def windows() -> None:
    for seed in range(5):
        test_cache.test_appends_and_roll_backs_leave_what_a_list_would_hold("window", seed)


def acceptance() -> None:
    for seed in range(5):
        test_drafts.test_a_draft_kept_or_replaced_is_distributed_as_if_there_were_none(
            seed, Sampling(1.0)
        )


def drafted() -> None:
    for seed in range(20):
        test_drafts.test_each_draft_is_what_its_depth_says_of_the_whole_text(seed)


def joint(how: Sampling, drafts: int) -> Callable[[], None]:
    """The distribution of three tokens after another, over all that may happen."""

    def runs() -> None:
        with pytest.MonkeyPatch.context() as patch:
            test_drafts.let_forks_draw(patch)
            weights, config = test_drafts.small(3, drafts)
            test_drafts.same_joint([1], weights, config, 3, how, drafts)

    return runs


def ends() -> None:
    test_drafts.test_an_end_token_among_kept_drafts_ends_the_text_there(3, 3)


context = patching(
    test_drafts.test_near_the_end_of_the_context_there_are_fewer_drafts_and_nothing_runs_past_it,
    3,
    0.0,
)
warm = joint(Sampling(1.0), 1)
last_punished = joint(Sampling(1.0, repetition_penalty=2.0), 1)
punished = joint(Sampling(1.0, top_k=2, repetition_penalty=2.0), 2)
# Bugs that no golden shows, and what does.
PROPERTIES = [
    (windows, Mutation("window cache too short by one", "cache", "self.keep = self.sees + slack", "self.keep = self.sees - 1 + slack")),
    (windows, Mutation("no slack to roll back", "cache", "self.keep = self.sees + slack", "self.keep = self.sees")),
    (windows, Mutation("first slots moved, not the last", "cache", "_moved(self.keys, used - kept, used, room)", "_moved(self.keys, 0, kept, room)")),
    (windows, Mutation("start left behind", "cache", "self.start = self.end - kept", "pass")),
    (drafted, Mutation("h^0 of the prompt for every depth", "mtp", "x = self._depth(k, tokens[self.first + k : self.first + k + known], x)", "self._depth(k, tokens[self.first + k : self.first + k + known], x)")),
    (drafted, Mutation("one too far after the prompt", "mtp", "rotations([spec], self.first,", "rotations([spec], self.first + (self.first > 0),")),
    (acceptance, Mutation("draft always kept", "sampling", "chance = min(1.0, float(p[draft] / q[draft]))", "chance = 1.0")),
    (acceptance, Mutation("kept with probability p", "sampling", "float(p[draft] / q[draft])", "float(p[draft])")),
    (acceptance, Mutation("replaced from p", "sampling", "rest / total if total > 0 else p", "p")),
    (acceptance, Mutation("replaced from |p - q|", "sampling", "np.maximum(p - q, 0)", "abs(p - q)")),
    (warm, Mutation("last token from the row before", "sampling", "distribution(logits[len(drafts)],", "distribution(logits[len(drafts) - 1],")),
    (warm, Mutation("drafts drawn from elsewhere than they say", "mtp", "drafts.append(draw(q[-1], rng))", "drafts.append(draw(distribution(logits, text, Sampling(0.5)), rng))")),
    (punished, Mutation("penalty forgets the drafts", "sampling", "[*text, *drafts[:j]]", "text")),
    (last_punished, Mutation("penalty forgets the drafts at the end", "sampling", "[*text, *drafts], how", "text, how")),
    (punished, Mutation("penalty forgets the new text", "generate", "logits, tokens, how, rng)", "logits, prompt, how, rng)")),
    (ends, Mutation(*OVERLOOKED)),
    (ends, Mutation("text goes on after an end token", "generate", 'new, stop = new[:end], "eos"', 'stop = "eos"')),
    (context, Mutation("drafts past the context", "mtp", "min(self.count, self.config.max_positions - len(tokens))", "self.count")),
    (blocks, Mutation("mix not shrunk", "attention", "mixed = mixed * shrink", "mixed = mixed")),
    (blocks, Mutation("sum not shrunk", "attention", "total = total * shrink", "total = total")),
    (blocks, Mutation("peak not kept", "attention", "            peak = higher\n", "            pass\n")),
    (blocks, Mutation("first key of a window skipped", "attention", "first + a - window + 1 -", "first + a - window + 2 -")),
    (blocks, Mutation("last key skipped", "attention", "d = min(c + KEYS, first + b - past.start)", "d = min(c + KEYS, max(c + 1, first + b - past.start - 1))")),
    (blocks, Mutation("not scaled", "attention", ".reshape(-1, K) * K**-0.5", ".reshape(-1, K)")),
    (blocks, Mutation("mask of the first block", "attention", "visible(first + a, b - a, start, d - c", "visible(first + a, b - a, past.start, d - c")),
    (blocks, Mutation("block at the diagonal not masked", "attention", "end > first + a + 1", "end > first + b")),
    (blocks, Mutation("block at the window's edge not masked", "attention", "first + b - start > window", "first + a - start > window")),
]  # fmt: skip
DRAFT_CASES = [pytest.param(m, id=f"{row}: {m.bug}") for row, bugs in DRAFTS.items() for m in bugs]


@pytest.mark.parametrize("mutation", DRAFT_CASES)
def test_a_bug_of_drafts_changes_the_golden_drafts_and_no_token(mutation: Mutation) -> None:
    folder = GOLDEN / "drafts" / "bf16"
    golden = test_golden.meta(folder)
    with planted(mutation):
        text = test_golden.decode(folder, 7, "float64", 3)
    assert text.trace != golden["mtp_trace"], "the drafts are as before"
    assert text.tokens == golden["greedy"]


@pytest.mark.parametrize(("drafts", "mutation"), TOKENS, ids=[m.bug for _, m in TOKENS])
def test_a_bug_of_decoding_changes_the_golden_tokens(
    drafts: int, mutation: Mutation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minstep.model.check_caches", lambda *_: None)  # refuses two of them
    folder = GOLDEN / mutation.golden / "bf16"
    with planted(mutation):
        text = test_golden.decode(folder, 7, "float64", drafts)
    assert text.tokens != test_golden.meta(folder)["greedy"]


@pytest.mark.parametrize(("check", "mutation"), PROPERTIES, ids=[m.bug for _, m in PROPERTIES])
def test_a_bug_that_no_golden_shows_fails_a_property(
    check: Callable[[], None], mutation: Mutation
) -> None:
    failures = (AssertionError, ValueError)  # ValueError: the cache refuses what it no longer holds
    with planted(mutation), np.errstate(all="ignore"), pytest.raises(failures):
        check()


@pytest.mark.thorough  # the tests of these properties run in each tier
@pytest.mark.parametrize("check", {check: 0 for check, _ in PROPERTIES})
def test_without_a_bug_every_property_holds(check: Callable[[], None]) -> None:
    check()


def test_positions_of_a_depth_may_be_counted_from_anywhere() -> None:
    folder = GOLDEN / "drafts" / "bf16"
    golden = test_golden.meta(folder)["mtp_trace"]
    first = "rotations([spec], self.first"
    with planted(Mutation("moved by five", "mtp", f"{first},", f"{first} + 5,")):
        assert test_golden.decode(folder, 7, "float64", 3).trace == golden
