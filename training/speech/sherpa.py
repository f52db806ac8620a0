"""sherpa-onnx: Kokoro and VITS (Piper) voices from a folder on disk.

The folder is one as sherpa-onnx's model archives unpack: `tokens.txt`, one ONNX model, and what the model needs of
`voices.bin` (Kokoro), `lexicon*.txt` and `espeak-ng-data`. Needs the package sherpa-onnx. Such models draw random
numbers of their own, so the same seed does not give the same samples twice.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from das_asr.runtime.errors import SynthesisError
from das_asr.training.speech.processes import plain_text
from das_asr.training.speech.voices import EngineFailure, Samples, Voice

__all__ = ["SherpaEngine"]


class SherpaEngine:
    """The name of a voice is the number of a speaker of the model."""

    default_voice: str | None = "0"

    def __init__(self, model: str | None) -> None:
        if model is None:
            raise SynthesisError(
                "sherpa-onnx needs a voice model: give the folder of a Kokoro or Piper model as model."
            )
        self._tts = _load(Path(model))
        self._folder = model

    def check(self, voice: Voice) -> None:
        """Compares the number with the model's speakers; see `Engine.check`."""
        speakers = max(1, int(self._tts.num_speakers))
        if not (voice.name.isdecimal() and int(voice.name) < speakers):
            raise SynthesisError(
                f"{self._folder} has no speaker {voice.name!r}. It has {speakers}: 0 to {speakers - 1}."
                if speakers > 1
                else f"{self._folder} has no speaker {voice.name!r}. It has one: 0."
            )
        if voice.pitch != 1:
            raise SynthesisError(f"A pitch of {voice.pitch} was asked, but sherpa-onnx cannot change pitch.")

    def speak(self, text: str, voice: Voice) -> tuple[Samples, int]:
        """Runs the model in this process; see `Engine.speak`."""
        try:
            audio = self._tts.generate(plain_text(text), sid=int(voice.name), speed=voice.speed)
        except (IndexError, RuntimeError, ValueError) as error:  # what exceptions of its C++ part become
            raise EngineFailure("engine", f"sherpa-onnx: {error}") from error
        samples = np.asarray(audio.samples, np.float32)
        if not samples.size:
            raise EngineFailure("empty", "sherpa-onnx gave no samples")
        return samples, int(audio.sample_rate)

    def close(self) -> None:
        """The model goes with the object."""


def _load(folder: Path) -> Any:
    try:
        import sherpa_onnx  # pyright: ignore[reportMissingImports]  # optional, and in no extra
    except ImportError as error:
        raise SynthesisError(
            "The package sherpa_onnx is not installed. Install it with `pip install sherpa-onnx`."
        ) from error
    model = _model_file(folder)
    files = {
        "model": str(model),
        "tokens": str(folder / "tokens.txt"),
        "lexicon": ",".join(str(path) for path in sorted(folder.glob("lexicon*.txt"))),
        "data_dir": _if_there(folder / "espeak-ng-data"),
    }
    voices = folder / "voices.bin"
    if voices.is_file():
        family = {"kokoro": sherpa_onnx.OfflineTtsKokoroModelConfig(voices=str(voices), **files)}
    else:
        family = {"vits": sherpa_onnx.OfflineTtsVitsModelConfig(**files)}
    # One thread per utterance: utterances are spoken side by side.
    config = sherpa_onnx.OfflineTtsConfig(model=sherpa_onnx.OfflineTtsModelConfig(num_threads=1, **family))
    if not config.validate():
        raise SynthesisError(f"sherpa-onnx refuses the voice model in {folder}; what it missed stands above.")
    return sherpa_onnx.OfflineTts(config)


def _model_file(folder: Path) -> Path:
    if not (folder / "tokens.txt").is_file():
        raise SynthesisError(
            f"{folder} is no folder of a sherpa-onnx voice: it has no tokens.txt. Unpack a Kokoro or Piper model there."
        )
    models = sorted(folder.glob("*.onnx"), key=lambda path: (path.name != "model.onnx", "int8" in path.name, path.name))
    if not models:
        raise SynthesisError(f"{folder} holds no .onnx file. Unpack a Kokoro or Piper model of sherpa-onnx there.")
    return models[0]


def _if_there(path: Path) -> str:
    return str(path) if path.exists() else ""
