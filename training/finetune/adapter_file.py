"""A plain PEFT LoRA checkpoint, written and compressed with NumPy alone.

factors = read_factors(directory)
smaller, errors = compress(factors, rank=32)
write_adapter(folder, smaller, config, lineage)
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from das_asr.runtime.errors import AdapterError, OptionError
from das_asr.runtime.lora_config import CONFIG_NAME, Scaling, read_config
from das_asr.runtime.peft_checkpoint import LINEAGE_NAME
from das_asr.runtime.tensor_file import Array, TensorFile

__all__ = ["WEIGHTS_NAME", "Factors", "compress", "read_factors", "write_adapter"]

WEIGHTS_NAME = "adapter_model.safetensors"

_TENSOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<part>[AB])\.weight")


@dataclass(frozen=True)
class Factors:
    """The weights of a LoRA: W + scale B A for every module."""

    modules: Mapping[str, tuple[Array, Array]]  # module -> A [r, in], B [out, r], float32
    scale: float

    @property
    def rank(self) -> int:
        """Largest rank of all modules."""
        return max(int(a.shape[0]) for a, _ in self.modules.values())


def read_factors(directory: Path) -> tuple[Factors, dict[str, Any]]:
    """Reads a PEFT LoRA checkpoint; scales that differ between modules are folded into B.

    Returns:
        The factors, and the content of `adapter_config.json`.

    Raises:
        AdapterError: it is missing, damaged or of a kind that is not a plain LoRA.
    """
    config = read_config(directory)
    scaling = Scaling.of(config, directory)
    file = TensorFile.open(directory / WEIGHTS_NAME, AdapterError, "Save or copy the adapter again.")
    parts: dict[str, dict[str, Array]] = {}
    for name in file.entries:
        match = _TENSOR.fullmatch(name)
        if match is None:
            raise AdapterError(f"{file.path}: tensor {name} is not understood; expected lora_A and lora_B weights.")
        parts.setdefault(match["module"], {})[match["part"]] = file.read(name, AdapterError)
    if incomplete := [module for module, found in parts.items() if len(found) < 2] or not parts:
        raise AdapterError(f"{file.path} lacks lora_A or lora_B of {incomplete}. Save the adapter again.")
    modules = {}
    for module, found in sorted(parts.items()):
        relative = scaling.module(module)[1] / scaling.general if scaling.general else 0.0
        modules[module] = (found["A"], found["B"] * np.float32(relative))
    return Factors(modules, scaling.general), config


def compress(factors: Factors, rank: int) -> tuple[Factors, dict[str, float]]:
    """The best approximation of every module's B A by factors of a smaller rank, by singular values.

    Returns:
        The new factors with the same scale, and the relative error ||new - old|| / ||old|| (Frobenius) of each module.

    Raises:
        OptionError: the rank is not smaller than that of the factors.
    """
    if not 1 <= rank < factors.rank:
        raise OptionError(
            f"Rank {rank} was asked for; the adapter has rank {factors.rank}. Give 1 to {factors.rank - 1}."
        )
    modules, errors = {}, {}
    for name, (a, b) in factors.modules.items():
        u, values, vt = _svd_of_product(b, a)
        total = math.sqrt(float((values**2).sum()))
        errors[name] = math.sqrt(float((values[rank:] ** 2).sum())) / total if total else 0.0
        root = np.sqrt(values[:rank])
        modules[name] = (
            np.ascontiguousarray(root[:, None] * vt[:rank], np.float32),
            np.ascontiguousarray(u[:, :rank] * root, np.float32),
        )
    return Factors(modules, factors.scale), errors


def _svd_of_product(b: Array, a: Array) -> tuple[Any, Any, Any]:
    """Singular value decomposition of B A, float64, without making the product."""
    q_b, r_b = np.linalg.qr(b.astype(np.float64))
    q_a, r_a = np.linalg.qr(a.T.astype(np.float64))
    u, values, vt = np.linalg.svd(r_b @ r_a.T)
    return q_b @ u, values, vt @ q_a.T


def write_adapter(folder: Path, factors: Factors, config: Mapping[str, Any], lineage: Mapping[str, Any]) -> None:
    """Writes the three files of an adapter into an existing folder.

    Args:
        folder: where to.
        factors: the weights.
        config: PEFT's configuration; rank and alpha are made to fit `factors`, and its initialisation to say that the
            base is unchanged.
        lineage: content of `das_lineage.json`.
    """
    rank = factors.rank
    unit = math.sqrt(rank) if config.get("use_rslora") else rank
    changed = {
        "r": rank,
        "lora_alpha": factors.scale * unit,
        "rank_pattern": {},
        "alpha_pattern": {},
        "init_lora_weights": True,
        "inference_mode": True,
    }
    tensors = {}
    for module, (a, b) in factors.modules.items():
        a, b = _padded(a, b, rank)
        tensors[f"base_model.model.{module}.lora_A.weight"] = a
        tensors[f"base_model.model.{module}.lora_B.weight"] = b
    save_file(tensors, folder / WEIGHTS_NAME, metadata={"format": "pt"})
    for name, content in ((CONFIG_NAME, {**config, **changed}), (LINEAGE_NAME, lineage)):
        (folder / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _padded(a: Array, b: Array, rank: int) -> tuple[Array, Array]:
    """Adds zeros up to a common rank."""
    missing = rank - a.shape[0]
    return np.pad(a, ((0, missing), (0, 0))), np.pad(b, ((0, 0), (0, missing)))
