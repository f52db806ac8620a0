"""Where the time of a batch goes."""

from __future__ import annotations

from time import perf_counter
from typing import TYPE_CHECKING

from das_asr.runtime.decoding import DecodedBatch
from das_asr.runtime.results import Timings

if TYPE_CHECKING:
    from das_asr.runtime.scheduler import Stages

__all__ = ["Clock"]


class Clock:
    """Measures the stages of one batch from its construction on; what no stage claims is host time."""

    def __init__(self) -> None:
        self._started = self._last = perf_counter()
        self._stages = {"audio": 0.0, "features": 0.0, "encoder": 0.0, "prefill": 0.0, "steps": 0.0}
        self._step_rows: tuple[int, ...] = ()
        self._queue = 0.0

    def lap(self, stage: str | None) -> None:
        """Books the time since the last lap; None leaves it to the host."""
        now = perf_counter()
        if stage is not None:
            self._stages[stage] += now - self._last
        self._last = now

    def decoded(self, batch: DecodedBatch) -> None:
        """Books what the loop measured itself."""
        self._stages["prefill"] += batch.prefill_seconds
        self._stages["steps"] += sum(batch.step_seconds)
        self._step_rows += batch.step_rows

    def served(self, stages: Stages, batch: DecodedBatch) -> None:
        """Books what the scheduler measured; other requests' turns in between are host time."""
        self._stages["encoder"], self._stages["prefill"] = stages.encoder, stages.prefill
        self._stages["steps"], self._step_rows = sum(stages.steps), batch.step_rows
        self._queue = stages.queue

    def stop(self, audio_duration: float) -> Timings:
        """All timings, with the seconds of audio they were for."""
        total = perf_counter() - self._started - self._queue
        host = total - sum(self._stages.values())
        return Timings(
            audio_duration=audio_duration,
            step_count=len(self._step_rows),
            step_rows=self._step_rows,
            host=host,
            total=total,
            queue=self._queue,
            **self._stages,
        )
