"""Programs that speak: text in by argument or standard input, a WAV file out."""

from __future__ import annotations

import io
import os
import shutil
import signal
import subprocess
import unicodedata
from collections.abc import Sequence

import numpy as np
import soundfile

from das_asr.runtime.errors import SynthesisError
from das_asr.training.speech.voices import EngineFailure, Samples

__all__ = ["decode", "find_program", "plain_text", "run_program"]


def find_program(name: str, remedy: str) -> str:
    """Path of a program.

    Raises:
        SynthesisError: it is not installed; the message ends with `remedy`.
    """
    path = shutil.which(name)
    if path is None:
        raise SynthesisError(f"The program {name} was not found on the PATH. {remedy}")
    return path


def plain_text(text: str) -> str:
    """One line without control characters, in valid UTF-8.

    Raises:
        EngineFailure: nothing is left to say.
    """
    printable = "".join(" " if unicodedata.category(letter) in ("Cc", "Cs") else letter for letter in text)
    line = " ".join(printable.split())
    if not any(letter.isalnum() for letter in line):
        raise EngineFailure("empty", "the text has no letter and no digit")
    return line


def run_program(command: Sequence[str], text: str, timeout: float) -> bytes:
    """Runs a program with a text on standard input -> its standard output.

    Raises:
        EngineFailure: it cannot be started, ends with an error, or takes more than `timeout` seconds.
    """
    try:
        # A session of its own: Ctrl-C is for us alone, and a program that hangs is ended with all that it started.
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
        )
    except (OSError, ValueError) as error:
        raise EngineFailure("engine", f"{command[0]} cannot be started: {error}") from error
    with process:
        try:
            output, errors = process.communicate(text.encode(), timeout)
        except subprocess.TimeoutExpired as error:
            raise EngineFailure("timeout", f"{command[0]} took more than {timeout:g} s") from error
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    if process.returncode:
        raise EngineFailure("engine", f"{command[0]} ended with status {process.returncode}: {_last_line(errors)}")
    return output


def _last_line(errors: bytes) -> str:
    lines = errors.decode(errors="replace").strip().splitlines()
    return lines[-1][:300] if lines else "no message"


def decode(data: bytes, source: str) -> tuple[Samples, int]:
    """An encoded file -> mono float32 [n] and its rate in Hz.

    Raises:
        EngineFailure: it is no audio, or holds no samples.
    """
    if not data:
        raise EngineFailure("empty", f"{source} gave no audio")
    try:
        samples, rate = soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        raise EngineFailure("engine", f"{source} gave {len(data)} bytes that are no audio: {error}") from error
    if not len(samples):
        raise EngineFailure("empty", f"{source} gave a file without samples")
    return np.asarray(samples.mean(axis=1), np.float32), int(rate)
