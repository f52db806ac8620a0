"""Joins the folders of all shards into the folder that one run would have made."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from das_asr.runtime.errors import SynthesisError
from das_asr.runtime.jsonl import Row, read_rows, write_rows
from das_asr.runtime.utterances import METADATA
from das_asr.training.speech.folder import FAILURES, JOURNAL, SETTINGS, read_settings

__all__ = ["merge_shards"]


def merge_shards(shards: Sequence[str | Path], output: str | Path) -> int:
    """Writes a folder with the utterances of all shards, in the order of the sentences; the shards stay as they are.

    Audio files are hard links where the file system has them, copies elsewhere.

    Returns:
        The number of utterances.

    Raises:
        SynthesisError: a shard is missing, unfinished, given twice or of other options, or `output` exists.
        DataError: a manifest is damaged.
    """
    folders, output = [Path(shard) for shard in shards], Path(output)
    if output.exists():
        raise SynthesisError(f"{output} exists. Name a folder that does not.")
    settings = _check_shards(folders)
    rows = sorted(
        ((row, folder) for folder in folders for row in read_rows(folder / METADATA)),
        key=lambda pair: pair[0]["source_row"],
    )
    failures = [row for folder in folders if (folder / FAILURES).exists() for row in read_rows(folder / FAILURES)]
    temporary = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        _write(temporary, rows, failures, settings)
        temporary.replace(output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return len(rows)


def _write(folder: Path, rows: list[tuple[Row, Path]], failures: list[Row], settings: dict[str, Any]) -> None:
    for row, shard in rows:
        target = folder / row["file_name"]
        target.parent.mkdir(parents=True, exist_ok=True)
        _link(shard / row["file_name"], target)
    if failures:
        write_rows(folder / FAILURES, sorted(failures, key=lambda row: int(row["source_row"])))
    write_rows(folder / SETTINGS, [settings])
    write_rows(folder / METADATA, [row for row, _ in rows])


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without hard links
        shutil.copy2(source, target)


def _check_shards(folders: Sequence[Path]) -> dict[str, Any]:
    """Returns what the audio of the whole depends on."""
    if not folders:
        raise SynthesisError("No shards were given. Name the folders that das-synth speech --shard made.")
    for folder in folders:
        if (folder / JOURNAL).exists() or ((folder / SETTINGS).exists() and not (folder / METADATA).exists()):
            raise SynthesisError(f"{folder} is not finished. Start its das-synth speech again and let it end.")
    settings = [read_settings(folder) for folder in folders]
    whole = [{**each, "shard": [0, 1]} for each in settings]
    for folder, each in zip(folders, whole, strict=True):
        if each != whole[0]:
            raise SynthesisError(f"{folder} was made with other options than {folders[0]} ({each}, {whole[0]}).")
    found = sorted(tuple(each["shard"]) for each in settings)
    parts = found[0][1]
    if found != [(part, parts) for part in range(parts)]:
        names = ", ".join(f"{part}/{parts}" for part, parts in found)
        raise SynthesisError(f"The folders hold the shards {names}; each of {parts} is expected once.")
    return whole[0]
