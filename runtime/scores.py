"""How the text of a row is scored: one formula for texts that have ended and for those that are being written."""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

__all__ = ["text_score", "token_values"]

Sum = TypeVar("Sum", float, NDArray[np.float64])


def token_values(logprobs: NDArray[np.float32], score: str) -> NDArray[np.float64]:
    """What each token adds to a score: its log-probability, or for `root` the negated root of its surprisal."""
    values: NDArray[np.float64] = np.minimum(logprobs.astype(np.float64), 0.0)
    return -np.sqrt(-values) if score == "root" else values


def text_score(values: Sum, tokens: Any, score: str) -> Sum:
    """Score of a text of so many tokens, at least 1, end-of-text counted, whose `token_values` sum up to `values`."""
    return values if score == "total" else values / tokens
