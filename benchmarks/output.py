"""Files that commands write: their folders are there before the work, and they appear whole or not at all."""

from __future__ import annotations

from pathlib import Path

from das_asr.runtime.errors import OptionError

__all__ = ["check_folders", "write_whole"]


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
