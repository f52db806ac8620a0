"""CTranslate2: converted by its own converter, weights stored in the precision that they are computed with.

The engine takes features, not audio; it gets those of this package's extractor. Encoder and decoder are timed apart.
Keys and values of the cross-attention are made by the decoder here, at its first step.
"""

from __future__ import annotations

from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np

from das_asr.benchmarks.models import prompt_ids, read_json
from das_asr.benchmarks.systems import System, Work
from das_asr.benchmarks.timing import Utterance
from das_asr.runtime.features import LogMel
from das_asr.runtime.manifest import AudioFrontEnd

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["COMPUTE_TYPES", "ENGINE", "convert_checkpoint", "most_length", "starts_with_words", "suppressed"]

COMPUTE_TYPES = {"fp32": "float32", "int8": "int8"}


def convert_checkpoint(checkpoint: Path, precision: str, folder: Path) -> None:
    """Runs the converter; `folder` may exist if it is empty."""
    from ctranslate2.converters import TransformersConverter  # pyright: ignore[reportMissingImports]

    files = ["tokenizer.json", "preprocessor_config.json"]
    TransformersConverter(str(checkpoint), copy_files=files).convert(
        str(folder), quantization=COMPUTE_TYPES[precision], force=True
    )


def most_length(tokens: int | None, positions: int) -> int:
    """The engine's `max_length` for a number of new tokens: it halves what it is given."""
    return positions if tokens is None else 2 * tokens


def suppressed(checkpoint: Path, tokens: int | None) -> list[int]:
    """Ids that may not be written: the checkpoint's, and end-of-text where a number of tokens is forced."""
    config = read_json(checkpoint / "generation_config.json")
    forced = [] if tokens is None else [int(config["eos_token_id"])]
    return [*(config.get("suppress_tokens") or []), *forced]


def starts_with_words(checkpoint: Path) -> bool:
    """Whether a text may not begin with a blank or its end, as the checkpoint's `begin_suppress_tokens` have it.

    Peers have a switch for this and not a list; what it suppresses is what the published models list.
    """
    return bool(read_json(checkpoint / "generation_config.json").get("begin_suppress_tokens"))


class _System:
    def __init__(self, work: Work, folder: Path) -> None:
        import ctranslate2  # pyright: ignore[reportMissingImports]

        self._checkpoint = work.checkpoint
        self._engine: Any = ctranslate2
        self._model = ctranslate2.models.Whisper(
            str(folder), compute_type=COMPUTE_TYPES[work.precision], intra_threads=work.threads
        )
        settings = read_json(work.checkpoint / "preprocessor_config.json")
        positions = int(read_json(work.checkpoint / "config.json")["max_target_positions"])
        names = ("sampling_rate", "n_fft", "hop_length", "n_samples")
        self._features = LogMel(AudioFrontEnd(*(int(settings[name]) for name in names)), int(settings["feature_size"]))
        self._prompt = prompt_ids(work.checkpoint)
        self._options = {
            "beam_size": 1,
            "max_length": most_length(work.tokens, positions),
            "suppress_blank": starts_with_words(work.checkpoint),
            "suppress_tokens": suppressed(work.checkpoint, work.tokens),
        }

    def transcribe(self, audio: NDArray[np.float32]) -> Utterance:
        started = perf_counter()
        features = self._features(audio)[None]
        extracted = perf_counter()
        encoded = self._model.encode(self._engine.StorageView.from_array(np.ascontiguousarray(features)))
        seen = perf_counter()
        (result,) = self._model.generate(encoded, [self._prompt], **self._options)
        ended = perf_counter()
        return Utterance(
            tuple(result.sequences_ids[0]), (), ended - started, extracted - started, seen - extracted, 0.0, ()
        )

    def close(self) -> None:
        self._model.unload_model()


class _CTranslate2:
    def convert(self, checkpoint: Path, precision: str, folder: Path, whisper_cpp: Path | None) -> None:  # noqa: ARG002
        convert_checkpoint(checkpoint, precision, folder)

    def open(self, work: Work, folder: Path) -> System:
        return _System(work, folder)


ENGINE = _CTranslate2()
