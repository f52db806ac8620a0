"""Which rows stop writing before the end: those that can no longer win, and by choice those that tell little.

A row stops in one utterance; it leaves the batch once no utterance needs it. The base never stops.

Own history: a row's running score is that of its text so far, see `DecodingOptions.score`.

- Exact: with `score="total"` scores only fall, so a row whose running score is below that of a text that has ended
  cannot win any more. It is dropped at once, unless rows may take over from each other (`switch_cost`).
- `prune_margin`: from `prune_after` tokens on, a row that is further behind the best one is dropped.
- `max_active_rows`: after `prune_after` tokens the base and the best adapters stay.

Shared history: `max_active_rows` keeps the base and the adapters that give the text so far the highest log-probability.
Where a row would have written another token than the chosen one, that one's probability is not known; the largest value
that it can have counts: the row's own candidate was likelier, and both together have at most 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from das_asr.runtime.backends.base import Step
from das_asr.runtime.options import DecodingOptions
from das_asr.runtime.scores import text_score, token_values
from das_asr.runtime.selection import HYPOTHESIS, SelectionRule

__all__ = ["PRUNE_AFTER", "Pruning", "RowJudge"]

PRUNE_AFTER = 8
"""Tokens after which rows are judged, unless `prune_after` says otherwise."""

_ROUNDING = 1e-9  # a score that is summed up in another order must not change who wins
_LEAST_PROBABILITY = 1e-9  # of a token that a row is sure not to want: one such token must not decide alone


@dataclass(frozen=True)
class Pruning:
    """When rows stop.

    Attributes:
        own: rows have their own histories.
        score, base_bias, include_base: see `DecodingOptions`.
        exact: rows that can no longer win stop.
        rows: of an utterance that stay after `after` tokens, the base counted; None is all.
        margin: how far behind the best a row may be from then on; None is any.
        after: tokens.
    """

    own: bool
    score: str
    base_bias: float
    include_base: bool
    exact: bool
    rows: int | None
    margin: float | None
    after: int

    @classmethod
    def of(cls, options: DecodingOptions, rule: str | SelectionRule) -> Pruning | None:
        """What options ask for under a rule; None where no row will ever stop early."""
        own = rule == HYPOTHESIS
        exact = own and options.score == "total" and options.switch_cost is None
        if not (exact or options.prunes):
            return None
        return cls(
            own=own,
            score=options.score,
            base_bias=options.base_bias,
            include_base=options.include_base,
            exact=exact,
            rows=options.max_active_rows,
            margin=options.prune_margin,
            after=PRUNE_AFTER if options.prune_after is None else options.prune_after,
        )


class RowJudge:
    """Keeps the running scores of B utterances and R rows, and says who stops."""

    def __init__(self, pruning: Pruning, shape: tuple[int, int]) -> None:
        self._pruning = pruning
        self._sums = np.zeros(shape, np.float64)
        self._tokens = np.zeros(shape, np.int64)
        self._stopped = np.zeros(shape, np.bool_)
        self._bias = np.zeros(shape[1])
        self._bias[0] = pruning.base_bias
        self._eligible = np.ones(shape[1], np.bool_)
        self._eligible[0] = pruning.include_base
        self._steps = 0

    @property
    def caps(self) -> bool:
        """Whether the last step was the one after which rows are counted."""
        return self._pruning.rows is not None and self._steps == self._pruning.after

    def judge(
        self, step: Step, written: NDArray[np.int64], wrote: NDArray[np.bool_], alive: NDArray[np.bool_]
    ) -> NDArray[np.bool_]:
        """Takes the outcome of a step of all rows and says which stop now, bool [B, R].

        Args:
            step: of the decoder.
            written: ids [B, R] that went into the rows' histories.
            wrote: rows [B, R] that were writing before it.
            alive: those that go on.
        """
        values = token_values(step.logprob, self._pruning.score) if self._pruning.own else _shares(step, written)
        self._sums += np.where(wrote, values, 0.0)
        self._tokens += wrote
        self._steps += 1
        stops = self._behind(alive) & alive
        stops[:, 0] = False
        self._stopped |= stops
        return stops

    def _behind(self, alive: NDArray[np.bool_]) -> NDArray[np.bool_]:
        pruning = self._pruning
        scores = text_score(self._sums, self._tokens, pruning.score if pruning.own else "total") + self._bias
        known = self._eligible & ~self._stopped
        stops = np.zeros_like(alive)
        if pruning.exact:
            stops |= scores < _best(scores, known & ~alive) - _ROUNDING
        if self._steps >= pruning.after and pruning.margin is not None:
            stops |= scores < _best(scores, known) - pruning.margin - _ROUNDING
        if self.caps:
            assert pruning.rows is not None
            rivals = np.where(self._stopped, -np.inf, scores)[:, 1:]
            order = np.argsort(-rivals, axis=1, kind="stable")  # of equals the lowest row stays
            np.put_along_axis(stops[:, 1:], order[:, pruning.rows - 1 :], True, axis=1)
        return stops


def _best(scores: NDArray[np.float64], among: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Highest score [B, 1] of the rows in `among`, minus infinity without any."""
    best: NDArray[np.float64] = np.where(among, scores, -np.inf).max(axis=1, keepdims=True)
    return best


def _shares(step: Step, written: NDArray[np.int64]) -> NDArray[np.float64]:
    """Log-probability [B, R] of the written token under each row, at most."""
    own = np.minimum(step.logprob.astype(np.float64), 0.0)
    other = np.log(np.maximum(1.0 - np.exp(own), _LEAST_PROBABILITY))
    return np.where(step.candidate == written, own, np.minimum(own, other))
