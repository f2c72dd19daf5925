"""The size of the package: folders are summed, and a closure follows every import once."""

from pathlib import Path

from docs.make.house import sizes, table, working_tree

TREE = {
    "minstep/__init__.py": "from minstep.generate import steps\n",
    "minstep/generate.py": "import math\n\nfrom minstep.fast import near\n\n\n"
    "def steps():\n    from minstep.far import away\n",
    "minstep/far.py": "from minstep import generate\naway = 1\n",
    "minstep/alone.py": "1\n" * 50,
    "minstep/fast/__init__.py": "",
    "minstep/fast/near.py": "x = 1\n" * 30,
    "minstep/lab/layers.py": "import minstep.far\n\n\ndef check_layers(): ...\n",
    "minstep/lab/page/style.css": "a\nb\nc\n",
}


def test_folders_and_closures_are_counted_in_files_and_lines() -> None:
    assert sizes(TREE) == {
        "minstep/": (4, 60),
        "minstep/fast/": (2, 30),
        "minstep/lab/": (1, 4),
        "minstep/lab/page/, other text": (1, 3),
        "all Python": (7, 94),
        "generate and what it imports": (3, 39),
        "generate, without fast/": (2, 9),
        "check-layer and what it imports": (4, 43),
        "check-layer, without fast/": (3, 13),
    }


def test_a_folder_is_read_and_two_trees_stand_side_by_side(tmp_path: Path) -> None:
    for path, text in TREE.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    cache = tmp_path / "minstep" / "__pycache__"
    cache.mkdir()
    (cache / "far.pyc").write_bytes(b"\xff")
    assert working_tree(tmp_path) == TREE
    lines = table({"before": sizes(TREE), "after": sizes({"minstep/generate.py": "1\n"})})
    rows = dict((line[:34].strip(), line[34:].split()) for line in lines.splitlines())
    assert rows["minstep/"] == ["4", "60", "1", "1"] and rows["minstep/lab/"] == [
        "1",
        "4",
        "0",
        "0",
    ]
    assert rows["check-layer, without fast/"] == ["3", "13", "0", "0"]
