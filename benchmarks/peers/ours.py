"""The runtime, from a bundle: the base alone, or with adapters and shared or own histories."""

from __future__ import annotations

from pathlib import Path

from das_asr.benchmarks.ours import OursSystem
from das_asr.benchmarks.systems import System, Work

__all__ = ["OWN", "SHARED"]


class _Ours:
    def __init__(self, system: str) -> None:
        self._system = system

    def convert(self, checkpoint: Path, precision: str, folder: Path, whisper_cpp: Path | None) -> None:
        """Nothing: there is a bundle for each number of adapters, exported before."""

    def open(self, work: Work, folder: Path) -> System:  # noqa: ARG002
        return OursSystem(self._system, work)


SHARED = _Ours("das")
OWN = _Ours("das-hypothesis")
