"""What nobody uses costs next to nothing: taps, checks and drafts, counted in calls and not timed.

Counted are calls of the package's own functions, and of methods of arrays that these call: how many
there are depends on neither the machine nor the versions of Python and NumPy.
"""

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest

import minstep
from minstep import model, validation
from minstep.cache import new_caches
from minstep.generate import steps
from minstep.model import decoder, head
from minstep.sampling import GREEDY, distribution, draw
from minstep.tap import Array, ScopedTap, Tap, silent

PACKAGE = str(Path(minstep.__file__).parent)
CONFIG = minstep.load_config(minstep.find_config("tiny"))
WEIGHTS = minstep.random_weights(CONFIG, np.random.default_rng(0))
PROMPT, TOKENS = [5, 17, 9], 6
CLAMPED, DENSE, MOE = 7, 1, 2  # layers; all slide, and clamps check what they clamp

# What is there for whoever listens, or for weights that are not finite: calls of one layer for one
# token. Of a tap as many as there are names; of anything else in these two files none.
MOST = {"tap.py:at": 3, "tap.py:wants": 1}
MOST |= {"validation.py:check_finite": 4, "validation.py:is_finite": 4}
MOST_A_LAYER = {DENSE: 100, MOE: 136, CLAMPED: 140}  # calls of any kind
# What `steps` adds to a token without drafts, and to each layer of it: a window looks once more.
OF_STEPS = {"generate.py:steps", "validation.py:is_finite", "sampling.py:verify", "mtp.py:propose"}
MOST_OF_CACHES = 2


def counted(work: Callable[[], object]) -> Counter[str]:
    """The calls that `work` makes: of functions as file:name, of methods of arrays by name."""
    calls = Counter[str]()

    def note(frame: FrameType, event: str, called: Any) -> None:
        code = frame.f_code
        if not code.co_filename.startswith(PACKAGE):
            return
        if event == "call" and not code.co_name.startswith("<"):
            calls[f"{code.co_filename.removeprefix(PACKAGE)[1:]}:{code.co_name}"] += 1
        if event == "c_call" and isinstance(getattr(called, "__self__", None), np.ndarray):
            calls[called.__name__] += 1

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(before)
    return calls


def cut(layers: int) -> tuple[Any, Any]:
    """The weights and the config of the first so many layers."""
    weights = WEIGHTS._replace(layers=WEIGHTS.layers[:layers], mtp=())
    return weights, CONFIG._replace(layers=CONFIG.layers[:layers], mtp_layers=())


def of_a_token(layers: int, listening: Tap = silent) -> Counter[str]:
    """The calls of the decoder for one token after a prompt, through the first so many layers."""
    weights, config = cut(layers)
    caches = new_caches(config.layers, np.float32, 0, len(PROMPT), 20)
    decoder(PROMPT, weights, config, caches=caches)
    return counted(lambda: decoder([3], weights, config, caches=caches, tap=listening))


def of_a_layer(n: int, listening: Tap = silent) -> Counter[str]:
    """The calls that layer n adds to those of a token."""
    return of_a_token(n + 1, listening) - of_a_token(n, listening)


class Keep(ScopedTap):
    """Keeps names and arrays, and wants nothing that is not there anyway."""

    def __init__(self) -> None:
        self.seen = dict[str, Array]()

    def __call__(self, name: str, x: Array) -> Array:
        self.seen[self._full(name)] = x
        return x


def check_tap(listening: Tap) -> None:
    """A silent tap hands back the array itself, and keeps neither it nor a scope."""
    x = np.ones(3)
    assert listening("name", x) is x
    assert listening.at("model.layers.3").at("moe") is listening
    assert not listening.wants("margin") and vars(listening) == {}


def check_layer(n: int) -> None:
    """A layer calls taps and checks as often as is stated above, and no others."""
    kept, calls = Keep(), of_a_layer(n)
    of_a_token(n + 1, kept)
    names = [name for name in kept.seen if name.startswith(f"{CONFIG.layers[n].name}.")]
    limits = MOST | {"tap.py:__call__": len(names) + 1}  # and the layer's own output
    for name, count in calls.items():
        if name.startswith(("tap.py", "validation.py")):
            assert count <= limits.get(name, 0), name
    assert calls.total() <= MOST_A_LAYER[n], calls


def bare(layers: int, count: int) -> list[int]:
    """What `steps` decodes, by nothing but decoder, head, and a token drawn as it is there."""
    (weights, config), rng = cut(layers), np.random.default_rng(0)
    caches = new_caches(config.layers, np.float32, 0, 1, len(PROMPT) + count)
    tokens = list[int]()
    for _ in range(count):
        x = decoder(tokens[-1:] or PROMPT, weights, config, caches=caches)  # [T, D]
        logits = head(x[-1:], weights, config)[0]  # [V]
        tokens.append(draw(distribution(logits, [*PROMPT, *tokens], GREEDY), rng))
    return tokens


def stepped(layers: int, count: int) -> list[int]:
    """The same with `steps`, which drafts nothing where there is no MTP layer."""
    (weights, config), rng = cut(layers), np.random.default_rng(0)
    decoded = steps(PROMPT, weights, config, rng, count, ignore_eos=True)
    return [token for step in decoded for token in step.tokens]


def check_steps(layers: int) -> None:
    """`steps` adds to each token what is stated above, whatever the number of layers."""
    calls = Counter[str]()
    for decoded, sign in ((stepped, 1), (bare, -1)):
        for count in (2 + TOKENS, -2):
            found = counted(lambda decoded=decoded, count=count: decoded(layers, abs(count)))
            for name, times in found.items():
                calls[name] += times * (sign if count > 0 else -sign)
    truncated = calls.pop("cache.py:truncate")
    assert truncated <= TOKENS * MOST_OF_CACHES * layers
    assert +calls == dict.fromkeys(OF_STEPS, TOKENS)


def test_a_silent_tap_hands_back_the_array_itself_and_keeps_nothing() -> None:
    check_tap(silent)
    of_a_token(3)
    check_tap(silent)


@pytest.mark.parametrize("n", MOST_A_LAYER)
def test_a_layer_calls_a_tap_once_a_tensor_and_few_checks(n: int) -> None:
    check_layer(n)


@pytest.mark.parametrize("n", MOST_A_LAYER)
def test_nothing_more_is_computed_for_a_tap_that_wants_nothing(n: int) -> None:
    silently, heard = of_a_layer(n), of_a_layer(n, Keep())
    for calls in (silently, heard):
        for name in [name for name in calls if name.startswith("tap.py")]:
            del calls[name]
    assert heard == silently


@pytest.mark.parametrize("layers", [1, 4, 8])
def test_steps_add_four_calls_to_a_token_and_two_to_a_layer(layers: int) -> None:
    assert stepped(layers, TOKENS) == bare(layers, TOKENS)
    check_steps(layers)


# Each check fails where something that nobody uses is planted


def test_a_tap_that_copies_is_seen() -> None:
    class Copying(Tap):
        def __call__(self, name: str, x: Array) -> Array:
            return x.copy()

    with pytest.raises(AssertionError):
        check_tap(Copying())
    with pytest.raises(AssertionError):
        check_tap(Keep())


def test_a_check_or_a_tap_more_in_each_layer_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    block = model.block

    def checking(x: Array, *others: Any) -> Array:
        validation.check_states(x, CONFIG.hidden_size)
        return block(x, *others)

    def tapping(*others: Any) -> Array:
        return silent("", block(*others))

    def computing(x: Array, weights: Any, *others: Any) -> Array:
        for _ in range(3):
            model.rms_norm(x, weights.input_layernorm, 1e-5)
        return block(x, weights, *others)

    plants = ((checking, "check_states"), (tapping, "__call__"), (computing, "Counter"))
    for planted, naming in plants:
        with monkeypatch.context() as changed:
            changed.setattr(model, "block", planted)
            with pytest.raises(AssertionError, match=naming):
                check_layer(MOE)


def test_work_of_steps_in_each_layer_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def checked(tokens: Any, weights: Any, config: Any, *others: Any) -> Array:
        for cache in others[1]:
            validation.is_finite(cache.keys)
        return decoder(tokens, weights, config, *others)

    monkeypatch.setattr(sys.modules["minstep.generate"], "decoder", checked)
    with pytest.raises(AssertionError, match="is_finite"):
        check_steps(4)
