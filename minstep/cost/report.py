"""All that `minstep cost` says, as one dictionary of numbers; no text, no maths of its own.

Checked by: tests/cost/test_command.py
"""

from pathlib import Path
from typing import Any, NamedTuple

from minstep.config import Config
from minstep.cost.count import (
    FORMS,
    SCORES,
    cache_bytes,
    decoding_pass,
    experts_read,
    matrices,
    product_flops,
    score_flops,
    stored_bytes,
    visible_pairs,
)
from minstep.cost.hardware import KEPT, Hardware
from minstep.cost.prices import conversation_report
from minstep.cost.roofline import (
    Setup,
    batch_within,
    fitting_batch,
    form_that_fits,
    gpus_for,
    pass_of,
    room,
    seconds,
    speed,
    tokens_per_pass,
)
from minstep.cost.serving import count_within, predicted, published
from minstep.errors import InputError
from minstep.store.config_file import find_config, load_config
from minstep.store.inspect import inspect

CONTEXTS, MIDDLE = (4096, 32_768, 131_072, 262_144), 32_768
BATCHES = (1, 4, 16, 64, 256, 1024)
ANNOUNCED = 350.0  # tokens a second at best, by the model card


class Wanted(NamedTuple):
    """What is asked for: the command's flags. Empty or None where the usual is to be taken.

    `config`: as find_config takes it. `latency` in seconds a token. `tokens`: new input and output
    of a turn.
    """

    config: str = "step-3.5-flash"
    contexts: tuple[int, ...] = ()
    hardware: tuple[Hardware, ...] = ()
    gpus: int | None = None
    form: str | None = None
    batch: int = 1
    acceptance: tuple[float, ...] | None = None
    latency: float = 0.02
    turns: int = 20
    tokens: tuple[int, int] = (2000, 500)


def report(wanted: Wanted) -> dict[str, Any]:
    """Every section. Raises InputError for what the configuration cannot be asked."""
    folder = find_config(wanted.config)
    file = folder / "config.json" if folder.is_dir() else folder  # weights beside it do not matter
    config = load_config(file)
    depths, most = len(config.mtp_layers), config.max_positions
    for context in wanted.contexts:
        if context > most:
            raise InputError(f"--context {context}: expected at most the model's {most}")
    kept = (KEPT,) * depths if wanted.acceptance is None else wanted.acceptance
    if len(kept) > depths:
        told = f"--acceptance: has {len(kept)} depths"
        raise InputError(f"{told}, expected at most the model's {depths}")
    contexts = wanted.contexts or (*(c for c in CONTEXTS if c < most), most)
    context = wanted.contexts[0] if wanted.contexts else min(MIDDLE, most)
    released = load_config(find_config("step-3.5-flash"))
    return {
        "config": wanted.config,
        "context": context,
        "acceptance": list(kept),
        "tokens_per_pass": tokens_per_pass(kept),
        "parameters": parameters(config, file),
        "contexts": [at_context(config, each) for each in contexts],
        "batches": [at_batch(config, context, n, len(kept)) for n in BATCHES],
        "latency_ms": wanted.latency * 1e3,
        "batch": wanted.batch,
        "hardware": [on(hardware, wanted, config, context, kept) for hardware in wanted.hardware],
        "serving": {
            "predicted": predicted(released),
            "published": published(released),
            "within_35_percent": count_within(released),
        },
        "conversation": conversation_report(wanted.turns, *wanted.tokens),
    }


def parameters(config: Config, file: Path) -> dict[str, Any]:
    """Parameters by part with what a token is multiplied with, and the sums that are announced."""
    parts: dict[str, dict[str, int]] = {}
    used = product_flops(config, 1)
    for tensor in matrices(config):
        name = "MTP layers" if tensor.depth else tensor.part
        if tensor.name == "model.embed_tokens.weight" and tensor.part == "output matrix":
            continue  # tied: the embedding once more
        part = parts.setdefault(name, {"parameters": 0, "of_a_token": 0})
        part["parameters"] += tensor.size
    for name, flops in used.items():
        parts.setdefault(name, {"parameters": 0, "of_a_token": 0})["of_a_token"] = flops // 2
    found = inspect(file)
    total, without = found["total_parameters"], found["parameters_without_mtp"]
    outside = sum(parts.get(name, {"parameters": 0})["parameters"] for name in OUTSIDE)
    depths = len(config.mtp_layers)
    return {
        "parts": parts,
        "total": total,
        "without_mtp": without,
        "main_layers": without - outside,
        "one_mtp_layer": (total - without) // depths if depths else 0,
        "active": found["active_parameters_per_token"],
        "active_with_output_matrix": found["active_parameters_per_token"]
        + used.get("output matrix", 0) // 2,
        "bytes": {name: stored_bytes(config, form) for name, form in FORMS.items()},
    }


OUTSIDE = ("embedding", "output matrix")  # of the layers, so not counted by the report's tables


def at_context(config: Config, context: int) -> dict[str, Any]:
    """One token at this context, without drafts: FLOPs, bytes in bfloat16, and caches."""
    layers = config.layers
    alone = decoding_pass(config, FORMS["bf16"], context)
    every = [spec._replace(window=None) for spec in layers]
    pairs = sum(score_flops(spec, visible_pairs(spec, 1, context - 1)) for spec in layers)
    return {
        "context": context,
        "flops": {"weights": sum(product_flops(config, 1).values()), SCORES: pairs},
        "bytes": {"weights": alone.weights, "caches": alone.caches},
        "flops_per_byte": alone.intensity,
        "cache": {
            "full": cache_bytes([spec for spec in layers if spec.window is None], context),
            "sliding": cache_bytes([spec for spec in layers if spec.window], context),
            "mtp": cache_bytes(config.mtp_layers, context),
            "if_all_were_full": cache_bytes(every, context),
        },
    }


def at_batch(config: Config, context: int, batch: int, drafts: int) -> dict[str, Any]:
    """A pass over many texts in bfloat16, with no drafts and with all of them."""
    moe = next((spec.moe for spec in config.layers if spec.moe), None)
    row: dict[str, Any] = {"texts": batch}
    for name, count in (("alone", 0), ("drafting", drafts)):
        cost = decoding_pass(config, FORMS["bf16"], context, batch, count)
        row[name] = {
            "experts_read": experts_read(moe, batch * (count + 1)) if moe else 0,
            "weights": cost.weights,
            "caches": cost.caches,
            "flops_per_byte": cost.intensity,
        }
    return row


def on(
    hardware: Hardware, wanted: Wanted, config: Config, context: int, kept: tuple[float, ...]
) -> dict[str, Any]:
    """The model on one kind of device."""
    gpus = wanted.gpus or hardware.usual
    setup = Setup(config, hardware, gpus, wanted.form or "bf16", context, kept)
    setup = setup if wanted.form else setup._replace(form=form_that_fits(setup))
    fits, alone = fitting_batch(setup), setup._replace(acceptance=())
    row = hardware._asdict() | {"gpus": gpus, "form": setup.form, "ridge": hardware.ridge}
    row |= {"room": room(setup), "fitting_texts": fits, "exchanges": setup.exchanges}
    if fits < wanted.batch:
        specs = [*config.layers, *config.mtp_layers[: len(kept)]]
        return row | {"fits": False, "room_needed": cache_bytes(specs, context)}
    within = batch_within(setup, wanted.latency)
    return row | {
        "fits": True,
        "bytes_of_a_pass": pass_of(setup, wanted.batch).bytes,
        "seconds_of_a_pass": seconds(setup, wanted.batch),
        "at_most": {
            "alone": speed(alone, wanted.batch),
            "drafting": speed(setup, wanted.batch),
        },
        "expected": {
            "alone": speed(alone, wanted.batch, True),
            "drafting": speed(setup, wanted.batch, True),
        },
        "gpus_for_350": gpus_for(setup, ANNOUNCED),
        "texts_within_latency": within,
        "tokens_per_second_within_latency": within * speed(setup, within, True) if within else 0.0,
    }
