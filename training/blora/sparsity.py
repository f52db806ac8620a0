"""How much of an adapter is next to nothing: the share of |value| below a threshold in A, in B and in the update."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from das_asr.runtime.tensor_file import Array
from das_asr.training.finetune.adapter_file import read_factors

__all__ = ["Sparsity", "measure_sparsity"]


@dataclass(frozen=True)
class Sparsity:
    """Shares, 0 to 1, over the elements of all modules of an adapter."""

    threshold: float
    a: float
    b: float
    both: float  # A and B counted together
    update: float  # scale * B A, what is added to the base's weights


def measure_sparsity(directory: str | Path, threshold: float = 1e-3) -> Sparsity:
    """Reads a PEFT LoRA folder and counts, with numpy alone.

    The weights that BLoRA saves are its posterior's means.

    Raises:
        AdapterError: the folder is not a plain LoRA, or its files are broken.
    """
    factors, _ = read_factors(Path(directory))
    a_small, a_total = _count((a for a, _ in factors.modules.values()), threshold)
    b_small, b_total = _count((b for _, b in factors.modules.values()), threshold)
    # One module at a time, for they are large.
    updates = (np.float32(factors.scale) * (b @ a) for a, b in factors.modules.values())
    small, total = _count(updates, threshold)
    both = (a_small + b_small) / (a_total + b_total)
    return Sparsity(threshold, a_small / a_total, b_small / b_total, both, small / total)


def _count(arrays: Iterable[Array], threshold: float) -> tuple[int, int]:
    """(elements below the threshold, elements)."""
    counts = [(int((np.abs(array) < threshold).sum()), array.size) for array in arrays]
    return sum(small for small, _ in counts), sum(size for _, size in counts)
