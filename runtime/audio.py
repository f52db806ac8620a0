"""Audio in: a file, a file object, encoded bytes or an array -> mono float32 samples at the model's rate.

    samples = load_audio("request.flac")
    check_duration(samples, manifest.audio)

Everything is decoded by libsndfile (WAV, FLAC, Ogg Vorbis and Opus, MP3 and its other formats) and resampled by soxr.
"""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import BinaryIO, TypeAlias

import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray

from das_asr.runtime.errors import AudioError, OptionError
from das_asr.runtime.manifest import AudioFrontEnd

__all__ = [
    "MIN_SECONDS",
    "AudioInput",
    "check_duration",
    "is_silent",
    "load_audio",
]

AudioInput: TypeAlias = str | os.PathLike[str] | BinaryIO | bytes | NDArray[np.generic]
"""A path, an open binary file, the bytes of an encoded file, or samples [n] or [n, channels]."""

Samples: TypeAlias = NDArray[np.float32]

MIN_SECONDS = 0.1  # shorter than any word

# Outside these a header is damaged, or an array's rate was given in kHz; resampling would then ask for absurd memory.
_LOWEST_RATE, _HIGHEST_RATE = 1_000, 768_000  # Hz

# Full scale is 1. 40 dB above it the samples are integers that were cast to float without being scaled.
_LOUDEST = 100.0

_BLOCK_VALUES = 1 << 20  # values decoded at a time, whatever the number of channels: a header cannot make us allocate

# Sizes that ffmpeg and SoX write when the output is a pipe and the length is not known yet.
_WAV_UNKNOWN_SIZES = frozenset({0xFFFFFFFF, 0x7FFFF000})

# (dtype kind, bytes) -> (value of silence, full scale)
_INTEGER_SCALES = {("u", 1): (128.0, 2.0**7), ("i", 2): (0.0, 2.0**15), ("i", 4): (0.0, 2.0**31)}


def load_audio(audio: AudioInput, sample_rate: int | None = None, *, target_rate: int = 16000) -> Samples:
    """Reads any audio as mono float32 samples [n] at `target_rate`.

    Channels are averaged; full scale is 1.

    Args:
        audio: path, binary file object (read from where it stands to its end), bytes of an encoded file, or an array of
            uint8, int16, int32 or float samples, [n] or [n, channels].
        sample_rate: rate of an array in Hz; must be given for arrays, and for nothing else.
        target_rate: rate of the result in Hz.

    Returns:
        float32 [n]; may share memory with an array that needed no conversion.

    Raises:
        AudioError: the audio cannot be read, is damaged or cut off, holds no samples, or holds impossible ones.
        OptionError: `sample_rate` is missing for an array, or given for a file.
    """
    if isinstance(audio, np.ndarray):
        name = "the array"
        samples, rate = _from_array(audio, sample_rate)
    else:
        data, name = _encoded(audio)
        if sample_rate is not None:
            raise OptionError(f"sample_rate={sample_rate!r} was given, but {name} names its own rate. Leave it out.")
        samples, rate = _decode(data, name)
    _check_samples(samples, name)
    return _resample(samples, rate, target_rate)


def check_duration(samples: Samples, front_end: AudioFrontEnd) -> None:
    """Refuses audio that one model window cannot transcribe.

    Args:
        samples: float32 [n] at `front_end.sample_rate`.
        front_end: sizes of the model window.

    Raises:
        AudioError: shorter than `MIN_SECONDS`, or longer than the window.
    """
    seconds = len(samples) / front_end.sample_rate
    if seconds < MIN_SECONDS:
        raise AudioError(f"The audio lasts {seconds:.3f} s; at least {MIN_SECONDS} s are needed to transcribe it.")
    if len(samples) > front_end.window_samples:
        raise AudioError(
            f"The audio lasts {seconds:.2f} s, but this model hears {front_end.window_seconds:g} s at a time and "
            "long-form transcription is not there yet. Split the audio at pauses and transcribe the parts."
        )


def is_silent(samples: Samples) -> bool:
    """True for digital silence: no sample [n] reaches one step of 16-bit audio."""
    return samples.size == 0 or _peak(samples) < 2.0**-15


def _encoded(audio: str | os.PathLike[str] | BinaryIO | bytes) -> tuple[bytes, str]:
    """The bytes of an encoded file, and what to call it in messages."""
    if isinstance(audio, bytes | bytearray | memoryview):
        data, name = bytes(audio), "the audio given as bytes"
    elif isinstance(audio, str | os.PathLike):
        path = Path(os.fsdecode(audio))
        data, name = _read_path(path), str(path)
    elif hasattr(audio, "read"):
        name = str(getattr(audio, "name", "the file object"))
        data = _read_object(audio, name)
    else:
        raise AudioError(
            f"Audio cannot be given as {type(audio).__name__}. "
            "Give a path, a binary file object, the bytes of an encoded file, or a NumPy array with its sample_rate."
        )
    if not data:
        raise AudioError(f"{name} is empty (0 bytes); an audio file was expected. Check how it was recorded or sent.")
    return data, name


def _read_path(path: Path) -> bytes:
    if path.is_dir():
        raise AudioError(f"{path} is a directory; an audio file was expected.")
    if not path.is_file():  # also pipes and devices, on which reading could wait for ever
        raise AudioError(f"{path} does not exist or is not a regular file. Check the path.")
    try:
        return path.read_bytes()
    except OSError as error:
        raise AudioError(f"{path} cannot be read: {error.strerror}. Check its permissions.") from error


def _read_object(file: BinaryIO, name: str) -> bytes:
    try:
        data: object = file.read()
    except (OSError, ValueError) as error:  # ValueError: closed, or text that is no UTF-8
        raise AudioError(f"{name} cannot be read: {error}. Give a file that is open in binary mode.") from error
    if not isinstance(data, bytes):
        raise AudioError(f"{name} gave {type(data).__name__}, not bytes. Open the file in binary mode ('rb').")
    return data


def _decode(data: bytes, name: str) -> tuple[Samples, int]:
    """Decodes a whole file -> mono float32 [n] and its rate in Hz."""
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            rate, promised = int(file.samplerate), int(file.frames)
            _check_rate(rate, name)
            samples = _read_mono(file)
    except soundfile.LibsndfileError as error:
        raise AudioError(
            f"{name} cannot be decoded (libsndfile: {error.error_string.strip().rstrip('.')}). "
            "It is cut off, damaged or no audio; WAV, FLAC, Ogg and MP3 are understood."
        ) from error
    if len(samples) < promised:
        raise _cut_off(name, promised / rate, len(samples) / rate, "s")
    _check_wav_size(data, name)
    return samples, rate


def _read_mono(file: soundfile.SoundFile) -> Samples:
    """Reads to the end in blocks, because the length in the header is only a promise."""
    frames = max(1, _BLOCK_VALUES // int(file.channels))
    blocks = [np.empty(0, np.float32)]
    while len(block := file.read(frames, dtype="float32", always_2d=True)):
        blocks.append(_mono(np.asarray(block, np.float32)))
    return np.concatenate(blocks)


def _check_wav_size(data: bytes, name: str) -> None:
    """Refuses a WAV whose data chunk claims more bytes than follow: libsndfile shortens it without a word."""
    if data[:4] != b"RIFF":
        return
    start = 12  # RIFF, size, WAVE; then chunks of name, size and content, padded to even sizes
    while start + 8 <= len(data):
        size = int.from_bytes(data[start + 4 : start + 8], "little")
        present = len(data) - start - 8
        if data[start : start + 4] == b"data":
            if size > present + 1 and size not in _WAV_UNKNOWN_SIZES:  # one pad byte may be missing
                raise _cut_off(name, size, present, "bytes of samples")
            return
        start += 8 + size + size % 2


def _cut_off(name: str, promised: float, found: float, unit: str) -> AudioError:
    return AudioError(
        f"{name} is cut off or damaged: its header promises {promised:g} {unit}, it holds {found:g}. "
        "Record, copy or encode it again."
    )


def _from_array(array: NDArray[np.generic], sample_rate: int | None) -> tuple[Samples, int]:
    """Any accepted array -> mono float32 [n] and its rate in Hz."""
    if sample_rate is None:
        raise OptionError("An array does not tell its rate. Give sample_rate in Hz, for example sample_rate=16000.")
    if isinstance(sample_rate, bool) or not isinstance(sample_rate, int | np.integer):
        raise OptionError(f"sample_rate must be a whole number of Hz, not {sample_rate!r}.")
    _check_rate(int(sample_rate), "the array")
    _check_shape(array.shape)
    return _mono(_as_float(array).reshape(len(array), -1)), int(sample_rate)


def _check_shape(shape: tuple[int, ...]) -> None:
    if len(shape) not in (1, 2):
        raise AudioError(f"The array has shape {shape}; [samples] or [samples, channels] was expected.")
    if 0 in shape:
        raise AudioError(f"The array has shape {shape} and holds no samples.")
    if len(shape) == 2 and shape[1] > shape[0]:
        raise AudioError(f"The array has shape {shape}, more channels than samples. Transpose it: [samples, channels].")


def _as_float(array: NDArray[np.generic]) -> Samples:
    """Scales integers to +-1; floats keep their values. Same shape, float32."""
    kind, size = array.dtype.kind, array.dtype.itemsize
    if kind == "f":
        with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is refused as such
            return array.astype(np.float32, copy=False)
    if (kind, size) not in _INTEGER_SCALES:
        raise AudioError(f"The array has dtype {array.dtype}; float, int16, int32 or uint8 samples were expected.")
    silence, scale = _INTEGER_SCALES[kind, size]
    return (array.astype(np.float32) - np.float32(silence)) / np.float32(scale)


def _mono(block: Samples) -> Samples:
    """[n, channels] -> [n], the average of the channels."""
    if block.shape[1] == 1:
        return block[:, 0]
    with np.errstate(over="ignore", invalid="ignore"):  # infinities are refused later, with a message
        average: Samples = block.mean(axis=1, dtype=np.float32)
    return average


def _check_rate(rate: int, name: str) -> None:
    if not _LOWEST_RATE <= rate <= _HIGHEST_RATE:
        raise AudioError(
            f"{name} has a sample rate of {rate} Hz; {_LOWEST_RATE} to {_HIGHEST_RATE} Hz were expected. "
            "Check the header, or the sample_rate that was given."
        )


def _check_samples(samples: Samples, name: str) -> None:
    if not samples.size:
        raise AudioError(f"{name} holds no samples. Check how it was recorded.")
    peak = _peak(samples)
    if not np.isfinite(peak):
        raise AudioError(f"{name} holds samples that are not finite numbers (NaN or infinity). Mend what wrote them.")
    if peak > _LOUDEST:
        raise AudioError(
            f"{name} has a peak of {peak:g}, where full scale is 1. "
            "Divide the samples by their full scale (32768 for 16-bit audio) or give them as integers."
        )


def _peak(samples: Samples) -> float:
    """Largest magnitude; NaN where a sample is NaN."""
    return max(float(samples.max()), -float(samples.min()))


def _resample(samples: Samples, rate: int, target_rate: int) -> Samples:
    """[n] at `rate` -> [about n * target_rate / rate] at `target_rate`, free of aliases."""
    if rate == target_rate:
        return np.ascontiguousarray(samples)
    return np.asarray(soxr.resample(np.ascontiguousarray(samples), rate, target_rate, quality="HQ"), np.float32)
