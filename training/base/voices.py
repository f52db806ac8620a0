"""The voices of the tiny base, and those kept for evaluation: never heard in any training."""

from __future__ import annotations

import random
from dataclasses import dataclass

from das_asr.training.speech.engines import Voice

__all__ = ["HELD_OUT_VARIANTS", "HELD_OUT_VOICES", "Take", "draw_take"]

HELD_OUT_VARIANTS = ("linda", "f5", "m7", "klatt3", "steph3")
"""espeak-ng variants kept for evaluation."""

HELD_OUT_VOICES = (*(Voice("espeak-ng", f"en-us+{name}") for name in HELD_OUT_VARIANTS), Voice("flite", "slt"))
"""All voices kept for evaluation; slt is a speaker of whom no other voice is used."""

_ACCENTS = (
    "en-us",
    "en-us",
    "en-us",
    "en-gb",
    "en-gb-x-rp",
    "en-gb-scotland",
    "en-gb-x-gbclan",
    "en-gb-x-gbcwmd",
    "en-029",
    "en-us-nyc",
)
_VARIANTS = """
    adam Alex Alicia Andrea Andy Annie antonio aunty belinda benjamin boris caleb david Denis Diogo ed edward
    edward2 Gene Gene2 Henrique Hugo iven iven2 iven3 Jacky john kaukovalta Lee marcelo Marco Mario max Michael
    michel miguel Mike Mr Nguyen pablo paul pedro quincy RicishayMax RicishayMax2 rob robert sandro shelby steph
    steph2 travis victor zac anika AnxiousAndy f1 f2 f3 f4 grandma grandpa klatt klatt2 klatt4 klatt5 m1 m2 m3 m4 m5
    m6 m8 norbert
    """.split()  # noqa: SIM905

# (flite voice, weight)
_SPEAKERS = (("rms", 0.2), ("awb", 0.19), ("kal16", 0.11))
_FESTIVAL = ("ked_diphone",)
_PICO = ("en-US", "en-GB")
_SHARES = {"espeak-ng": 0.32, "festival": 0.06, "flite": 0.38, "pico": 0.24}


@dataclass(frozen=True)
class Take:
    """One way to speak a sentence: a voice, its audio played faster by `resample`, which moves the formants too."""

    voice: Voice
    resample: float = 1.0


def draw_take(rng: random.Random) -> Take:
    """Draws a training voice with its speed, pitch and formants."""
    engine = rng.choices(list(_SHARES), list(_SHARES.values()))[0]
    if engine == "espeak-ng":
        name = f"{rng.choice(_ACCENTS)}+{rng.choice(_VARIANTS)}"
        return Take(Voice(engine, name, speed=rng.uniform(0.8, 1.3), pitch=rng.uniform(0.5, 1.6)))
    # Two of three takes sound like another speaker. Pico's are women, the others men: both are moved further towards
    # the sex that they are not.
    low, high = (0.8, 1.12) if engine == "pico" else (0.88, 1.3)
    resample = rng.choice((1.0, rng.uniform(low, 1.0), rng.uniform(1.0, high)))
    speed = rng.uniform(0.85, 1.2) / resample
    if engine == "festival":
        return Take(Voice(engine, rng.choice(_FESTIVAL), speed=speed), resample)
    pitch = rng.uniform(0.85, 1.25)
    if engine == "pico":
        return Take(Voice(engine, rng.choice(_PICO), speed=speed, pitch=pitch), resample)
    speaker = rng.choices([name for name, _ in _SPEAKERS], [weight for _, weight in _SPEAKERS])[0]
    return Take(Voice(engine, speaker, speed=speed, pitch=pitch), resample)
