"""bench's copies without taps and checks compute the same, and have none left."""

import ast

import numpy as np
import pytest

from minstep import find_config, open_checkpoint
from minstep.bench.decoding import Model, continued
from minstep.bench.peers import Setup
from minstep.bench.unused import CHAIN, _compiled, _same_code, bare, compared, without
from minstep.lab.copies import copies, source

TEXT = '''
def f(x, tap):
    """Says what it does."""
    if x < 0:
        raise ValueError("negative")
    assert x
    check_finite("x", x)
    for n in x:
        if n:
            message = "no"
            raise ValueError(message)
    if tap.wants("a"):
        x = tap("a", x)
    elif x:
        raise ValueError
    return g(tap("b", tap("c", check_ids(x, 9) + 1)), tap.at("d"))
'''
BARE = '''
def f(x, tap):
    """Says what it does."""
    for n in x:
        pass
    if False:
        x = x
    return g(x + 1, tap)
'''


@pytest.fixture(scope="module")
def trained() -> Model:
    checkpoint = open_checkpoint(find_config("trained"))
    return Model(find_config("trained"), checkpoint.weights(0), checkpoint.config)


def test_taps_asserts_and_checks_are_taken_out_and_nothing_else() -> None:
    assert ast.unparse(without(TEXT)).strip() == BARE.strip()


def test_no_file_of_the_chain_keeps_a_tap_or_a_check() -> None:
    assert sum(source(name).count('tap("') for name in CHAIN) > 20
    for name in CHAIN:
        left = ast.unparse(without(source(name)))
        assert "tap('" not in left and "raise InputError" not in left, name
        assert "check_finite(" not in left and "check_ids(" not in left, name


def test_all_sides_continue_a_prompt_alike(trained: Model) -> None:
    prompt = [5, 17, 9, 40]
    stripped = copies({name: without(source(name)) for name in CHAIN}, CHAIN)("generate").steps
    _, _, tokens = continued(trained, prompt, 6)
    assert len(tokens) == 7
    assert continued(trained, prompt, 6, decode=stripped)[2] == tokens
    assert bare(trained, prompt, 6)[2] == tokens
    with pytest.raises(IndexError):  # nothing checks there
        continued(trained, [10**6], 1, decode=stripped)


def test_rows_are_named_by_what_they_are_held_against(
    trained: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minstep.bench.unused.TOKENS", 2)
    setup = Setup(trained.folder, None, rounds=1, quick=True, seed=0)
    rows, is_same = compared("trained", trained, setup)
    assert is_same and [list(row.others) for row in rows] == [["taken out"], ["bare loop"]]
    assert all(np.min(row.ours) > 0 for row in rows)


def test_comments_are_no_part_of_the_bytecode() -> None:
    assert all(_same_code(*_compiled(name)) for name in CHAIN)
    one, other = (compile(text, "x", "exec") for text in ("def f(): return 1", "def f(): 2"))
    assert not _same_code(one, other)
