"""Other readings of what rows wrote for themselves: further forms of `hypothesis` without decoding again."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from das_asr.runtime.adapter_sets import AdapterSet
from das_asr.runtime.clock import Clock
from das_asr.runtime.decoding import DecodedBatch
from das_asr.runtime.job import Job
from das_asr.runtime.options import DecodingOptions
from das_asr.runtime.results import Transcription
from das_asr.runtime.selection import HYPOTHESIS
from das_asr.runtime.transcriber import Transcriber
from das_asr.runtime.transcript import Transcript, read_own_histories

__all__ = ["Reading", "RereadingTranscriber", "Score"]

Samples = NDArray[np.float32]
Score = Literal["mean", "total", "root"]


@dataclass(frozen=True, kw_only=True)
class Reading:
    """A form of `hypothesis`: the rows that it knows, and fields of `DecodingOptions`."""

    rows: tuple[str, ...]  # "base", then adapters
    score: Score = "mean"
    base_bias: float = 0.0
    include_base: bool = True
    switch_cost: float | None = None

    @property
    def first(self) -> str:
        """The lowest row that may win."""
        return self.rows[0 if self.include_base else 1]

    def options(self) -> DecodingOptions:
        """What the runtime would be given."""
        return DecodingOptions(
            rule=HYPOTHESIS,
            score=self.score,
            base_bias=self.base_bias,
            include_base=self.include_base,
            switch_cost=self.switch_cost,
        )


class RereadingTranscriber(Transcriber):
    """Keeps what the last batch wrote. For one thread: another's batch would take its place."""

    _decoded: DecodedBatch | None = None

    def reread(self, results: Sequence[Transcription], reading: Reading) -> Iterator[Transcript | None]:
        """The last batch as another form of `hypothesis` reads it; None for digital silence.

        Args:
            results: of the last `transcribe_batch`, whose rule was `hypothesis`, without a no-speech threshold.
            reading: its rows are among those that were decoded, the base first.
        """
        options, place = reading.options(), 0
        for result in results:
            if not result.hypotheses:  # it was not decoded either
                yield None
                continue
            assert self._decoded is not None
            decoded = _of_rows(self._decoded, [result.rows.index(row) for row in reading.rows])
            yield read_own_histories(decoded, place, reading.rows, self._tokenizer, result.language, options)
            place += 1

    def __enter__(self) -> RereadingTranscriber:
        return self

    def _decode(
        self, samples: list[Samples], margin: float | None, adapters: AdapterSet, job: Job, clock: Clock
    ) -> DecodedBatch:
        self._decoded = super()._decode(samples, margin, adapters, job, clock)
        return self._decoded


def _of_rows(decoded: DecodedBatch, rows: Sequence[int]) -> DecodedBatch:
    """The same batch as if only these rows had been in it."""
    return dataclasses.replace(
        decoded,
        candidates=decoded.candidates[:, :, rows],
        logprobs=decoded.logprobs[:, :, rows],
        lengths=decoded.lengths[:, rows],
        pruned=decoded.pruned[:, rows],
        finished=decoded.finished[:, rows],
    )
