"""espeak-ng: formant synthesis of more than a hundred languages, one process per utterance."""

from __future__ import annotations

import subprocess

from das_asr.runtime.errors import SynthesisError
from das_asr.training.speech.processes import decode, find_program, plain_text, run_program
from das_asr.training.speech.voices import Samples, Voice

__all__ = ["EspeakEngine"]

_WORDS_PER_MINUTE = 175  # espeak-ng's default
_SLOWEST, _FASTEST = 80, 450  # words per minute; beyond them it takes the nearest
_PITCH, _HIGHEST_PITCH = 50, 99  # its default, and the end of its scale, which is no scale of Hz


class EspeakEngine:
    """Voices are language codes with an optional variant, as `espeak-ng -v` takes them: `en-us`, `en-gb+f3`.

    Pitch scales espeak-ng's own setting of 0 to 99, clipped: 0.5 to 1.5 move the fundamental by about -15 % to +27 %.
    """

    default_voice: str | None = "en-us"

    def __init__(self, timeout: float) -> None:
        self._program = find_program("espeak-ng", "Install it, for example with `apt install espeak-ng`.")
        self._timeout = timeout

    def check(self, voice: Voice) -> None:
        """Asks the program for the language and looks the variant up; see `Engine.check`."""
        language, _, variant = voice.name.partition("+")
        words = round(_WORDS_PER_MINUTE * voice.speed)
        if not _SLOWEST <= words <= _FASTEST:
            raise SynthesisError(
                f"A speed of {voice.speed:g} was asked, {words} words per minute; espeak-ng speaks {_SLOWEST} to "
                f"{_FASTEST}: take {_SLOWEST / _WORDS_PER_MINUTE:.2f} to {_FASTEST / _WORDS_PER_MINUTE:.2f}."
            )
        if self._run("-q", "-v", language, "a").returncode:
            raise SynthesisError(
                f"espeak-ng has no voice {language!r}. It has: {_joined(self._listed('--voices', 1))}."
            )
        variants = {name.removeprefix("!v/") for name in self._listed("--voices=variant", 4)}
        if variant and variant not in variants:  # which espeak-ng would leave out without a word
            raise SynthesisError(f"espeak-ng has no variant {variant!r}. It has: {_joined(variants)}.")

    def speak(self, text: str, voice: Voice) -> tuple[Samples, int]:
        """Speaks through a pipe; see `Engine.speak`."""
        words = round(_WORDS_PER_MINUTE * voice.speed)
        pitch = min(_HIGHEST_PITCH, max(0, round(_PITCH * voice.pitch)))
        command = [
            self._program,
            "-v",
            voice.name,
            "-s",
            str(words),
            "-p",
            str(pitch),
            "-b",
            "1",
            "--stdin",
            "--stdout",
        ]
        return decode(run_program(command, plain_text(text), self._timeout), "espeak-ng")

    def close(self) -> None:
        """Nothing is kept running."""

    def _listed(self, option: str, column: int) -> set[str]:
        lines = self._run(option).stdout.decode(errors="replace").splitlines()[1:]
        return {fields[column] for line in lines if len(fields := line.split()) > column}

    def _run(self, *arguments: str) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run([self._program, *arguments], capture_output=True, check=False, stdin=subprocess.DEVNULL)


def _joined(names: set[str]) -> str:
    return ", ".join(sorted(names))
