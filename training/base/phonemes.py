"""Phonemes of sentences by espeak-ng, as targets of the CTC loss."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence

from das_asr.runtime.errors import SynthesisError

__all__ = ["phonemes"]

_MARKS = re.compile(r"[',:;|#%=]|_:_:|\(.*?\)")  # stress, length and pauses carry no letter


def phonemes(texts: Sequence[str]) -> list[list[str]]:
    """Phoneme names of each text, stress and length marks left out.

    Raises:
        SynthesisError: espeak-ng is not installed.
    """
    lines = _spoken("".join(f"{text}.\n\n" for text in texts))
    if len(lines) != len(texts):  # a clause break that is not ours: one by one
        lines = [" ".join(_spoken(f"{text}.\n")) for text in texts]
    return [_symbols(line) for line in lines]


def _spoken(text: str) -> list[str]:
    program = shutil.which("espeak-ng")
    if program is None:
        raise SynthesisError("espeak-ng is not on PATH. On Debian: apt-get install espeak-ng.")
    command = [program, "-v", "en-us", "-q", "-x", "--sep=_", "--stdin"]
    done = subprocess.run(command, input=text, check=True, capture_output=True, text=True)
    return [line for line in done.stdout.splitlines() if line.strip()]


def _symbols(line: str) -> list[str]:
    return [symbol for part in re.split(r"[_\s]+", line) if (symbol := _MARKS.sub("", part).strip("_"))]
