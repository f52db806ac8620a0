"""Sentences to be spoken: JSON Lines or plain text -> rows with `text` and `id`.

A row of JSON Lines needs `text`; `id` and `domain` are taken where they are there, and all other columns are carried
along. A sentence without an id gets one made of its text, so the same sentence has the same id in every file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from das_asr.runtime.errors import DataError
from das_asr.runtime.jsonl import Row, read_rows

__all__ = ["identified", "in_shard", "read_sentences", "stable_hash"]

_JSON_SUFFIXES = frozenset({".json", ".jsonl", ".ndjson"})


def read_sentences(path: Path, domain: str | None = None) -> list[Row]:
    """Reads a file of sentences; by its name JSON Lines (.jsonl, .json, .ndjson), else text with one per line.

    Args:
        path: the file.
        domain: domain of the sentences that do not name theirs.

    Raises:
        DataError: the file cannot be read or has no sentences.
    """
    rows = list(read_rows(path)) if path.suffix.lower() in _JSON_SUFFIXES else _plain(path)
    if not rows:
        raise DataError(f"{path} holds no sentences. JSON Lines with `text`, or one sentence per line, are expected.")
    if domain is not None:
        rows = [{**row, "domain": row.get("domain") or domain} for row in rows]
    return rows


def _plain(path: Path) -> list[Row]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}. A file with one sentence per line is expected.") from error
    return [{"text": line.strip()} for line in lines if line.strip()]


def identified(rows: Iterable[Row]) -> dict[str, Row]:
    """Rows by id, in their order; a sentence that comes again under its id is left out.

    Raises:
        DataError: there are no rows, one has no text, or two texts share an id.
    """
    found: dict[str, Row] = {}
    for number, row in enumerate(rows, start=1):
        text = row.get("text")
        if not (isinstance(text, str) and text.strip()):
            raise DataError(f"Sentence {number} has no `text`; it has the columns {sorted(row)}.")
        name = stable_hash(text) if row.get("id") in (None, "") else str(row["id"])
        if found.setdefault(name, {**row, "id": name})["text"] != text:
            raise DataError(
                f"Sentence {number} ({text!r}) has the id {name!r} of another ({found[name]['text']!r}). "
                "Ids must differ."
            )
    if not found:
        raise DataError("There are no sentences to be spoken.")
    return found


def stable_hash(*parts: str) -> str:
    """16 hexadecimal digits that depend on the parts alone."""
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def in_shard(name: str, shard: tuple[int, int]) -> bool:
    """Whether an id belongs to the i-th of n parts; it depends on nothing but the id."""
    part, parts = shard
    return int(stable_hash("shard", name), 16) % parts == part
