"""The log of a run, written and read back."""

from pathlib import Path

import pytest

from minstep.errors import InputError
from minstep.store.config_file import find_config
from minstep.train.log import LogRow, header, line, read_log


def test_a_log_reads_back_as_it_is_printed(tmp_path: Path) -> None:
    rows = [
        LogRow(20, (6.5, 7.25, 7.125), 3.2e-3, 1.5, 0.25, 2.5),
        LogRow(1200, (1.0, 2.0, 3.0), 1e-4, 0.125, 0.5, 1.25, 1.5349),
    ]
    file = tmp_path / "log.txt"
    file.write_text("\n".join(["steps 5, rate 1", "9 parameters", header(2), *map(line, rows)]))
    assert read_log(file) == rows
    assert len({len(text) for text in (header(2), *map(line, rows))}) == 1


@pytest.mark.parametrize("depths", [0, 1, 5])
def test_a_log_has_a_column_for_each_depth(depths: int, tmp_path: Path) -> None:
    row = LogRow(3, tuple(1.0 + n for n in range(1 + depths)), 1e-3, 0.5, 0.25, 4.0)
    rows = [row, row._replace(step=4, held_out=2.5)]
    (tmp_path / "log.txt").write_text("\n".join([header(depths), *map(line, rows)]))
    assert read_log(tmp_path / "log.txt") == rows


def test_the_shipped_log_falls_to_the_quality_that_is_told() -> None:
    rows = read_log(find_config("trained") / "log.txt")
    assert rows[-1].step == 2000 and rows[0].losses[0] > 6
    assert rows[-1].held_out is not None and rows[-1].held_out < 1.9
    assert min(row.least for row in rows[-10:]) > 0.1


@pytest.mark.parametrize("content", [None, b"\xff\xfe"])
def test_a_log_that_cannot_be_read_is_named(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "log.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(InputError, match=r"log\.txt: cannot be read"):
        read_log(file)
