"""How our tensors are made of those another engine recorded: fused, summed or unscaled ones.

Checked by: tests/parity/test_recording.py
"""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from minstep.config import Config
from minstep.errors import InputError, shown
from minstep.parity.names import is_wrapper, places, sums_experts
from minstep.store.stages import split

PROJECTIONS = ("q_proj", "k_proj", "v_proj")  # in the order in which they are fused
Shapes = Mapping[str, tuple[int, ...]]


class Term(NamedTuple):
    """A stored tensor, or entries `start` to `stop` along `axis` of it, times `scale`."""

    source: str
    scale: float = 1.0
    start: int = 0
    stop: int | None = None
    axis: int = -1


Form = tuple[Term, ...]  # one of our tensors is the sum of its terms
Widths = Mapping[int, tuple[int, int]]  # layer -> columns of its queries, and of its keys


def stored_forms(path: Path | str, shapes: Shapes) -> dict[str, Form]:
    """Our names of a file's tensors. Raises InputError where two of them have the same one.

    `shapes` are by the file's names. Of a module and its last part, which are equal, the part is
    taken. The halves of a fused gate and up projection are two tensors of ours.
    """
    forms: dict[str, Form] = {}
    moe_is_sum = sums_experts(shapes)
    for source in sorted(shapes, key=is_wrapper):
        for name, part, of in places(source, moe_is_sum):
            if name in forms and is_wrapper(source):
                continue
            if name in forms:
                both = f"{shown(forms[name][0].source)} and {shown(source)}"
                message = f"are both {shown(name)}, expected one of them"
                raise InputError(f"{path}: tensors {both} {message}")
            term, axis = Term(source), outputs(name)
            if of > 1 and len(shapes[source]) >= -axis:
                size, rest = divmod(shapes[source][axis], of)
                if rest:
                    message = f"has shape {list(shapes[source])}, expected {of} equal parts"
                    raise InputError(f"{path}: tensor {shown(source)} {message}")
                term = Term(source, start=part * size, stop=(part + 1) * size, axis=axis)
            forms[name] = (term,)
    return forms


def derived(
    name: str, forms: Mapping[str, Form], factor: float | None, widths: Widths
) -> Form | None:
    """How `name` is made of tensors that `forms` has; None where it cannot be.

    `factor`: what the routed experts are scaled by, if known.
    """
    layer, part = split(name)
    if name in forms or layer is None:
        return forms.get(name)
    unscaled = forms.get(f"{name}.unscaled")
    if part in ("moe", "moe.weights") and unscaled and factor:
        return tuple(term._replace(scale=factor) for term in unscaled)
    if part == "mlp":
        routed = derived(f"model.layers.{layer}.moe", forms, factor, widths)
        shared = forms.get(f"model.layers.{layer}.share_expert")
        return routed + shared if routed and shared else None
    proj = part.removeprefix("self_attn.").removesuffix(".weight")
    if proj in PROJECTIONS and layer in widths:
        fused, (_, k) = forms.get(name.replace(proj, "qkv_proj")), widths[layer]
        n = PROJECTIONS.index(proj)
        start, stop = (0, -2 * k, -k)[n], (-2 * k, -k, None)[n]  # it may have other query heads
        return fused and (fused[0]._replace(start=start, stop=stop, axis=outputs(name)),)
    return None


def outputs(name: str) -> int:
    """The axis of a projection's outputs: of a weight [..., O, I], or of what it computed."""
    return -2 if name.endswith(".weight") else -1


def config_widths(config: Config) -> Widths:
    """The widths of every layer by the config."""
    specs = enumerate((*config.layers, *config.mtp_layers))
    return {n: (spec.heads * spec.head_dim, spec.groups * spec.head_dim) for n, spec in specs}


def sibling_widths(fused: Shapes, whole: Shapes) -> Widths:
    """The widths of layers whose projection is fused in one recording and has parts in another.

    Shapes are by our names.
    """
    widths: dict[int, tuple[int, int]] = {}
    for name, shape in fused.items():
        layer, part = split(name)
        if layer is None or not part.startswith("self_attn.qkv_proj") or len(shape) < 2:
            continue
        total = shape[outputs(name)]
        sizes = {
            proj: whole[sibling][outputs(name)]
            for proj in PROJECTIONS
            if len(whole.get(sibling := name.replace("qkv_proj", proj), ())) > 1
        }
        if "q_proj" in sizes:
            widths[layer] = sizes["q_proj"], (total - sizes["q_proj"]) // 2
        elif sizes:
            k = min(sizes.values())
            widths[layer] = total - 2 * k, k
    return widths
