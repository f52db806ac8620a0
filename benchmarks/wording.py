"""What counts as the same word: texts are brought to one form before their words are compared.

`paper`    the DAS paper's: lower case, no punctuation. Dashes and slashes separate words, every other mark vanishes,
           so that "what's" is one word and "twenty-one" two.
`whisper`  Whisper's rules for English, by transformers: fillers dropped, contractions and titles written out, numbers
           as digits, British spellings as American ones. The list of spellings is a checkpoint's `normalizer.json`.

Under both, wake words are removed from reference and hypothesis: at the start of an utterance, as whole words, and as
often as they are repeated there.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from das_asr.runtime.errors import DataError, OptionError

__all__ = ["STYLES", "Normalize", "Wording", "Words", "english_rules", "paper_rules", "strip_wake_words"]

STYLES = ("paper", "whisper")
SPELLINGS = "normalizer.json"

Words = tuple[str, ...]
Normalize = Callable[[str], Words]


@dataclass(frozen=True)
class Wording:
    """How texts are compared.

    Attributes:
        style: one of `STYLES`.
        wake_words: words or phrases such as "olly" or "hey computer".
        spellings: a `normalizer.json`, or a checkpoint folder that may have one; for `whisper` only. Without one,
            spellings stay as they are.
    """

    style: str = "paper"
    wake_words: tuple[str, ...] = ()
    spellings: Path | None = None

    def __post_init__(self) -> None:
        if self.style not in STYLES:
            raise OptionError(f"--normalization is {self.style!r}, expected {' or '.join(STYLES)}.")
        if self.spellings is not None and self.style != "whisper":
            raise OptionError(f"--spellings belongs to --normalization whisper, but that is {self.style!r}.")
        if isinstance(self.wake_words, str):
            raise OptionError(f"wake_words is {self.wake_words!r}, expected several, as in ({self.wake_words!r},).")

    def normalizer(self) -> Normalize:
        """The function from a text to its words.

        Raises:
            DataError: the list of spellings cannot be read.
            OptionError: a wake word has no letters.
        """
        rules = paper_rules if self.style == "paper" else english_rules(_read_spellings(self.spellings))
        phrases = [rules(phrase) for phrase in self.wake_words]
        if not all(phrases):
            empty = self.wake_words[phrases.index(())]
            raise OptionError(f"--wake-word {empty!r} is empty after normalization. Give words.")
        return lambda text: strip_wake_words(rules(text), phrases)


def paper_rules(text: str) -> Words:
    """Lower case, no punctuation."""
    return tuple("".join(map(_letter, unicodedata.normalize("NFKC", text).lower())).split())


def _letter(letter: str) -> str:
    category = unicodedata.category(letter)
    if category == "Pd" or letter == "/":
        return " "
    return "" if category.startswith("P") else letter


def english_rules(spellings: dict[str, str]) -> Normalize:
    """Whisper's rules with a map of spellings."""
    from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

    normalize = EnglishTextNormalizer(spellings)
    return lambda text: tuple(normalize(text).split())


def strip_wake_words(words: Words, phrases: Sequence[Words]) -> Words:
    """Removes the phrases from the front, the longest that fits first, until none fits."""
    longest_first = sorted(phrases, key=len, reverse=True)
    while found := next((phrase for phrase in longest_first if words[: len(phrase)] == phrase), None):
        words = words[len(found) :]
    return words


def _read_spellings(source: Path | None) -> dict[str, str]:
    if source is None:
        return {}
    path = source / SPELLINGS if source.is_dir() else source
    if source.is_dir() and not path.is_file():
        return {}
    try:
        spellings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as JSON ({error}). A checkpoint's {SPELLINGS} is expected.") from error
    if not isinstance(spellings, dict) or not all(isinstance(value, str) for value in spellings.values()):
        raise DataError(f"{path} is not a map from spelling to spelling. A checkpoint's {SPELLINGS} is expected.")
    return spellings
