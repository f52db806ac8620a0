"""festival: diphone voices of English, spoken by processes that stay alive.

A process loads its dictionary in most of a second and then speaks a sentence in some hundredths, so processes are kept
in a pool and fed Scheme expressions. The wave comes back through the same pipe as the answer, which ends with a mark.
"""

from __future__ import annotations

import os
import secrets
import select
import subprocess
import time

from das_asr.runtime.errors import SynthesisError
from das_asr.training.speech.processes import decode, find_program, plain_text
from das_asr.training.speech.voices import EngineFailure, Samples, Voice

__all__ = ["FestivalEngine"]

_SPEAK = """(begin
  (set! das_done nil)
  (unwind-protect
    (begin
      (voice_{voice})
      (Parameter.set 'Duration_Stretch {stretch:.6f})
      {intonation}
      (set! das_wave (utt.synth (Utterance Text {text})))
      (utt.save.wave das_wave "-" 'riff)
      (set! das_done t))
    (set! das_done nil))
  (format t "\\n{mark} %l\\n" das_done)
  (fflush nil))
"""
# The first pair of an association list counts.
_INTONATION = """(set! int_lr_params
        (cons (list 'target_f0_mean (* {pitch:.6f} (cadr (assoc 'target_f0_mean int_lr_params)))) int_lr_params))"""
_VOICES = '(begin (format t "%l\\n{mark} t\\n" (voice.list)) (fflush nil))\n'


class FestivalEngine:
    """Voices are those of festival's `voice.list`: `kal_diphone`, `ked_diphone`."""

    default_voice: str | None = "kal_diphone"

    def __init__(self, timeout: float) -> None:
        remedy = "Install it, for example with `apt install festival festvox-kallpc16k`."
        self._program = find_program("festival", remedy)
        self._timeout = timeout
        self._idle: list[_Process] = []  # appended and popped by several threads, which lists allow

    def check(self, voice: Voice) -> None:
        """Looks the voice up; see `Engine.check`."""
        known = self._voices()
        if voice.name not in known:
            raise SynthesisError(f"festival has no voice {voice.name!r}. It has: {', '.join(known)}.")
        if voice.pitch != 1 and not voice.name.endswith("_diphone"):
            raise SynthesisError(
                f"festival's voice {voice.name!r} has one pitch; {voice.pitch} was asked. Take a diphone voice."
            )

    def speak(self, text: str, voice: Voice) -> tuple[Samples, int]:
        """Speaks in a process of the pool; see `Engine.speak`."""
        if not voice.name.isidentifier():  # it becomes part of an expression
            raise EngineFailure("engine", f"festival has no voice {voice.name!r}")
        mark = secrets.token_hex(16)
        expression = _SPEAK.format(
            voice=voice.name,
            stretch=1 / voice.speed,
            intonation=_INTONATION.format(pitch=voice.pitch) if voice.pitch != 1 else "",
            text=_quoted(plain_text(text)),
            mark=mark,
        )
        answer, done = self._ask(expression, mark)
        if not done:
            raise EngineFailure("engine", "festival could not speak the text")
        return decode(answer[answer.find(b"RIFF") :], "festival")

    def close(self) -> None:
        """Ends the processes."""
        while self._idle:
            self._idle.pop().close()

    def _voices(self) -> list[str]:
        mark = secrets.token_hex(16)
        try:
            answer, _ = self._ask(_VOICES.format(mark=mark), mark)
        except EngineFailure as error:
            raise SynthesisError(
                f"festival does not tell its voices: {error}. Check that it is installed whole."
            ) from error
        return sorted(answer.decode(errors="replace").strip().strip("()").split())

    def _ask(self, expression: str, mark: str) -> tuple[bytes, bool]:
        """Evaluates an expression in an idle process or a new one -> what it wrote before the mark, and the flag."""
        try:
            process = self._idle.pop()
        except IndexError:
            process = _Process(self._program)
        try:
            answer = process.ask(expression, mark.encode(), self._timeout)
        except BaseException:
            process.close()
            raise
        self._idle.append(process)
        return answer


class _Process:
    """A festival that reads expressions from a pipe."""

    def __init__(self, program: str) -> None:
        self._process = subprocess.Popen(
            [program, "--pipe"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            start_new_session=True,  # Ctrl-C is for us alone
        )

    def ask(self, expression: str, mark: bytes, timeout: float) -> tuple[bytes, bool]:
        """Writes an expression and reads up to its mark; a text without anything to say makes festival crash."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(expression.encode())
        except OSError as error:
            raise EngineFailure("engine", "festival has ended") from error
        answer, deadline = b"", time.monotonic() + timeout
        while not (answer.endswith(b"\n") and mark in answer[-64:]):
            answer += self._read(deadline)
        text, _, flag = answer.rpartition(mark)
        return text.removesuffix(b"\n"), flag.strip() == b"t"

    def _read(self, deadline: float) -> bytes:
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            raise EngineFailure("timeout", "festival took too long")
        part = os.read(self._process.stdout.fileno(), 1 << 20)
        if not part:
            raise EngineFailure("engine", "festival crashed on the text")
        return part

    def close(self) -> None:
        """Ends the process at once; it has nothing to save."""
        self._process.kill()
        with self._process:
            pass


def _quoted(text: str) -> str:
    """A Scheme string."""
    return '"' + text.replace("\\", " ").replace('"', '\\"') + '"'
