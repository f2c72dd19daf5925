"""What `minstep cost` found, as text for a terminal: sections with headings.

Checked by: tests/cost/test_command.py
"""

from collections.abc import Iterator
from typing import Any

from minstep.cost.count import SCORES
from minstep.errors import shown

RELEASED = 199_384_301_376  # parameters in the released files, whose announced figures are told
OFF = 0.2  # share by which a prediction misses before its cause is told
CAUSES = {
    "MiMo-V2 Flash": "its 4 groups are kept twice, for 8 GPUs",
    "MiniMax M2.1": "no constant of ours changes that much",
    "DeepSeek V3.2": "memory bounds it: a larger reserve makes it dearer",
    "GLM-4.7": "under one text a GPU: whatever else costs hits it most",
    "Kimi K2": "waiting for other nodes is nearly half of its pass",
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
    told = report["parameters"]
    yield f"PARAMETERS of {shown(report['config'])}"
    yield f"{'':20}{'all':>18}{'':7}{'of one token':>16}"
    active = told["active_with_output_matrix"]
    for name, part in told["parts"].items():
        share, of_token = part["parameters"] / told["total"], part["of_a_token"]
        used = f"{of_token:>16,}{of_token / active:7.1%}" if of_token else f"{'-':>16}"
        yield f"  {name:18}{part['parameters']:>18,}{share:7.1%}{used}"
    yield f"{_billions(told['total'])}  in the files"
    if told["one_mtp_layer"]:
        yield f"{_billions(told['without_mtp'])}  without MTP layers: what transformers loads"
    if told["total"] == RELEASED:
        one = told["one_mtp_layer"]
        both = told["main_layers"] + one
        yield f"{_billions(both)}  main layers alone, and one MTP layer of {one / 1e9:.3f}B"
        yield "   196.81B  announced: the line above with its layers rounded to 196B, and 0.81B"
    yield f"{_billions(told['active'])}  active, as the report counts: without embedding and output"
    forms = ", ".join(f"{name} {si(size)}B" for name, size in told["bytes"].items())
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
    for name, told in table["published"].items():
        found = table["predicted"][name]
        off = found / told - 1
        why = f"   {CAUSES[name]}" if abs(off) > OFF and name in CAUSES else ""
        yield f"  {name:16}{found:10.1f}{told:11.1f}{off:+9.0%}{why}"
    near = f"{table['within_35_percent']} of {len(table['published'])} within 35 %"
    yield f"  {near}; constants are shared by all models. Chapter 14: what hangs on them"


def _conversation(report: dict[str, Any]) -> Iterator[str]:
    told = report["conversation"]
    yield (
        f"A CONVERSATION of {told['turns']} turns, {told['tokens_at_the_end']:,} tokens at its end,"
        " at the API's prices"
    )
    old, new = told["cached_input"], told["input"] - told["cached_input"]
    yield (
        f"  {old:,} tokens sent before, {new:,} new, {told['output']:,} of answers: "
        f"CNY {told['cny']:.4f}, without a cache {told['cny_without_cache']:.4f}"
    )
    for name, plan in told["plans"].items():
        cny, count = plan["cny"], plan["conversations"]
        yield f"  {name:12} CNY {cny:>4} a month buys {count:>9,.0f} of them at these prices"
