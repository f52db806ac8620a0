"""One utterance: text -> a checked FLAC file and its row of the manifest."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import soundfile

from das_asr.runtime.audio import MIN_SECONDS
from das_asr.runtime.jsonl import Row
from das_asr.training.speech.casting import Delivery, cast
from das_asr.training.speech.engines import SAMPLE_RATE, Engine, EngineFailure, Samples, Voice, resample_16k
from das_asr.training.speech.noise import add_noise
from das_asr.training.speech.options import SpeechOptions
from das_asr.training.speech.sentences import stable_hash

__all__ = ["TEMPORARY", "audio_name", "record", "speak_checked"]

TEMPORARY = ".{}.tmp"  # what a file is called while it is written

# Peaks of speech are above -15 dB; below -40 dB engines met nothing that they can say.
_QUIETEST_PEAK = 0.01

# A few samples at full scale are a peak that was normalised; one in a thousand is audible.
_FULL_SCALE, _MOST_AT_FULL_SCALE = 0.999, 0.001


def audio_name(name: str) -> str:
    """Path of an utterance's file inside the folder; 256 sub-folders keep each of them small."""
    digest = stable_hash("audio", name)
    return f"audio/{digest[:2]}/{digest}.flac"


def record(engine: Engine, row: Row, options: SpeechOptions, folder: Path) -> Row:
    """Speaks a sentence into its file, which is complete or absent.

    Args:
        engine: speaks.
        row: the sentence, with `id` and `text`.
        options: what its delivery is drawn from.
        folder: of the run.

    Returns:
        The row of the manifest. Columns of the sentence that have the name of one of ours become `text_<name>`.

    Raises:
        EngineFailure: the sentence could not be spoken, or the audio is empty, clipped or too long.
        SynthesisError: nothing can be spoken any more.
    """
    delivery = cast(row["id"], options)
    samples = _over_noise(speak_checked(engine, row["text"], delivery.voice, options.max_seconds), delivery)
    path = folder / audio_name(row["id"])
    temporary = path.with_name(TEMPORARY.format(path.name))
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(temporary, samples, SAMPLE_RATE, subtype="PCM_16", format="FLAC")
    temporary.replace(path)
    return _manifest_row(row, delivery, options.seed, len(samples) / SAMPLE_RATE)


def speak_checked(engine: Engine, text: str, voice: Voice, max_seconds: float) -> Samples:
    """Speaks one text -> float32 [n] at 16 kHz, neither empty nor clipped nor too long.

    Raises:
        EngineFailure: it is one of these, or could not be spoken.
        SynthesisError: nothing can be spoken any more.
    """
    samples, rate = engine.speak(text, voice)
    seconds = len(samples) / rate
    loudness = np.abs(samples)
    if not np.isfinite(loudness).all():
        raise EngineFailure("engine", "the audio holds values that are no numbers")
    if seconds < MIN_SECONDS or float(loudness.max()) < _QUIETEST_PEAK:
        raise EngineFailure("empty", f"{seconds:.2f} s of audio without speech")
    if float(np.mean(loudness >= _FULL_SCALE)) > _MOST_AT_FULL_SCALE:
        raise EngineFailure("clipped", f"{np.mean(loudness >= _FULL_SCALE):.1%} of the samples are at full scale")
    if seconds > max_seconds:
        raise EngineFailure("too long", f"{seconds:.2f} s of audio, {max_seconds:g} s fit")
    return resample_16k(samples, rate)


def _over_noise(speech: Samples, delivery: Delivery) -> Samples:
    samples = speech
    if delivery.noise_db is not None and delivery.noise_color is not None:
        samples = add_noise(speech, SAMPLE_RATE, delivery.noise_db, delivery.noise_color, delivery.noise_seed)
    peak = float(np.abs(samples).max())
    return samples if peak <= _FULL_SCALE else samples * np.float32(_FULL_SCALE / peak)


def _manifest_row(row: Row, delivery: Delivery, seed: int, seconds: float) -> Row:
    ours = {
        "file_name": audio_name(row["id"]),
        "text": row["text"],
        "domain": row.get("domain"),
        "id": row["id"],
        "engine": delivery.voice.engine,
        "voice": delivery.voice.name,
        "speed": delivery.voice.speed,
        "pitch": delivery.voice.pitch,
        "noise_db": delivery.noise_db,
        "noise_color": delivery.noise_color,
        "duration": round(seconds, 4),
        "seed": seed,
        "source_row": row["source_row"],
    }
    same = ("text", "domain", "id", "source_row")
    theirs = {f"text_{key}" if key in ours else key: value for key, value in row.items() if key not in same}
    return {**ours, **theirs}
