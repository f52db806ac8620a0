"""JSON Lines that survive a kill: rows are appended whole, a torn last line is dropped when the file is opened again.

with JsonLines.open(path) as rows:
rows.append({"id": "a", "text": "play some jazz"})
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from das_asr.runtime.errors import DataError

__all__ = ["JsonLines", "Row", "read_rows", "write_rows"]

Row = dict[str, Any]


def read_rows(path: Path) -> Iterator[Row]:
    """Yields the rows of a JSON Lines file; blank lines are skipped.

    Raises:
        DataError: the file cannot be read, or a line is not a JSON object; the message names the line.
    """
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield _parse(line, path, number)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}. A JSON Lines file in UTF-8 is expected.") from error


def _parse(line: str, path: Path, number: int) -> Row:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{number} is not JSON ({error}). One JSON object per line is expected.") from error
    if not isinstance(row, dict):
        raise DataError(f"{path}:{number} holds {type(row).__name__}. One JSON object per line is expected.")
    return row


def write_rows(path: Path, rows: Iterator[Row] | list[Row]) -> None:
    """Writes a whole file under a temporary name and renames it: the file is complete or absent."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            for row in rows:
                file.write(_line(row))
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _line(row: Row) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode() + b"\n"


class JsonLines:
    """A JSON Lines file open for appending; `rows` are those that were whole when it was opened."""

    def __init__(self, file: BinaryIO, rows: list[Row]) -> None:
        self._file = file
        self.rows = rows

    @classmethod
    def open(cls, path: Path) -> JsonLines:
        """Opens or makes the file; what a kill left of a last line is cut off.

        Raises:
            DataError: a line before the last is not a JSON object.
        """
        if path.exists():
            _drop_torn_line(path)
            rows = list(read_rows(path))
        else:
            rows = []
        return cls(path.open("ab", buffering=0), rows)

    def append(self, row: Row) -> None:
        """Adds one row, written by one system call."""
        self._file.write(_line(row))

    def close(self) -> None:
        """Puts the rows on disk and closes the file."""
        os.fsync(self._file.fileno())
        self._file.close()

    def __enter__(self) -> JsonLines:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _drop_torn_line(path: Path) -> None:
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        with path.open("r+b") as file:
            file.truncate(whole)
