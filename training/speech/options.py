"""What a run of speech synthesis is told."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any

from das_asr.runtime.errors import OptionError
from das_asr.training.speech.engines import ENGINES

__all__ = ["Range", "SpeechOptions"]

Range = tuple[float, float]  # lowest and highest, both included


@dataclass(frozen=True)
class SpeechOptions:
    """How sentences are spoken. By default one voice says everything, at its own rate and pitch, without noise.

    Raises:
        OptionError: a value is out of range, or an option does not go with the engine.
    """

    engine: str = "flite"  # one of `engines.ENGINES`
    voices: tuple[str, ...] = ()  # one is drawn for each utterance; none: the engine's default
    speed: Range = (1.0, 1.0)  # factor of the engine's rate, drawn uniformly
    pitch: Range = (1.0, 1.0)  # factor of the voice's pitch, drawn uniformly
    noise_db: Range | None = None  # signal-to-noise ratio in dB, drawn uniformly; None: no noise
    max_seconds: float = 30.0  # the model's window; what is longer fails
    max_failures: float = 0.02  # share of the sentences that may fail before the run stops
    seed: int = 0
    shard: tuple[int, int] = (0, 1)  # (i, n): the i-th of n parts, counted from 0
    workers: int | None = None  # utterances spoken at a time; None: one per core
    timeout: float = 60.0  # seconds that one utterance may take
    model: str | None = None  # sherpa-onnx: folder of the voice model; openai: name of the model
    base_url: str | None = None  # openai: address of the endpoint
    api_key: str | None = None  # openai

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise OptionError(f"There is no speech engine {self.engine!r}. There are: {', '.join(ENGINES)}.")
        if len(set(self.voices)) != len(self.voices) or not all(name.strip() for name in self.voices):
            raise OptionError(f"voices={self.voices} has an empty name, or one twice. Name each voice once.")
        _check_range("speed", self.speed, (0.25, 4.0))
        _check_range("pitch", self.pitch, (0.25, 4.0))
        if self.noise_db is not None:
            _check_range("noise_db", self.noise_db, (-20.0, 100.0))
        _check_range("max_seconds", (self.max_seconds, self.max_seconds), (0.1, 3600.0))
        _check_range("max_failures", (self.max_failures, self.max_failures), (0.0, 1.0))
        _check_range("timeout", (self.timeout, self.timeout), (0.1, 3600.0))
        if self.workers is not None and self.workers < 1:
            raise OptionError(f"workers={self.workers} was given; 1 or more are expected.")
        part, parts = self.shard
        if not 0 <= part < parts:
            raise OptionError(f"shard={part}/{parts} was given; i/n with i from 0 to n - 1 is expected, such as 0/4.")

    @property
    def workers_or_cores(self) -> int:
        """Utterances spoken at a time."""
        if self.workers is not None:
            return self.workers
        if hasattr(os, "sched_getaffinity"):  # the cores that this process may use, where the system tells
            return len(os.sched_getaffinity(0))
        return os.cpu_count() or 1

    def identity(self) -> dict[str, Any]:
        """What the audio depends on, as JSON; a folder holds utterances of one identity."""
        return {
            "engine": self.engine,
            "voices": list(self.voices),
            "speed": list(self.speed),
            "pitch": list(self.pitch),
            "noise_db": None if self.noise_db is None else list(self.noise_db),
            "max_seconds": self.max_seconds,
            "seed": self.seed,
            "shard": list(self.shard),
            "model": self.model,
        }


def _check_range(name: str, values: Range, allowed: Range) -> None:
    lowest, highest = values
    if not (all(math.isfinite(value) for value in values) and allowed[0] <= lowest <= highest <= allowed[1]):
        given = f"{lowest:g}" if lowest == highest else f"{lowest:g} to {highest:g}"
        raise OptionError(
            f"{name} was {given}; lowest before highest and {allowed[0]:g} to {allowed[1]:g} are expected."
        )
