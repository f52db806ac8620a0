"""Seeded template grammars: sentences of a domain without any language model.

A grammar is a YAML file:

    slots:
      artist: [adele, bruno mars]
      song: [hello, "{artist} live"]          # a filler may use other slots
    templates:
      - text: "[please|can you|] play {song} by {artist}"
        skill: play a song                    # one of the domain's skills
        style: request                        # request or question
        weight: 2                             # optional, 1 when left out; how often the template is drawn

`{slot}` draws a filler, `[a|b|]` one of the alternatives (an empty one leaves the part out). Slots of `common.yaml`
beside it (numbers, days, times, cities, first names, ...) are there in every grammar.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

from das_asr.runtime.errors import DataError
from das_asr.training.text.yaml_file import is_yaml_path, parse_mapping, read_text

__all__ = ["STYLES", "Grammar", "Sentence", "Template", "load_grammar", "shipped_grammars"]

STYLES = ("request", "question")

_GRAMMARS = "das_asr.training.text.grammars"
_COMMON = "common.yaml"
_SLOT = re.compile(r"\{([a-z][a-z0-9_]*)\}")
_CHOICE = re.compile(r"\[([^\[\]]*)\]")
_DEEPEST = 20  # nested slots; deeper than this is a cycle


@dataclass(frozen=True)
class Template:
    """One sentence pattern and what it is for."""

    text: str
    skill: str
    style: str = "request"
    weight: float = 1.0


@dataclass(frozen=True)
class Sentence:
    """A drawn sentence with its lineage."""

    text: str
    template: int  # index into the grammar's templates
    slots: tuple[tuple[str, str], ...]  # (slot, filler) in the order drawn, outermost first


@dataclass(frozen=True)
class Grammar:
    """Templates over slots.

    Raises:
        DataError: an unknown or empty slot, slots that need each other in a circle, an unknown style, no template.
    """

    name: str
    slots: Mapping[str, Sequence[str]]
    templates: Sequence[Template]

    def __post_init__(self) -> None:
        if not self.templates:
            raise DataError(f"Grammar {self.name} has no templates.")
        for template in self.templates:
            self._check_types(template)
            if template.style not in STYLES:
                raise DataError(
                    f"Grammar {self.name}: style {template.style!r}; one of {', '.join(STYLES)} is expected."
                )
            self._check(template.text, ())

    def _check_types(self, template: Template) -> None:
        texts = (template.text, template.skill, template.style)
        weighed = isinstance(template.weight, int | float) and template.weight > 0
        if not (weighed and all(isinstance(text, str) for text in texts)):
            raise DataError(f"Grammar {self.name}: {template}: texts and a weight above 0 are expected.")

    def _check(self, text: str, inside: tuple[str, ...]) -> None:
        for slot in _SLOT.findall(text):
            if slot not in self.slots:
                raise DataError(f"Grammar {self.name}: {text!r} uses {{{slot}}}, which is not among its slots.")
            if slot in inside:
                raise DataError(f"Grammar {self.name}: slot {slot!r} needs itself ({' -> '.join((*inside, slot))}).")
            if slot not in self._checked:
                if not self.slots[slot]:
                    raise DataError(f"Grammar {self.name}: slot {slot!r} has no fillers.")
                for filler in self.slots[slot]:
                    self._check(filler, (*inside, slot))
                self._checked.add(slot)

    @cached_property
    def _checked(self) -> set[str]:
        return set()

    @cached_property
    def _weights(self) -> list[float]:
        return [template.weight for template in self.templates]

    def draw(self, rng: random.Random) -> Sentence:
        """Draws one sentence: a template by weight, then its choices and slots."""
        index = rng.choices(range(len(self.templates)), self._weights)[0]
        return self.fill(index, rng)

    def fill(self, index: int, rng: random.Random) -> Sentence:
        """Draws one sentence of the template with this index."""
        drawn: list[tuple[str, str]] = []
        text = self._expand(self.templates[index].text, rng, drawn, 0)
        return Sentence(" ".join(text.split()), index, tuple(drawn))

    def _expand(self, text: str, rng: random.Random, drawn: list[tuple[str, str]], depth: int) -> str:
        assert depth <= _DEEPEST, f"grammar {self.name}: {text!r} nests too deeply"
        text = _CHOICE.sub(lambda found: rng.choice(found.group(1).split("|")), text)

        def one(found: re.Match[str]) -> str:
            slot = found.group(1)
            at = len(drawn)
            filler = self._expand(rng.choice(self.slots[slot]), rng, drawn, depth + 1)
            drawn.insert(at, (slot, filler))
            return filler

        return _SLOT.sub(one, text)

    def sentences(self, seed: int | str) -> Iterator[Sentence]:
        """Yields draws without end; the same seed gives the same sequence."""
        rng = random.Random(f"{self.name} {seed}")  # noqa: S311
        while True:
            yield self.draw(rng)

    def size(self) -> float:
        """Upper bound of the number of sentences: how many ways there are to fill the templates."""
        return sum(self._ways(template.text) for template in self.templates)

    def _ways(self, text: str) -> float:
        if found := _CHOICE.search(text):
            rest = (text[: found.start()], text[found.end() :])
            return sum(self._ways(choice.join(rest)) for choice in found.group(1).split("|"))
        return math.prod(self._slot_ways(slot) for slot in _SLOT.findall(text))

    def slot_size(self, slot: str) -> float:
        """How many ways there are to fill a slot."""
        return self._slot_ways(slot)

    @property
    def sha256(self) -> str:
        """Of its slots and templates."""
        slots = {slot: list(fillers) for slot, fillers in self.slots.items()}
        content = json.dumps([slots, [dataclasses.asdict(template) for template in self.templates]], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()

    def _slot_ways(self, slot: str) -> float:
        if slot not in self._sizes:
            self._sizes[slot] = sum(self._ways(filler) for filler in self.slots[slot])
        return self._sizes[slot]

    @cached_property
    def _sizes(self) -> dict[str, float]:
        return {}


def shipped_grammars() -> list[str]:
    """Names of the grammars in the package."""
    files = resources.files(_GRAMMARS).iterdir()
    return sorted(
        file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml") and file.name != _COMMON
    )


def load_grammar(source: str | Path) -> Grammar:
    """Loads a shipped grammar by name, or a YAML file by path; the common slots are added to its own.

    Raises:
        DataError: there is no such grammar, or the file is not a grammar.
    """
    if is_yaml_path(source):
        path = Path(source)
        return _grammar(path.stem, parse_mapping(read_text(path, "Grammar"), f"Grammar {path}"))
    if str(source) not in shipped_grammars():
        raise DataError(
            f"There is no grammar {str(source)!r}. There are {', '.join(shipped_grammars())}, or give a YAML file."
        )
    return _grammar(str(source), parse_mapping(_shipped(f"{source}.yaml"), f"Grammar {source}"))


def _shipped(name: str) -> str:
    return (resources.files(_GRAMMARS) / name).read_text(encoding="utf-8")


def _grammar(name: str, data: dict[str, Any]) -> Grammar:
    common = parse_mapping(_shipped(_COMMON), _COMMON)["slots"]
    own = data.get("slots") or {}
    if not isinstance(own, dict) or not isinstance(data.get("templates", []), list):
        raise DataError(f"Grammar {name}: `slots` must be a mapping and `templates` a list.")
    slots = {slot: _strings(fillers, name, slot) for slot, fillers in {**common, **own}.items()}
    try:
        templates = [Template(**item) for item in data.get("templates", [])]
    except TypeError as error:
        raise DataError(f"Grammar {name}: a template has `text`, `skill`, `style` and `weight` ({error}).") from error
    return Grammar(name, slots, templates)


def _strings(fillers: Any, name: str, slot: str) -> list[str]:
    if not isinstance(fillers, list) or not all(isinstance(filler, str) for filler in fillers):
        raise DataError(f"Grammar {name}: slot {slot!r} must be a list of strings; quote numbers, `yes` and `no`.")
    return fillers
