"""Figures of a `WerReport` with their uncertainty: rates, comparisons and means over sets, from the same resamples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from das_asr.benchmarks.significance import Bootstrap, Interval, p_value
from das_asr.benchmarks.wer_result import WerReport

__all__ = ["Comparison", "WerStatistics"]

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Comparison:
    """A system against another on one set, or on the mean of several."""

    difference: Interval  # of word error rates, as a fraction
    relative: Interval | None  # difference / the other's rate; None where the other made no errors
    p_value: float  # two-sided


class WerStatistics:
    """Resamples every set once, with the errors of all systems, so that all comparisons are paired."""

    def __init__(self, report: WerReport, bootstrap: Bootstrap | None = None) -> None:
        self.report = report
        self.bootstrap = bootstrap or Bootstrap()

    def rate(self, system: str, sets: str | Sequence[str]) -> Interval:
        """Corpus-level word error rate on one set, or the plain mean of the rates on several."""
        return self.bootstrap.interval(self._value(system, sets), self.samples(system, sets))

    def compare(self, system: str, other: str, sets: str | Sequence[str]) -> Comparison:
        """`system` against `other`: below zero is better."""
        value, base = self._value(system, sets), self._value(other, sets)
        samples, base_samples = self.samples(system, sets), self.samples(other, sets)
        difference = self.bootstrap.interval(value - base, samples - base_samples)
        relative = None
        if base > 0:
            with np.errstate(divide="ignore", invalid="ignore"):
                ratios = np.where(base_samples > 0, samples / base_samples - 1, np.nan)
            relative = self.bootstrap.interval(value / base - 1, ratios)
        return Comparison(difference, relative, p_value(samples - base_samples))

    def samples(self, system: str, sets: str | Sequence[str]) -> Floats:
        """Resampled rates [B]; the same draws for every system."""
        names = [sets] if isinstance(sets, str) else list(sets)
        column = self.report.systems.index(self.report.system(system))
        rates: Floats = np.mean([self._rates[name][column] for name in names], axis=0)
        return rates

    def _value(self, system: str, sets: str | Sequence[str]) -> float:
        names = [sets] if isinstance(sets, str) else list(sets)
        return float(np.mean([self.report.wer(system, name) for name in names]))

    @cached_property
    def _rates(self) -> dict[str, Floats]:
        """Resampled rates [S, B] of all systems by set."""
        rates = {}
        for name in self.report.sets:
            words = self.report.words(name)
            errors = [self.report.errors(system.name, name).sum(axis=1) for system in self.report.systems]
            sums = self.bootstrap.sums(np.stack([words, *errors], axis=1), name)  # [B, 1 + S]
            rates[name] = (sums[:, 1:] / sums[:, :1]).T
        return rates
