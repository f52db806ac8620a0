"""Nearly equal sentences: two that share most of their words, in whatever order (Jaccard index).

A pair of similarity t differs in few words, so that both leave the same rest when each drops a few of its own: at
t = 0.9 nothing up to nine words, one word up to nineteen. Every rest is a key, and a look-up per rest finds all pairs
without comparing any.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from itertools import combinations

from das_asr.runtime.errors import OptionError
from das_asr.training.text.words import Words

__all__ = ["NearIndex"]

_LOWEST = 0.8
_MOST_DROPPED = 3  # keys of a sentence of n words are n over this; beyond it, long sentences pass as different


class NearIndex:
    """Sentences seen so far, as bags of words.

    Args:
        similarity: shared words over all words of two sentences, from which on they count as the same; 0.8 to 1.
            1 finds only the same words in another order.

    Raises:
        OptionError: the similarity is out of range.
    """

    def __init__(self, similarity: float) -> None:
        if not _LOWEST <= similarity <= 1:
            raise OptionError(f"similarity was {similarity}; {_LOWEST} to 1 is expected.")
        self._similarity = similarity
        self._shortest: dict[int, int] = {}  # rest -> fewest words of a sentence that has it
        self._hashes: dict[str, int] = {}

    def add(self, words: Words) -> None:
        """Remembers a sentence."""
        for rest, _ in self._rests(words):
            self._shortest[rest] = min(len(words), self._shortest.get(rest, len(words)))

    def finds(self, words: Words) -> bool:
        """Whether a remembered sentence is nearly this one."""
        return any(
            (other := self._shortest.get(rest)) is not None
            and size >= self._similarity * (len(words) + other - size) - 1e-9
            for rest, size in self._rests(words)
        )

    def _rests(self, words: Words) -> Iterator[tuple[int, int]]:
        """(sum of the hashes, number of words) of the sentence without some of its words, itself first."""
        hashes = self._word_hashes(words)
        total, count = sum(hashes), len(hashes)
        yield total, count
        droppable = min(_MOST_DROPPED, math.floor((1 - self._similarity) * count + 1e-9))
        for dropped in range(1, droppable + 1):
            for some in combinations(hashes, dropped):
                yield total - sum(some), count - dropped

    def _word_hashes(self, words: Words) -> list[int]:
        """One per word; the second occurrence of a word is another word."""
        seen: dict[str, int] = {}
        found = []
        for word in words:
            seen[word] = seen.get(word, 0) + 1
            key = word if seen[word] == 1 else f"{word} {seen[word]}"
            if key not in self._hashes:
                self._hashes[key] = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest())
            found.append(self._hashes[key])
        return found
