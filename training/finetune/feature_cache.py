"""Features on disk: computed once, memory-mapped ever after, shared by all runs.

One `.npy` file per utterance, found by the hash of its audio inside a folder named after everything else that the
values depend on. A file appears whole, so several processes may fill one cache.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from das_asr.runtime.manifest import AudioFrontEnd

__all__ = ["FeatureCache", "audio_sha256", "default_cache", "pad_features", "trim_features"]

# Part of the key; raise it when the same settings shall give other values.
_FORMAT = 1


def default_cache() -> Path:
    """`das-asr/features` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "das-asr" / "features"


def audio_sha256(path: Path) -> str:
    """Hash of an audio file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class FeatureCache:
    """One kind of feature of any number of utterances."""

    folder: Path

    @classmethod
    def open(
        cls, root: Path | None, front_end: AudioFrontEnd, mels: int, encoder_sha256: str | None = None, how: str = ""
    ) -> FeatureCache:
        """The part of a cache for these settings.

        Args:
            root: folder of the whole cache; None takes `default_cache()`.
            front_end: how audio becomes features.
            mels: mel bins.
            encoder_sha256: of the encoder whose outputs are kept; None keeps log-mels.
            how: what else the values depend on, e.g. the precision of the encoder.
        """
        settings = {"format": _FORMAT, **asdict(front_end), "mels": mels, "encoder": encoder_sha256, "how": how}
        key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
        kind = "mel" if encoder_sha256 is None else "encoder"
        return cls((root or default_cache()) / f"{kind}-{key}")

    def has(self, audio: str) -> bool:
        """Whether the features of the audio with this hash are there."""
        return self._path(audio).is_file()

    def put(self, audio: str, features: NDArray[np.generic]) -> None:
        """Stores the features of one utterance."""
        path = self._path(audio)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        try:
            with temporary.open("wb") as file:
                np.save(file, features)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    def get(self, audio: str) -> NDArray[np.generic]:
        """The features of one utterance, memory-mapped."""
        features: NDArray[np.generic] = np.load(self._path(audio), mmap_mode="r")
        return features

    def _path(self, audio: str) -> Path:
        return self.folder / audio[:2] / f"{audio}.npy"


def trim_features(features: NDArray[np.float32]) -> NDArray[np.float32]:
    """Drops the columns [mels, frames] at the end that repeat the last one, all but one of them."""
    changing = np.flatnonzero((features != features[:, -1:]).any(axis=0))
    return features[:, : int(changing[-1]) + 2 if changing.size else 1]


def pad_features(trimmed: NDArray[np.generic], frames: int) -> NDArray[np.float32]:
    """Undoes `trim_features`: float32 [mels, frames]."""
    missing = frames - trimmed.shape[1]
    return np.pad(np.asarray(trimmed, np.float32), ((0, 0), (0, missing)), mode="edge")
