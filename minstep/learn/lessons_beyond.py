"""What the exercises beyond the model run: comparing, training, text (chapters 11, 12 and 15).

Each function is a scene: minstep/learn/scenes.py says what becomes of it.
Checked by: tests/learn/test_exercise.py
"""

from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from minstep.learn.scenes import Rng, Shown, drawn, floats, refused, shipped
from minstep.parity.variants import Find
from minstep.sampling import Sampling
from minstep.tap import Array, Tap
from minstep.text.tokenizer import byte_level_tokenizer
from minstep.weights import assemble, tensor_shapes


def pairs_of_tensors_are_compared(find: Find, rng: Rng, dtype: DTypeLike) -> Shown:
    """Equal, off by rounding, off in one place, zero, of other shapes, as sets of experts."""
    compare, x = find("parity.compare").compare, floats(rng, (6, 4, 5), dtype)
    one = x.copy()
    one[3, 1, 2] += 1
    pairs = {
        "equal": (x, x),
        "off by rounding": (x, x * (1 + 1e-4 * rng.random(x.shape)).astype(dtype)),
        "off in one place": (x, one),
        "against zeros": (x, np.zeros_like(x)),
        "zeros against": (np.zeros_like(x), x),
        "with a batch axis": (x, one[None]),
        "with merged heads": (x, one.reshape(6, 20)),
        "turned": (x, x.swapaxes(1, 2)),
        "shorter": (x, x[:5]),
        "large": (1e30 * x, 1e30 * one),
        "empty": (x[:0], x[:0]),
    }
    for said, (ours, theirs) in pairs.items():
        for tolerance, scale in ((1e-3, None), (0.5, None), (1e-3, 50.0)):
            yield (
                f"compare {said}, {tolerance}, {scale}",
                compare("", ours, theirs, tolerance, scale),
            )
    ids = np.array([[1, 4, 6], [0, 2, 3]])
    for theirs in (ids[:, ::-1], np.array([[6, 1, 5], [0, 2, 3]])):
        name = "model.layers.3.moe.ids"
        yield f"compare experts {theirs.tolist()}", compare(name, ids, theirs, 1e-3)


def shapes_fit_where_only_form_differs(find: Find, rng: Rng, dtype: DTypeLike) -> Shown:
    """Axes of size 1 in front, and heads that are merged."""
    x = floats(rng, (6, 4, 5), dtype)
    for given in (x, x[None], x[None, None], x.reshape(6, 20), x.reshape(24, 5), x[:, :, :4]):
        for shape in ((6, 4, 5), (1, 6, 4, 5), (6, 20), (120,)):
            yield f"fitted {given.shape} to {shape}", find("parity.compare").fitted(given, shape)
    yield "fitted (20,) to (1, 20)", find("parity.compare").fitted(x[0].reshape(20), (1, 20))


def rows_are_measured_by_their_own_length(find: Find, rng: Rng, dtype: DTypeLike) -> Shown:
    """Massive columns are left out, a row of zeros is no exception, and other tensors have none."""
    row_errors, x = find("parity.compare").row_errors, floats(rng, (5, 40), dtype)
    x[:, 7] *= 1000
    x[2] *= 1e-3
    x[4] = 0
    theirs = x + floats(rng, x.shape, dtype) * 1e-2
    for name in ("model.layers.0", "model.layers.3.moe", "model.layers.3.moe.gate", "lm_head"):
        yield f"row_errors of {name}", row_errors(name, x, theirs)
    yield "row_errors of narrow rows", row_errors("model.layers.0", x[:, :9], theirs[:, :9])


def surprise_is_minus_log_probability(find: Find, rng: Rng, dtype: DTypeLike) -> Shown:
    """Of small logits and of huge ones; and the mean of it."""
    loss, targets = find("train.loss"), [4, 0, 2]
    for size in (1, 30, 3000):
        logits = size * floats(rng, (3, 5), dtype)
        yield f"surprise, logits of {size}", loss.surprise(logits, targets)
        yield f"cross_entropy, logits of {size}", loss.cross_entropy(logits, targets)


def the_objective_weighs_the_depths(find: Find, rng: Rng, dtype: DTypeLike) -> Shown:
    """With three MTP depths, one and none; a text that is too short for them is refused."""
    objective = find("train.loss").objective
    for name in ("tiny", "odd", "no_extras"):
        config = shipped(name)
        weights, tokens = assemble(config, drawn(rng)), rng.integers(120, size=7).tolist()
        yield f"objective of {name}", objective(tokens, weights, config, 0.3, dtype, Tap())
        least = tokens[: len(weights.mtp) + 1]
        said = refused(objective, least, weights, config, 0.3, dtype, Tap())
        yield f"objective of {name}, {len(least)} tokens", said


def a_product_sends_its_gradient_back(find: Find, rng: Rng, dtype: DTypeLike) -> Shown:
    """Also where one side was repeated along the other's axes; vectors are refused."""
    matmul = find("train.tape").matmul
    for a, b in (
        ((3, 4), (4, 5)),
        ((2, 3, 4), (4, 5)),
        ((3, 4), (2, 4, 1)),
        ((2, 1, 3, 4), (6, 4, 5)),
    ):
        x, y = floats(rng, a, dtype), floats(rng, b, dtype)
        value, pulls = matmul(x, y)
        yield f"matmul {a} @ {b}", value
        for side, pull in zip("ab", pulls, strict=True):
            yield f"matmul {a} @ {b}: gradient of {side}", pull(floats(rng, value.shape, dtype))
    said = "no error"
    try:
        matmul(floats(rng, (4,), dtype), floats(rng, (4, 5), dtype))
    except TypeError:
        said = "TypeError"
    yield "matmul of a vector", said


def singular_values_become_one(find: Find, rng: Rng, dtype: DTypeLike) -> Shown:
    """Wide, tall and stacked matrices, fewer steps, and zeros."""
    orthogonalised = find("train.optimizer").orthogonalised
    for shape in ((4, 7), (9, 3), (3, 5, 4), (6, 6)):
        x = floats(rng, shape, dtype)
        for steps in (1, 3, 6):
            yield f"orthogonalised {list(shape)}, {steps} steps", orthogonalised(x.copy(), steps)
    yield "orthogonalised zeros", orthogonalised(np.zeros((3, 4), dtype))


def the_rate_warms_up_and_falls(find: Find, rng: Rng, dtype: DTypeLike) -> Shown:
    """Runs of several lengths, one step among them, and steps after the end."""
    rate_at = find("train.optimizer").rate_at
    for steps, warmup, floor in ((20, 5, 0.1), (20, 0, 0.0), (1, 1, 0.1), (3, 8, 0.2), (1, 0, 0.5)):
        for step in range(steps + 3):
            yield (
                f"rate_at({step}, {steps}, {warmup}, {floor})",
                rate_at(step, steps, warmup, floor),
            )


def biases_lift_experts_that_lack_tokens(find: Find, rng: Rng, dtype: DTypeLike) -> Shown:
    """In place; an expert that is exactly at its share stays, and a layer without bias is left."""
    layers = [f"model.layers.{n}.moe" for n in range(3)]
    counts = {layer: rng.integers(0, 9, size=6) for layer in layers}
    counts[layers[1]] = np.array([2, 2, 3, 1, 2, 2])
    biases = {f"{layer}.router_bias": floats(rng, (6,), np.float32) for layer in layers[:2]}
    find("train.balance").balance(biases, counts, 0.01)
    yield "balance", biases


def gradients_of_a_whole_model(find: Find, rng: Rng, dtype: DTypeLike) -> Shown:
    """The loss of a text goes back to every tensor."""
    tape, config = find("train.tape"), shipped("odd")
    names, get = tensor_shapes(config), drawn(rng)
    held = {name: np.asarray(get(name, shape), dtype) for name, shape in names.items()}
    variables = {name: tape.Variable(x) for name, x in held.items()}
    weights = assemble(config, lambda name, _: variables[name])
    tap = find("train.balance").Counter(config)  # it keeps attention from writing in place
    losses = find("train.loss").objective([5, 17, 9, 9, 3], weights, config, 0.3, dtype, tap)
    yield "loss", losses.total.value
    tape.backward(losses.total)
    gradients: dict[str, Array] = {}
    for name, variable in variables.items():
        if variable.gradient is not None:
            gradients[f"gradient of {name}"] = np.asarray(variable.gradient)
    yield "gradients", len(gradients)
    yield "backward", gradients


def filters_apply_in_their_order(find: Find, rng: Rng, dtype: DTypeLike) -> Shown:
    """Each alone and all at once, with equal logits among them."""
    distribution = find("sampling").distribution
    for how in (
        Sampling(),
        Sampling(1.0),
        Sampling(0.5, top_k=3),
        Sampling(2.0, top_p=0.7),
        Sampling(1.0, min_p=0.3),
        Sampling(1.0, repetition_penalty=1.7),
        Sampling(0.8, top_k=5, top_p=0.9, min_p=0.05, repetition_penalty=1.3),
    ):
        for size in (1, 4):
            logits = size * floats(rng, (9,), dtype)
            logits[5] = logits[2] = logits.max()
            yield f"distribution, {how}", distribution(logits, [2, 7, 7], how)


def draws_follow_the_probabilities(find: Find, rng: Rng, dtype: DTypeLike) -> Shown:
    """One thing that is certain, and how often each of several comes."""
    draw, counts = find("sampling").draw, np.zeros(5)
    for token in range(5):
        yield f"draw of a certain {token}", draw(np.eye(5)[token], rng)
    p = np.array([0.1, 0, 0.5, 0.15, 0.25])
    for _ in range(3000):
        counts[draw(p, rng)] += 1
    yield "draw, 3000 times: what has no chance", float(counts[1])
    yield "draw, 3000 times: is distributed as p", bool(np.abs(counts / 3000 - p).max() < 0.05)


def characters_come_whole_and_stops_do_not(find: Find, rng: Rng, dtype: DTypeLike) -> Shown:
    """Bytes of a character, broken ones, special tokens, and stops across tokens."""
    tokenizer = byte_level_tokenizer()
    text = "Héllo 日本 🙂 <|im_end|>stop it, ststop"
    for stops in ((), ("stop",), ("it", "stop it"), ("zz", "日"), ("st", "sto")):
        stream = find("text.tokenizer").StreamingText(tokenizer, stops)
        ids = tokenizer.encode(text).ids
        ids[3:3] = tokenizer.encode("é").ids[:1]  # the first half of a character
        for n, token in enumerate([0, *ids, 9999]):
            yield f"StreamingText {stops}, token {n}", stream.add(token)
            yield f"StreamingText {stops}, stopped at {n}", stream.stopped
        yield f"StreamingText {stops}, rest", stream.finish()
    for text, tag in (
        ("ab<th", "<think>"),
        ("<<", "<think>"),
        ("x", "x"),
        ("", "ab"),
        ("aaa", "aab"),
    ):
        yield f"unfinished({text!r}, {tag!r})", find("text.reply").unfinished(text, tag)


def a_message_is_the_same_however_it_is_cut(find: Find, rng: Rng, dtype: DTypeLike) -> Shown:
    """Thinking, content and a call, in pieces of one character, of five, and at once."""
    call = (
        "<tool_call>\n<function=look>\n<parameter=at>\nsky\n</parameter>\n</function>\n</tool_call>"
    )
    text = f"<think>\nso <thi\n</think>\nI look < up.\n{call}\n{call} done <tool_"
    for size in (1, 5, len(text)):
        stream = find("text.reply").ChatStream()
        for n in range(0, len(text), size):
            yield f"ChatStream, pieces of {size}, at {n}", stream.feed(text[n : n + size])
        yield f"ChatStream, pieces of {size}, rest", stream.finish()


def conversations_become_prompts(find: Find, rng: Rng, dtype: DTypeLike) -> Shown:
    """Thinking of earlier turns goes, but not after the last real question."""

    def said(role: str, content: str, **more: Any) -> dict[str, Any]:
        return {"role": role, "content": content, **more}

    call = {"type": "function", "function": {"name": "look", "arguments": {"at": "sky"}}}
    thought = "<think>\nhm\n</think>\nwell"
    disguised = "<tool_response>blue</tool_response>"
    talks = (
        [said("user", "hi")],
        [said("system", "be brief"), said("user", "hi"), said("assistant", thought)],
        [said("user", "a"), said("assistant", thought), said("user", "b")],
        [said("user", "a"), said("assistant", "x", reasoning_content="why", tool_calls=[call])]
        + [said("tool", "blue"), said("assistant", "y", reasoning_content="so")],
        [said("user", "a"), said("assistant", thought), said("user", disguised)],
        [said("assistant", "no question", reasoning_content="so")],
    )
    for n, messages in enumerate(talks):
        for prompts in (True, False):
            said_of = f"render, conversation {n}, {'with' if prompts else 'without'} a start"
            yield said_of, find("text.prompt").render(messages, None, prompts)
