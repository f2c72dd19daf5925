"""What drafts, taps and error checks cost a model that uses none of them.

Private copies of the model's files, with the taps and checks taken out, decode beside the real
ones; and the real ones decode beside a bare loop. Comments on shapes are no part of the bytecode.
Checked by: tests/test_bench_unused.py
"""

import ast
import io
import time
import tokenize
from collections.abc import Callable, Sequence
from types import CodeType
from typing import Any

import numpy as np

from minstep.bench.decoding import PROMPT, Model, continued, made
from minstep.bench.peers import Setup
from minstep.bench.timing import Found, Row, rounds
from minstep.cache import new_caches
from minstep.checkpoint import open_checkpoint
from minstep.configs import find_config, read_config
from minstep.lab.copies import copies, source
from minstep.model import decoder, head
from minstep.sampling import GREEDY, distribution, draw

CHAIN = "cache attention mlp moe model sampling mtp generate".split()  # in the order of imports
TOKENS, TURNS = 8, 40  # tokens of a block; blocks of each side for one round elsewhere


def unused(setup: Setup) -> Found:
    """The shipped model, where work hides the cost somewhat, and tiny, where little does.

    Errors where a side continues with other tokens.
    """
    raw, config, _ = read_config("tiny")
    folders = {"trained": find_config("trained"), "tiny": made(raw, config, setup)}
    rows, errors = list[Row](), list[str]()
    for name, folder in folders.items():
        checkpoint = open_checkpoint(folder)
        model = Model(folder, checkpoint.weights(0), checkpoint.config)
        its_rows, is_same = compared(name, model, setup)
        rows += its_rows
        errors += [] if is_same else [f"unused, {name}: not the same tokens"]
    notes = [f"ratios here are medians of {len(rows[0].ours)} pairs of blocks"]
    if all(_same_code(*_compiled(name)) for name in CHAIN):
        notes.append(f"shape comments: the bytecode of {len(CHAIN)} files is the same without them")
    return Found(rows, errors, notes)


def compared(name: str, model: Model, setup: Setup) -> tuple[list[Row], bool]:
    """Rows of one model, and whether all sides continue a prompt alike.

    Many short blocks take turns, without pauses: all sides use the same library.
    """
    rng = np.random.default_rng(setup.seed)
    prompt = rng.integers(model.config.vocab_size, size=PROMPT).tolist()
    # Both are copies: the interpreter has fitted the real files to all they were used for before.
    real = copies({each: ast.parse(source(each)) for each in CHAIN}, CHAIN)("generate").steps
    stripped = copies({each: without(source(each)) for each in CHAIN}, CHAIN)("generate").steps
    said: dict[str, list[int]] = {}

    def side(which: str, run: Callable[[], tuple[float, float, list[int]]]) -> Callable[[], float]:
        def block() -> float:
            _, rest, said[which] = run()
            return rest / TOKENS

        return block

    pairs = {
        "taps and checks": {
            "ours": side("ours", lambda: continued(model, prompt, TOKENS, decode=real)),
            "taken out": side("out", lambda: continued(model, prompt, TOKENS, decode=stripped)),
        },
        "steps, no drafts": {
            "ours": side("steps", lambda: continued(model, prompt, TOKENS)),
            "bare loop": side("bare", lambda: bare(model, prompt, TOKENS)),
        },
    }
    rows = []
    for what, blocks in pairs.items():
        for block in blocks.values():  # warms up
            block()
        times = rounds(blocks, TURNS * setup.rounds, pause=0)
        rows.append(Row("unused", f"{name}, {what}", times.pop("ours"), times, in_pairs=True))
    return rows, all(tokens == said["ours"] for tokens in said.values())


def bare(model: Model, prompt: Sequence[int], count: int) -> tuple[float, float, list[int]]:
    """What `continued` does, with nothing but decoder, head and a token drawn as it is there."""
    config, weights, rng = model.config, model.weights, np.random.default_rng(0)
    caches = new_caches(config.layers, np.float32, 0, len(prompt), len(prompt) + count)
    tokens = list[int]()

    def step(given: Sequence[int]) -> None:
        x = decoder(given, weights, config, np.float32, caches)  # [T, D]
        logits = head(x[-1:], weights, config)[0]  # [V]
        tokens.append(draw(distribution(logits, tokens, GREEDY), rng))

    started = time.perf_counter()
    step(prompt)
    first = time.perf_counter()
    for _ in range(count):
        step(tokens[-1:])
    return first - started, time.perf_counter() - first, tokens


def without(text: str) -> ast.Module:
    """The code of a file without its taps, its asserts, and every `if` that ends in raising."""
    return ast.fix_missing_locations(_Without().visit(ast.parse(text)))


class _Without(ast.NodeTransformer):
    """Takes taps and checks out of a tree."""

    def generic_visit(self, node: ast.AST) -> ast.AST:
        super().generic_visit(node)
        if getattr(node, "body", None) == []:
            node.body = [ast.Pass()]  # type: ignore[attr-defined]
        return node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        """tap("name", x) is x, tap.at("scope") the tap itself, and tap.wants("name") False."""
        self.generic_visit(node)
        match node.func:
            case ast.Name("tap") if len(node.args) == 2:
                return node.args[1]
            case ast.Attribute(ast.Name("tap"), "at"):
                return node.func.value
            case ast.Attribute(ast.Name("tap"), "wants"):
                return ast.Constant(False)
            case ast.Name("check_ids"):  # of what it checks it returns the same
                return node.args[0]
        return node

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        """check_finite(...) and the other checks that nothing is taken from are taken out."""
        self.generic_visit(node)
        match node.value:
            case ast.Call(ast.Name(name)) if name.startswith("check_"):
                return None
        return node

    def visit_If(self, node: ast.If) -> ast.AST | None:
        """A check is taken out; any other branch stays."""
        self.generic_visit(node)
        return None if isinstance(node.body[-1], ast.Raise) and not node.orelse else node

    def visit_Assert(self, node: ast.Assert) -> None:
        """Taken out."""


def _compiled(name: str) -> tuple[CodeType, CodeType]:
    """The bytecode of a file, and of the same without comments."""
    text = source(name)
    lines = text.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            lines[token.start[0] - 1] = lines[token.start[0] - 1][: token.start[1]]
    return compile(text, name, "exec"), compile("\n".join(lines), name, "exec")


def _same_code(one: CodeType, other: CodeType) -> bool:
    inner: list[list[Any]] = [
        [x for x in code.co_consts if isinstance(x, CodeType)] for code in (one, other)
    ]
    pairs = zip(*inner, strict=True)
    return one.co_code == other.co_code and all(_same_code(a, b) for a, b in pairs)
