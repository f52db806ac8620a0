"""The output of a run: a file that is complete or absent, and beside it what a killed run goes on from.

    music.jsonl             the rows, in place when all of them are there
    music.report.json       what the run did and how varied the rows are
    music.settings.json     what the rows depend on; a run with other settings is refused
    music.jsonl.part        rows written so far; gone at the end
    music.answers.jsonl     answers of a language model; they stay

The rows are a fixed sequence for given settings. A run that goes on computes it again, from kept answers, compares what
is there and writes what is not.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from das_asr.runtime.errors import SynthesisError
from das_asr.runtime.jsonl import JsonLines, Row

__all__ = ["SentenceFile", "beside", "write_json"]


def beside(output: Path, ending: str) -> Path:
    """`music.jsonl` -> `music.` + ending."""
    return output.with_name(f"{output.stem}.{ending}")


def write_json(path: Path, value: Any) -> None:
    """Writes an indented JSON file under a temporary name and renames it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


class SentenceFile:
    """Rows on their way into `output`.

    Attributes:
        complete: the output was there already; nothing is written.
        rows: what was put or found.
    """

    def __init__(self, output: Path, part: JsonLines | None) -> None:
        self._output = output
        self._part = part
        self.complete = part is None
        self.resumed = 0 if part is None else len(part.rows)
        self.rows: list[Row] = []

    @classmethod
    def open(cls, output: Path, settings: Mapping[str, Any]) -> SentenceFile:
        """Begins a file, or opens an unfinished one to go on.

        Raises:
            SynthesisError: the file is of other settings or not ours, or cannot be written.
            DataError: the unfinished file is damaged.
        """
        try:
            _check_settings(output, settings)
            if output.exists():
                return cls(output, None)
            output.parent.mkdir(parents=True, exist_ok=True)
            if not beside(output, "settings.json").exists():
                write_json(beside(output, "settings.json"), dict(settings))
            return cls(output, JsonLines.open(_part(output)))
        except OSError as error:
            raise SynthesisError(f"{output} cannot be written: {error}. Name another file.") from error

    def put(self, row: Row) -> None:
        """Adds the next row, or finds it to be there.

        Raises:
            SynthesisError: another row is there.
        """
        assert self._part is not None
        if len(self.rows) >= self.resumed:
            self._part.append(row)
        elif self._part.rows[len(self.rows)] != row:
            raise SynthesisError(
                f"Row {len(self.rows) + 1} of {_part(self._output)} is not what this run makes of the same settings: "
                f"the file or the package has changed. Delete {_part(self._output)} to begin anew."
            )
        self.rows.append(row)

    def finish(self) -> None:
        """Puts the file in its place."""
        assert self._part is not None
        self._part.close()
        _part(self._output).replace(self._output)
        self._part = None

    def discard(self) -> None:
        """Removes all that a run which cannot succeed has begun; answers stay."""
        self.close()
        self._remove()

    def _remove(self) -> None:
        _part(self._output).unlink(missing_ok=True)
        beside(self._output, "settings.json").unlink(missing_ok=True)

    def close(self) -> None:
        """Closes an unfinished file; it stays to go on from, if it has any rows."""
        if self._part is None:
            return
        self._part.close()
        self._part = None
        if not (self.rows or self.resumed):
            self._remove()

    def __enter__(self) -> SentenceFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _part(output: Path) -> Path:
    return output.with_name(f"{output.name}.part")


def _check_settings(output: Path, settings: Mapping[str, Any]) -> None:
    path, part = beside(output, "settings.json"), _part(output)
    if not path.exists() and (output.exists() or part.exists()):
        raise SynthesisError(f"{output} exists and was not made by das-synth text. Name another file.")
    if not output.exists() and not (part.exists() and part.stat().st_size):
        path.unlink(missing_ok=True)  # of a run that wrote no row
        return
    try:
        made = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SynthesisError(f"{path} cannot be read: {error}. Name another output.") from error
    if changed := _changes(made, settings):
        raise SynthesisError(
            f"{output} was begun with other options ({changed}). Give the old ones to go on, or name another file."
        )


def _changes(made: Any, settings: Mapping[str, Any]) -> str:
    if not isinstance(made, dict):
        return "settings that cannot be read"
    names = sorted({*made, *settings})
    different = [name for name in names if made.get(name) != settings.get(name)]
    return "; ".join(f"{name} was {made.get(name)!r}, now {settings.get(name)!r}" for name in different)
