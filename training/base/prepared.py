"""Sentences -> speech -> raw log-mel features on disk, in shards that survive a kill.

A shard is a folder with `features.npy` (f16 [frames, mels], log10 power, utterances one after the other) and
`rows.jsonl` (text, source, voice, frames, phonemes). It is written under a temporary name and renamed.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soxr
from numpy.typing import NDArray

from das_asr.runtime.errors import SynthesisError
from das_asr.runtime.features import LogMel
from das_asr.runtime.jsonl import Row, read_rows, write_rows
from das_asr.runtime.manifest import AudioFrontEnd
from das_asr.training.base.phonemes import phonemes
from das_asr.training.base.voices import Take, draw_take
from das_asr.training.speech.engines import EngineFailure, create_engine, speak_16k

__all__ = ["SHARD", "Prepared", "load_prepared", "prepare", "raw_features"]

_RATE, _HOP, _FFT = 16_000, 160, 400
SHARD = 500  # utterances
_ENGINES = ("espeak-ng", "flite", "festival", "pico")
_FEATURES, _ROWS = "features.npy", "rows.jsonl"
_LEAST_POWER = 1e-10


@dataclass(frozen=True)
class Prepared:
    """Utterances ready for training."""

    rows: list[Row]
    features: list[NDArray[np.float16]]  # f16 [frames, mels] each


def raw_features(samples: NDArray[np.float32], mels: int) -> NDArray[np.float16]:
    """log10 mel power of mono samples at 16 kHz, f16 [frames, mels], before Whisper's normalisation."""
    window = -(-len(samples) // (2 * _HOP)) * 2 * _HOP  # whole pairs of frames: the encoder halves them
    front_end = AudioFrontEnd(sample_rate=_RATE, n_fft=_FFT, hop_length=_HOP, window_samples=window)
    power = LogMel(front_end, mels).power(samples)  # [mels, frames]
    return np.log10(np.maximum(power, _LEAST_POWER)).T.astype(np.float16)


def prepare(rows: Sequence[Row], folder: Path, *, mels: int, seconds: float, workers: int) -> Iterator[int]:
    """Speaks every row with a random training voice; yields the number of rows done as shards complete.

    Shards that exist are kept, so a killed run goes on where it was.

    Raises:
        SynthesisError: an engine is missing, or more than 2 % of a shard cannot be spoken.
    """
    folder.mkdir(parents=True, exist_ok=True)
    starts = [start for start in range(0, len(rows), SHARD) if not (folder / _name(start)).is_dir()]
    done = len(rows) - sum(len(rows[start : start + SHARD]) for start in starts)
    yield done
    with ProcessPoolExecutor(workers) as pool:
        jobs = {
            pool.submit(_write_shard, list(rows[start : start + SHARD]), folder / _name(start), mels, seconds): start
            for start in starts
        }
        for job in as_completed(jobs):
            job.result()
            done += len(rows[jobs[job] : jobs[job] + SHARD])
            yield done


def _name(start: int) -> str:
    return f"shard-{start // SHARD:05d}"


def _write_shard(rows: list[Row], path: Path, mels: int, seconds: float) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    spoken, features = _speak_all(rows, mels, seconds)
    for row, symbols in zip(spoken, phonemes([row["text"] for row in spoken]), strict=True):
        row["phonemes"] = symbols
    np.save(temporary / _FEATURES, np.concatenate(features))
    write_rows(temporary / _ROWS, spoken)
    temporary.replace(path)


def _speak_all(rows: list[Row], mels: int, seconds: float) -> tuple[list[Row], list[NDArray[np.float16]]]:
    spoken, features, failures = [], [], []
    with ExitStack() as stack:
        # An engine may keep a process of hundreds of megabytes running.
        engines = {name: stack.enter_context(closing(create_engine(name))) for name in _ENGINES}
        for row in rows:
            take = draw_take(random.Random(f"take {row['id']}"))  # noqa: S311
            try:
                samples = _resampled(speak_16k(engines[take.voice.engine], row["text"], take.voice), take)
            except EngineFailure as error:
                failures.append(f"{row['text']!r}: {error}")
                continue
            if len(samples) <= seconds * _RATE:
                features.append(raw_features(samples, mels))
                voice = f"{take.voice.engine}/{take.voice.name}"
                spoken.append({**row, "voice": voice, "frames": len(features[-1])})
    if len(failures) > 0.02 * len(rows):
        raise SynthesisError(f"{len(failures)} of {len(rows)} sentences could not be spoken, the first: {failures[0]}")
    return spoken, features


def _resampled(samples: NDArray[np.float32], take: Take) -> NDArray[np.float32]:
    """Plays the samples faster by the factor: shorter, higher, with a shorter vocal tract."""
    if take.resample == 1.0:
        return samples
    faster: NDArray[np.float32] = soxr.resample(samples, take.resample * _RATE, _RATE, quality="HQ")
    return faster


def load_prepared(folder: Path) -> Prepared:
    """Reads all shards; the features stay memory-mapped."""
    rows: list[Row] = []
    features: list[NDArray[np.float16]] = []
    for path in sorted(folder.glob("shard-*")):
        shard = list(read_rows(path / _ROWS))
        stored = np.load(path / _FEATURES, mmap_mode="r")
        ends = np.cumsum([row["frames"] for row in shard])
        features += np.split(stored, ends[:-1])
        rows += shard
    return Prepared(rows, features)
