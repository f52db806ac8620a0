"""Peak memory of one system, measured in a process that runs nothing else.

In one process the systems would share each other's libraries and freed pages, and a peak only ever rises.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from pathlib import Path
from typing import Any

from das_asr.benchmarks.audio import window_audio
from das_asr.benchmarks.machine import quiet_libraries
from das_asr.benchmarks.systems import Work, open_system
from das_asr.benchmarks.worker import run_task

__all__ = ["measure_memory", "peak_memory", "probe"]

STATUS = Path("/proc/self/status")
KIB, MIB = 2**10, 2**20


def measure_memory(system: str, work: Work) -> float:
    """Peak resident memory in MiB of a process that loads one system and transcribes one window with it."""
    return float(run_task("memory", {"system": system, "work": dataclasses.asdict(work)}, work.threads))


def probe(specification: dict[str, Any]) -> float:
    """What the process of `measure_memory` does; MiB."""
    name, work = specification["system"], Work.parse(specification["work"])
    # Loads transformers, which the runtime does without.
    quiet = contextlib.nullcontext() if name.startswith("das") else quiet_libraries()
    with quiet:
        open_system(name, work).transcribe(window_audio(work.checkpoint))
    return peak_memory()


def peak_memory() -> float:
    """High-water mark of this process's resident memory in MiB.

    Linux hands `ru_maxrss` down from the parent through fork and exec; the mark in /proc starts afresh.
    """
    if STATUS.is_file():
        line = next(line for line in STATUS.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * KIB / MIB
    import resource

    unit = 1 if sys.platform == "darwin" else KIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / MIB
