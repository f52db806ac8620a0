"""transformers: `generate` on the base model, the checkpoint as it is."""

from __future__ import annotations

from pathlib import Path

from das_asr.benchmarks.baselines import TransformersGenerate
from das_asr.benchmarks.systems import System, Work

__all__ = ["ENGINE"]


class _Transformers:
    def convert(self, checkpoint: Path, precision: str, folder: Path, whisper_cpp: Path | None) -> None:
        """Nothing to convert."""

    def open(self, work: Work, folder: Path) -> System:  # noqa: ARG002
        return TransformersGenerate(work)


ENGINE = _Transformers()
