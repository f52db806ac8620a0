"""How much a model forgets of what it could: the measures of BLoRA (arXiv 2510.18723).

    forgetting      F = WER after adaptation - WER of the base, on each set to retain
    backward gain   1 - mean F of one method / mean F of another; the paper's is 54 % of BLoRA over LoRA
    drop            relative increase of the WER on the new domain over the other method; the paper's is 4 %

The paper's formulas are not in its abstract; these are the readings of this project. What else it counts, the share of
posterior means below 1e-3, is `das_asr.training.blora.sparsity`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from das_asr.benchmarks.significance import Interval
from das_asr.benchmarks.wer_stats import Comparison, WerStatistics

__all__ = ["adaptation_drop", "backward_gain", "forgetting"]


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
