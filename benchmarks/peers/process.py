"""Sides as processes that take turns: who is not measured is stopped.

The thread pools of several peers spin for a while after each run (OpenMP's for 200 ms by default) and would take cores
from whoever comes next. In one process they would also share libraries and settings of threads. So each side lives in a
process of its own, and SIGSTOP holds it from its answer to its next request: nothing of it runs in between, and nothing
of it has to be configured away. That process also has a peak of memory of its own.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from das_asr.benchmarks.peers.engines import Tools, UnavailableError
from das_asr.benchmarks.systems import Work
from das_asr.benchmarks.timing import Burst, Utterance
from das_asr.benchmarks.worker import pools

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["SideProcess", "convert"]


def convert(engine: str, precision: str, checkpoint: Path, folder: Path, tools: Tools) -> None:
    """Lets a peer convert a checkpoint into `folder`, unless that is there.

    Raises:
        UnavailableError: it cannot.
    """
    if folder.is_dir():
        return
    specification = {"engine": engine, "precision": precision, "checkpoint": checkpoint, "folder": folder}
    process = _start({"convert": True, "whisper_cpp": tools.whisper_cpp, **specification}, engine, 1, tools)
    try:
        _read(process)
    finally:
        process.communicate()


class SideProcess:
    """A peer that has loaded its model; a `System` whose `transcribe` wakes it, and puts it to sleep again."""

    def __init__(self, engine: str, work: Work, folder: Path, tools: Tools) -> None:
        """Starts the process and waits until the model is loaded.

        Raises:
            UnavailableError: the peer refuses, or its process broke.
        """
        specification = {"convert": False, "engine": engine, "folder": folder, "work": asdict(work)}
        self._process = _start(specification, engine, work.threads, tools)
        try:
            self.versions: dict[str, str] = _read(self._process)["versions"]
        except BaseException:
            self.close()
            raise
        self._stop()

    def transcribe(self, audio: NDArray[np.float32]) -> Utterance:
        """Transcribes float32 [samples] at 16 kHz; times are those that the process took itself."""
        answer = self._ask([audio])
        self._stop()
        return Utterance(**{**answer, **{name: tuple(answer[name]) for name in ("tokens", "rows", "steps")}})

    def transcribe_all(self, clips: Sequence[NDArray[np.float32]], size: int) -> Burst:
        """Transcribes clips in batches of up to `size`; for peers that are a `BatchSystem`."""
        answer = self._ask(clips, size)
        self._stop()
        return Burst(answer["seconds"], tuple(map(tuple, answer["tokens"])))

    def finish(self) -> float:
        """Peak resident memory in MiB of everything so far; the process then ends."""
        return float(self._ask([])["memory_mib"])

    def close(self) -> None:
        """Ends the process whatever it does."""
        self._process.kill()
        self._process.communicate()

    def _ask(self, clips: Sequence[NDArray[np.float32]], size: int | None = None) -> dict[str, Any]:
        request = json.dumps({"samples": list(map(len, clips)), "batch": size}).encode()
        os.kill(self._process.pid, signal.SIGCONT)
        assert self._process.stdin is not None
        self._process.stdin.write(b"\n".join([request, b"".join(clip.tobytes() for clip in clips)]))
        self._process.stdin.flush()
        return _read(self._process)

    def _stop(self) -> None:
        os.kill(self._process.pid, signal.SIGSTOP)
        os.waitpid(self._process.pid, os.WUNTRACED)  # until it has stopped


def _start(specification: Mapping[str, Any], engine: str, threads: int, tools: Tools) -> subprocess.Popen[bytes]:
    python = tools.pythons.get(engine, Path(sys.executable))
    process = subprocess.Popen(
        [str(python), "-m", "das_asr.benchmarks.peers.side"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, **pools(threads)},
    )
    assert process.stdin is not None
    process.stdin.write(json.dumps(specification, default=str).encode() + b"\n")
    process.stdin.flush()
    return process


def _read(process: subprocess.Popen[bytes]) -> dict[str, Any]:
    """The next answer.

    Raises:
        UnavailableError: the side refused, or its process ended, having shown why on standard error.
    """
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise UnavailableError(f"its process ended with status {process.wait()}")
    answer: dict[str, Any] = json.loads(line)
    if "refused" in answer:
        raise UnavailableError(answer["refused"])
    return answer
