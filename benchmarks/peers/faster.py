"""faster-whisper: what most users of CTranslate2 call; its own features, one window, greedy, no fall-back.

Many utterances go through its `BatchedInferencePipeline`, which takes a single audio and the places of what is spoken
in it: here all utterances, one behind the other.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np

from das_asr.benchmarks.models import SAMPLE_RATE, is_multilingual, prompt_ids, read_json
from das_asr.benchmarks.peers.ctranslate import (
    COMPUTE_TYPES,
    convert_checkpoint,
    most_length,
    starts_with_words,
    suppressed,
)
from das_asr.benchmarks.peers.engines import UnavailableError
from das_asr.benchmarks.systems import System, Work
from das_asr.benchmarks.timing import Burst, Utterance

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["ENGINE"]


class _Timed:
    """Calls through to what it wraps and adds up the seconds."""

    def __init__(self, inner: Any) -> None:
        self._inner, self.seconds = inner, 0.0

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        started = perf_counter()
        result = self._inner(*arguments, **options)
        self.seconds += perf_counter() - started
        return result

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


class _Named:
    """The engine's model with the languages that the checkpoint has: the engine tells them by the vocabulary's size."""

    def __init__(self, inner: Any, multilingual: bool) -> None:
        self._inner, self.is_multilingual = inner, multilingual

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


class _System:
    def __init__(self, work: Work, folder: Path) -> None:
        from faster_whisper import WhisperModel  # pyright: ignore[reportMissingImports]

        self._model: Any = WhisperModel(
            str(folder), compute_type=COMPUTE_TYPES[work.precision], cpu_threads=work.threads
        )
        multilingual = is_multilingual(read_json(work.checkpoint / "generation_config.json"))
        self._model.model = _Named(self._model.model, multilingual)
        self._features = self._model.feature_extractor = _Timed(self._model.feature_extractor)
        self._encoder = self._model.encode = _Timed(self._model.encode)
        prompt, positions = prompt_ids(work.checkpoint), read_json(work.checkpoint / "config.json")
        self._options = {
            "language": "en",
            "beam_size": 1,
            "temperature": 0,
            "without_timestamps": True,
            "condition_on_previous_text": False,
            "no_speech_threshold": None,
            "log_prob_threshold": None,
            "compression_ratio_threshold": None,
            "suppress_blank": starts_with_words(work.checkpoint),
            "suppress_tokens": suppressed(work.checkpoint, work.tokens),
            "max_new_tokens": most_length(work.tokens, int(positions["max_target_positions"])) - len(prompt),
        }

    def transcribe(self, audio: NDArray[np.float32]) -> Utterance:
        self._features.seconds = self._encoder.seconds = 0.0
        started = perf_counter()
        segments = list(self._model.transcribe(audio, **self._options)[0])
        total = perf_counter() - started
        tokens = tuple(token for segment in segments for token in segment.tokens)
        return Utterance(tokens, (), total, self._features.seconds, self._encoder.seconds, 0.0, ())

    def transcribe_all(self, clips: Sequence[NDArray[np.float32]], size: int) -> Burst:
        from faster_whisper import BatchedInferencePipeline  # pyright: ignore[reportMissingImports]

        self._check_window()
        started = perf_counter()
        ends = list(itertools.accumulate(map(len, clips)))
        # Half a sample more, for the pipeline multiplies by the rate again and cuts off.
        moments = [(end + 0.5) / SAMPLE_RATE for end in (0, *ends)]
        places = [{"start": start, "end": end} for start, end in itertools.pairwise(moments)]
        segments: Any = BatchedInferencePipeline(self._model).transcribe(
            np.concatenate(clips), clip_timestamps=places, batch_size=size, **self._options
        )[0]
        # A text with two timestamps in a row becomes several segments, which have the place of their utterance.
        tokens = tuple(
            tuple(token for segment in segments for token in segment.tokens)
            for _, segments in itertools.groupby(segments, lambda segment: segment.seek)
        )
        return Burst(perf_counter() - started, tokens)

    def _check_window(self) -> None:
        from faster_whisper.audio import pad_or_trim  # pyright: ignore[reportMissingImports]

        frames, padded = self._features.nb_max_frames, inspect.signature(pad_or_trim).parameters["length"].default
        if frames != padded:
            raise UnavailableError(
                f"its batched pipeline pads every utterance to {padded} frames; this checkpoint's window has {frames}"
            )

    def close(self) -> None:
        self._model.model.unload_model()


class _FasterWhisper:
    def convert(self, checkpoint: Path, precision: str, folder: Path, whisper_cpp: Path | None) -> None:  # noqa: ARG002
        convert_checkpoint(checkpoint, precision, folder)

    def open(self, work: Work, folder: Path) -> System:
        return _System(work, folder)


ENGINE = _FasterWhisper()
