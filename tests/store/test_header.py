"""Headers of safetensors files: what is refused, against the safetensors package, and at what cost.

By hand: python -c "from tests.store.test_header import fuzz; fuzz(100_000, 1)"
"""

import json
import os
import random
import time
import tracemalloc
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError, deserialize

from minstep.errors import LONGEST_MESSAGE, InputError
from minstep.fast.pages import Pages
from minstep.store.header import MOST_TENSORS, map_file, open_header, read_header

A = '"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
EMPTY = '{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
# What the package takes and we do not, by what the message says: the list that open_header has.
STRICTER = (
    "expected { and then",  # spaces before the header
    "stands twice",
    "expected dtype, shape and data_offsets alone",
    "expected an object",  # an array in the place of an entry
    "expected a list of at most 8 sizes",
    "expected sizes that 64 bits can count",
    "expected one of F64",  # F4, F6, FNUZ, C64
    "is no JSON",  # an object within an entry, under a key of its own
)


def file_of(path: Path, header: str | bytes, count: int = 4, length: int | None = None) -> Path:
    """A file that begins with this header, and has `count` bytes behind it."""
    text = header.encode() if isinstance(header, str) else header
    length = len(text) if length is None else length
    path.unlink(missing_ok=True)  # a file that is cut to be written again waits for the disk
    path.write_bytes(length.to_bytes(8, "little") + text + bytes(count))
    return path


def package_takes(file: Path) -> bool:
    """Whether the safetensors package opens a file."""
    try:
        deserialize(file.read_bytes())
    except SafetensorError:
        return False
    return True


def refusal(file: Path) -> str | None:
    """What we say of a file that we refuse."""
    try:
        open_header(file)
    except InputError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("header", "naming"),
    [
        (f'{{"__metadata__":{{"a":1}},{A}}}', "metadata"),
        (f'{{"__metadata__":[],{A}}}', "metadata"),
        (f'{{"__metadata__":{{"a":["b"]}},{A}}}', "metadata"),
        (f'{{"__metadata__":{{"a":"b","a":"c"}},{A}}}', "twice"),
        (f'{{"__metadata__":{{}},"__metadata__":{{}},{A}}}', "twice"),
        (f"{{{A},{A}}}", "name a stands twice"),
        ('{"a":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}}', "twice"),
        ('{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4],"x":1}}', "has x, expected"),
        ('{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}', "NaN"),
        ('{"a":{"dtype":"F32","shape":[Infinity],"data_offsets":[0,4]}}', "Infinity"),
        ('{"a":{"dtype":"F32","shape":[-0],"data_offsets":[0,0]}}', "shape"),
        ('{"a":{"dtype":"F32","shape":[%s],"data_offsets":[0,4]}}' % ("1" * 5000), "tensor a"),
        ('{"a":{"dtype":"F32","shape":[%s],"data_offsets":[0,4]}}' % ("1" * 50_000), "20000"),
        ('{"a":["F32",[1],[0,4]]}', "an object"),
        ('{"\\ud800":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', "surrogates"),
        ('{"a\x00":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', "control"),
        (f" {{{A}}}", "expected {"),
        (f"\ufeff{{{A}}}", "expected {"),
        (f"[{{{A}}}]", "expected {"),
        (f"{{{A}}}x", "follows its end"),
        (f"{{{A}", "header"),
        (f"{{{A},}}", "header"),
        ("{", "header"),
        ("", "expected {"),
        (f"{{{A}}}".encode("utf-16"), "utf-8"),
        (f"{{{A}}}".encode("utf-16-le"), "header"),
        (f"{{{A}}}".encode("utf-32"), "header"),
        (b'{"\xff":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', "utf-8"),
        (b'{"\xed\xa0\x80":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', "utf-8"),
    ],
)
def test_what_the_format_does_not_allow_is_refused(
    header: str | bytes, naming: str, tmp_path: Path
) -> None:
    said = refusal(file_of(tmp_path / "file", header))
    assert said is not None and naming in said and said.startswith(f"{tmp_path / 'file'}: ")


@pytest.mark.parametrize("sizes", [[0, 2**47, 2**47], [2**47, 2**47, 0], [2**40, 0, 2**40]])
def test_sizes_that_numpy_cannot_hold_are_refused_beside_a_size_of_zero(
    sizes: list[int], tmp_path: Path
) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": sizes, "data_offsets": [0, 0]}})
    said = refusal(file_of(tmp_path / "file", header, 0))
    assert said is not None and "tensor a has shape" in said


def test_what_the_format_allows_is_read(tmp_path: Path) -> None:
    file = tmp_path / "file"
    entry = '{ "shape":[ 1 ],"\\u0064type":"F32" ,\n"data_offsets":[0,4]}'
    header = open_header(file_of(file, f'{{"__metadata__":null,\t"über{{}}" :{entry}}} \r\n'))
    assert list(header.tensors) == ["über{}"] and header.metadata == {}
    assert header.tensors["über{}"].shape == (1,) and header.tensors["über{}"].dtype == "F32"
    assert package_takes(file)
    header = open_header(file_of(file, '{"__metadata__":{"a":"{\\n","b":""}}', 0))
    assert header.metadata == {"a": "{\n", "b": ""} and not header.tensors
    assert not read_header(file_of(file, "{}", 0)) and len(map_file(file, Pages())) == 10


@pytest.mark.parametrize(
    ("first", "unit", "last"),
    [
        ('{"a":[', "[],", "[]]}"),
        ('{"a":', '{"a":', "1"),
        ('{"a":', "[", ""),
        ('{"__metadata__":{"a":', "[", ""),
        ('{"__metadata__":{"a":', '{"a":', ""),
        ('{"a":{"dtype":"F32","shape":[', "1,", "1]}}"),
        ('{"a":{"x":', "1", "}}"),
        ('{"', "a", '":1}'),
    ],
)
def test_a_header_costs_no_more_than_its_own_bytes(
    first: str, unit: str, last: str, tmp_path: Path
) -> None:
    size = 3_000_000
    file = file_of(tmp_path / "file", first + unit * (size // len(unit)) + last)
    tracemalloc.start()
    try:
        said = refusal(file)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert said is not None and len(said) <= LONGEST_MESSAGE and peak < 6 * size


def test_names_that_stand_twice_are_found_in_linear_time(tmp_path: Path) -> None:
    names = [*map(str, range(40_000))] * 2
    file = file_of(tmp_path / "file", "{" + ",".join(f'"{name}":{EMPTY}' for name in names) + "}")
    start = time.perf_counter()
    assert "name 0 stands twice" in str(refusal(file))
    assert time.perf_counter() - start < 20  # comparing all with all takes minutes


def test_a_file_has_a_bounded_number_of_tensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert MOST_TENSORS > 100_000
    monkeypatch.setattr("minstep.store.header.MOST_TENSORS", 5)
    texts = ",".join(f'"{n}":{EMPTY}' for n in range(6))
    assert "more than 5 names" in str(refusal(file_of(tmp_path / "file", f"{{{texts}}}", 0)))
    texts = ",".join(f'"{n}":""' for n in range(6))
    header = f'{{"__metadata__":{{{texts}}}}}'
    assert "more than 5 names" in str(refusal(file_of(tmp_path / "file", header, 0)))


def test_a_message_shows_no_more_of_a_name_than_a_line_holds(tmp_path: Path) -> None:
    name = "\\u001b[2J\\u202e" + "n" * 100_000
    said = str(refusal(file_of(tmp_path / "file", f'{{"{name}":{EMPTY.replace("F32", "F31")}}}')))
    assert len(said) < 600 and said.isprintable() and "expected one of F64" in said


def test_a_file_that_is_replaced_before_it_is_mapped_is_refused(tmp_path: Path) -> None:
    file = file_of(tmp_path / "file", f"{{{A}}}")
    header = open_header(file)
    assert len(map_file(file, Pages(), header)) == os.stat(file).st_size
    file.unlink()
    file_of(tmp_path / "other", f"{{{A}}}").rename(file)
    with pytest.raises(InputError, match="was changed while it was opened"):
        map_file(file, Pages(), header)
    header = open_header(file)
    os.truncate(file, 0)
    with pytest.raises(InputError, match="was changed while it was opened"):
        map_file(file, Pages(), header)
    with pytest.raises(InputError, match="cannot be mapped"):
        map_file(file, Pages())


def entries(rng: random.Random) -> tuple[dict[str, Any], int]:
    """A good header of a few tensors, and the bytes that they take."""
    header: dict[str, Any] = {}
    reached = 0
    if rng.random() < 0.5:
        header["__metadata__"] = {"format": "pt", "tokens": "[1, 2]"}
    for n in range(rng.randrange(4)):
        dtype, width = rng.choice([("F32", 4), ("BF16", 2), ("U8", 1), ("I64", 8), ("BOOL", 1)])
        shape = [rng.choice([0, 1, 2, 3]) for _ in range(rng.randrange(4))]
        size = width
        for each in shape:
            size *= each
        header[f"model.layers.{n}"] = {
            "dtype": dtype,
            "shape": shape,
            "data_offsets": [reached, reached + size],
        }
        reached += size
    return header, reached


ODD: list[Any] = [None, True, -1, 0, 1, 2**31, 2**63, 2**64, 10**30, 1.0, 0.5, 1e30, "", "F32"]
ODD += ["F4", "C64", "F8_E4M3", "a\u202e", [], [[]], {}, {"a": 1}, [0, 4], [1] * 9, [0, 2**47]]
TOKENS = ["NaN", "-0", "1e5", "1e999", "\\ud800", "\\u0000", "\ufeff", "{", "}", "[", "]", ",", ":"]
TOKENS += ['"', " ", "\n", "\x00", "\x1b", "null", "true", "9" * 5000, "é", "/**/", "'", '"a":1,']
Edit = Callable[[random.Random, dict[str, Any]], object]


def _odd_value(rng: random.Random, header: dict[str, Any]) -> None:
    key = rng.choice([*header, "new", "__metadata__"])
    entry = header.get(key)
    if isinstance(entry, dict) and rng.random() < 0.8:
        inner = rng.choice([*entry, "x"])
        if isinstance(entry.get(inner), list) and entry[inner] and rng.random() < 0.6:
            entry[inner][rng.randrange(len(entry[inner]))] = deepcopy(rng.choice(ODD))
        else:
            entry[inner] = deepcopy(rng.choice(ODD))
    else:
        header[key] = deepcopy(rng.choice(ODD))


def _dropped(rng: random.Random, header: dict[str, Any]) -> None:
    key = rng.choice([*header, ""])
    if isinstance(header.get(key), dict) and header[key] and rng.random() < 0.8:
        header[key].pop(rng.choice([*header[key]]))
    else:
        header.pop(key, None)


def mutant(rng: random.Random, path: Path) -> Path:
    """A file whose header is good but for a few things."""
    header, count = entries(rng)
    for _ in range(rng.choice([0, 0, 1, 1, 2])):
        rng.choice([_odd_value, _odd_value, _dropped])(rng, header)
    text = json.dumps(header, ensure_ascii=rng.random() < 0.5)
    for _ in range(rng.choice([0, 0, 0, 0, 1, 1, 2, 5])):
        at = rng.randrange(len(text) + 1)
        text = text[:at] + rng.choice([*TOKENS, ""]) + text[at + rng.choice([0, 0, 1, 1, 3]) :]
    raw = bytearray(text.encode(*rng.choice([("utf-8",)] * 30 + [("utf-16",)])))
    for _ in range(rng.choice([0] * 8 + [1, 3])):
        if raw:
            raw[rng.randrange(len(raw))] = rng.randrange(256)
    length = len(raw) + rng.choice([0] * 30 + [-1, 1, 8, 2**40])
    count = max(0, count + rng.choice([0] * 30 + [-1, 1, 4]))
    return file_of(path, bytes(raw), count, max(0, length))


def fuzz(count: int, seed: int, path: Path = Path("header.safetensors")) -> dict[str, int]:
    """Compare our verdict on so many files with the package's; how often we are stricter, and why.

    Raises AssertionError for a file that the package refuses and we take, and for one that it takes
    and we refuse for another reason than those in STRICTER.
    """
    rng, reasons = random.Random(seed), dict[str, int]()
    for _ in range(count):
        file = mutant(rng, path)
        ours, theirs = refusal(file), package_takes(file)
        assert theirs or ours is not None, file.read_bytes()
        if theirs and ours is not None:
            reason = next((text for text in STRICTER if text in ours), None)
            assert reason, (ours, file.read_bytes())
            reasons[reason] = reasons.get(reason, 0) + 1
        assert ours is None or (ours.isprintable() and len(ours) <= LONGEST_MESSAGE)
    path.unlink(missing_ok=True)
    return reasons


def test_verdicts_on_mutated_headers_are_those_of_the_package(tmp_path: Path) -> None:
    reasons = fuzz(3000, 0, tmp_path / "file")
    assert sum(reasons.values()) < 300
