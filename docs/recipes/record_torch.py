"""Record what layers of Step 3.5 Flash compute in torch, for `minstep check-layer` and `diff`.

It needs torch, and transformers as a script, but not minstep: copy it to where the model runs.

    python record_torch.py --model DIR --tokens 5,17,9 --layers 0,17 --out FILE.safetensors

or around any call of a loaded model over a whole prompt without a cache:

    with recording(model, "FILE.safetensors", layers=[0, 17], tokens=ids):
        model(input_ids=torch.tensor([ids]), use_cache=False)

The model may be transformers' own, the released remote code, or a port whose modules have the
checkpoint's paths; its MTP layers can be recorded too. Each tensor goes to the disk as it comes, in
the model's dtype: memory grows by one tensor, and the disk holds all of them twice at the end.
Names are the checkpoint's module paths, so what transformers' modules give is renamed, experts are
sorted by id, and their weights and their sum are multiplied by the scaling factor.
"""

import argparse
import contextlib
import inspect
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

PARTS = {f"self_attn.{x}_proj" for x in "qkvgo"} | {"self_attn.q_norm", "self_attn.k_norm", "mlp"}
PARTS |= {"", "input_layernorm", "post_attention_layernorm", "moe", "moe.gate", "share_expert"}
PARTS |= {"enorm", "hnorm", "eh_proj", "transformer.shared_head.norm"}
PARTS |= {"transformer.shared_head.output"}
NATIVE = {"mlp.gate": "moe.gate", "mlp.experts": "moe", "mlp.shared_experts": "share_expert"}
OUTER = ("model.embed_tokens", "model.norm", "lm_head")
BY_HEAD = ("q_norm", "k_norm", "q_rope", "k_rope")
CODES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int32": "I32"}
ROTATE = "apply_rotary_pos_emb"


class Writer:
    """Puts tensors into an unnamed file one by one; `finish` makes a safetensors file of them."""

    def __init__(self, path: Path, tokens: Sequence[int]) -> None:
        self.path, self.tokens, self.dtype = path, [int(token) for token in tokens], ""
        self.places: dict[str, tuple[str, list[int], int, int]] = {}  # code, shape, start, bytes
        self.raw = tempfile.TemporaryFile(dir=path.parent)
        self.temporary = path.with_name(f".{path.name}.{os.getpid()}")

    def add(self, name: str, x: Any, is_mtp: bool = False) -> None:
        """Write a tensor, [T, ...] or with a batch axis of 1 before it; T is less in MTP layers."""
        import torch

        axes, T = 3 if name.endswith(BY_HEAD) else 2, len(self.tokens)
        x = x[0] if x.dim() == axes + 1 and len(x) == 1 else x
        if x.dim() != axes or not (len(x) == T or len(x) < T and is_mtp):
            expected = f"expected {axes} axes, the first of {T} tokens, without a batch or a cache"
            raise ValueError(f"{name} has shape {list(x.shape)}, {expected}")
        if name in self.places:
            raise ValueError(f"{name} is computed twice, expected one call of the model")
        start, dtype = self.raw.tell(), str(x.dtype).removeprefix("torch.")
        self.raw.write(x.detach().cpu().contiguous().view(torch.uint8).numpy().data)
        self.places[name] = CODES[dtype], list(x.shape), start, self.raw.tell() - start
        self.dtype = self.dtype or dtype

    def finish(self, engine: str) -> None:
        """Header and tensors under a temporary name, which becomes `path` when all are there."""
        metadata = {"format": "minstep-trace", "engine": engine, "dtype": self.dtype}
        metadata |= {"tokens": json.dumps(self.tokens), "order": json.dumps(list(self.places))}
        header: dict[str, Any] = {"__metadata__": metadata}
        names = sorted(self.places, key=lambda name: -int(self.places[name][0][-2:]))  # aligns them
        end = 0
        for name in names:
            code, shape, _, size = self.places[name]
            header[name] = {"dtype": code, "shape": shape, "data_offsets": [end, end + size]}
            end += size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(self.temporary, "wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            for name in names:
                _, _, start, size = self.places[name]
                self.raw.seek(start)
                for done in range(0, size, 1 << 20):
                    out.write(self.raw.read(min(1 << 20, size - done)))
        os.replace(self.temporary, self.path)

    def close(self) -> None:
        """Leave nothing but `path`, if it was finished."""
        self.raw.close()
        self.temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def recording(
    model: Any, path: str | Path, layers: Sequence[int], tokens: Sequence[int], outer: bool = False
) -> Iterator[None]:
    """Record the `layers` while the block runs; `outer` adds embedding, final norm and logits.

    The file appears when the block has ended well. Raises ValueError for a layer that the model
    does not have or did not run, and for anything but one run over all of the `tokens`.
    """
    blocks, tops = {}, {}
    for place, module in model.named_modules():
        found = re.search(r"(?:^|\.)layers\.(\d+)(\.|$)", place)
        top = "lm_head" if place.endswith("lm_head") else f"model.{place.rpartition('.')[2]}"
        if found and not found[2] and "vision" not in place:
            blocks[int(found[1])] = module
        elif outer and not found and top in OUTER and "vision" not in place:
            tops[top] = module
    for n in layers:
        if n not in blocks:
            raise ValueError(f"layer {n} is not in the model, which has {sorted(blocks)}")
    with contextlib.ExitStack() as undo:
        writer = undo.enter_context(contextlib.closing(Writer(Path(path), tokens)))
        for n in dict.fromkeys(layers):
            first = n - 1 not in layers  # nobody else has written what it is fed
            _watch_layer(f"model.layers.{n}", blocks[n], first, writer, undo)
        for name, module in tops.items():
            _watch(module, lambda x, name=name: name in writer.places or writer.add(name, x), undo)
        yield
        for n in layers:
            if f"model.layers.{n}" not in writer.places:
                raise ValueError(f"layer {n} was not run while its recording was open")
        writer.finish(f"torch {type(model).__name__}")


def _watch(module: Any, see: Callable[[Any], Any], undo: contextlib.ExitStack) -> None:
    """Until `undo`, call `see` with what the module computes; of several outputs with the first."""

    def hook(_: Any, args: Any, output: Any) -> None:
        see(output[0] if isinstance(output, tuple) else output)

    undo.callback(module.register_forward_hook(hook).remove)


def _watch_layer(layer: str, block: Any, first: bool, writer: Writer, undo: Any) -> None:
    """Have what the modules of one layer compute written under our names; `first`: its input too.

    An MTP layer's input is that of hnorm: the state before it.
    """
    experts, is_mtp = getattr(block, "moe", getattr(block, "mlp", None)), hasattr(block, "hnorm")
    factor, key = getattr(experts, "routed_scaling_factor", 1.0), "custom_routing_function"
    choose = getattr(experts, key, None)  # of the released code, which only reads gate.weight

    firsts: dict[str, Any] = {}  # of q_proj and k_proj: the first token's row

    def add(part: str, x: Any, is_by_head: bool = False) -> None:
        """`is_by_head`: where its shape does not tell, x is [1, H, T, K], not [1, T, H, K]."""
        if part.endswith(BY_HEAD):
            T = writer.places[f"{layer}.input_layernorm"][1][0]
            is_by_head = x.shape[-3] != T or x.shape[-2] == T and is_by_head
        elif part.endswith(("q_proj", "k_proj")):
            firsts[part] = x.flatten(0, -2)[0].clone()
        x = x.transpose(-3, -2) if is_by_head else x
        writer.add(f"{layer}.{part}" if part else layer, x, is_mtp)

    def add_normed(part: str, x: Any, normed: Any) -> None:
        first = firsts.get(part.replace("norm", "proj"))  # a fused projection has none
        is_turned = x.stride(-3) < x.stride(-2)
        is_same = first is not None and first.to(x).equal(x[..., 0, :].flatten())
        add(part, normed, is_turned if first is None else is_same)

    def add_input(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
        add("input", args[0] if args else kwargs["hidden_states"])

    def add_choice(logits: Any, weights: Any, ids: Any) -> None:
        ids, order = ids.sort(dim=-1)
        add("moe.gate", logits)
        add("moe.ids", ids.int())
        add("moe.weights", weights.gather(-1, order) * factor)

    def chosen(logits: Any, *args: Any, **kwargs: Any) -> Any:
        weights, ids = choose(logits, *args, **kwargs)
        add_choice(logits, weights, ids)
        return weights, ids

    if first:
        start = block.hnorm if is_mtp else block
        undo.callback(start.register_forward_pre_hook(add_input, with_kwargs=True).remove)
    for place, module in block.named_modules():
        part = NATIVE.get(place, place)
        if place == "self_attn":
            _watch_rotation(module, add, undo)
        elif place == "mlp.gate":
            hook = module.register_forward_hook(lambda _, args, output: add_choice(*output))
            undo.callback(hook.remove)
        elif place == "mlp.experts":
            _watch(module, lambda x: add("moe", x * factor), undo)
        elif place == "mlp" and hasattr(module, "experts") or place == "moe.gate" and choose:
            pass  # the first is a sum with the shared expert in it
        elif part in ("self_attn.q_norm", "self_attn.k_norm"):
            see = partial(lambda part, _, args, normed: add_normed(part, args[0], normed), part)
            undo.callback(module.register_forward_hook(see).remove)
        elif part in PARTS:
            _watch(module, lambda x, part=part: add(part, x), undo)
    if choose:
        undo.callback(setattr, experts, key, choose)
        setattr(experts, key, chosen)


def _watch_rotation(attention: Any, add: Callable[..., None], undo: Any) -> None:
    """While this attention runs, have written what its file's function returns."""
    scope = inspect.unwrap(type(attention).forward).__globals__
    if (real := scope.get(ROTATE)) is None:
        return

    def rotate(*args: Any, **kwargs: Any) -> Any:
        rotated = real(*args, **kwargs)
        given = inspect.signature(real).bind(*args, **kwargs)
        given.apply_defaults()
        heads = given.arguments.get("unsqueeze_dim", 1)  # the axis of heads, as cos is spread
        for name, x in zip(("q_rope", "k_rope"), rotated, strict=True):
            add(f"self_attn.{name}", x, heads % x.dim() != x.dim() - 2)
        return rotated

    begin = attention.register_forward_pre_hook(lambda *_: scope.update({ROTATE: rotate}))
    end = attention.register_forward_hook(lambda *_: scope.update({ROTATE: real}), always_call=True)
    undo.callback(begin.remove)
    undo.callback(end.remove)


def load(folder: Path, dtype: str, remote_code: bool) -> Any:
    """The checkpoint's text model. Raises ValueError where transformers would draw random weights.

    It renames the tensors of the hub's text checkpoint only under its outer config.
    """
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()  # else it tells of a missing vision part
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    how: dict[str, Any] = {"dtype": getattr(torch, dtype), "trust_remote_code": remote_code}
    text = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if text.get("model_type") == "step3p5" and not remote_code:
        tied, eye = text.get("tie_word_embeddings", False), {"width": 28, "layers": 1, "heads": 2}
        how["config"] = transformers.Step3p7Config(text_config=text, vision_config=eye)
        how["config"].tie_word_embeddings = tied
    kind = "AutoModelForCausalLM" if remote_code else "Step3p7ForConditionalGeneration"
    load_it = getattr(transformers, kind).from_pretrained
    model, info = load_it(folder, output_loading_info=True, **how)
    missing = [name for name in info["missing_keys"] if not re.search("vision|modal", name)]
    if missing:
        raise ValueError(f"{folder}: transformers found no tensor for {min(missing)}")
    return model.eval()


def main() -> None:
    """Record from the command line; what cannot be is told in one line, with exit code 2."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    for flag, example in (("model", "DIR"), ("tokens", "5,17,9"), ("layers", "0,17")):
        parser.add_argument(f"--{flag}", required=True, metavar=example)
    parser.add_argument("--out", required=True, metavar="FILE.safetensors")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--outer", action="store_true", help="embedding, final norm, logits too")
    parser.add_argument("--remote-code", action="store_true", help="run the checkpoint's own code")
    args = parser.parse_args()
    try:
        for flag in ("tokens", "layers"):
            if not re.fullmatch(r"[0-9]{1,9}(,[0-9]{1,9})*", text := getattr(args, flag)):
                raise ValueError(f"--{flag} is {text!r}, expected numbers such as 5,17,9")
        _record(args, *([int(n) for n in text.split(",")] for text in (args.tokens, args.layers)))
    except (OSError, ValueError) as error:
        parser.exit(2, f"{parser.prog}: {' '.join(str(error).split())}\n")


def _record(args: argparse.Namespace, ids: list[int], layers: list[int]) -> None:
    import torch

    if not Path(args.out).parent.is_dir():
        raise ValueError(f"--out is {args.out}, expected a file in a folder that is there")
    model = load(Path(args.model), args.dtype, args.remote_code)
    if max(ids) >= (V := model.get_input_embeddings().num_embeddings):
        raise ValueError(f"--tokens has {max(ids)}, expected 0 to {V - 1}")
    with torch.no_grad(), recording(model, args.out, layers, ids, args.outer):
        model(input_ids=torch.tensor([ids]), use_cache=False)


if __name__ == "__main__":
    main()
