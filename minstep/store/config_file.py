"""config.json files: found by path or by shipped name, read strictly, and parsed."""

import os
from pathlib import Path
from typing import Any

from minstep.config import Config, parse_config
from minstep.errors import InputError
from minstep.store.json_file import read_json
from minstep.store.layouts import hub_config


def shipped_folder() -> Path:
    """Where tiny_configs lies: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "tiny_configs"
    return installed if installed.is_dir() else package.parent / "tiny_configs"


def find_config(name: str) -> Path:
    """The folder of a shipped configuration, or a path to a folder or config.json as it stands.

    Raises InputError that lists the shipped names when it is neither.
    """
    path = Path(name)
    shipped = shipped_folder()
    if os.path.exists(path):
        return path
    if name and Path(name).name == name and os.path.isfile(shipped / name / "config.json"):
        return shipped / name
    names = ", ".join(sorted(folder.parent.name for folder in shipped.glob("*/config.json")))
    raise InputError(f"{name}: no such file or folder, nor a shipped configuration ({names})")


def load_config(path: Path | str) -> Config:
    """Read `path`, a config.json or the folder that holds one. Raises InputError naming the key."""
    if not isinstance(path, (str, os.PathLike)):
        raise InputError(f"the path of a config is a {type(path).__name__}, expected a path")
    path = Path(path)
    file = path / "config.json" if os.path.isdir(path) else path
    return parse_config(hub_config(read_json(file), str(file)), str(file))


def read_config(name: str) -> tuple[dict[str, Any], Config, Path]:
    """The JSON of a configuration in hub layout, what it says, and the folder that it lies in.

    `name` as find_config takes it. Raises InputError as that and parse_config do.
    """
    source = find_config(name)
    file = source / "config.json" if source.is_dir() else source
    raw = hub_config(read_json(file), str(file))
    return raw, parse_config(raw, str(file)), file.parent
