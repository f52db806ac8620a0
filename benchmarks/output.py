"""What commands write: files that appear whole or not at all, and how options and paths stand in them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from das_asr.runtime.errors import OptionError

__all__ = ["check_folders", "plain_options", "plain_path", "write_result", "write_whole"]


def check_folders(**paths: Path | None) -> None:
    """Refuses files in folders that do not exist; the names are those of the options.

    Raises:
        OptionError: naming the option and the folder.
    """
    for name, path in paths.items():
        if path is not None and not path.parent.is_dir():
            raise OptionError(f"--{name} {path}: there is no folder {path.parent}. Make it first.")


def write_whole(path: Path, text: str) -> None:
    """Writes a text file under a temporary name and renames it."""
    scratch = path.with_name(f".{path.name}.part")
    try:
        scratch.write_text(text, encoding="utf-8")
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def write_result(path: Path, result: Mapping[str, Any]) -> None:
    """Writes a result as JSON, whole."""
    write_whole(path, json.dumps(result, indent=1, ensure_ascii=False) + "\n")


def plain_path(path: Path) -> str:
    """A path as results name it: relative to the working folder, or by its name alone where it lies elsewhere.

    Results are passed on, and the folders of a machine say nothing to others.
    """
    whole = path.absolute()
    return whole.relative_to(Path.cwd()).as_posix() if whole.is_relative_to(Path.cwd()) else whole.name


def plain_options(options: Any) -> dict[str, Any]:
    """The fields of a dataclass as JSON has them, paths as `plain_path`."""

    def plain(value: object) -> object:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, tuple):
            return [plain(item) for item in value]
        return plain_path(value) if isinstance(value, Path) else value

    return {key: plain(value) for key, value in dataclasses.asdict(options).items()}
