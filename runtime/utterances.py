"""Spoken sentences on disk: a Hugging Face AudioFolder or a JSON Lines manifest -> `Utterance`s.

Columns: the audio file (`file_name` or `audio`, relative to the manifest's folder or absolute), `text`, and optionally
`domain` and `duration` (seconds). Every other column is kept in `fields`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from das_asr.runtime.errors import DataError
from das_asr.runtime.jsonl import Row, read_rows

__all__ = ["METADATA", "Utterance", "read_utterances"]

METADATA = "metadata.jsonl"

_AUDIO_COLUMNS = ("file_name", "audio")
_OWN_COLUMNS = frozenset({*_AUDIO_COLUMNS, "text", "domain", "duration"})


@dataclass(frozen=True)
class Utterance:
    """One spoken sentence."""

    audio: Path
    text: str
    domain: str | None = None
    duration: float | None = None  # seconds, where the manifest has it
    fields: Mapping[str, Any] = field(default_factory=dict)  # the manifest's other columns


def read_utterances(source: str | Path) -> list[Utterance]:
    """Reads a folder with `metadata.jsonl`, or a JSON Lines manifest.

    Raises:
        DataError: there is no such file or folder, a row lacks its audio or text column, an audio file does not exist,
            or there are no rows at all.
    """
    manifest = _manifest(Path(source))
    utterances = [_utterance(row, manifest, number) for number, row in enumerate(read_rows(manifest), start=1)]
    if not utterances:
        raise DataError(f"{manifest} holds no rows. One JSON object per utterance is expected.")
    return utterances


def _manifest(source: Path) -> Path:
    manifest = source / METADATA if source.is_dir() else source
    if not manifest.is_file():
        raise DataError(f"{source} is neither a folder with {METADATA} nor a JSON Lines manifest.")
    return manifest


def _utterance(row: Row, manifest: Path, number: int) -> Utterance:
    where = f"{manifest}, row {number}"
    audio = manifest.parent / _column(row, _AUDIO_COLUMNS, where)
    if not audio.is_file():
        raise DataError(f"{where}: there is no audio file {audio}.")
    text = _column(row, ("text",), where)
    domain, duration = row.get("domain"), row.get("duration")
    return Utterance(
        audio=audio,
        text=text,
        domain=None if domain is None else str(domain),
        duration=None if duration is None else float(duration),
        fields={name: value for name, value in row.items() if name not in _OWN_COLUMNS},
    )


def _column(row: Row, names: tuple[str, ...], where: str) -> str:
    for name in names:
        value = row.get(name)
        if isinstance(value, str) and value.strip():
            return value
    expected = " or ".join(f"`{name}`" for name in names)
    raise DataError(f"{where} has no column {expected} with text in it; it has {sorted(row)}.")
