"""optimum-onnx: its own export, and `generate` of transformers over ONNX Runtime.

Its releases want an older transformers than the rest, so it usually runs in an interpreter of its own (`--python`).
"""

from __future__ import annotations

import functools
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from das_asr.benchmarks.baselines import generate_options
from das_asr.benchmarks.models import SAMPLE_RATE, read_json
from das_asr.benchmarks.systems import System, Work
from das_asr.benchmarks.timing import Utterance

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["ENGINE"]


class _System:
    def __init__(self, work: Work, folder: Path) -> None:
        import onnxruntime
        from optimum.onnxruntime import ORTModelForSpeechSeq2Seq  # pyright: ignore[reportMissingImports]
        from transformers import WhisperFeatureExtractor

        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = work.threads
        settings.log_severity_level = 3
        self._model: Any = ORTModelForSpeechSeq2Seq.from_pretrained(
            folder,
            session_options=settings,
            encoder_file_name="encoder_model.onnx",
            decoder_file_name="decoder_model.onnx",
            decoder_with_past_file_name="decoder_with_past_model.onnx",
        )
        self._extractor = WhisperFeatureExtractor.from_pretrained(work.checkpoint, local_files_only=True)
        config = read_json(work.checkpoint / "generation_config.json")
        self._end = int(config["eos_token_id"])
        self._options = generate_options(config, work.tokens)
        self._encoder = 0.0
        self._model.encoder.forward = self._timed(self._model.encoder.forward)

    def _timed(self, forward: Any) -> Any:
        @functools.wraps(forward)  # `generate` reads its signature
        def timed(*arguments: Any, **options: Any) -> Any:
            started = perf_counter()
            result = forward(*arguments, **options)
            self._encoder += perf_counter() - started
            return result

        return timed

    def transcribe(self, audio: NDArray[np.float32]) -> Utterance:
        self._encoder = 0.0
        started = perf_counter()
        features = self._extractor(audio, sampling_rate=SAMPLE_RATE, return_tensors="pt").input_features
        extracted = perf_counter()
        ids = self._model.generate(features, **self._options)[0].tolist()
        total = perf_counter() - started
        tokens = tuple(token for token in ids if token < self._end)
        return Utterance(tokens, (), total, extracted - started, self._encoder, 0.0, ())

    def close(self) -> None:
        del self._model


class _Optimum:
    def convert(self, checkpoint: Path, precision: str, folder: Path, whisper_cpp: Path | None) -> None:  # noqa: ARG002
        from optimum.onnxruntime import ORTModelForSpeechSeq2Seq  # pyright: ignore[reportMissingImports]

        ORTModelForSpeechSeq2Seq.from_pretrained(str(checkpoint), export=True).save_pretrained(folder)

    def open(self, work: Work, folder: Path) -> System:
        return _System(work, folder)


ENGINE = _Optimum()
