"""Peak memory of one system, measured in a process that runs nothing else: python -m das_asr.benchmarks.memory SPEC.

In one process the systems would share freed pages and each other's libraries, and a peak only ever rises. SPEC is the
JSON that `measure_memory` writes; the answer is one line of JSON on standard output.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from das_asr.benchmarks.systems import Work
from das_asr.runtime.errors import BackendError

__all__ = ["Memory", "measure_memory"]

STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")
MIB = 2**20


@dataclass(frozen=True)
class Memory:
    """Resident memory of a process in MiB."""

    peak: float  # over its whole life, with imports and loading
    serving_peak: float | None  # while it transcribes; None where the system cannot say


def measure_memory(name: str, work: Work) -> Memory:
    """Runs one system in a fresh process over one utterance.

    Raises:
        BackendError: the process failed; the message ends with what it printed last.
    """
    spec = {"system": name, "work": dataclasses.asdict(work)}
    command = [sys.executable, "-m", "das_asr.benchmarks.memory", json.dumps(spec, default=str)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["nothing"]
        raise BackendError(
            f"The memory of {name!r} could not be measured, its process ended with {done.returncode} and said: "
            f"{last[0]}. Use --no-memory to leave this out."
        )
    return Memory(**json.loads(done.stdout.splitlines()[-1]))


def _probe(spec: dict[str, Any]) -> Memory:
    from das_asr.benchmarks.machine import hold_threads, limit_threads
    from das_asr.benchmarks.rtf import window_audio
    from das_asr.benchmarks.systems import open_system

    work = _work(spec["work"])
    limit_threads(work.threads)
    with hold_threads(work.threads):
        audio = window_audio(work.checkpoint)
        system = open_system(spec["system"], work)
        loading = _peak()
        reset = _reset_peak()
        system.transcribe(audio)
        serving = _peak()
    return Memory(peak=max(loading, serving), serving_peak=serving if reset else None)


def _work(data: dict[str, Any]) -> Work:
    bundle = Path(data["bundle"]) if data["bundle"] else None
    adapters = tuple(Path(folder) for folder in data["adapters"])
    return Work(**{**data, "checkpoint": Path(data["checkpoint"]), "adapters": adapters, "bundle": bundle})


def _peak() -> float:
    """High-water mark of resident memory in MiB.

    Linux hands `ru_maxrss` down from the parent through fork and exec; the mark in /proc starts afresh.
    """
    if STATUS.is_file():
        line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024 / MIB
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / MIB


def _reset_peak() -> bool:
    with contextlib.suppress(OSError):
        CLEAR.write_text("5")
        return True
    return False


if __name__ == "__main__":
    sys.stdout.write(json.dumps(dataclasses.asdict(_probe(json.loads(sys.argv[1])))) + "\n")
