"""flite: small statistical and diphone voices of English, one process per utterance."""

from __future__ import annotations

import subprocess
from pathlib import Path

from das_asr.runtime.errors import SynthesisError
from das_asr.training.speech.processes import decode, find_program, plain_text, run_program
from das_asr.training.speech.voices import Samples, Voice

__all__ = ["FliteEngine"]

# Mean fundamental of the voices in Hz, from which a factor is computed. Others, rms among them, ignore the setting.
_MEAN_HZ = {"awb": 132.0, "kal": 95.0, "kal16": 95.0, "slt": 174.0}


class FliteEngine:
    """Voices are the names that `flite -lv` lists, or paths of `.flitevox` files."""

    default_voice: str | None = "rms"

    def __init__(self, timeout: float) -> None:
        self._program = find_program("flite", "Install it, for example with `apt install flite`.")
        self._timeout = timeout

    def check(self, voice: Voice) -> None:
        """Looks the voice up, because flite replaces an unknown one by its default; see `Engine.check`."""
        known = self._voices()
        if voice.name not in known and not (voice.name.endswith(".flitevox") and Path(voice.name).is_file()):
            raise SynthesisError(
                f"flite has no voice {voice.name!r}. It has: {', '.join(known)}; "
                "the path of a .flitevox file is taken too."
            )
        if voice.pitch != 1 and voice.name not in _MEAN_HZ:
            raise SynthesisError(
                f"flite's voice {voice.name!r} has one pitch; {voice.pitch} was asked. "
                f"Voices whose pitch can be changed: {', '.join(_MEAN_HZ)}."
            )

    def speak(self, text: str, voice: Voice) -> tuple[Samples, int]:
        """Speaks through a pipe; see `Engine.speak`."""
        command = [self._program, "-voice", voice.name]
        if voice.speed != 1:
            command += ["--setf", f"duration_stretch={1 / voice.speed:.6f}"]
        if voice.pitch != 1 and voice.name in _MEAN_HZ:
            command += ["--setf", f"int_f0_target_mean={_MEAN_HZ[voice.name] * voice.pitch:.3f}"]
        # -t: without it a short text is taken for the name of a file
        command += ["-t", plain_text(text), "-o", "/dev/stdout"]
        return decode(run_program(command, "", self._timeout), "flite")

    def close(self) -> None:
        """Nothing is kept running."""

    def _voices(self) -> list[str]:
        listing = subprocess.run([self._program, "-lv"], capture_output=True, check=False, stdin=subprocess.DEVNULL)
        return sorted(listing.stdout.decode(errors="replace").partition(":")[2].split())
