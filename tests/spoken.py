"""Tiny sets of spoken sentences for the training tests: bursts of noise with texts, on which random bases train."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from das_asr.training.finetune import DataOptions, LoraOptions, TrainOptions

WORDS = ("play", "a", "song", "rain", "in", "town", "goal", "now", "the", "next")


def sentence(number: int) -> str:
    """Two to five words, different for every number."""
    rng = np.random.default_rng(number)
    return " ".join(str(word) for word in rng.choice(WORDS, 2 + number % 4)) + f" {number}"


def noise(number: int, seconds: float | None = None) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Coloured noise, 0.4 to 1.2 s unless told otherwise."""
    rng = np.random.default_rng(1000 + number)
    samples = rng.normal(size=int(16000 * (seconds or 0.4 + 0.1 * (number % 9))))
    return np.asarray(0.1 * np.cumsum(samples) / np.sqrt(len(samples)), np.float32)


def make_folder(folder: Path, numbers: Sequence[int], **columns: Any) -> Path:
    """An AudioFolder of one utterance per number."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number in numbers:
        soundfile.write(folder / f"{number}.wav", noise(number), 16000, subtype="PCM_16")
        rows.append({"file_name": f"{number}.wav", "text": sentence(number), **columns})
    write_metadata(folder, rows)
    return folder


def write_metadata(folder: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Writes metadata.jsonl."""
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def lora_options(base: Path, folder: Path, output: Path, **changes: Any) -> LoraOptions:
    """A short run; `changes` go to the options that have a field of that name."""
    data = {"sources": (folder,), "language": "en", "cache": folder.parent / "cache", "leading_space": False}
    train = {"learning_rate": 1e-2, "epochs": 3, "batch_size": 8, "device": "cpu", "threads": 1, "seed": 3}
    own = {"base": str(base), "output": output, "rank": 4, "alpha": 8.0}
    for name, value in changes.items():
        for fields, options in ((DataOptions, data), (TrainOptions, train), (LoraOptions, own)):
            if name in fields.__dataclass_fields__:
                options[name] = value
    return LoraOptions(data=DataOptions(**data), train=TrainOptions(**train), **own)  # type: ignore[arg-type]
