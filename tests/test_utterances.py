"""JSON Lines that survive a kill, and manifests of spoken sentences."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from das_asr.runtime.errors import DataError
from das_asr.runtime.jsonl import JsonLines, read_rows, write_rows
from das_asr.runtime.utterances import METADATA, Utterance, read_utterances


def test_rows_come_back_in_order(tmp_path: Path) -> None:
    rows = [{"id": number, "text": "naïve ☕"} for number in range(5)]
    write_rows(tmp_path / "rows.jsonl", rows)
    assert list(read_rows(tmp_path / "rows.jsonl")) == rows
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_a_failing_writer_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        write_rows(tmp_path / "rows.jsonl", [{"id": 1}, {"id": object()}])
    assert not list(tmp_path.iterdir())


def test_appending_goes_on_behind_what_was_whole(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    with JsonLines.open(path) as rows:
        rows.append({"id": 1})
        rows.append({"id": 2})
    with path.open("ab") as file:
        file.write(b'{"id": 3, "te')  # what a kill leaves
    with JsonLines.open(path) as rows:
        assert rows.rows == [{"id": 1}, {"id": 2}]
        rows.append({"id": 3})
    assert list(read_rows(path)) == [{"id": 1}, {"id": 2}, {"id": 3}]


def test_every_appended_row_is_there_after_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    code = f"""
import os, signal
from pathlib import Path
from das_asr.runtime.jsonl import JsonLines
rows = JsonLines.open(Path({str(path)!r}))
for number in range(100):
    rows.append({{"id": number}})
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code], check=False)
    assert done.returncode != 0
    with JsonLines.open(path) as rows:
        assert [row["id"] for row in rows.rows] == list(range(100))


@pytest.mark.parametrize(
    ("content", "message"),
    [("{}\nnonsense\n", r"rows.jsonl:2 is not JSON"), ("[1]\n", "holds list"), ("\xff", "cannot be read")],
)
def test_broken_rows_are_named(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(DataError, match=message):
        list(read_rows(path))


def make_manifest(folder: Path, rows: list[dict[str, Any]]) -> Path:
    folder.mkdir(exist_ok=True)
    soundfile.write(folder / "a.flac", np.zeros(1600), 16_000)
    manifest = folder / METADATA
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return manifest


def test_an_audio_folder_and_its_manifest_read_alike(tmp_path: Path) -> None:
    row = {"file_name": "a.flac", "text": "hello", "domain": "music", "duration": 0.1, "voice": "rms"}
    manifest = make_manifest(tmp_path / "set", [row])
    expected = [Utterance(tmp_path / "set" / "a.flac", "hello", "music", 0.1, {"voice": "rms"})]
    assert read_utterances(tmp_path / "set") == read_utterances(manifest) == expected


def test_audio_may_be_absolute_and_columns_few(tmp_path: Path) -> None:
    make_manifest(tmp_path / "set", [])
    manifest = tmp_path / "other.jsonl"
    manifest.write_text(json.dumps({"audio": str(tmp_path / "set" / "a.flac"), "text": "hello"}) + "\n")
    (found,) = read_utterances(manifest)
    assert found == Utterance(tmp_path / "set" / "a.flac", "hello")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "holds no rows"),
        ([{"file_name": "a.flac"}], "row 1 has no column `text`"),
        ([{"file_name": "a.flac", "text": "x"}, {"text": "x"}], "row 2 has no column `file_name` or `audio`"),
        ([{"file_name": "b.flac", "text": "x"}], "there is no audio file"),
        ([{"file_name": "a.flac", "text": "  "}], "no column `text`"),
    ],
)
def test_broken_manifests_are_refused(tmp_path: Path, rows: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_utterances(make_manifest(tmp_path / "set", rows).parent)


def test_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="neither a folder"):
        read_utterances(tmp_path)
