"""The router lab: how many tokens each expert gets, which ones, and what the bias does to that.

Checked by: tests/explore/test_expert_loads.py
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray

from minstep.config import Config
from minstep.draw.charts import LOW, load_chart
from minstep.errors import InputError
from minstep.model import ModelWeights, decoder
from minstep.moe import Choice
from minstep.parity.trace import Recorder, Trace
from minstep.tap import Array

Counts = NDArray[np.integer[Any]]
WITH, WITHOUT = "with the router bias", "without it"
LEAST = 8  # times that an expert got a token, before that says anything


class Liking(NamedTuple):
    """A token that an expert gets more often than chance would have it."""

    token: int
    times: int  # that the expert got it
    share: float  # of all the times that it stands in the text
    lift: float  # its share of the expert's tokens, over its share of all tokens


def routed(
    windows: Sequence[Sequence[int]],
    weights: ModelWeights,
    config: Config,
    dtype: DTypeLike = np.float32,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, Choice]:
    """What each MoE layer of the main model chose for the N tokens of all windows, by its name.

    `progress` is told of the tokens done. Raises InputError for a model without MoE layers.
    """
    names = [spec.name for spec in config.layers if spec.moe]
    if not names:
        raise InputError("the model has no MoE layers, expected one whose experts can be counted")
    traces, done = list[Trace](), 0
    for window in windows:
        traces.append({})
        tap = Recorder(traces[-1], lambda name: name.endswith((".moe.ids", ".moe.weights")))
        decoder(window, weights, config, dtype, tap=tap)
        progress(done := done + len(window))

    def joined(name: str) -> Array:
        return np.concatenate([trace[name] for trace in traces])  # [N, A]

    return {
        name: Choice(joined(f"{name}.moe.ids"), joined(f"{name}.moe.weights")) for name in names
    }


def without_bias(weights: ModelWeights) -> ModelWeights:
    """The same weights, but for router biases of 0: experts are chosen by their scores alone."""
    layers = (
        layer._replace(moe=layer.moe._replace(router_bias=None)) if layer.moe else layer
        for layer in weights.layers
    )
    return weights._replace(layers=tuple(layers))


def expert_counts(choice: Choice, experts: int) -> Counts:
    """How many tokens each expert got: [E]."""
    return np.bincount(choice.ids.ravel(), minlength=experts)


def evenness(counts: Array) -> float:
    """The entropy of where counts [E] went, over its largest: 1 all alike, 0 all to one expert."""
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum() / np.log(len(counts))) if len(counts) > 1 else 1.0


def likings(
    choice: Choice, tokens: Sequence[int], experts: int, most: int = 6, least: int = LEAST
) -> list[list[Liking]]:
    """For each expert up to `most` tokens it gets more often than chance, by falling lift.

    `tokens`: the N ids that `choice` was made for. Tokens that it got fewer than `least` times are
    left out. Of equal lifts the more frequent comes first, then the lower id.
    """
    text = np.asarray(tokens, np.int64)  # [N]
    V = int(text.max()) + 1
    pairs = choice.ids.astype(np.int64) * V + text[:, None]  # [N, A]
    found, counts = np.unique(pairs, return_counts=True)  # [pairs], [pairs]
    all_of, gets = np.bincount(text, minlength=V), expert_counts(choice, experts)  # [V], [E]
    result: list[list[Liking]] = [[] for _ in range(experts)]
    enough = counts >= least
    for pair, count in zip(found[enough].tolist(), counts[enough].tolist(), strict=True):
        expert, token = divmod(pair, V)
        lift = count / gets[expert] / (all_of[token] / len(text))
        if lift > 1:
            share = float(count / all_of[token])
            result[expert].append(Liking(token, count, share, float(lift)))
    return [sorted(each, key=lambda k: (-k.lift, -k.times, k.token))[:most] for each in result]


def router_report(
    tokens: Sequence[int],
    on: dict[str, Choice],
    off: dict[str, Choice],
    weights: ModelWeights,
    config: Config,
    words: Callable[[int], str],
) -> dict[str, Any]:
    """Each MoE layer's experts over the text `tokens` [N]: loads with the bias, and without it.

    `on` and `off` are what `routed` gave with the weights and without_bias. Loads are multiples of
    the fair share, N times A over E. `weight` is the mean of what an expert's outputs were scaled
    by, None for one that nobody chose. `words` gives a token's text.
    """
    layers = []
    for layer, spec in zip(weights.layers, config.layers, strict=True):
        if not (spec.moe and layer.moe):
            continue
        E, choice = spec.moe.experts, on[spec.name]
        sums = np.bincount(choice.ids.ravel(), choice.weights.ravel(), E)  # [E]
        counts, bias = expert_counts(choice, E), layer.moe.router_bias
        layers.append(
            {"layer": spec.name, "experts": E, "active": spec.moe.top_k}
            | {"on": _spread(counts), "off": _spread(expert_counts(off[spec.name], E))}
            | {"bias": None if bias is None else np.asarray(bias, float).round(5).tolist()}
            | {
                "weight": [
                    round(s / n, 4) if n else None for s, n in zip(sums, counts, strict=True)
                ]
            }
            | {
                "likings": [
                    [k._asdict() | {"text": words(k.token)} for k in each]
                    for each in likings(choice, tokens, E)
                ]
            }
        )
    return {"tokens": len(tokens), "layers": layers}


def _spread(counts: Counts) -> dict[str, Any]:
    """How counts [E] spread."""
    load = counts / counts.mean()
    figures = {"least": float(load.min()), "most": float(load.max()), "evenness": evenness(counts)}
    rounded = {name: round(value, 4) for name, value in figures.items()}
    return rounded | {"low": int((load < LOW).sum()), "load": load.round(4).tolist()}


def router_chart(report: dict[str, Any]) -> str:
    """The load of each expert of each layer, with the router bias and without it, as SVG text."""
    loads = {
        title: {layer["layer"]: np.array(layer[key]["load"]) for layer in report["layers"]}
        for title, key in ((WITH, "on"), (WITHOUT, "off"))
    }
    return load_chart("How many tokens each expert gets", loads)


def router_table(report: dict[str, Any]) -> str:
    """router_report as text for a terminal: a line a layer, then what some experts like."""
    head = "least   most  even  <0.1 "
    lines = [
        f"{report['tokens']:,} held-out tokens; 1 is an expert's fair share of them",
        f"{'':18}{'':10}{'with the router bias':27}without it",
        f"{'layer':18}{'experts':10}{head}  {head}",
    ]
    for layer in report["layers"]:
        of = f"{layer['active']} of {layer['experts']}"
        cells = "  ".join(_spread_cells(layer[which]) for which in ("on", "off"))
        lines.append(f"{layer['layer']:18}{of:10}{cells}")
    lines.append("even: 1 all alike, 0 all to one; <0.1: experts with less than a tenth of theirs")
    lines += ["", "what the most particular expert of each layer likes, by how often it gets that"]
    for layer in report["layers"]:
        means = [np.mean([k["lift"] for k in each] or [0]) for each in layer["likings"]]
        best = int(np.argmax(means))
        lines.append(f"{layer['layer']:18}expert {best:<4}{_liked(layer['likings'][best], 70)}")
    return "\n".join(line.rstrip() for line in lines)


def layer_table(layer: dict[str, Any]) -> str:
    """One layer of router_report as text for a terminal: a line an expert."""
    lines = [
        f"{layer['layer']}, {layer['active']} of {layer['experts']} experts",
        "expert    bias  load  without  weight  likes",
    ]
    for n, liked in enumerate(layer["likings"]):
        bias = f"{layer['bias'][n]:8.3f}" if layer["bias"] else "       -"
        weight = "     -" if layer["weight"][n] is None else f"{layer['weight'][n]:6.2f}"
        loads = f"{layer['on']['load'][n]:6.2f}{layer['off']['load'][n]:9.2f}"
        lines.append(f"{n:6}{bias}{loads}  {weight}  {_liked(liked, 60)}".rstrip())
    return "\n".join(lines)


def _spread_cells(spread: dict[str, Any]) -> str:
    numbers = f"{spread['least']:5.2f} {spread['most']:6.2f}  {spread['evenness']:.2f}"
    return f"{numbers} {spread['low']:5} "


def _liked(liked: Sequence[dict[str, Any]], width: int) -> str:
    """As many tokens as fit, each with how much of its occurrences the expert gets."""
    line = ""
    for each in liked:
        more = f"{each['text']!r} {each['share']:.0%}"
        if len(line) + len(more) + 2 > width:
            break
        line += f"{', ' if line else ''}{more}"
    return line
