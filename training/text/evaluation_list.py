"""Sentences that must not be trained on, and how much the training text has in common with them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from das_asr.training.speech.sentences import read_sentences
from das_asr.training.text.near import NearIndex
from das_asr.training.text.words import Words, ngrams, without_wake_word, words_of

__all__ = ["OVERLAP_SIZE", "EvaluationList", "ngram_overlap"]

OVERLAP_SIZE = 4  # words


class EvaluationList:
    """The sentences of one or more files (JSON Lines with `text`, or one sentence per line).

    Args:
        files: where they are.
        wake_words: which of them in front of a sentence make no difference.
        similarity: from which on a sentence is near to one of them, see `NearIndex`.

    Raises:
        DataError: a file cannot be read or is empty.
    """

    def __init__(self, files: Sequence[Path], wake_words: Iterable[str] = (), similarity: float = 0.9) -> None:
        self._wake_words = [words_of(phrase) for phrase in wake_words]
        texts = [str(row.get("text", "")) for file in files for row in read_sentences(file)]
        self.sentences = [words for text in texts if (words := words_of(text))]
        self._exact = {form for words in self.sentences for form in self._forms(words)}
        self._near = NearIndex(similarity)
        for form in self._exact:
            self._near.add(form)

    def holds(self, words: Words) -> bool:
        """Whether this sentence is one of them."""
        return any(form in self._exact for form in self._forms(words))

    def nearly_holds(self, words: Words) -> bool:
        """Whether it is near to one of them."""
        return any(self._near.finds(form) for form in self._forms(words))

    def _forms(self, words: Words) -> set[Words]:
        return {words, without_wake_word(words, self._wake_words)} - {()}


def ngram_overlap(generated: Iterable[Words], listed: Iterable[Words], size: int = OVERLAP_SIZE) -> dict[str, Any]:
    """Distinct n-grams that two sets of sentences share.

    Returns:
        `size`; `shared`, their number; `of_generated` and `of_list`, the shares (0 to 1) of either set's n-grams.
    """
    ours = {gram for words in generated for gram in ngrams(words, size)}
    theirs = {gram for words in listed for gram in ngrams(words, size)}
    shared = len(ours & theirs)
    return {
        "size": size,
        "shared": shared,
        "of_generated": shared / len(ours) if ours else 0.0,
        "of_list": shared / len(theirs) if theirs else 0.0,
    }
