"""What a transcription consists of. Field names are those of faster-whisper where it has one."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

__all__ = ["BASE", "Hypothesis", "Timings", "TokenProvenance", "Transcription", "Word"]

BASE = "base"
"""Name of row 0."""


@dataclass(frozen=True)
class TokenProvenance:
    """Which row wrote a token, and what the others would have written.

    With a shared history all rows stood at the same place. With own history (`hypothesis`) entry i of `candidates` and
    `confidences` is what row i wrote into its own text at the step in which `row` wrote this token, None once that had
    ended. A row that was pruned has None from then on.
    """

    id: int
    adapter: str  # "base" or an adapter's name
    row: int
    logprob: float  # natural log-probability under that row
    candidates: tuple[int | None, ...]  # best token of each row
    confidences: tuple[float | None, ...]  # its probability


@dataclass(frozen=True)
class Word:
    """A word as written, with the space before it."""

    word: str
    probability: float  # mean over its tokens
    adapter: str  # the row that wrote most of its tokens, the first of equals
    confidences: tuple[float | None, ...]  # of every row, mean over its tokens; None where a row had ended
    differs_from_base: bool  # shared history: a token the base would not have written; own: not in the base's text
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Hypothesis:
    """One row's own text (rule `hypothesis`)."""

    adapter: str
    text: str
    tokens: tuple[int, ...]
    score: float  # what the rows are compared by
    avg_logprob: float  # over its tokens and its end-of-text
    finished: bool  # False: cut by the length limit, or pruned


@dataclass(frozen=True)
class Timings:
    """Seconds spent in each stage; utterances decoded in one batch share one object."""

    audio_duration: float  # seconds of audio in the batch
    audio: float  # reading and resampling
    features: float
    encoder: float
    prefill: float
    steps: float  # decoder runs after the prefill
    step_count: int
    host: float  # Python: choosing, words, results
    total: float
    step_rows: tuple[int, ...] = ()  # rows that each of those runs had
    queue: float = 0.0  # waiting to be admitted, see `Transcriber.submit`; not in `total`

    @property
    def rtf(self) -> float:
        """Real-time factor: processing time / audio time."""
        return self.total / self.audio_duration


@dataclass(frozen=True)
class Transcription:
    """The result for one utterance."""

    text: str
    language: str | None  # None for an English-only model
    duration: float  # seconds of audio
    tokens: tuple[int, ...]  # of the text, without end-of-text
    words: tuple[Word, ...]
    provenance: tuple[TokenProvenance, ...]  # of `tokens`, and of the end-of-text if it was reached
    avg_logprob: float  # over the tokens and the end-of-text, natural logarithm
    no_speech_prob: float | None  # None when it was not measured or the model has no such token
    compression_ratio: float  # of the text by zlib; above about 2.4 it repeats itself
    finished: bool  # False: cut by the length limit
    rule: str
    tau: float
    rows: tuple[str, ...]  # names of the rows: "base", then the adapters
    adapter: str | None  # the winner under `hypothesis`; None for a shared history or several rows' words
    hypotheses: tuple[Hypothesis, ...]  # of every row under `hypothesis`, else empty
    pruned: tuple[int | None, ...]  # of each row, the tokens after which it was left out; empty if nothing was decoded
    timings: Timings

    @property
    def rtf(self) -> float:
        """Real-time factor of the batch this utterance was decoded in."""
        return self.timings.rtf

    def to_dict(self) -> dict[str, Any]:
        """Plain Python containers, for JSON."""
        return dataclasses.asdict(self)
