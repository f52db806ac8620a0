"""The audio that the parity gate decodes."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from das_asr.runtime.audio import check_duration, is_silent, load_audio
from das_asr.runtime.errors import AudioError
from das_asr.runtime.manifest import AudioFrontEnd

__all__ = ["load_clips"]

Samples = NDArray[np.float32]


def load_clips(paths: Sequence[Path], front_end: AudioFrontEnd) -> list[Samples]:
    """Reads the given files, or without any the clips that come with the package.

    Args:
        paths: audio files.
        front_end: of the model; its window limits the length.

    Returns:
        Mono samples float32 [n] of each, at the model's rate.

    Raises:
        AudioError: a file cannot be read, is silent, or is longer than the window.
    """
    return [_given(path, front_end) for path in paths] if paths else _packaged(front_end)


def _given(path: Path, front_end: AudioFrontEnd) -> Samples:
    samples = load_audio(path, target_rate=front_end.sample_rate)
    try:
        check_duration(samples, front_end)
    except AudioError as error:
        raise AudioError(f"--sample-audio {path}: {error}") from error
    if is_silent(samples):
        raise AudioError(f"--sample-audio {path} is silent: nothing would be decoded. Give a clip with speech.")
    return samples


def _packaged(front_end: AudioFrontEnd) -> list[Samples]:
    """The packaged clips in the order of their names, cut to the window of a model that hears less at a time."""
    folder = resources.files("das_asr.export") / "samples"
    clips = sorted((item for item in folder.iterdir() if item.name.endswith(".flac")), key=lambda item: item.name)
    return [
        load_audio(clip.read_bytes(), target_rate=front_end.sample_rate)[: front_end.window_samples] for clip in clips
    ]
