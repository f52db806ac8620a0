"""YAML to a mapping, with errors that name the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from das_asr.runtime.errors import DataError

__all__ = ["is_yaml_path", "parse_mapping", "read_text"]

_SUFFIXES = frozenset({".yaml", ".yml"})


def is_yaml_path(source: str | Path) -> bool:
    """Whether this is a file rather than the name of something shipped."""
    return isinstance(source, Path) or Path(source).suffix in _SUFFIXES


def read_text(path: Path, what: str) -> str:
    """The text of a file.

    Raises:
        DataError: it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{what} {path} cannot be read: {error}. A YAML file in UTF-8 is expected.") from error


def parse_mapping(text: str, what: str) -> dict[str, Any]:
    """Parses a YAML mapping.

    Args:
        text: the YAML.
        what: names it in errors, such as `Domain music.yaml`.

    Raises:
        DataError: it is no YAML, or no mapping.
    """
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times faster, where libyaml is there
    try:
        data = yaml.load(text, loader)  # noqa: S506  # both are safe loaders
    except yaml.YAMLError as error:
        raise DataError(f"{what} is not YAML: {error}.") from error
    if not isinstance(data, dict):
        raise DataError(f"{what} holds {type(data).__name__}. A mapping of keys to values is expected.")
    return data
