"""The whole loop against the oracle: what the runtime wrote on the sample audio is replayed in torch, token by token.

The oracle is given the runtime's own tokens and says, at every step, what it would have written there. That is the same
as running its own loop and comparing the texts: up to the first difference both have the same history, and behind the
first difference nothing is compared. But it takes one pass for each row instead of one for each token.

A different token is accepted only where the oracle itself is undecided, that is where one of the numbers that decide
lies closer to its threshold than two implementations may differ.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from das_asr.export.reference import RowTrace
from das_asr.runtime.errors import ParityError
from das_asr.runtime.results import Transcription

__all__ = ["REPLAYED_RULES", "Comparison", "Written", "compare", "paper_choice", "written"]

REPLAYED_RULES = ("paper", "hypothesis")
"""One rule of each kind of history."""


@dataclass(frozen=True)
class Written:
    """What the runtime wrote for one sample."""

    sample: int  # index of the audio
    rule: str
    tokens: tuple[tuple[int, ...], ...]  # of each row, with the end-of-text if it was reached; the same under `paper`
    chosen: tuple[int, ...]  # the row of each token of the result


@dataclass(frozen=True)
class Comparison:
    """Outcome of a replay that found no error."""

    compared: int
    differing: int  # accepted: the oracle was undecided


def written(transcription: Transcription, sample: int, end_of_text: int) -> Written:
    """Takes from a result what the oracle has to reproduce."""
    if transcription.rule == "hypothesis":
        tokens = tuple(
            (*hypothesis.tokens, end_of_text) if hypothesis.finished else hypothesis.tokens
            for hypothesis in transcription.hypotheses
        )
    else:
        tokens = (tuple(token.id for token in transcription.provenance),) * len(transcription.rows)
    chosen = tuple(token.row for token in transcription.provenance)
    return Written(sample, transcription.rule, tokens, chosen)


def compare(
    product: Written, oracle: Sequence[RowTrace], *, end_of_text: int, limit: int, tau: float, tolerance: float
) -> Comparison:
    """Compares what the runtime wrote with the oracle's view of it.

    Args:
        product: the runtime's tokens.
        oracle: one trace of each row, over that row's tokens.
        end_of_text: id that ends a text.
        limit: most tokens a row may write.
        tau: threshold of the paper's rule.
        tolerance: how far a logit may be off, absolute.

    Raises:
        ParityError: a token or a row differs and the oracle was not undecided, or a text ends where it must not.
    """
    for row, tokens in enumerate(product.tokens):
        _check_end(product, row, tokens, end_of_text, limit)
    if product.rule == "hypothesis":
        return _compare_own(product, oracle, tolerance)
    return _compare_shared(product, oracle, tau, tolerance)


def _check_end(product: Written, row: int, tokens: tuple[int, ...], end_of_text: int, limit: int) -> None:
    ended = bool(tokens) and tokens[-1] == end_of_text
    if end_of_text in tokens[:-1] or not (ended or len(tokens) == limit):
        raise ParityError(
            f"{_place(product, len(tokens) - 1)}: row {row} stopped after {len(tokens)} tokens, neither at its first "
            f"end-of-text nor at the limit of {limit}."
        )


def _compare_shared(product: Written, oracle: Sequence[RowTrace], tau: float, tolerance: float) -> Comparison:
    """Rows with one history: at every step the paper's rule must choose the same row and token."""
    for step, (token, row) in enumerate(zip(product.tokens[0], product.chosen, strict=True)):
        confidences = np.exp([trace.logprob[step] for trace in oracle])
        expected, gap = paper_choice(confidences, tau)
        wanted = int(oracle[expected].token[step])
        if (token, row) == (wanted, expected):
            continue
        row_open = row == expected or gap < _of_probabilities(tolerance)
        token_open = token == oracle[row].token[step] or oracle[row].margin[step] < _of_margins(tolerance)
        if not (row_open and token_open):
            raise ParityError(
                f"{_place(product, step)}: the runtime wrote token {token} of row {row}, transformers and PEFT write "
                f"{wanted} of row {expected}, decided by {gap:.2g} in probability and "
                f"{oracle[expected].margin[step]:.2g} in logits."
            )
        return Comparison(step + 1, 1)
    return Comparison(len(product.chosen), 0)


def _compare_own(product: Written, oracle: Sequence[RowTrace], tolerance: float) -> Comparison:
    """Rows with their own histories: each row's text, then the choice between the texts."""
    compared = differing = 0
    for row, (tokens, trace) in enumerate(zip(product.tokens, oracle, strict=True)):
        step = next(iter(_differences(tokens, trace)), None)
        compared += len(tokens) if step is None else step + 1
        if step is None:
            continue
        if trace.margin[step] >= _of_margins(tolerance):
            raise ParityError(
                f"{_place(product, step)}: row {row} of the runtime wrote token {tokens[step]}, transformers and PEFT "
                f"write {int(trace.token[step])}, decided by {trace.margin[step]:.2g} in logits."
            )
        differing += 1
    if not differing:
        differing = _compare_winner(product, [float(trace.logprob.mean()) for trace in oracle], tolerance)
    return Comparison(compared, differing)


def _differences(tokens: Sequence[int], trace: RowTrace) -> Iterator[int]:
    """Steps at which the oracle would have written another token."""
    return (step for step, token in enumerate(tokens) if token != trace.token[step])


def _compare_winner(product: Written, scores: list[float], tolerance: float) -> int:
    """Whether another row won: 0 or 1. The winner has the highest mean log-probability, ties go to the lowest row."""
    row, winner = product.chosen[0], int(np.argmax(scores))
    if row == winner:
        return 0
    if (gap := scores[winner] - scores[row]) >= _of_probabilities(tolerance):
        raise ParityError(
            f"{_place(product, 0)}: the runtime chose the text of row {row}, transformers and PEFT that of row "
            f"{winner}, whose mean log-probability is {gap:.2g} higher."
        )
    return 1


def paper_choice(confidences: NDArray[np.float64], tau: float) -> tuple[int, float]:
    """The DAS paper's rule (Eq. 3), read literally.

    With c_i the confidence of row i: if max c - c_0 >= tau the most confident row, else if min c - c_0 <= -tau the
    least confident row, else row 0; ties go to the lowest row.

    Args:
        confidences: c [R].
        tau: threshold in probability units.

    Returns:
        The row, and by how much probability the decision was made: the distance to the nearest threshold, or between
        the two rows that came into question.
    """
    gain, loss = confidences.max() - confidences[0], confidences.min() - confidences[0]
    if gain >= tau:
        return int(confidences.argmax()), min(gain - tau, _lead(confidences))
    if loss <= -tau:
        return int(confidences.argmin()), min(tau - gain, -tau - loss, _lead(-confidences))
    return 0, min(tau - gain, loss + tau)


def _lead(values: NDArray[np.float64]) -> float:
    """How far the largest value is ahead of the second."""
    ordered = np.sort(values)
    return float(ordered[-1] - ordered[-2]) if len(ordered) > 1 else float("inf")


def _of_margins(tolerance: float) -> float:
    """The distance of two logits may be off by twice what one of them may."""
    return 2 * tolerance


def _of_probabilities(tolerance: float) -> float:
    """A log-probability may be off by twice what a logit may, and a distance of two of them by four times as much."""
    return 4 * tolerance


def _place(product: Written, step: int) -> str:
    return f"Sample {product.sample + 1}, rule {product.rule}, step {step + 1}"
