"""White and coloured noise under speech."""

from __future__ import annotations

import numpy as np

from das_asr.training.speech.voices import Samples

__all__ = ["COLORS", "add_noise"]

COLORS = ("white", "pink", "brown")

# Power falls with this power of frequency: flat, 3 dB and 6 dB per octave.
_SLOPES = {"white": 0.0, "pink": 1.0, "brown": 2.0}

# Hz; below it the spectrum is flat, or most of brown noise would be a rumble that no speaker plays.
_CORNER_HZ = 50.0


def add_noise(samples: Samples, rate: int, ratio_db: float, color: str, seed: int) -> Samples:
    """Speech [n] over noise of one colour.

    Args:
        samples: float32 [n], not silent.
        rate: in Hz.
        ratio_db: 10 log10 of the speech's mean power over the noise's.
        color: one of `COLORS`.
        seed: of the noise.
    """
    count = len(samples)
    spectrum = np.fft.rfft(np.random.default_rng(seed).standard_normal(count))
    frequencies = np.maximum(np.fft.rfftfreq(count, 1 / rate), _CORNER_HZ)
    noise = np.fft.irfft(spectrum * frequencies ** (-_SLOPES[color] / 2), count)
    gain = _rms(samples) / _rms(noise) * 10 ** (-ratio_db / 20)
    return np.asarray(samples + gain * noise, np.float32)


def _rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(values, dtype=np.float64))))
