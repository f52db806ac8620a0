"""Which proposed sentences become rows: spoken form, length, duplicates, evaluation sentences."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from das_asr.training.text.candidate import Candidate
from das_asr.training.text.domain import Domain
from das_asr.training.text.evaluation_list import EvaluationList
from das_asr.training.text.near import NearIndex
from das_asr.training.text.options import TextOptions
from das_asr.training.text.spoken import is_spoken, spoken
from das_asr.training.text.words import Words, without_wake_word, words_of

__all__ = ["Screened", "Screening"]

_SHOWN = 20  # near hits in the report


@dataclass(frozen=True)
class Screened:
    """A sentence that may become a row."""

    text: str
    words: Words


class Screening:
    """Lets a sentence pass once; what it turned away is counted by reason."""

    def __init__(self, domain: Domain, options: TextOptions, excluded: EvaluationList) -> None:
        self._domain = domain
        self._options = options
        self._excluded = excluded
        self._wake_words = [words_of(phrase) for phrase in domain.wake_words]
        self._seen: set[Words] = set()
        self._near = NearIndex(options.similarity)
        self._near_hits: list[str] = []
        self.rejected: Counter[str] = Counter()

    def passes(self, candidate: Candidate) -> Screened | None:
        """The sentence as it will be spoken, or None."""
        text = spoken(candidate.text)
        if self._options.lower_case:
            text = text.lower()
        words = words_of(text)
        if reason := self._objection(candidate, text, words):
            self.rejected[reason] += 1
            return None
        if self._excluded.nearly_holds(words):
            self.rejected["near an evaluation sentence (kept)"] += 1
            self._near_hits.append(text)
        self._seen.add(words)
        self._near.add(words)
        return Screened(text, words)

    def facts(self) -> dict[str, Any]:
        """What the report says about it."""
        kept = "near an evaluation sentence (kept)"
        rejected = {reason: count for reason, count in sorted(self.rejected.items()) if reason != kept}
        return {"rejected": rejected, "near_hits": len(self._near_hits), "near_hit_texts": self._near_hits[:_SHOWN]}

    def _objection(self, candidate: Candidate, text: str, words: Words) -> str | None:
        if candidate.style is not None and candidate.style not in self._domain.styles:
            return "style"
        if not is_spoken(text):
            return "symbols"
        return self._length(without_wake_word(words, self._wake_words)) or self._repetition(words)

    def _length(self, words: Words) -> str | None:
        count = len(words)
        if count < self._domain.words_min:
            return "too short"
        longest = min(self._domain.words_max, self._options.max_seconds * self._options.words_per_second)
        return "too long" if count > longest else None

    def _repetition(self, words: Words) -> str | None:
        if words in self._seen:
            return "duplicate"
        if self._excluded.holds(words):
            return "evaluation sentence"
        return "near duplicate" if self._near.finds(words) else None
