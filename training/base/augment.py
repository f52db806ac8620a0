"""Augmentation of raw log-mel features: other speeds, voices, rooms and noises without touching the audio.

Everything works on log10 power [B, mels, frames] before Whisper's normalisation (`normalized`), which must come last
because it depends on the loudest value.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Augmentation", "augmented", "normalized"]

SILENCE = -10.0  # log10 of the least power
_DYNAMIC_RANGE = 8.0


@dataclass(frozen=True)
class Augmentation:
    """How strong each change is at `strength` 1; 0 switches everything off."""

    strength: float = 1.0
    warp_share: float = 0.7
    stretch: tuple[float, float] = (0.87, 1.15)
    mel_warp: tuple[float, float] = (0.9, 1.13)
    tilt_share: float = 0.5
    tilt: float = 0.5  # decades of power, largest deviation of a smooth equaliser
    noise_share: float = 0.5
    noise_decades: tuple[float, float] = (2.8, 6.5)  # below the loudest bin
    mask_share: float = 0.5
    mel_mask: int = 10
    time_mask: int = 12


def normalized(power: Tensor) -> Tensor:
    """Whisper's last step: log10 power [B, mels, frames] -> about -1 .. 1."""
    loudest = power.amax(dim=(1, 2), keepdim=True)
    return (torch.maximum(power, loudest - _DYNAMIC_RANGE) + 4.0) / 4.0


def augmented(power: Tensor, frames: Tensor, how: Augmentation, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Returns changed (power [B, mels, F'], frames [B]).

    Args:
        power: log10 power [B, mels, F], `SILENCE` behind the end of each utterance.
        frames: i64 [B], length of each utterance.
        how: which changes, and how strong.
        rng: source of all randomness.
    """
    if how.strength == 0:
        return power, frames
    power, frames = _warped(power, frames, how, rng)
    power = power + _equalizer(power, how, rng)
    power = _noisy(power, how, rng)
    return _masked(power, frames, how, rng), frames


def _uniform(low: float, high: float, count: int, rng: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(count, generator=rng)


def _chosen(share: float, count: int, rng: torch.Generator) -> Tensor:
    return torch.rand(count, generator=rng) < share


def _towards(factor: Tensor, strength: float, chosen: Tensor) -> Tensor:
    return torch.where(chosen, 1 + (factor - 1) * strength, torch.ones_like(factor))


def _warped(power: Tensor, frames: Tensor, how: Augmentation, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Stretches time and shifts the spectrum along the mel axis (a longer or shorter vocal tract)."""
    count, mels, length = power.shape
    stretch = _towards(_uniform(*how.stretch, count, rng), how.strength, _chosen(how.warp_share, count, rng))
    warp = _towards(_uniform(*how.mel_warp, count, rng), how.strength, _chosen(how.warp_share, count, rng))
    longer = int(torch.ceil(frames * stretch).max().item())
    longer += longer % 2
    times = (torch.arange(longer)[None] + 0.5) / stretch[:, None] / length * 2 - 1  # [B, F'], -1 .. 1
    bins = (torch.arange(mels)[None] + 0.5) * warp[:, None] / mels * 2 - 1  # [B, mels]
    across = times[:, None, :].expand(-1, mels, -1)
    grid = torch.stack((across, bins[:, :, None].expand_as(across)), dim=-1)  # [B, mels, F', 2] as (x, y)
    # Padding by zeros is silence once the level is moved to 0.
    moved = torch.nn.functional.grid_sample((power - SILENCE)[:, None], grid, align_corners=False)[:, 0] + SILENCE
    return moved, torch.round(frames * stretch).long().clamp(max=longer)


def _equalizer(power: Tensor, how: Augmentation, rng: torch.Generator) -> Tensor:
    """A smooth curve over the mel axis for each utterance, [B, mels, 1]."""
    count, mels, _ = power.shape
    knots = torch.randn(count, 1, 6, generator=rng) * how.tilt * how.strength / 2
    curve = torch.nn.functional.interpolate(knots, size=mels, mode="linear", align_corners=True)[:, 0]
    return (curve * _chosen(how.tilt_share, count, rng)[:, None])[..., None]


def _noisy(power: Tensor, how: Augmentation, rng: torch.Generator) -> Tensor:
    """Adds stationary coloured noise."""
    count, mels, length = power.shape
    below = _uniform(*how.noise_decades, count, rng) + (1 - how.strength) * 2
    level = power.amax(dim=(1, 2)) - below
    level = torch.where(_chosen(how.noise_share, count, rng), level, torch.full_like(level, SILENCE))
    colour = torch.nn.functional.interpolate(
        torch.randn(count, 1, 4, generator=rng) * 0.5, size=mels, mode="linear", align_corners=True
    )[:, 0]
    # The power of a noise bin is exponentially distributed; averaging in a mel band makes it milder.
    grain = torch.log10(0.3 + 0.7 * torch.rand(count, mels, length, generator=rng))
    noise = level[:, None, None] + colour[..., None] + grain
    return torch.maximum(power, noise)


def _masked(power: Tensor, frames: Tensor, how: Augmentation, rng: torch.Generator) -> Tensor:
    """Silences one band and one short moment of some utterances."""
    count, mels, length = power.shape
    floor = power.mean(dim=(1, 2), keepdim=True)
    band = _span(mels, how.mel_mask * how.strength, torch.full((count,), mels), how.mask_share, rng)
    moment = _span(length, how.time_mask * how.strength, frames, how.mask_share, rng)
    hidden = band[:, :, None] | moment[:, None, :]
    return torch.where(hidden, floor, power)


def _span(size: int, widest: float, limit: Tensor, share: float, rng: torch.Generator) -> Tensor:
    """Booleans [B, size], true on one random span within the first `limit` of each row."""
    count = len(limit)
    width = torch.rand(count, generator=rng) * widest * _chosen(share, count, rng)
    start = torch.rand(count, generator=rng) * (limit - width).clamp(min=0)
    index = torch.arange(size)[None]
    return (index >= start[:, None]) & (index < (start + width)[:, None])
