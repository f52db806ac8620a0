"""Word error rate on the development set, to choose among checkpoints; published figures are das-bench's."""

from __future__ import annotations

import re
from collections.abc import Sequence

__all__ = ["normalise", "word_error_rate"]


def normalise(text: str) -> str:
    """Lower case, no punctuation but apostrophes inside words, single spaces."""
    return " ".join(re.sub(r"[^\w\s']|(?<!\w)'|'(?!\w)|_", " ", text.lower()).split())


def word_error_rate(references: Sequence[str], hypotheses: Sequence[str]) -> float:
    """Errors over words of the whole set, a fraction; references that normalise to nothing are left out."""
    from jiwer import wer

    pairs = [(normalise(reference), normalise(guess)) for reference, guess in zip(references, hypotheses, strict=True)]
    kept = [(reference, guess) for reference, guess in pairs if reference]
    if not kept:
        return 0.0
    return float(wer([reference for reference, _ in kept], [guess for _, guess in kept]))
