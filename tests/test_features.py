"""Log-mel features equal those of transformers, for every front end and any kind of sound."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from transformers import WhisperFeatureExtractor
from transformers.audio_utils import mel_filter_bank

from das_asr.runtime.features import LogMel, mel_filters
from das_asr.runtime.manifest import AudioFrontEnd

RATE = 16000
TOLERANCE = 1e-4  # of values that lie between about -1 and 1.5


def front_end(seconds: int) -> AudioFrontEnd:
    return AudioFrontEnd(sample_rate=RATE, n_fft=400, hop_length=160, window_samples=seconds * RATE)


@functools.cache
def extractor(mels: int, seconds: int) -> WhisperFeatureExtractor:
    return WhisperFeatureExtractor(feature_size=mels, chunk_length=seconds)


def reference(samples: NDArray[np.float32], mels: int, seconds: int) -> NDArray[np.float32]:
    features = extractor(mels, seconds)(samples, sampling_rate=RATE, return_tensors="np")["input_features"][0]
    return np.asarray(features, np.float32)


def noise(count: int) -> NDArray[np.float32]:
    return (0.1 * np.random.default_rng(count).standard_normal(count)).astype(np.float32)


def voice(count: int) -> NDArray[np.float32]:
    return long_voice()[:count].copy()


@functools.cache
def long_voice() -> NDArray[np.float32]:
    """Harmonics of a gliding pitch under a syllable-like envelope, over a little noise; 30 s."""
    time = np.arange(30 * RATE) / RATE
    phase = 2 * np.pi * (120 * time + 3 * np.sin(2 * np.pi * 0.7 * time))
    buzz = sum(np.sin(harmonic * phase + harmonic) / harmonic for harmonic in range(1, 40))
    return np.asarray(0.1 * buzz * (1 + np.sin(2 * np.pi * 3 * time)) + 0.01 * noise(len(time)), np.float32)


SOUNDS = {
    "noise": noise,
    "voice": voice,
    "quiet": lambda count: voice(count) * np.float32(1e-4),
    "one step of 16 bits": lambda count: np.sign(voice(count)) / np.float32(32768),
    "clipped": lambda count: np.clip(30 * voice(count), -1, 1),
    "tone": lambda count: np.sin(2 * np.pi * 440 * np.arange(count) / RATE).astype(np.float32),
    "offset": lambda count: np.full(count, 0.5, np.float32),
    "silence": lambda count: np.zeros(count, np.float32),
    "click at the end": lambda count: np.eye(1, count, count - 1, dtype=np.float32)[0],
}


@pytest.mark.parametrize("sound", SOUNDS)
@pytest.mark.parametrize("seconds", [5, 8, 30])
@pytest.mark.parametrize("mels", [80, 128])
def test_equals_transformers(mels: int, seconds: int, sound: str) -> None:
    log_mel = LogMel(front_end(seconds), mels)
    window = seconds * RATE
    for count in (33333, window - 1, window)[:: 1 if seconds == 5 else 2]:
        samples = SOUNDS[sound](count)
        features, expected = log_mel(samples), reference(samples, mels, seconds)
        assert features.dtype == np.float32
        assert features.shape == expected.shape == (mels, seconds * 100)
        difference = np.abs(features - expected)
        assert difference.max() < TOLERANCE, f"{count} samples: max {difference.max():.2e} mean {difference.mean():.2e}"


@settings(deadline=None, max_examples=60)
@given(count=st.integers(0, 2 * RATE), level=st.floats(-5, 0), mels=st.sampled_from([80, 128]))
def test_equals_transformers_at_any_length(count: int, level: float, mels: int) -> None:
    samples = noise(count) * np.float32(10**level)
    difference = np.abs(LogMel(front_end(1), mels)(samples) - reference(samples[:RATE], mels, 1))
    # Among so many random signals there are narrow bands that nearly cancel, of which float32 keeps fewer digits.
    assert difference.max() < 10 * TOLERANCE
    assert np.quantile(difference, 0.999) < TOLERANCE


def test_what_exceeds_the_window_is_cut() -> None:
    log_mel = LogMel(front_end(5), 80)
    samples = noise(7 * RATE)
    np.testing.assert_array_equal(log_mel(samples), log_mel(samples[: 5 * RATE]))


@pytest.mark.parametrize("mels", [80, 128])
def test_filters_equal_transformers(mels: int) -> None:
    expected = mel_filter_bank(201, mels, 0.0, 8000.0, RATE, norm="slaney", mel_scale="slaney")
    np.testing.assert_allclose(mel_filters(front_end(30), mels), expected.T, atol=1e-12)


def test_batch_equals_one_at_a_time() -> None:
    log_mel = LogMel(front_end(5), 80)
    utterances = [noise(RATE), voice(5 * RATE), np.zeros(0, np.float32), voice(777)]
    batch = log_mel.batch(utterances)
    assert batch.shape == (4, 80, 500)
    assert batch.flags.c_contiguous
    for features, samples in zip(batch, utterances, strict=True):
        np.testing.assert_array_equal(features, log_mel(samples))
    assert log_mel.batch([]).shape == (0, 80, 500)


def test_samples_are_left_as_they_were() -> None:
    samples = noise(RATE)
    samples.flags.writeable = False
    before = samples.copy()
    LogMel(front_end(1), 80)(samples)
    np.testing.assert_array_equal(samples, before)
