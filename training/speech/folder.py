"""The output folder: an AudioFolder that a kill at any moment leaves in a state to go on from.

    synthesis.json      what the audio depends on; a folder with another one is refused
    audio/3f/....flac   utterances; each appears complete
    .journal.jsonl      rows of finished utterances, in the order in which they were finished
    failures.jsonl      sentences that could not be spoken, with the reason; tried again by the next run
    metadata.jsonl      all rows in the order of the sentences; written at the end of a run, the journal then goes

A row is journalled after its file is in place, so a row without a file cannot be; a file without a row is written anew.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

from das_asr.runtime.errors import DataError, SynthesisError
from das_asr.runtime.jsonl import JsonLines, Row, read_rows, write_rows
from das_asr.runtime.utterances import METADATA
from das_asr.training.speech.options import SpeechOptions
from das_asr.training.speech.recording import TEMPORARY, audio_name

__all__ = ["FAILURES", "JOURNAL", "SETTINGS", "SpeechFolder", "check_folder", "read_settings"]

SETTINGS = "synthesis.json"
JOURNAL = ".journal.jsonl"
FAILURES = "failures.jsonl"


def check_folder(path: Path, options: SpeechOptions) -> None:
    """Refuses a folder that this run must not write to; writes nothing.

    Raises:
        SynthesisError: the folder is not ours, or was made with other options.
    """
    if path.exists() and not path.is_dir():
        raise SynthesisError(f"{path} is a file; a folder for the speech is expected.")
    if not (path / SETTINGS).exists():
        leftover = TEMPORARY.format(f"{SETTINGS}.*")
        if path.exists() and any(not entry.match(leftover) for entry in path.iterdir()):
            raise SynthesisError(f"{path} is not empty and was not made by das-synth speech. Name a new folder.")
        return
    made, asked = read_settings(path), options.identity()
    changed = [f"{key} was {made.get(key)!r}, now {asked[key]!r}" for key in asked if made.get(key) != asked[key]]
    if changed:
        raise SynthesisError(
            f"{path} holds speech of other options ({'; '.join(changed)}). Name a new folder, or give the old options."
        )


def read_settings(path: Path) -> dict[str, Any]:
    """What the audio in a folder depends on, as `SpeechOptions.identity` gave it.

    Raises:
        SynthesisError: the folder was not made by das-synth speech.
    """
    try:
        settings = json.loads((path / SETTINGS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SynthesisError(f"{path} is no folder that das-synth speech made: {SETTINGS}: {error}.") from error
    if not isinstance(settings, dict):
        raise SynthesisError(f"{path} is no folder that das-synth speech made: {SETTINGS} is no JSON object.")
    return settings


class SpeechFolder:
    """The folder of one run. `done` holds the rows of finished utterances by id."""

    def __init__(
        self, path: Path, journal: JsonLines, failures: JsonLines, done: dict[str, Row], held: ExitStack
    ) -> None:
        self.path = path
        self.done = done
        self._journal = journal
        self._failures = failures
        self._held = held  # files and lock, until the run ends

    @classmethod
    def open(cls, path: Path, options: SpeechOptions, sentences: Mapping[str, Row]) -> SpeechFolder:
        """Makes the folder, or opens it to go on.

        Raises:
            SynthesisError: see `check_folder`; another run is writing to it; or it holds
                utterances that are not among the sentences.
            DataError: a manifest in it is damaged.
        """
        check_folder(path, options)
        path.mkdir(parents=True, exist_ok=True)
        if not (path / SETTINGS).exists():
            write_rows(path / SETTINGS, [options.identity()])
        with ExitStack() as held:
            held.enter_context(_lock(path))
            journal, failures, done = cls._resume(path, sentences, held)
            return cls(path, journal, failures, done, held.pop_all())

    @staticmethod
    def _resume(
        path: Path, sentences: Mapping[str, Row], held: ExitStack
    ) -> tuple[JsonLines, JsonLines, dict[str, Row]]:
        """Clears up after a kill -> journal, failures, and the finished rows whose files are there."""
        for leftover in (*path.glob(TEMPORARY.format("*")), *path.glob(f"audio/*/{TEMPORARY.format('*')}")):
            leftover.unlink()
        earlier = list(read_rows(path / METADATA)) if (path / METADATA).exists() else []
        # Before a journal is made, which says that a run is not finished.
        _check_same_sentences(path, _by_id(path, earlier), sentences)
        journal = held.enter_context(JsonLines.open(path / JOURNAL))
        done = _by_id(path, (*earlier, *journal.rows))
        _check_same_sentences(path, done, sentences)
        (path / FAILURES).unlink(missing_ok=True)
        failures = held.enter_context(JsonLines.open(path / FAILURES))
        return journal, failures, {name: row for name, row in done.items() if (path / row["file_name"]).is_file()}

    def add(self, row: Row) -> None:
        """Records a finished utterance, whose file is in place."""
        self._journal.append(row)
        self.done[row["id"]] = row

    def fail(self, row: Row, reason: str, detail: str) -> None:
        """Records a sentence that could not be spoken."""
        (self.path / audio_name(row["id"])).unlink(
            missing_ok=True
        )  # an earlier run may have been killed before its row
        self._failures.append({**row, "reason": reason, "detail": detail})

    def finish(self, sentences: Mapping[str, Row]) -> None:
        """Writes the manifest in the order of the sentences; the journal has then done its work."""
        rows = [
            {**self.done[name], "source_row": row["source_row"]} for name, row in sentences.items() if name in self.done
        ]
        write_rows(self.path / METADATA, rows)
        (self.path / JOURNAL).unlink()
        if not (self.path / FAILURES).stat().st_size:
            (self.path / FAILURES).unlink()

    def close(self) -> None:
        """Puts the journal on disk and lets other runs in."""
        self._held.close()


def _lock(path: Path) -> BinaryIO:
    """Takes the folder for this process; the kernel gives it back when the process ends, however it ends."""
    file = (path / SETTINGS).open("rb")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise SynthesisError(
            f"Another run is writing to {path}. Wait for it, or give each run a folder and a --shard of its own."
        ) from error
    except OSError:  # a file system without locks
        pass
    return file


def _by_id(path: Path, rows: Iterable[Row]) -> dict[str, Row]:
    found = {}
    for row in rows:
        if not {"id", "text", "file_name", "duration"} <= row.keys():
            raise DataError(f"{path} has a row without id, text, file_name or duration: {row}. Name a new folder.")
        found[row["id"]] = row
    return found


def _check_same_sentences(path: Path, done: Mapping[str, Row], sentences: Mapping[str, Row]) -> None:
    other = [row for name, row in done.items() if name not in sentences or sentences[name]["text"] != row["text"]]
    if other:
        raise SynthesisError(
            f"{path} holds {len(other)} utterances that are not among the sentences, such as {other[0]['text']!r}. "
            "Sentences may be added to a run, not taken away or changed. Name a new folder."
        )
