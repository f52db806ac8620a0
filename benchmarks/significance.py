"""Bootstrap over utterances: how far a corpus-level rate may be off, and whether two systems differ.

An utterance is drawn with its errors under every system and its words, so systems are compared on the same resamples
(paired), after Bisani and Ney, ICASSP 2004. Intervals are percentiles of the resamples.

The p-value is two-sided: twice the smaller share of resamples in which the difference is at most, or at least, zero. It
is not corrected for the number of systems that are compared.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from das_asr.runtime.errors import OptionError

__all__ = ["Bootstrap", "Interval", "p_value", "percentiles"]

Floats = NDArray[np.float64]

_DRAWN_AT_ONCE = 4_000_000  # indices; bounds the memory of a large set


@dataclass(frozen=True)
class Interval:
    """A figure and where it may lie; without bounds where the resamples do not determine them."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Bootstrap:
    """How to resample.

    Attributes:
        resamples: how many resamples B.
        seed: the same seed, set name and number of utterances give the same resamples.
        level: of the intervals.
    """

    resamples: int = 5000
    seed: int = 0
    level: float = 0.95

    def __post_init__(self) -> None:
        if self.resamples < 100:
            raise OptionError(f"--resamples is {self.resamples}, expected at least 100.")
        if self.seed < 0:
            raise OptionError(f"--seed is {self.seed}, expected 0 or more.")
        if not 0 < self.level < 1:
            raise OptionError(f"level is {self.level}, expected a share between 0 and 1, such as 0.95.")

    def sums(self, counts: NDArray[np.int64], name: str) -> Floats:
        """Column sums [B, C] of resampled rows of `counts` [N, C].

        Args:
            counts: one row per utterance; columns that are summed together are paired.
            name: of the set; sets of equal size must not share their draws, or means over sets would not be ones of
                independent sets.
        """
        utterances = len(counts)
        generator = np.random.default_rng([self.seed, zlib.crc32(name.encode())])
        columns = counts.astype(np.float64)
        block = max(1, _DRAWN_AT_ONCE // utterances)
        sizes = [min(block, self.resamples - start) for start in range(0, self.resamples, block)]
        return np.concatenate([_weights(generator, size, utterances) @ columns for size in sizes])

    def interval(self, value: float, samples: Floats) -> Interval:
        """The percentile interval of `samples` [B] around a figure that was measured."""
        low, high = percentiles(samples, self.level)
        return Interval(value, low, high)


def _weights(generator: np.random.Generator, resamples: int, utterances: int) -> Floats:
    """How often each utterance is drawn, [resamples, utterances]."""
    drawn = generator.integers(0, utterances, (resamples, utterances))
    drawn += np.arange(resamples)[:, None] * utterances
    weights = np.bincount(drawn.ravel(), minlength=resamples * utterances)
    return weights.reshape(resamples, utterances).astype(np.float64)


def percentiles(samples: Floats, level: float) -> tuple[float | None, float | None]:
    """The bounds that leave (1 - level) / 2 of the samples [B] on each side.

    Samples that are not a number count for neither; where more than (1 - level) / 2 are, there are no bounds.
    """
    outside = (1 - level) / 2
    known = samples[~np.isnan(samples)]
    if len(samples) - len(known) > outside * len(samples):
        return None, None
    low, high = np.quantile(known, [outside, 1 - outside])
    return float(low), float(high)


def p_value(differences: Floats) -> float:
    """Two-sided p-value of resampled differences [B]; never 0, for a finite number of resamples cannot show that."""
    smaller = min(np.count_nonzero(differences <= 0), np.count_nonzero(differences >= 0))
    return float(min(1.0, 2 * (smaller + 1) / (len(differences) + 1)))
