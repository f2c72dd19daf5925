"""quantization_config: which weights are stored as 8-bit floats, in blocks of what size."""

from typing import Any, NamedTuple

from minstep.keys import MAX_INTEGER, Keys


class Quantization(NamedTuple):
    """float8_e4m3fn weights with one float32 scale for each block of rows and columns.

    `excluded`: modules that stay in the checkpoint's own dtype, by name or part of a name.
    """

    rows: int
    columns: int
    excluded: frozenset[str]

    def covers(self, tensor: str) -> bool:
        """Whether a tensor may be stored in 8 bits: a projection that no excluded module holds."""
        parts = tensor.removesuffix(".weight").split(".")
        ends = range(1, len(parts) + 1)
        modules = (".".join(parts[start:end]) for end in ends for start in range(end))
        return tensor.endswith("_proj.weight") and self.excluded.isdisjoint(modules)


def parse_quantization(raw: dict[str, Any], source: str) -> Quantization | None:
    """The config's quantization_config; None where there is none.

    Raises InputError for any other scheme than fp8 e4m3 with square or other 2-D blocks.
    Source: config.json of the released FP8 checkpoint; "fp8" of transformers' quantizers.
    Differs: the scheme rounds activations to 8 bits too, each time a layer runs. Here they are not:
        what is computed is what the stored weights mean.
    Checked by: tests/fast/test_fp8.py
    """
    if raw.get("quantization_config") is None:
        return None
    keys = Keys(raw, source).inner("quantization_config")
    keys.require("quant_method", keys.get("quant_method") == "fp8", "expected fp8")
    keys.require("fmt", keys.raw.get("fmt", "e4m3") == "e4m3", "expected e4m3")
    block: Any = keys.raw.get("weight_block_size")
    good = isinstance(block, list) and len(block) == 2 and all(type(n) is int for n in block)
    good = good and 0 < min(block) and max(block) <= MAX_INTEGER
    keys.require("weight_block_size", good, "expected two sizes, as [128, 128]")
    excluded: Any = keys.raw.get("modules_to_not_convert") or []
    named = isinstance(excluded, list) and all(isinstance(name, str) for name in excluded)
    keys.require("modules_to_not_convert", named, "expected a list of module names")
    return Quantization(block[0], block[1], frozenset(excluded))
