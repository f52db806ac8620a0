"""Decodes the sentences of a set once for all systems that can share it.

One run with own histories gives the base and every adapter alone, and by that every choice among them and every path
through them (`wer_reading`). Rules with a shared history decode for themselves, but only where a text that another rule
or threshold wrote cannot be theirs (`wer_replay`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from das_asr.benchmarks.testsets import EvaluationSet
from das_asr.benchmarks.wer_reading import Reading, RereadingTranscriber
from das_asr.benchmarks.wer_replay import SharedRule, replay
from das_asr.runtime.audio import load_audio
from das_asr.runtime.errors import OptionError
from das_asr.runtime.results import BASE, Transcription
from das_asr.runtime.selection import HYPOTHESIS
from das_asr.runtime.transcript import Transcript

__all__ = ["DecodeOptions", "Decoded", "Demand", "JointText", "OwnTexts", "decode_set"]

Samples = NDArray[np.float32]

_BATCHES_AT_ONCE = 8  # audio held in memory; rules that decode few of the sentences again still fill their batches


@dataclass(frozen=True)
class DecodeOptions:
    """How to run the bundles; see `Transcriber.load` and `DecodingOptions`.

    Nothing is discarded for holding no speech: a system answers for all that it writes.
    """

    device: str = "cpu"
    threads: int | None = None
    batch_size: int = 16
    language: str | None = None
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise OptionError(f"--batch-size is {self.batch_size}, expected at least 1.")

    def choices(self, **more: Any) -> dict[str, Any]:
        """Keyword arguments of `transcribe_batch`."""
        common = {"language": self.language, "max_tokens": self.max_tokens, "no_speech_threshold": None}
        return {"sample_rate": None, **common, **more}


@dataclass(frozen=True)
class Demand:
    """What is wanted of one bundle: rows with their own histories (None: none), and rules with a shared one.

    Readings are of the rows with their own histories.
    """

    own: tuple[str, ...] | None  # adapters beside the base
    shared: tuple[SharedRule, ...] = ()
    readings: tuple[Reading, ...] = ()


@dataclass(frozen=True)
class OwnTexts:
    """What each of R rows wrote for itself of N sentences."""

    rows: tuple[str, ...]  # "base", then adapters
    texts: tuple[tuple[str, ...], ...]  # N x R
    means: NDArray[np.float64]  # [N, R]: mean log-probability per token, end-of-text counted
    lengths: NDArray[np.int64]  # [N, R]: tokens that the mean is over, at least 1


@dataclass(frozen=True)
class JointText:
    """What several rows wrote of one sentence, in a shared history or by a path through their own texts."""

    text: str
    words: tuple[tuple[str, str], ...]  # each word, and the row that wrote most of it
    adapter: str | None = None  # of a reading that keeps to one row


@dataclass(frozen=True)
class Decoded:
    """A set, decoded: texts in the order of its sentences."""

    own: OwnTexts | None
    shared: dict[SharedRule, tuple[JointText, ...]]
    runs: int  # sentences that were decoded with a shared history; the others were replayed
    readings: dict[Reading, tuple[JointText, ...]] = field(default_factory=dict)


def decode_set(
    transcriber: RereadingTranscriber, each: EvaluationSet, demand: Demand, options: DecodeOptions
) -> Decoded:
    """Decodes what is demanded of every sentence, those of similar length together."""
    rows: dict[int, tuple[tuple[str, float, int], ...]] = {}
    shared: dict[SharedRule, dict[int, JointText]] = {rule: {} for rule in demand.shared}
    read: dict[Reading, dict[int, JointText]] = {reading: {} for reading in demand.readings}
    runs = 0
    for chunk in _chunks(each, options.batch_size * _BATCHES_AT_ONCE):
        rate = transcriber.manifest.audio.sample_rate
        loaded = [load_audio(each.utterances[index].audio, target_rate=rate) for index in chunk]
        batch = _Chunk(transcriber, loaded, options)
        if demand.own is not None:
            rows.update(zip(chunk, batch.own(demand.own, demand.readings), strict=True))
            for reading in demand.readings:
                read[reading].update(zip(chunk, batch.read[reading], strict=True))
        for rule in demand.shared:
            shared[rule].update(zip(chunk, batch.shared(rule), strict=True))
        runs += batch.runs
    order = range(len(each.utterances))
    own = None if demand.own is None else _own_texts((BASE, *demand.own), [rows[index] for index in order])
    return Decoded(
        own,
        {rule: tuple(texts[index] for index in order) for rule, texts in shared.items()},
        runs,
        {reading: tuple(texts[index] for index in order) for reading, texts in read.items()},
    )


def _chunks(each: EvaluationSet, size: int) -> Iterator[list[int]]:
    """Indices of the sentences, the shortest first: a batch takes as long as its longest text."""
    order = sorted(range(len(each.utterances)), key=lambda index: each.utterances[index].duration or 0.0)
    for start in range(0, len(order), size):
        yield order[start : start + size]


def _own_texts(rows: tuple[str, ...], found: Sequence[tuple[tuple[str, float, int], ...]]) -> OwnTexts:
    return OwnTexts(
        rows=rows,
        texts=tuple(tuple(text for text, _, _ in sentence) for sentence in found),
        means=np.array([[mean for _, mean, _ in sentence] for sentence in found], np.float64),
        lengths=np.array([[length for _, _, length in sentence] for sentence in found], np.int64),
    )


class _Chunk:
    """Sentences whose audio is in memory, and what was written of them with a shared history so far."""

    def __init__(self, transcriber: RereadingTranscriber, samples: Sequence[Samples], options: DecodeOptions) -> None:
        self._transcriber, self._samples, self._options = transcriber, samples, options
        self._histories: list[list[Transcription]] = [[] for _ in samples]
        self.runs = 0
        self.read: dict[Reading, list[JointText]] = {}  # by `own`

    def own(self, adapters: tuple[str, ...], readings: Sequence[Reading]) -> list[tuple[tuple[str, float, int], ...]]:
        """Text, mean log-probability and length of every row, for every sentence; fills `read` along with it."""
        rows: list[tuple[tuple[str, float, int], ...]] = []
        self.read = {reading: [] for reading in readings}
        for results in self._transcribe(range(len(self._samples)), rule=HYPOTHESIS, adapters=adapters):
            rows += [_rows(result, 1 + len(adapters)) for result in results]
            for reading, texts in self.read.items():
                texts += [_read_text(reading, one) for one in self._transcriber.reread(results, reading)]
        return rows

    def shared(self, rule: SharedRule) -> list[JointText]:
        """Replays what it can and decodes the rest."""
        found = [_replayed(rule, known) for known in self._histories]
        missing = [index for index, text in enumerate(found) if text is None]
        decoded = self._transcribe(missing, rule=rule.name, tau=rule.tau, adapters=rule.adapters)
        self.runs += len(missing)
        for index, result in zip(missing, chain.from_iterable(decoded), strict=True):
            self._histories[index].append(result)
            found[index] = _shared_text(result, [token.row for token in result.provenance])
        return [text for text in found if text is not None]

    def _transcribe(self, indices: Sequence[int], **choices: Any) -> Iterator[list[Transcription]]:
        """Results batch by batch."""
        choices = self._options.choices(**choices) | {"sample_rate": self._transcriber.manifest.audio.sample_rate}
        size = self._options.batch_size
        for start in range(0, len(indices), size):
            batch = [self._samples[index] for index in indices[start : start + size]]
            yield self._transcriber.transcribe_batch(batch, **choices)


def _rows(result: Transcription, count: int) -> tuple[tuple[str, float, int], ...]:
    """Digital silence is not decoded: then every row wrote nothing."""
    if not result.hypotheses:
        return (("", 0.0, 1),) * count
    return tuple((one.text, one.avg_logprob, max(1, len(one.tokens) + one.finished)) for one in result.hypotheses)


def _read_text(reading: Reading, transcript: Transcript | None) -> JointText:
    """Nothing for digital silence. The row is that of a whole text; with a switch cost the words have theirs."""
    if reading.switch_cost is None:
        text, row = ("", reading.first) if transcript is None else (transcript.text, transcript.adapter)
        return JointText(text, (), row)
    if transcript is None:
        return JointText("", ())
    return JointText(transcript.text, tuple((word.word.strip(), word.adapter) for word in transcript.words))


def _replayed(rule: SharedRule, known: Sequence[Transcription]) -> JointText | None:
    for result in known:
        rows = replay(rule, result)
        if rows is not None:
            return _shared_text(result, rows)
    return None


def _shared_text(result: Transcription, rows: Sequence[int]) -> JointText:
    """Words with the row that wrote most of their tokens, the first of equals."""
    words, start = [], 0
    for word in result.words:
        wrote = list(rows[start : start + len(word.tokens)])
        start += len(word.tokens)
        words.append((word.word.strip(), result.rows[max(wrote, key=wrote.count)]))
    return JointText(result.text, tuple(words))
