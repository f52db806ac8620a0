"""Which rows of a batch the decoder computes: all at first, later those that some utterance still needs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from das_asr.runtime.backends.base import Step

__all__ = ["Cut", "LiveRows"]

_WORTH_A_CUT = 0.5
"""Share of the rows that may stay at most: a cut copies the caches and adapters of those, about as much memory as a run
reads for as many rows, so it pays with the first run."""

_ENOUGH_LINES = 2
"""Of the decoder's products: one of a single line is computed in another order on a CPU, and would be rounded
differently."""


@dataclass(frozen=True)
class Cut:
    """The rows that a batch goes on with."""

    rows: tuple[int, ...]  # their indices, ascending from 0
    places: NDArray[np.int64]  # [R'], where they are in the batch now
    row_mask: NDArray[np.bool_]  # [B, R']


class LiveRows:
    """The rows that are in the batch, by their indices among all R."""

    def __init__(self, batch: int, rows: int, end_of_text: int) -> None:
        self._shape, self._end_of_text = (batch, rows), end_of_text
        self._indices = np.arange(rows)

    def widened(self, step: Step) -> Step:
        """The outcome [B, R'] of a run as one for all rows; those that have left the batch write end-of-text."""
        if len(self._indices) == self._shape[1]:
            return step
        candidate = np.full(self._shape, self._end_of_text, np.int64)
        logprob = np.full(self._shape, -np.inf, np.float32)
        candidate[:, self._indices], logprob[:, self._indices] = step.candidate, step.logprob
        return Step(self._indices[step.row], candidate, logprob)

    def cut(self, needed: NDArray[np.bool_], row_mask: NDArray[np.bool_], *, at_once: bool) -> Cut | None:
        """The rows to go on with; None where leaving some out is not worth it yet.

        Args:
            needed: bool [B, R], rows that still write something for an utterance.
            row_mask: bool [B, R], rows that take part in the selection of an utterance.
            at_once: cut whatever it is worth.
        """
        rows = self._indices[self._wanted(needed)]
        if len(rows) > _WORTH_A_CUT * len(self._indices) and not at_once:
            return None
        places = np.searchsorted(self._indices, rows)
        self._indices = rows
        return Cut(tuple(rows.tolist()), places, row_mask[:, rows])

    def _wanted(self, needed: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Of the rows in the batch those that stay: the base, whoever is needed, and enough for a product."""
        wanted: NDArray[np.bool_] = np.logical_or.reduce(needed[:, self._indices], axis=0)
        wanted[: _ENOUGH_LINES if self._shape[0] < _ENOUGH_LINES and not wanted[1:].any() else 1] = True
        return wanted
