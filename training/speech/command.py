"""Any program that speaks: a command line with placeholders, one process per utterance.

    my-tts --text {text} --rate {speed} --out {output}
    my-tts-filter                                        # text on standard input, WAV on standard output

`{text}` and `{output}` (a WAV file to write) replace standard input and output; `{speed}` and `{pitch}` are factors.
The line is split as a shell would, but no shell runs it.
"""

from __future__ import annotations

import shlex
import tempfile
from pathlib import Path

from das_asr.runtime.errors import SynthesisError
from das_asr.training.speech.processes import decode, find_program, plain_text, run_program
from das_asr.training.speech.voices import EngineFailure, Samples, Voice

__all__ = ["CommandEngine"]

_MEMORY = Path("/dev/shm")  # noqa: S108  # where there is one, the wave never touches a disk


class CommandEngine:
    """The name of a voice is its command line."""

    default_voice: str | None = None

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout

    def check(self, voice: Voice) -> None:
        """Looks the program up, and the placeholders of what is to be changed; see `Engine.check`."""
        find_program(_split(voice.name)[0], f"It is the first word of the command {voice.name!r}.")
        for name, factor in (("speed", voice.speed), ("pitch", voice.pitch)):
            if factor != 1 and f"{{{name}}}" not in voice.name:
                raise SynthesisError(
                    f"A {name} of {factor} was asked, but the command {voice.name!r} has no {{{name}}} to put it in."
                )

    def speak(self, text: str, voice: Voice) -> tuple[Samples, int]:
        """Runs the command; see `Engine.speak`."""
        line, words = plain_text(text), _split(voice.name)
        values = {"text": line, "speed": f"{voice.speed:g}", "pitch": f"{voice.pitch:g}"}
        given = "" if "{text}" in voice.name else line
        if "{output}" not in voice.name:
            return decode(run_program([_fill(word, values) for word in words], given, self._timeout), words[0])
        with tempfile.TemporaryDirectory(prefix="das-speech-", dir=_MEMORY if _MEMORY.is_dir() else None) as folder:
            output = Path(folder) / "speech.wav"
            values["output"] = str(output)
            run_program([_fill(word, values) for word in words], given, self._timeout)
            if not output.is_file():
                raise EngineFailure("empty", f"{words[0]} wrote no file")
            return decode(output.read_bytes(), words[0])

    def close(self) -> None:
        """Nothing is kept running."""


def _split(command: str) -> list[str]:
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise SynthesisError(f"The command {command!r} cannot be split into words: {error}.") from error
    if not words:
        raise SynthesisError(f"The command {command!r} is empty; a program and its arguments are expected.")
    return words


def _fill(word: str, values: dict[str, str]) -> str:
    """Replaces placeholders; the text goes last, so that what it says is never taken for one."""
    for name in ("output", "speed", "pitch", "text"):
        word = word.replace(f"{{{name}}}", values.get(name, ""))
    return word
