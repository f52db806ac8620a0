"""Sentences from a template grammar."""

from __future__ import annotations

from collections.abc import Callable, Generator
from itertools import islice
from typing import Any

from das_asr.runtime.errors import DataError
from das_asr.training.text.candidate import Candidate
from das_asr.training.text.domain import Domain
from das_asr.training.text.grammar import Grammar, Sentence, load_grammar, shipped_grammars
from das_asr.training.text.options import TextOptions

__all__ = ["GrammarSource", "domain_grammar"]

_BATCH = 500


def domain_grammar(domain: Domain, options: TextOptions) -> Grammar:
    """The grammar for a domain, checked against its skills.

    Raises:
        DataError: there is none, or one of its templates has a skill that the domain has not.
    """
    if options.grammar is None and domain.name not in shipped_grammars():
        raise DataError(
            f"There is no grammar for the domain {domain.name!r}. Give one as --grammar FILE (`das-synth init` makes "
            f"one to start from), or take another back end. Shipped are {', '.join(shipped_grammars())}."
        )
    grammar = load_grammar(options.grammar or domain.name)
    strange = sorted({template.skill for template in grammar.templates} - set(domain.skills))
    if domain.skills and strange:
        raise DataError(
            f"Grammar {grammar.name} has templates for {', '.join(map(repr, strange))}, which are no skills of the "
            f"domain {domain.name}. Its skills are {', '.join(domain.skills)}."
        )
    return grammar


class GrammarSource:
    """Draws without end."""

    patience = 40
    unit = f"{_BATCH} draws"
    model: str | None = None

    def __init__(self, grammar: Grammar, seed: int) -> None:
        self._grammar = grammar
        self._seed = seed
        self._draws = 0

    def batches(self, missing: Callable[[], int]) -> Generator[list[Candidate], None, None]:  # noqa: ARG002
        """See `Source.batches`."""
        sentences = self._grammar.sentences(self._seed)
        while True:
            self._draws += _BATCH
            yield [self._candidate(sentence) for sentence in islice(sentences, _BATCH)]

    def facts(self) -> dict[str, Any]:
        """Draws, and how many sentences there may be at most."""
        return {"draws": self._draws, "grammar": self._grammar.name, "grammar_size": self._grammar.size()}

    def _candidate(self, sentence: Sentence) -> Candidate:
        template = self._grammar.templates[sentence.template]
        lineage = {"index": sentence.template, "slots": [list(pair) for pair in sentence.slots]}
        return Candidate(sentence.text, template.skill, template.style, "grammar", template=lineage)
