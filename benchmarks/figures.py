"""Figures of one system's repeats, as the results files have them; times in milliseconds."""

from __future__ import annotations

import dataclasses
import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Any

from das_asr.benchmarks.timing import Utterance, summarize

__all__ = ["figures", "ratios", "summary"]


def figures(utterances: Sequence[Utterance], seconds: float) -> dict[str, Any]:
    """Summaries of the parts of an utterance, and what was written.

    Args:
        utterances: one per repeat.
        seconds: of audio in each.
    """
    totals = [utterance.total for utterance in utterances]
    rtf = statistics.median(totals) / seconds
    first = utterances[0]
    return {
        "rtf": rtf,
        "rtfx": 1 / rtf,
        "total_ms": summary(totals),
        "features_ms": summary([utterance.features for utterance in utterances]),
        "encoder_ms": summary([utterance.encoder for utterance in utterances]),
        "prefill_ms": summary([utterance.prefill for utterance in utterances]),
        "step_ms": summary([step for utterance in utterances for step in utterance.steps]),
        "token_ms": summary([_per_token(utterance) for utterance in utterances]),
        "selection_ms": summary([item.selection for item in utterances if item.selection is not None]),
        "host_ms": summary([item.host for item in utterances if item.host is not None]),
        "tokens": list(first.tokens),
        "rows": {str(row): count for row, count in sorted(Counter(first.rows).items())},
        "repeatable": all(utterance.tokens == first.tokens for utterance in utterances),
    }


def ratios(mine: Sequence[float], other: Sequence[float]) -> dict[str, float] | None:
    """Summary of the ratios within the repeats: a machine that was slower for a while slows both sides."""
    return summary([a / b for a, b in zip(mine, other, strict=True)], 1.0)


def summary(values: Sequence[float], scale: float = 1e3) -> dict[str, float] | None:
    """Median, 95th percentile, minimum and number of the scaled values; None where there are none."""
    found = summarize([value * scale for value in values])
    return dataclasses.asdict(found) if found else None


def _per_token(utterance: Utterance) -> float:
    """Seconds of decoding per token, prefill and host included."""
    return (utterance.total - utterance.features - utterance.encoder) / max(1, len(utterance.tokens))
