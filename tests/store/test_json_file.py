"""JSON files of any origin: what is refused, in one line, and at what cost."""

import time
import tracemalloc
from pathlib import Path

import pytest

from minstep.errors import InputError
from minstep.store.json_file import MAX_JSON, read_json, strict_json


@pytest.mark.parametrize(
    ("text", "naming"),
    [
        ('{"a": NaN}', "a is NaN, expected finite"),
        ('{"a": [-Infinity]}', "a is -Infinity, expected finite"),
        ('{"a": 1e999}', "a is 1e999, expected finite"),
        ('{"b": 1, "a": {"c": [[-1e999]]}}', "c is -1e999, expected finite"),
        ("[NaN]", "it holds NaN, expected finite"),
        ('{"a": %s}' % ("9" * 1_000_000), "digits"),
        ('{"a": 1, "a": 1}', "key a stands twice"),
        ('{"a": [{"b": 1, "\\u0062": 2}]}', "key b stands twice"),
        ('{"a": "\\ud800"}', "surrogates"),
        ('{"\\udfff": 1}', "surrogates"),
        ('{"a": "\n"}', "control character"),
        ('{"a": 1}}', "Extra data"),
        ('{"a":' * 100_000, "recursion"),
        ("[" * 100_000, "recursion"),
        ("", "Expecting value"),
        ("[]", "expected a JSON object"),
        ("7", "expected a JSON object"),
    ],
)
def test_what_is_no_json_object_is_refused_in_one_line(
    text: str, naming: str, tmp_path: Path
) -> None:
    file = tmp_path / "file"
    file.write_text(text)
    with pytest.raises(InputError) as caught:
        read_json(file)
    assert naming in str(caught.value) and str(file) in str(caught.value)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32", "latin-1"])
def test_json_is_utf_8_and_nothing_else(encoding: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes('{"aß": 1}'.encode(encoding))
    with pytest.raises(InputError, match="is not valid JSON"):
        read_json(tmp_path / "file")


def test_good_json_is_read_as_it_stands(tmp_path: Path) -> None:
    text = '\ufeff{"ü": ["\\ud83d\\ude00", 1e308, -0.0, 12345678901234567890, null]}'
    (tmp_path / "file").write_bytes(text.encode())
    assert read_json(tmp_path / "file") == {"ü": ["😀", 1e308, 0.0, 12345678901234567890, None]}
    assert strict_json('[{"a": 1}, {"a": 2}]') == [{"a": 1}, {"a": 2}]


def test_a_file_is_read_up_to_a_size_and_no_further(tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb") as opened:
        opened.truncate(1 << 40)
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match="larger than 16,000,000 bytes"):
            read_json(tmp_path / "file")
        assert tracemalloc.get_traced_memory()[1] < 3 * MAX_JSON
    finally:
        tracemalloc.stop()


def test_keys_that_stand_twice_are_found_in_linear_time() -> None:
    names = [*map(str, range(100_000))] * 2
    text = "{" + ",".join(f'"{name}":0' for name in names) + "}"
    start = time.perf_counter()
    with pytest.raises(ValueError, match="key 0 stands twice"):
        strict_json(text)
    assert time.perf_counter() - start < 10  # comparing all with all takes minutes


def test_a_number_too_large_is_named_in_linear_time() -> None:
    """It stands in a list, and no object after it holds it."""
    deep = '{"a":' * 900 + '"' + "x" * 12_000_000 + '"' + "}" * 900
    start = time.perf_counter()
    with pytest.raises(ValueError, match="it holds 1e999, expected finite"):
        strict_json(f"[1e999,{deep}]")
    assert time.perf_counter() - start < 15  # writing every object out again takes a minute
