"""What counts as the same sentence: its words in lower case, without punctuation and apostrophes, numbers as words."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from das_asr.training.text.spoken import spoken

__all__ = ["Words", "ngrams", "without_wake_word", "words_of"]

Words = tuple[str, ...]

_BETWEEN = re.compile(r"[^\w]+|_+")


def words_of(text: str) -> Words:
    """The words that texts are compared by: "What's on at 7?" -> whats, on, at, seven."""
    return tuple(_BETWEEN.sub(" ", spoken(text).lower().replace("'", "")).split())


def without_wake_word(words: Words, wake_words: Iterable[Words]) -> Words:
    """Removes the longest wake word from the front, if there is one."""
    front = [phrase for phrase in wake_words if phrase and words[: len(phrase)] == phrase]
    return words[len(max(front, key=len)) :] if front else words


def ngrams(words: Sequence[str], size: int) -> list[Words]:
    """All runs of `size` words, repeated ones repeatedly."""
    return [tuple(words[start : start + size]) for start in range(len(words) - size + 1)]
