"""SVOX Pico: two natural women's voices of English, and one of each of four other languages.

Needs the package ttspico, which brings the voices (Apache-2.0).
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from das_asr.runtime.errors import SynthesisError
from das_asr.training.speech.processes import decode, plain_text, run_program
from das_asr.training.speech.voices import Samples, Voice

__all__ = ["PicoEngine"]

_VOICES = ("de-DE", "en-GB", "en-US", "es-ES", "fr-FR", "it-IT")
_PITCHES = (0.5, 2.0)
_PROGRAM = Path(__file__).with_name("pico_program.py")
_NO_MARKUP = str.maketrans("<>", "  ")  # what stands between them is an instruction to Pico


class PicoEngine:
    """Voices are named by their language; one process per utterance."""

    default_voice: str | None = "en-US"

    def __init__(self, timeout: float) -> None:
        if importlib.util.find_spec("ttspico") is None:
            raise SynthesisError(
                "The package ttspico is not installed. Install it with `pip install 'das-asr[pico]'`; "
                "it is compiled, so a C compiler and Python's headers are needed."
            )
        self._timeout = timeout

    def check(self, voice: Voice) -> None:
        """Compares with what the package holds; see `Engine.check`."""
        if voice.name not in _VOICES:
            raise SynthesisError(f"pico has no voice {voice.name!r}. It has: {', '.join(_VOICES)}.")
        if not _PITCHES[0] <= voice.pitch <= _PITCHES[1]:
            raise SynthesisError(
                f"A pitch of {voice.pitch} was asked; pico takes factors from {_PITCHES[0]} to {_PITCHES[1]}."
            )

    def speak(self, text: str, voice: Voice) -> tuple[Samples, int]:
        """Speaks through pipes; see `Engine.speak`."""
        percent = [str(round(100 * factor)) for factor in (voice.speed, voice.pitch)]
        # -E: no startup file of the user's environment
        command = [sys.executable, "-E", str(_PROGRAM), voice.name, *percent]
        return decode(run_program(command, plain_text(text.translate(_NO_MARKUP)), self._timeout), "pico")

    def close(self) -> None:
        """Nothing is kept running."""
