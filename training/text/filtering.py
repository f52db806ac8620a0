"""Keeps what a model misrecognises once it is spoken: the counterpart of CodecLM's Contrastive Filtering.

CodecLM keeps instructions that the model to be trained answers worse than a strong one. Here the strong one is the text
itself, and the gap is the word error rate of what the model hears.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from das_asr.runtime.errors import OptionError, SynthesisError
from das_asr.runtime.jsonl import JsonLines, Row, write_rows
from das_asr.runtime.manifest import read_manifest
from das_asr.runtime.utterances import Utterance, read_utterances
from das_asr.training.finetune.wer import normalise, word_error_rate
from das_asr.training.text.progress import progress_bar
from das_asr.training.text.spoken import spoken

__all__ = ["FilterOptions", "FilterReport", "filter_speech"]


@dataclass(frozen=True)
class FilterOptions:
    """How speech is transcribed and what is kept.

    Raises:
        OptionError: a value is out of range.
    """

    language: str | None = None  # of a multilingual model; None detects it
    adapters: tuple[str, ...] = ()  # of the bundle; none: the base alone
    above: float = 0.0  # word error rate of an utterance that is kept, not included
    batch_size: int = 8
    device: str = "cpu"
    threads: int | None = None

    def __post_init__(self) -> None:
        if self.above < 0:
            raise OptionError(f"above was {self.above}; a word error rate of 0 or more is expected, such as 0.2.")
        if self.batch_size < 1:
            raise OptionError(f"batch_size was {self.batch_size}; 1 or more are expected.")


@dataclass(frozen=True)
class FilterReport:
    """Result of a run."""

    output: Path
    kept: int
    heard: int
    wer: float  # of all utterances, a fraction


def filter_speech(
    source: Path, bundle: Path, output: Path, options: FilterOptions | None = None, *, quiet: bool = True
) -> FilterReport:
    """Transcribes an AudioFolder or manifest and writes a manifest of what was misrecognised.

    The rows have all columns of the source, and `audio` (absolute), `transcript` and `wer`. Texts are compared in
    lower case, without punctuation, with numbers as words. Killed and started again, it goes on.

    Args:
        source: what `read_utterances` takes.
        bundle: a folder that `das-export onnx` wrote.
        output: JSON Lines file to write.
        options: see `FilterOptions`.
        quiet: show no progress.

    Raises:
        DataError: the source is broken.
        BundleError: so is the bundle.
        AudioError: an utterance cannot be read or is too long.
        SynthesisError: the output exists, or was begun with other options.
    """
    options = options or FilterOptions()
    if output.exists():
        raise SynthesisError(f"{output} exists and is not overwritten. Name another file.")
    utterances = read_utterances(source)
    settings = {
        "base": read_manifest(bundle).base.sha256,
        "adapters": list(options.adapters),
        "language": options.language,
        "source": str(source.resolve()),
    }
    journal = output.with_name(f"{output.name}.part")
    with JsonLines.open(journal) as heard, progress_bar(len(utterances), "utterances", quiet=quiet) as bar:
        _begin(heard, settings, journal)
        done = {row["audio"] for row in heard.rows[1:]}
        bar.update(len(done))
        rest = (utterance for utterance in utterances if str(utterance.audio.resolve()) not in done)
        for row in _transcribe(rest, bundle, options):
            heard.append(row)
            heard.rows.append(row)
            bar.update()
        rows = heard.rows[1:]
    kept = [row for row in rows if row["wer"] > options.above]
    write_rows(output, kept)
    journal.unlink()
    wer = word_error_rate([_compared(row["text"]) for row in rows], [_compared(row["transcript"]) for row in rows])
    return FilterReport(output, len(kept), len(rows), wer)


def _begin(heard: JsonLines, settings: Row, journal: Path) -> None:
    """The first row says what the others depend on."""
    if not heard.rows:
        heard.append(settings)
        heard.rows.append(settings)
    elif heard.rows[0] != settings:
        raise SynthesisError(
            f"{journal} was begun with other options or another bundle. Delete it, or give the old ones."
        )


def _transcribe(utterances: Iterator[Utterance], bundle: Path, options: FilterOptions) -> Iterator[Row]:
    from das_asr.runtime import DecodingOptions, Transcriber

    batch = list(islice(utterances, options.batch_size))
    if not batch:
        return
    decoding = DecodingOptions(language=options.language, adapters=options.adapters)
    with Transcriber.load(bundle, options.device, options.threads) as transcriber:
        while batch:
            results = transcriber.transcribe_batch([utterance.audio for utterance in batch], decoding)
            yield from _judged(batch, [result.text for result in results])
            batch = list(islice(utterances, options.batch_size))


def _judged(batch: Sequence[Utterance], transcripts: Sequence[str]) -> Iterator[Row]:
    for utterance, transcript in zip(batch, transcripts, strict=True):
        known: dict[str, Any] = {"domain": utterance.domain, "duration": utterance.duration}
        yield {
            **utterance.fields,
            **{name: value for name, value in known.items() if value is not None},
            "audio": os.fspath(utterance.audio.resolve()),
            "text": utterance.text,
            "transcript": transcript,
            "wer": word_error_rate([_compared(utterance.text)], [_compared(transcript)]),
        }


def _compared(text: str) -> str:
    return normalise(spoken(text)).replace("-", " ")
