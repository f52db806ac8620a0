"""How varied a text is: distinct n-grams, vocabulary, lengths, slots, skills."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from das_asr.runtime.jsonl import Row
from das_asr.training.text.evaluation_list import EvaluationList, ngram_overlap
from das_asr.training.text.grammar import Grammar
from das_asr.training.text.words import ngrams, words_of

__all__ = ["Diversity", "measure_diversity"]

_SIZES = (1, 2, 3, 4)
_COUNTED = ("skill", "persona", "style", "stage", "backend")


@dataclass(frozen=True)
class Diversity:
    """Figures of a set of sentences."""

    rows: int
    duplicates: int  # rows whose words another row has before
    words: int
    vocabulary: int  # distinct words
    distinct: dict[str, float]  # n -> distinct n-grams over all n-grams
    lengths: dict[str, int]  # words -> sentences
    counts: dict[str, dict[str, int]]  # column -> value -> sentences
    slots: dict[str, dict[str, float]]  # slot -> fillings used, and of how many where the grammar is known
    templates: dict[str, int]  # used, and of how many where the grammar is known
    overlap: dict[str, Any] | None  # with the evaluation list, see `ngram_overlap`
    excluded: int | None  # sentences of the evaluation list that are among the rows
    near_excluded: int | None  # rows that are near to one of them, or the same

    @property
    def mean_length(self) -> float:
        """Words per sentence."""
        return self.words / self.rows if self.rows else 0.0


def measure_diversity(
    rows: Sequence[Row], grammar: Grammar | None = None, excluded: EvaluationList | None = None
) -> Diversity:
    """Measures rows with `text`; other columns are counted where they are there.

    Args:
        rows: the sentences with their lineage.
        grammar: where they come from, to say how much of it was used.
        excluded: sentences to compare with.
    """
    sentences = [words_of(str(row.get("text", ""))) for row in rows]
    words = [word for sentence in sentences for word in sentence]
    lengths = Counter(len(sentence) for sentence in sentences)
    return Diversity(
        rows=len(rows),
        duplicates=len(sentences) - len(set(sentences)),
        words=len(words),
        vocabulary=len(set(words)),
        distinct={str(size): _distinct([gram for one in sentences for gram in ngrams(one, size)]) for size in _SIZES},
        lengths={str(length): lengths[length] for length in sorted(lengths)},
        counts={column: counted for column in _COUNTED if (counted := _count(rows, column))},
        slots=_slots(rows, grammar),
        templates=_templates(rows, grammar),
        overlap=None if excluded is None else ngram_overlap(sentences, excluded.sentences),
        excluded=None if excluded is None else sum(map(excluded.holds, sentences)),
        near_excluded=None if excluded is None else sum(map(excluded.nearly_holds, sentences)),
    )


def _distinct(grams: list[tuple[str, ...]]) -> float:
    return len(set(grams)) / len(grams) if grams else 0.0


def _count(rows: Sequence[Row], column: str) -> dict[str, int]:
    values = Counter(str(row[column]) for row in rows if row.get(column) is not None)
    return dict(values.most_common())


def _slots(rows: Sequence[Row], grammar: Grammar | None) -> dict[str, dict[str, float]]:
    used: dict[str, set[str]] = {}
    for row in rows:
        for slot, filler in (row.get("template") or {}).get("slots", []):
            used.setdefault(slot, set()).add(filler)
    found: dict[str, dict[str, float]] = {}
    for slot in sorted(used):
        found[slot] = {"used": len(used[slot])}
        if grammar is not None and slot in grammar.slots:
            found[slot]["of"] = grammar.slot_size(slot)
    return found


def _templates(rows: Sequence[Row], grammar: Grammar | None) -> dict[str, int]:
    used = {row["template"]["index"] for row in rows if row.get("template")}
    if not used:
        return {}
    return {"used": len(used)} | ({} if grammar is None else {"of": len(grammar.templates)})
