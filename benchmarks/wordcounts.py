"""Word errors of every utterance, aligned by jiwer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from das_asr.benchmarks.wording import Words

__all__ = ["KINDS", "Counts", "count_errors"]

KINDS = ("substitutions", "insertions", "deletions")
"""Columns of `Counts`."""

Counts = NDArray[np.int64]  # [N, 3]: errors of N utterances by kind

_COLUMN = {"substitute": 0, "insert": 1, "delete": 2}


def count_errors(references: Sequence[Words], hypotheses: Sequence[Words]) -> Counts:
    """Substitutions, insertions and deletions [N, 3] of the alignment with the fewest errors.

    No reference may be empty; an empty hypothesis is all deletions.
    """
    import jiwer

    assert all(references), "an utterance without reference words has no word error rate"
    counts = np.zeros((len(references), len(KINDS)), np.int64)
    if not references:
        return counts
    aligned = jiwer.process_words([" ".join(words) for words in references], [" ".join(words) for words in hypotheses])
    for row, chunks in zip(counts, aligned.alignments, strict=True):
        for chunk in chunks:
            if chunk.type in _COLUMN:
                reference, hypothesis = chunk.ref_end_idx - chunk.ref_start_idx, chunk.hyp_end_idx - chunk.hyp_start_idx
                row[_COLUMN[chunk.type]] += max(reference, hypothesis)
    return counts
