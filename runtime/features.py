"""Log-mel features: mono samples -> what the encoder takes, in NumPy alone.

    features = LogMel(manifest.audio, manifest.dimensions.mels)
    batch = features.batch([first, second])  # float32 [2, mels, frames]
    short = features.batch([first, second], margin=1.0)  # as many frames as the longer one and a second need

The audio is padded with zeros to the model window, or to as much of it as is asked for; the frames are the same. Most
utterances are much shorter than the window, and a frame that sees only padding has a known value, so the transform runs
over the audio alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from das_asr.runtime.manifest import AudioFrontEnd

__all__ = ["LogMel", "mel_filters"]

# Whisper's constants; they belong to how every checkpoint was trained and are in no checkpoint's files.
_HIGHEST_FREQUENCY = 8000.0  # Hz, upper edge of the last filter
_LEAST_POWER = 1e-10
_DYNAMIC_RANGE = 8.0  # decades kept below the loudest value of the window
_OFFSET, _SCALE = 4.0, 0.25  # to about -1 .. 1

_SINGLE_THREADED = 1 << 18  # multiplications up to which OpenBLAS keeps a product on the calling thread
_WHOLE_FRAMES = 100  # a batch with a margin has a multiple of these: engines and slots then see few lengths
_CHUNK = 256  # frames transformed at a time: larger, and the intermediate arrays leave the CPU's cache


class LogMel:
    """Computes log-mel features of one model window; immutable, so threads may share one."""

    def __init__(self, front_end: AudioFrontEnd, mels: int) -> None:
        self.mels = mels
        self.frames = front_end.window_samples // front_end.hop_length
        self._limit = front_end.window_samples
        self._hop = front_end.hop_length
        self._n_fft = front_end.n_fft
        self._rate = front_end.sample_rate
        phase = 2 * np.pi * np.arange(self._n_fft) / self._n_fft
        self._window = (0.5 - 0.5 * np.cos(phase)).astype(np.float32)  # periodic Hann, [n_fft]
        self._filters = mel_filters(front_end, mels).astype(np.float32)  # [mels, bins]
        self._block = max(1, _SINGLE_THREADED // self._filters.size)  # frames

    def __call__(self, samples: NDArray[np.float32]) -> NDArray[np.float32]:
        """Features of one utterance.

        Args:
            samples: float32 [n], full scale 1; what exceeds the window is cut off.

        Returns:
            float32 [mels, frames].
        """
        features = np.empty((self.mels, self.frames), np.float32)
        self._write(samples, features)
        return features

    def batch(self, utterances: Sequence[NDArray[np.float32]], margin: float | None = None) -> NDArray[np.float32]:
        """Features of several utterances of any lengths, float32 [n] each -> float32 [B, mels, frames].

        Args:
            utterances: samples as for one.
            margin: seconds of silence that are kept behind the longest of them; None keeps the whole window.
        """
        frames = self.frames if margin is None else self.frames_for(max(map(len, utterances)), margin)
        features = np.empty((len(utterances), self.mels, frames), np.float32)
        for samples, out in zip(utterances, features, strict=True):
            self._write(samples, out)
        return features

    def frames_for(self, samples: int, margin: float) -> int:
        """Frames that hold so many samples and a margin in seconds: a round number, and at most a window."""
        behind = max(self._n_fft // 2, round(margin * self._rate))  # a frame hears half its width ahead
        rounded = -(-(samples + behind) // (self._hop * _WHOLE_FRAMES)) * _WHOLE_FRAMES
        return min(self.frames, rounded)

    def power(self, samples: NDArray[np.float32]) -> NDArray[np.float32]:
        """Mel power of the frames that hear any audio, before logarithm and normalisation: float32 [mels, heard]."""
        audible = self._heard_frames(samples[: self._limit])
        heard = np.empty((self.mels, len(audible)), np.float32)
        self._fill(audible, heard)
        return heard

    def _fill(self, audible: NDArray[np.float32], heard: NDArray[np.float32]) -> None:
        for start in range(0, len(audible), _CHUNK):
            heard[:, start : start + _CHUNK] = self._mel_power(audible[start : start + _CHUNK])

    def _write(self, samples: NDArray[np.float32], out: NDArray[np.float32]) -> None:
        """Fills `out` [mels, frames]."""
        audible = self._heard_frames(samples[: self._limit])
        heard = out[:, : len(audible)]
        self._fill(audible, heard)
        np.log10(np.maximum(heard, _LEAST_POWER, out=heard), out=heard)
        silence = np.float32(np.log10(_LEAST_POWER))
        floor = max(heard.max(), silence) - np.float32(_DYNAMIC_RANGE)
        np.maximum(heard, floor, out=heard)
        out[:, len(audible) :] = max(silence, floor)
        out += np.float32(_OFFSET)
        out *= np.float32(_SCALE)

    def _mel_power(self, frames: NDArray[np.float32]) -> NDArray[np.float32]:
        """Frames of samples [count, n_fft] -> power in each mel band [mels, count]."""
        count, bins = len(frames), self._filters.shape[1]
        spectrum = np.fft.rfft(frames * self._window)  # [count, bins]
        blocks = -(-count // self._block)
        power = np.zeros((blocks * self._block, bins), np.float32)
        np.add(spectrum.real**2, spectrum.imag**2, out=power[:count], casting="same_kind")
        # One small product per block: the BLAS would spread a larger one over threads that wait by spinning, which is
        # ten times slower when the cores have anything else to do.
        mel = power.reshape(blocks, self._block, bins) @ self._filters.T  # [blocks, block, mels]
        return mel.reshape(-1, self.mels)[:count].T

    def _heard_frames(self, samples: NDArray[np.float32]) -> NDArray[np.float32]:
        """The frames that hear any audio, as a view [count, n_fft] over the padded samples.

        Frame t is centred on sample t * hop of the window, whose two ends are mirrored by half a frame.
        """
        half = self._n_fft // 2
        count = min(self.frames, -(-(len(samples) + half) // self._hop))
        length = max((count - 1) * self._hop + self._n_fft, 2 * half + 1)
        padded = np.zeros(length, np.float32)
        beyond = length - half - self._limit  # samples after the end of the window, from the mirror
        end = min(len(samples), length - half)
        padded[half : half + end] = samples[:end]
        padded[:half] = padded[2 * half : half : -1]
        if beyond > 0:
            padded[-beyond:] = padded[-beyond - 2 : -2 * beyond - 2 : -1]
        return np.lib.stride_tricks.sliding_window_view(padded, self._n_fft)[:: self._hop][:count]


def mel_filters(front_end: AudioFrontEnd, mels: int) -> NDArray[np.float64]:
    """Triangular filters of equal area, evenly spaced on Slaney's mel scale from 0 to 8 kHz.

    Returns:
        float64 [mels, n_fft // 2 + 1], the weight of each frequency bin in each band.
    """
    bins = np.fft.rfftfreq(front_end.n_fft, 1 / front_end.sample_rate)  # Hz
    top = float(_hertz_to_mel(np.array(_HIGHEST_FREQUENCY)))
    edges = _mel_to_hertz(np.linspace(0.0, top, mels + 2))  # Hz; band i lies between edges i and i + 2
    low, peak, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    triangles = np.minimum((bins - low) / (peak - low), (high - bins) / (high - peak))
    filters: NDArray[np.float64] = np.maximum(triangles, 0.0) * (2.0 / (high - low))
    return filters


# Slaney's scale: linear up to 1 kHz (15 mel), logarithmic above, where 27 mel are a factor of 6.4.
_KNEE_HERTZ, _KNEE_MEL = 1000.0, 15.0
_MEL_PER_NEPER = 27.0 / np.log(6.4)


def _hertz_to_mel(hertz: NDArray[np.float64]) -> NDArray[np.float64]:
    above = _KNEE_MEL + _MEL_PER_NEPER * np.log(np.maximum(hertz, _KNEE_HERTZ) / _KNEE_HERTZ)
    return np.where(hertz < _KNEE_HERTZ, hertz * (_KNEE_MEL / _KNEE_HERTZ), above)


def _mel_to_hertz(mel: NDArray[np.float64]) -> NDArray[np.float64]:
    above = _KNEE_HERTZ * np.exp((np.maximum(mel, _KNEE_MEL) - _KNEE_MEL) / _MEL_PER_NEPER)
    return np.where(mel < _KNEE_MEL, mel * (_KNEE_HERTZ / _KNEE_MEL), above)
