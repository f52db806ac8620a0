"""Speech engines by name.

engine = create_engine("flite")
samples = speak_16k(engine, "play some jazz", Voice("flite", "rms"))
"""

from __future__ import annotations

import numpy as np
import soxr

from das_asr.runtime.errors import OptionError
from das_asr.training.speech.voices import Engine, EngineFailure, Samples, Voice

__all__ = [
    "ENGINES",
    "SAMPLE_RATE",
    "Engine",
    "EngineFailure",
    "Samples",
    "Voice",
    "create_engine",
    "resample_16k",
    "speak_16k",
]

SAMPLE_RATE = 16000  # Hz; what Whisper hears

ENGINES = ("espeak-ng", "flite", "festival", "pico", "sherpa-onnx", "openai", "command")

_TIMEOUT = 60.0  # seconds for one utterance


def create_engine(
    name: str,
    *,
    model: str | None = None,
    base_url: str | None = None,
    api_key: str | None = None,
    timeout: float = _TIMEOUT,
) -> Engine:
    """Makes an engine.

    Args:
        name: one of `ENGINES`.
        model: sherpa-onnx: the folder of a voice model; openai: the endpoint's name of the model.
        base_url: openai: where the endpoint is; default the environment's OPENAI_BASE_URL.
        api_key: openai: default the environment's OPENAI_API_KEY.
        timeout: seconds that one utterance may take.

    Raises:
        SynthesisError: the engine's program, package or model is missing; the message says what to install.
        OptionError: there is no engine of this name, or an option does not belong to it.
    """
    _check_options(name, model, base_url, api_key)
    if name == "espeak-ng":
        from das_asr.training.speech.espeak import EspeakEngine

        return EspeakEngine(timeout)
    if name == "flite":
        from das_asr.training.speech.flite import FliteEngine

        return FliteEngine(timeout)
    if name == "festival":
        from das_asr.training.speech.festival import FestivalEngine

        return FestivalEngine(timeout)
    if name == "pico":
        from das_asr.training.speech.pico import PicoEngine

        return PicoEngine(timeout)
    if name == "command":
        from das_asr.training.speech.command import CommandEngine

        return CommandEngine(timeout)
    if name == "sherpa-onnx":
        from das_asr.training.speech.sherpa import SherpaEngine

        return SherpaEngine(model)
    from das_asr.training.speech.endpoint import EndpointEngine

    return EndpointEngine(model, base_url, api_key, timeout)


def _check_options(name: str, model: str | None, base_url: str | None, api_key: str | None) -> None:
    if name not in ENGINES:
        raise OptionError(f"There is no speech engine {name!r}. There are: {', '.join(ENGINES)}.")
    if model is not None and name not in ("sherpa-onnx", "openai"):
        raise OptionError(f"model={model!r} was given for {name}, which has none; only sherpa-onnx and openai take it.")
    if (base_url is not None or api_key is not None) and name != "openai":
        raise OptionError(f"An endpoint or key was given for {name}; only openai takes them.")


def speak_16k(engine: Engine, text: str, voice: Voice) -> Samples:
    """Speaks one text as mono float32 [n] at 16 kHz; see `Engine.speak` for the errors."""
    return resample_16k(*engine.speak(text, voice))


def resample_16k(samples: Samples, rate: int) -> Samples:
    """Mono float32 [n] at `rate` Hz -> [about n * 16000 / rate] at 16 kHz, free of aliases."""
    if rate == SAMPLE_RATE:
        return samples
    return np.asarray(soxr.resample(samples, rate, SAMPLE_RATE, quality="HQ"), np.float32)
