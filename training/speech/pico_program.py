"""Speaks standard input with SVOX Pico: `python pico_program.py LANGUAGE RATE PITCH` writes WAV to standard output.

A program of its own because the C library crashes on some texts, and because its state makes the samples of an
utterance depend on those spoken before. It imports nothing of this project, so it starts in a few milliseconds.
"""

from __future__ import annotations

import sys
import wave

import ttspico  # pyright: ignore[reportMissingImports]  # optional

__all__ = ["main"]

_RATE = 16_000  # Hz
_BYTES = 2  # of a sample


def main(language: str, rate: str, pitch: str) -> None:
    """Rate and pitch are in percent of the voice's own."""
    engine = ttspico.TtsEngine(language)
    engine.rate, engine.pitch = int(rate), int(pitch)
    samples = engine.speak(sys.stdin.buffer.read().decode()) or b""
    with wave.open(sys.stdout.buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(_BYTES)
        file.setframerate(_RATE)
        file.setnframes(len(samples) // _BYTES)  # a pipe cannot be rewound to put the length in afterwards
        file.writeframesraw(samples)


if __name__ == "__main__":
    main(*sys.argv[1:])
