"""Who says an utterance, how, and over which noise: drawn from the seed and the utterance's id alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from das_asr.training.speech.noise import COLORS
from das_asr.training.speech.options import Range, SpeechOptions
from das_asr.training.speech.sentences import stable_hash
from das_asr.training.speech.voices import Voice

__all__ = ["Delivery", "cast"]


@dataclass(frozen=True)
class Delivery:
    """How one utterance is spoken."""

    voice: Voice
    noise_db: float | None  # signal-to-noise ratio
    noise_color: str | None
    noise_seed: int


def cast(name: str, options: SpeechOptions) -> Delivery:
    """Draws the delivery of the utterance with this id; `options.voices` names at least one voice."""
    draws = np.random.default_rng(int(stable_hash(str(options.seed), name), 16))
    # Always all of them, in this order: asking for noise does not change who speaks.
    voice, speed, pitch, level, color = draws.random(5)
    noisy = options.noise_db is not None
    return Delivery(
        voice=Voice(
            engine=options.engine,
            name=options.voices[int(voice * len(options.voices))],
            speed=_between(options.speed, speed),
            pitch=_between(options.pitch, pitch),
        ),
        noise_db=_between(options.noise_db, level) if options.noise_db is not None else None,
        noise_color=COLORS[int(color * len(COLORS))] if noisy else None,
        noise_seed=int(draws.integers(1 << 63)),
    )


def _between(limits: Range, share: float) -> float:
    """A value with three digits, so that what the manifest says is what was used."""
    return round(limits[0] + share * (limits[1] - limits[0]), 3)
