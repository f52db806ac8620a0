"""How much a model forgets of what it could: the measures of BLoRA (arXiv 2510.18723).

    forgetting      F = WER after adaptation - WER of the base, on each set to retain
    backward gain   1 - mean F of one method / mean F of another; the paper's is 54 % of BLoRA over LoRA
    drop            relative increase of the WER on the new domain over the other method; the paper's is 4 %
    small weights   share of elements with |mean| < 1e-3 in A, B and their product; the paper's is 99.7 %

The paper's formulas for the first three are not in its abstract; these are the readings of this project.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from das_asr.benchmarks.significance import Interval
from das_asr.benchmarks.wer_stats import Comparison, WerStatistics
from das_asr.runtime.errors import AdapterError

__all__ = ["SmallWeights", "adaptation_drop", "backward_gain", "forgetting", "small_weights"]

SMALL = 1e-3
_WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class SmallWeights:
    """Shares of elements below the threshold, over all modules together."""

    a: float
    b: float
    product: float  # of B A, without the scale


def forgetting(statistics: WerStatistics, system: str, base: str, retained: Sequence[str]) -> dict[str, Interval]:
    """F on each set to retain, as a difference of word error rates."""
    return {name: statistics.compare(system, base, name).difference for name in retained}


def backward_gain(
    statistics: WerStatistics, system: str, other: str, base: str, retained: Sequence[str]
) -> Interval | None:
    """1 - mean F(system) / mean F(other); None where the other forgets nothing.

    Resamples in which the other forgets nothing count for neither bound; where they are many there are no bounds.
    """
    forgotten = statistics.compare(other, base, retained).difference.value
    if forgotten <= 0:
        return None
    start = statistics.samples(base, retained)
    lost, others = statistics.samples(system, retained) - start, statistics.samples(other, retained) - start
    with np.errstate(divide="ignore", invalid="ignore"):
        gains = np.where(others > 0, 1 - lost / others, np.nan)
    value = 1 - statistics.compare(system, base, retained).difference.value / forgotten
    return statistics.bootstrap.interval(value, gains)


def adaptation_drop(statistics: WerStatistics, system: str, other: str, target: str | Sequence[str]) -> Comparison:
    """The system against the other on the new domain; `relative` above zero is a drop."""
    return statistics.compare(system, other, target)


def small_weights(adapter: Path, threshold: float = SMALL) -> SmallWeights:
    """Shares of elements of a PEFT LoRA checkpoint that are smaller than the threshold.

    Raises:
        AdapterError: the checkpoint cannot be read, or holds no pairs of A and B.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    path = adapter / _WEIGHTS
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"{path} cannot be read: {error}. Give the folder that `save_pretrained` wrote.") from error
    modules = [name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")]
    if not modules or any(f"{module}.lora_B.weight" not in tensors for module in modules):
        raise AdapterError(f"{path} holds no pairs of lora_A and lora_B. Give a PEFT LoRA checkpoint.")
    counts = np.zeros((3, 2), np.int64)  # A, B, B A: small elements, all elements
    for module in modules:
        a, b = (tensors[f"{module}.lora_{part}.weight"].astype(np.float32) for part in "AB")
        for row, matrix in zip(counts, (a, b, b @ a), strict=True):
            row += np.array([np.count_nonzero(np.abs(matrix) < threshold), matrix.size], np.int64)
    return SmallWeights(*(counts[:, 0] / counts[:, 1]).tolist())
