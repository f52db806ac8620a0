"""The text of the tiny base: everyday requests, natural snippets, and random words, without the target domains' words.

Requests teach the decoder how people speak to an assistant, snippets widen its English, and random words keep it
listening instead of guessing. Sentences with a word of the music, weather or sports domains are left out: what the
adapters are to teach must be new to the base.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from das_asr.runtime.errors import DataError
from das_asr.runtime.jsonl import Row, write_rows
from das_asr.training.base.snippets import Sources, dictionary_words, natural_snippets
from das_asr.training.text.grammar import load_grammar

__all__ = ["DOMAIN_WORDS", "CorpusOptions", "make_corpus", "write_corpus"]

DOMAIN_WORDS = frozenset(
    """
    album albums artist artists band bands beat beats bass blues chorus classical composer concert concerts country
    dance disco drum drums duet encore folk funk gospel groove guitar hip hop indie jazz karaoke lyrics melody metal
    mixtape music musical musician orchestra piano playlist playlists pop punk radio rap rapper reggae remix rhythm
    rock sang shuffle sing singer singers singing single singles song songs sung symphony techno track tracks tune
    tunes violin vocals volume spotify pandora itunes barometer blizzard blowing breeze breezy celsius chilly cloud
    clouds cloudy cold cool degrees drizzle drought dry dust fahrenheit fog foggy forecast freeze freezing frost
    gale hail haze heat heatwave hot humid humidity hurricane ice icy jacket lightning meteorologist mist monsoon
    muggy overcast pollen pressure rain raincoat raining rains rainy scorching shower showers sleet snow snowing
    snows snowy storm storms stormy sun sunblock sunglasses sunny sunrise sunscreen sunset temperature temperatures
    thunder thunderstorm tornado typhoon umbrella warm weather wet wind winds windy arena athlete athletes athletics
    ball baseball basketball batting bowling boxing champion champions championship championships coach coaches
    cricket cup cycling defender derby draft dribble fixture fixtures football formula game games goal goalie
    goalkeeper goals golf gymnastics hockey inning innings league leagues marathon match matches medal medals nba
    nfl nhl mlb offense olympic olympics pitcher player players playoff playoffs quarterback racing ranking rankings
    referee rugby score scored scorer scores scoring season seasons semifinal skating ski skiing soccer sport sports
    squad stadium standings striker swimming team teams tennis tournament trophy umpire volleyball wicket winner
    wrestling
    """.split()  # noqa: SIM905
)
"""Words of the three target domains that the base never sees in text."""

_REQUESTS, _NATURAL = 0.5, 0.34  # shares of requests and of natural snippets; the rest is random words
_COMMON_WORDS = 12_000  # most random words are common ones
_RARE_SHARE = 0.3


@dataclass(frozen=True)
class CorpusOptions:
    """How much text, and from which seed."""

    count: int = 72_000
    seed: int = 0
    sources: Sources = Sources()  # noqa: RUF009  # paths alone


def make_corpus(options: CorpusOptions) -> list[Row]:
    """Returns rows of distinct sentences: `id`, `text`, `source`.

    Raises:
        DataError: a source of text is not installed, or gives fewer sentences than its share.
    """
    options.sources.check()
    snippets = _distinct_snippets(options.sources)
    words = _vocabulary(snippets, dictionary_words(options.sources))
    rng = random.Random(options.seed)  # noqa: S311
    rng.shuffle(snippets)
    sentences = snippets[: round(options.count * _NATURAL)]
    seen = {text for _, text in sentences}
    requests = round(options.count * _REQUESTS)
    sentences += [
        ("words", text) for text in _random_words(options.count - requests - len(sentences), words, rng, seen)
    ]
    sentences += [("requests", text) for text in _requests(requests, options.seed, seen)]
    return [{"id": f"b{number:06d}", "text": text, "source": source} for number, (source, text) in enumerate(sentences)]


def write_corpus(path: Path, options: CorpusOptions) -> None:
    """Writes the rows of `make_corpus` as JSON Lines."""
    write_rows(path, make_corpus(options))


def _distinct_snippets(sources: Sources) -> list[tuple[str, str]]:
    distinct: dict[str, str] = {}
    for source, text in natural_snippets(sources):
        if _outside_domains(text):
            distinct.setdefault(text, source)
    return [(source, text) for text, source in distinct.items()]


def _outside_domains(text: str) -> bool:
    return DOMAIN_WORDS.isdisjoint(text.replace("'", " ").split())


def _vocabulary(snippets: list[tuple[str, str]], dictionary: list[str]) -> tuple[list[str], list[str]]:
    """(common words, all words of the dictionary)."""
    counts = Counter(itertools.chain.from_iterable(text.split() for _, text in snippets))
    known = set(dictionary)
    common = [word for word, _ in counts.most_common() if word in known and word not in DOMAIN_WORDS]
    return common[:_COMMON_WORDS], [word for word in dictionary if word not in DOMAIN_WORDS]


def _requests(count: int, seed: int, seen: set[str]) -> Iterator[str]:
    fruitless = 0
    for sentence in load_grammar("general").sentences(seed):
        if count == 0:
            return
        if sentence.text in seen or not _outside_domains(sentence.text):
            fruitless += 1
            if fruitless > 20 * count + 10_000:
                raise DataError(f"The general grammar has no {count} further sentences. Ask for a smaller corpus.")
            continue
        seen.add(sentence.text)
        count -= 1
        yield sentence.text


def _random_words(
    count: int, vocabulary: tuple[list[str], list[str]], rng: random.Random, seen: set[str]
) -> Iterator[str]:
    common, every = vocabulary
    while count:
        drawn = [rng.choice(every if rng.random() < _RARE_SHARE else common) for _ in range(rng.randint(2, 6))]
        text = " ".join(drawn)
        if text not in seen:
            seen.add(text)
            count -= 1
            yield text
