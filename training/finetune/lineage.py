"""Where a trained model comes from: base, data, recipe and versions, as JSON beside the weights."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from das_asr.runtime.utterances import METADATA
from das_asr.training.finetune.base import Base
from das_asr.training.finetune.dataset import TrainingData
from das_asr.training.finetune.options import DataOptions, TrainOptions
from das_asr.training.finetune.trainer import Trained

__all__ = ["lineage_of", "recipe_of", "run_of"]

_PACKAGES = ("das-asr", "torch", "transformers", "peft", "accelerate", "numpy")

# What changes how a run is shown or where it computes, but not what it computes.
_NO_RESULT = frozenset({"device", "threads", "tensorboard", "progress", "log_steps"})


def recipe_of(train: TrainOptions) -> dict[str, Any]:
    """The options that decide on the weights, as JSON."""
    return {name: value for name, value in asdict(train).items() if name not in _NO_RESULT}


def run_of(base: Base, data: TrainingData, train: TrainOptions, **kind: Any) -> dict[str, Any]:
    """What tells one run from another: base, data and every option that decides on the weights.

    Args:
        base: the base.
        data: what is trained on.
        train: the optimisation.
        kind: what is trained, e.g. rank and initialisation.
    """
    return {"base_sha256": base.sha256, "data_sha256": data.sha256, "multi": data.multi, **recipe_of(train), **kind}


def lineage_of(
    base: Base, options: DataOptions, data: TrainingData, train: TrainOptions, trained: Trained, **kind: Any
) -> dict[str, Any]:
    """Content of the lineage file; `base_sha256` is what the runtime compares with its base."""
    return {
        "base": base.id,
        "base_sha256": base.sha256,
        "data": _sources(options.sources),
        "data_sha256": data.sha256,
        "domains": list(data.train.sizes),
        "multi": data.multi,
        "language": options.language,
        "task": options.task,
        "leading_space": data.leading_space,
        "skipped": data.skipped,
        "recipe": {**recipe_of(train), **kind},
        "seed": train.seed,
        "steps": trained.steps,
        "final_loss": trained.final_loss,
        "best": trained.best,
        "seconds": round(trained.seconds, 3),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
    }


def _sources(sources: Sequence[Path]) -> list[dict[str, str]]:
    manifests = [source / METADATA if source.is_dir() else source for source in sources]
    return [
        {"source": str(source), "metadata_sha256": hashlib.sha256(manifest.read_bytes()).hexdigest()}
        for source, manifest in zip(sources, manifests, strict=True)
    ]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
