"""All that `minstep cost` says: one dictionary of numbers, and its sections as text.

Checked by: tests/cost/test_report.py
"""

from collections.abc import Iterator
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
    Deployment,
    batch_within,
    fitting_batch,
    form_that_fits,
    gpus_for,
    pass_of,
    pass_seconds,
    room,
    speed,
    tokens_per_pass,
)
from minstep.cost.serving import count_within, predicted, published
from minstep.errors import InputError, shown
from minstep.store.config_file import find_config, load_config
from minstep.store.inspect import inspect

CONTEXTS, MIDDLE = (4096, 32_768, 131_072, 262_144), 32_768
BATCHES = (1, 4, 16, 64, 256, 1024)
ANNOUNCED = 350.0  # tokens a second at best, by the model card
OUTSIDE = ("embedding", "output matrix")  # of the layers, so not counted by the report's tables
RELEASED = 199_384_301_376  # parameters in the released files, whose announced figures are shown
OFF = 0.2  # share by which a prediction misses before its cause is shown
CAUSES = {
    "MiMo-V2 Flash": "its 4 groups are kept twice, for 8 GPUs",
    "MiniMax M2.1": "no constant of ours changes that much",
    "DeepSeek V3.2": "memory bounds it: a larger reserve makes it dearer",
    "GLM-4.7": "under one text a GPU: whatever else costs hits it most",
    "Kimi K2": "waiting for other nodes is nearly half of its pass",
}


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
        found = f"--acceptance: has {len(kept)} depths"
        raise InputError(f"{found}, expected at most the model's {depths}")
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
    setup = Deployment(config, hardware, gpus, wanted.form or "bf16", context, kept)
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
        "seconds_of_a_pass": pass_seconds(setup, wanted.batch),
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


def cost_text(report: dict[str, Any]) -> str:
    """All sections of a report."""
    sections = (_parameters, _contexts, _batches, _hardware, _serving, _conversation)
    return "\n\n".join("\n".join(section(report)) for section in sections)


def si(value: float) -> str:
    """A number in three or four digits, with the prefix k, M, G or T where it is large."""
    for prefix, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e4)):
        if value >= size:
            return f"{value / (1e3 if prefix == 'k' else size):.4g}{prefix}"
    return f"{value:,.0f}" if value >= 1e3 else f"{value:.3g}"


def _parameters(report: dict[str, Any]) -> Iterator[str]:
    sums = report["parameters"]
    yield f"PARAMETERS of {shown(report['config'])}"
    yield f"{'':20}{'all':>18}{'':7}{'of one token':>16}"
    active = sums["active_with_output_matrix"]
    for name, part in sums["parts"].items():
        share, of_token = part["parameters"] / sums["total"], part["of_a_token"]
        used = f"{of_token:>16,}{of_token / active:7.1%}" if of_token else f"{'-':>16}"
        yield f"  {name:18}{part['parameters']:>18,}{share:7.1%}{used}"
    yield f"{_billions(sums['total'])}  in the files"
    if sums["one_mtp_layer"]:
        yield f"{_billions(sums['without_mtp'])}  without MTP layers: what transformers loads"
    if sums["total"] == RELEASED:
        one = sums["one_mtp_layer"]
        both = sums["main_layers"] + one
        yield f"{_billions(both)}  main layers alone, and one MTP layer of {one / 1e9:.3f}B"
        yield "   196.81B  announced: the line above with its layers rounded to 196B, and 0.81B"
    yield f"{_billions(sums['active'])}  active, as the report counts: without embedding and output"
    forms = ", ".join(f"{name} {si(size)}B" for name, size in sums["bytes"].items())
    yield f"In memory: {forms}"


def _billions(count: int) -> str:
    return f"{count / 1e9:10.3f}B" if count >= 1e8 else f"{count:>11,}"


def _contexts(report: dict[str, Any]) -> Iterator[str]:
    yield "ONE TOKEN over context, without drafts, in bfloat16"
    yield f"{'':9}{'FLOPs':>20}{'bytes read':>20}{'':9}{'bytes of the cache':>27}"
    heads = f"{'weights':>10}{'attention':>10}{'weights':>10}{'cache':>10}{'FLOPs/B':>9}"
    yield f"{'context':>9}{heads}{'full':>10}{'sliding':>9}{'MTP':>8}{'if all were full':>18}"
    for row in report["contexts"]:
        flops, read, cache = row["flops"], row["bytes"], row["cache"]
        yield (
            f"{row['context']:>9,}{si(flops['weights']):>10}{si(flops[SCORES]):>10}"
            f"{si(read['weights']):>10}{si(read['caches']):>10}{row['flops_per_byte']:9.2f}"
            f"{si(cache['full']):>10}{si(cache['sliding']):>9}{si(cache['mtp']):>8}"
            f"{si(cache['if_all_were_full']):>18}"
        )


def _batches(report: dict[str, Any]) -> Iterator[str]:
    drafts = len(report["acceptance"])
    ways = {"alone": "without drafts"}
    if drafts:
        ways["drafting"] = f"with {drafts} drafts each"
    yield f"ONE PASS over many texts of {report['context']:,} tokens, in bfloat16"
    yield f"{'':7}{''.join(f'{words:>42}' for words in ways.values())}"
    heads = f"{'experts':>13}{'weights':>10}{'caches':>10}{'FLOPs/B':>9}"
    yield f"{'texts':>7}{heads * len(ways)}"
    for row in report["batches"]:
        cells = (
            f"{row[way]['experts_read']:13.1f}{si(row[way]['weights']):>10}"
            f"{si(row[way]['caches']):>10}{row[way]['flops_per_byte']:9.2f}"
            for way in ways
        )
        yield f"{row['texts']:>7,}{''.join(cells)}"


def _hardware(report: dict[str, Any]) -> Iterator[str]:
    batch, kept = report["batch"], ", ".join(f"{share:g}" for share in report["acceptance"])
    texts = f"{batch} text" + ("s, for each" if batch > 1 else "")
    yield f"TOKENS A SECOND on hardware: {texts}, {report['context']:,} tokens of context"
    if kept:
        mean = report["tokens_per_pass"]
        yield f"  drafts kept where reached: {kept}, so {mean:.2f} tokens a pass"
    within = f"within {report['latency_ms']:g} ms a token"
    yield f"{'':29}{'at most':>18}{'expected':>18}{'':9}{within:>25}"
    yield (
        f"{'':18}{'form':>5}{'room':>8}{'alone':>8}{'drafts':>8}{'alone':>10}{'drafts':>8}"
        f"{'for 350':>9}{'texts':>9}{'tokens/s':>9}{'each':>7}"
    )
    for row in report["hardware"]:
        name = f"{row['gpus']} x {row['label']}" if row["gpus"] > 1 else row["label"]
        start = f"  {name:16}{row['form']:>5}"
        if not row["fits"]:
            memory = row["memory"] * row["gpus"]
            yield f"{start}  does not fit into {si(memory)}B with {si(row['room_needed'])}B a text"
            continue
        bound, likely = row["at_most"], row["expected"]
        rate = row["tokens_per_second_within_latency"]
        yield (
            f"{start}{si(row['room']):>8}{si(bound['alone']):>8}{si(bound['drafting']):>8}"
            f"{si(likely['alone']):>10}{si(likely['drafting']):>8}{row['gpus_for_350'] or '-':>9}"
            f"{row['texts_within_latency']:9,}{si(rate):>9}{si(rate / row['gpus']):>7}"
        )
    yield "  At most: full speed. Expected: 90 % of the bandwidth, then 41 % of the FLOPs; 0.1 ms a"
    yield "  layer if devices are several. For 350: devices of one node, for one text that fast"


def _serving(report: dict[str, Any]) -> Iterator[str]:
    table = report["serving"]
    yield "SERVING: relative cost of a decoded token, 131,072 tokens of context, on Hopper"
    yield f"  {'':16}{'predicted':>10}{'published':>11}{'off by':>9}"
    for name, announced in table["published"].items():
        found = table["predicted"][name]
        off = found / announced - 1
        why = f"   {CAUSES[name]}" if abs(off) > OFF and name in CAUSES else ""
        yield f"  {name:16}{found:10.1f}{announced:11.1f}{off:+9.0%}{why}"
    near = f"{table['within_35_percent']} of {len(table['published'])} within 35 %"
    yield f"  {near}; constants are shared by all models. Chapter 14: what hangs on them"


def _conversation(report: dict[str, Any]) -> Iterator[str]:
    talk = report["conversation"]
    yield (
        f"A CONVERSATION of {talk['turns']} turns, {talk['tokens_at_the_end']:,} tokens at its end,"
        " at the API's prices"
    )
    old, new = talk["cached_input"], talk["input"] - talk["cached_input"]
    yield (
        f"  {old:,} tokens sent before, {new:,} new, {talk['output']:,} of answers: "
        f"CNY {talk['cny']:.4f}, without a cache {talk['cny_without_cache']:.4f}"
    )
    for name, plan in talk["plans"].items():
        cny, count = plan["cny"], plan["conversations"]
        yield f"  {name:12} CNY {cny:>4} a month buys {count:>9,.0f} of them at these prices"
