"""Batches of prepared utterances: of similar length, each padded to little more than its longest."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from das_asr.training.base.augment import SILENCE

__all__ = ["GRID", "Batch", "Example", "collate", "epoch_batches", "rounded_up"]

GRID = 40
"""Batches have a multiple of so many frames: every new shape makes the CPU's kernels anew, a third of a step's time."""

_TOKEN_GRID = 8
_POOL = 3000  # utterances sorted by length together
_IGNORED = -100


@dataclass(frozen=True)
class Example:
    """One utterance: features f16 [frames, mels], token ids (prompt, text, end), phoneme ids from 1 on."""

    features: NDArray[np.float16]
    tokens: list[int]
    phonemes: list[int]


@dataclass(frozen=True)
class Batch:
    """What one step takes; see `TinyWhisper.losses`. `power` is f32 [B, mels, frames], raw log10."""

    power: Tensor
    frames: Tensor
    tokens: Tensor
    phonemes: Tensor
    lengths: Tensor


def rounded_up(number: int, grid: int) -> int:
    """The next multiple of `grid`."""
    return -(-number // grid) * grid


def epoch_batches(lengths: Sequence[int], frames: int, seed: int | str) -> list[list[int]]:
    """Indices of one pass over all utterances, shuffled, in batches of at most `frames` frames after padding."""
    rng = random.Random(seed)  # noqa: S311
    order = list(range(len(lengths)))
    rng.shuffle(order)
    batches: list[list[int]] = []
    for start in range(0, len(order), _POOL):
        pool = sorted(order[start : start + _POOL], key=lengths.__getitem__)
        batches += _cut(pool, lengths, frames)
    rng.shuffle(batches)
    return batches


def _cut(pool: list[int], lengths: Sequence[int], frames: int) -> Iterator[list[int]]:
    batch: list[int] = []
    for index in pool:
        if batch and rounded_up(lengths[index], GRID) * (len(batch) + 1) > frames:
            yield batch
            batch = []
        batch.append(index)
    yield batch


def collate(examples: Sequence[Example], rng: random.Random) -> Batch:
    """Stacks examples; half of them begin after up to 0.25 s of silence."""
    shifts = [2 * rng.randint(0, 12) if rng.random() < 0.5 else 0 for _ in examples]
    frames = [len(example.features) + shift for example, shift in zip(examples, shifts, strict=True)]
    longest = max(frames) + max(frames) % 2
    power = np.full((len(examples), longest, examples[0].features.shape[1]), SILENCE, np.float32)
    for row, example, shift, end in zip(power, examples, shifts, frames, strict=True):
        row[shift:end] = example.features
    return Batch(
        power=torch.from_numpy(power).transpose(1, 2).contiguous(),
        frames=torch.tensor(frames),
        tokens=_padded([example.tokens for example in examples], _IGNORED, _TOKEN_GRID),
        phonemes=_padded([example.phonemes for example in examples], 0),
        lengths=torch.tensor([len(example.phonemes) for example in examples]),
    )


def _padded(rows: Sequence[list[int]], filler: int, grid: int = 1) -> Tensor:
    longest = rounded_up(max(len(row) for row in rows), grid)
    return torch.tensor([row + [filler] * (longest - len(row)) for row in rows])
