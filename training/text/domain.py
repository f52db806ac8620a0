"""A domain: what an assistant is used for, by whom, and how people talk to it.

domain = load_domain("music")             # shipped
domain = load_domain("my/pizza.yaml")     # a file of your own, see `das-synth init`
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from das_asr.runtime.errors import DataError
from das_asr.training.text.grammar import STYLES
from das_asr.training.text.yaml_file import is_yaml_path, parse_mapping, read_text

__all__ = ["Domain", "load_domain", "shipped_domains"]

_DOMAINS = "das_asr.training.text.domains"
_NAME = re.compile(r"[a-z][a-z0-9_]*")
_LISTS = ("skills", "personas", "seeds", "wake_words", "styles")
_KEYS = ("name", "use_case", *_LISTS, "words")
_REQUIRED = ("name", "personas", "styles", "words")


@dataclass(frozen=True)
class Domain:
    """Metadata of a domain (DAS paper, after CodecLM).

    Without `use_case` and `skills`, both are found from the seeds by a language model.

    Raises:
        DataError: a value is empty, doubled or out of range, or there are neither skills nor seeds.
    """

    name: str
    use_case: str
    skills: tuple[str, ...]
    personas: tuple[str, ...]
    seeds: tuple[str, ...]
    wake_words: tuple[str, ...]
    styles: tuple[str, ...]
    words_min: int  # of a sentence, both included
    words_max: int

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise DataError(
                f"Domain name {self.name!r}: a word of lower-case letters, digits and underscores is expected."
            )
        for key in _LISTS:
            self._check_list(key)
        self._check_styles()
        if not 1 <= self.words_min <= self.words_max:
            raise DataError(
                f"Domain {self.name}: words has min {self.words_min} and max {self.words_max}; "
                "1 <= min <= max is expected."
            )
        if not self.personas:
            raise DataError(f"Domain {self.name}: personas is empty. Name at least one speaker.")
        if bool(self.use_case) != bool(self.skills):
            there, absent = ("use_case", "skills") if self.use_case else ("skills", "use_case")
            raise DataError(f"Domain {self.name} has {there} but no {absent}. Give both, or leave out both.")
        if not (self.skills or self.seeds):
            raise DataError(f"Domain {self.name} has neither use_case and skills nor seeds to find them from.")

    def _check_list(self, key: str) -> None:
        values = getattr(self, key)
        if not all(value.strip() for value in values):
            raise DataError(f"Domain {self.name}: {key} holds an empty text.")
        if doubled := sorted({value for value in values if values.count(value) > 1}):
            raise DataError(f"Domain {self.name}: {key} names {', '.join(map(repr, doubled))} twice.")

    def _check_styles(self) -> None:
        unknown = [style for style in self.styles if style not in STYLES]
        if unknown or not self.styles:
            raise DataError(
                f"Domain {self.name}: styles is {list(self.styles)}; one or more of {', '.join(STYLES)} are expected."
            )

    @property
    def sha256(self) -> str:
        """Of all its values."""
        return hashlib.sha256(json.dumps(dataclasses.asdict(self), sort_keys=True).encode()).hexdigest()


def shipped_domains() -> list[str]:
    """Names of the domains in the package."""
    files = resources.files(_DOMAINS).iterdir()
    return sorted(file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml"))


def load_domain(source: str | Path) -> Domain:
    """Loads a shipped domain by name, or a YAML file by path.

    Raises:
        DataError: there is no such domain, or the file is not a domain; the message names the key.
    """
    if is_yaml_path(source):
        what = f"Domain {source}"
        return _domain(parse_mapping(read_text(Path(source), "Domain"), what), what)
    if source not in shipped_domains():
        raise DataError(
            f"There is no domain {str(source)!r}. There are {', '.join(shipped_domains())}; "
            "or give a YAML file, which `das-synth init` makes."
        )
    text = (resources.files(_DOMAINS) / f"{source}.yaml").read_text(encoding="utf-8")
    return _domain(parse_mapping(text, f"Domain {source}"), f"Domain {source}")


def _domain(data: dict[str, Any], what: str) -> Domain:
    if unknown := [str(key) for key in data if key not in _KEYS]:
        raise DataError(f"{what} has the unknown key {', '.join(unknown)}. Known are {', '.join(_KEYS)}.")
    if missing := [key for key in _REQUIRED if key not in data]:
        raise DataError(f"{what} has no {', '.join(missing)}. Expected are {', '.join(_KEYS)}.")
    low, high = _range(data["words"], what)
    return Domain(
        name=_text(data["name"], "name", what),
        use_case=_text(data.get("use_case") or "", "use_case", what),
        words_min=low,
        words_max=high,
        **{key: _texts(data.get(key) or [], key, what) for key in _LISTS},
    )


def _text(value: Any, key: str, what: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{what}: {key} is {value!r}; a text is expected. Put quotes around it.")
    return " ".join(value.split())


def _texts(values: Any, key: str, what: str) -> tuple[str, ...]:
    if not isinstance(values, list):
        raise DataError(f"{what}: {key} is {values!r}; a list of texts is expected.")
    return tuple(_text(value, f"{key}[{index}]", what) for index, value in enumerate(values))


def _range(value: Any, what: str) -> tuple[int, int]:
    if isinstance(value, dict) and set(value) == {"min", "max"}:
        low, high = value["min"], value["max"]
        if type(low) is int and type(high) is int:  # True is an int too
            return low, high
    raise DataError(f"{what}: words is {value!r}; {{min: 3, max: 16}} with two whole numbers is expected.")
