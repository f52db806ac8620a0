"""Would another rule or threshold have written the same text? If so it need not be decoded again.

A transcription records what every row would have written at each step, and how sure it was. A rule that would have
chosen the same token at every step would have seen exactly these steps, so its text is the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from das_asr.runtime.results import Transcription

__all__ = ["SharedRule", "chosen_rows", "replay"]

_MARGIN = 1e-5  # closer decisions than this may fall either way in a batch of other sentences


@dataclass(frozen=True)
class SharedRule:
    """A rule with a shared history, its threshold, and the adapters beside the base."""

    name: str
    tau: float
    adapters: tuple[str, ...]


def chosen_rows(name: str, tau: float, confidences: NDArray[np.float64]) -> NDArray[np.int64]:
    """The rows [T] that a rule of `runtime.selection` chooses by confidences [T, R]."""
    base = confidences[:, 0]
    best, worst = confidences.argmax(axis=1), confidences.argmin(axis=1)
    above = confidences.max(axis=1) - base >= tau
    below = confidences.min(axis=1) - base <= -tau
    if name == "gain":
        return np.where(above, best, 0)
    if name == "deviation-max":
        return np.where(above | below, best, 0)
    assert name == "paper", name
    return np.where(above, best, np.where(below, worst, 0))


def replay(rule: SharedRule, result: Transcription) -> list[int] | None:
    """The rows that the rule would have chosen for the steps of `result`.

    None: it would have written another token somewhere, or a decision is too close to tell.
    """
    if result.rows[1:] != rule.adapters:
        return None
    if not result.provenance:  # digital silence
        return []
    steps = result.provenance
    confidences = np.array([step.confidences for step in steps], np.float64)  # [T, R]
    candidates = np.array([step.candidates for step in steps], np.int64)
    written = np.array([step.id for step in steps], np.int64)
    chosen = [chosen_rows(rule.name, tau, confidences) for tau in (rule.tau - _MARGIN, rule.tau, rule.tau + _MARGIN)]
    index = np.arange(len(steps))
    same = all(np.array_equal(candidates[index, rows], written) for rows in chosen)
    return chosen[1].tolist() if same and not _undecided(confidences, candidates, chosen[1]) else None


def _undecided(confidences: NDArray[np.float64], candidates: NDArray[np.int64], rows: NDArray[np.int64]) -> bool:
    """Whether a row with another token was as sure as the chosen one."""
    index = np.arange(len(rows))
    close = np.abs(confidences - confidences[index, rows][:, None]) < _MARGIN
    differs = candidates != candidates[index, rows][:, None]
    return bool((close & differs).any())
