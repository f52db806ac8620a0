"""The audio of the speed comparison."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from das_asr.benchmarks.models import SAMPLE_RATE, read_json
from das_asr.runtime.errors import OptionError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["find_audio", "window_audio"]

_SUFFIXES = (".wav", ".flac", ".ogg", ".mp3")


def find_audio(paths: Sequence[Path]) -> list[Path]:
    """Files, and the audio files of folders, sorted.

    Raises:
        OptionError: a folder has none.
    """
    found: list[Path] = []
    for path in paths:
        inside = sorted(item for item in path.iterdir() if item.suffix in _SUFFIXES) if path.is_dir() else [path]
        if not inside:
            raise OptionError(f"--audio {path}: there is no {', '.join(_SUFFIXES)} file in this folder.")
        found += inside
    return found


def window_audio(checkpoint: Path) -> NDArray[np.float32]:
    """One full window of noise and gliding tones, always the same; float32 [samples] at 16 kHz."""
    import numpy as np

    samples = int(read_json(checkpoint / "preprocessor_config.json")["n_samples"])
    noise = np.random.default_rng(0).standard_normal(samples)
    time = np.arange(samples) / SAMPLE_RATE
    glides = sum(np.sin(2 * np.pi * (pitch * time + 20 * np.sin(time))) for pitch in (140, 420, 1100, 2600))
    return np.asarray(0.05 * noise + 0.1 * glides * np.sin(4 * time) ** 2, dtype=np.float32)
