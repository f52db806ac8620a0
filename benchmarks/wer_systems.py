"""What `das-bench wer` can compare, and the small language that names it.

    [NAME=]KIND[,KEY=VALUE]...            a system of the bundle
    NAME=FOLDER[:KIND[,KEY=VALUE]...]     a system of another folder

KIND is one of

    base                          the base alone
    music, weather, ...           one adapter alone, by its name
    own                           in each set the adapter of that name; the base where there is none
    oracle                        in each utterance the row with the fewest errors: what a perfect choice would reach
    hypothesis                    every row writes its own text, the best score wins; with `switch_cost` the best path
                                  through all of them
    paper, gain, deviation-max    the rows share one history

and KEY one of `tau` (rules with a shared history), `score` (`mean`, `total`, `root`), `switch_cost`, `base_bias`,
`include_base` (hypothesis), `adapters` (every rule and `oracle`: the rows beside the base, as in
`adapters=music+weather`). What is not given is the bundle's default.

FOLDER is a bundle, the checkpoint of a fully fine-tuned model (exported first, and kept in the cache), or a PEFT
adapter, which decodes alone on the bundle's base. It is told by a slash: `./ft-music`. KIND defaults to the bundle's
rule, or to the base where it has no adapters.

A systems file is YAML or JSON with one map from name to the rest of the description:

    DAS: hypothesis,score=root,switch_cost=0.5
    FT-Multi: build/ft-multi:base
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from das_asr.runtime.errors import OptionError
from das_asr.runtime.options import DecodingOptions
from das_asr.runtime.results import BASE
from das_asr.runtime.selection import HYPOTHESIS, RULES

__all__ = [
    "ALL",
    "ORACLE",
    "OWN",
    "SHARED_RULES",
    "System",
    "all_systems",
    "parse_system",
    "parse_systems",
    "read_systems",
]

OWN = "own"
ORACLE = "oracle"
SHARED_RULES = tuple(rule for rule in RULES if rule not in (BASE, HYPOTHESIS))
ALL = "all"
"""In place of a system: every kind of the bundle."""

_NAMED = re.compile(r"([^=,:/\\]+)=(.+)")
_SCORING = frozenset({"score", "base_bias", "include_base", "switch_cost"})
_KEYS = {
    **dict.fromkeys(SHARED_RULES, frozenset({"tau", "adapters"})),
    HYPOTHESIS: _SCORING | {"adapters"},
    ORACLE: frozenset({"adapters"}),
}
_READERS: dict[str, Callable[[str], Any]] = {
    "tau": float,
    "base_bias": float,
    "score": str,
    "switch_cost": float,
    "include_base": {"yes": True, "no": False}.__getitem__,
    "adapters": lambda value: tuple(name for name in value.split("+") if name),
}


@dataclass(frozen=True)
class System:
    """One system as described: its name, and what it stands for.

    Attributes:
        name: in tables.
        kind: see the module; empty is the default of the folder.
        folder: None is the bundle that is evaluated.
        choices: what was given of `DecodingOptions` for the rule.
    """

    name: str
    kind: str
    folder: Path | None = None
    choices: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        allowed = _KEYS.get(self.kind, frozenset[str]())
        if wrong := sorted(set(self.choices) - allowed):
            keys = ", ".join(sorted(allowed)) or "nothing"
            taker = self.kind or "a folder without a kind"
            raise OptionError(f"System {self.name!r}: {wrong[0]} was given, but {taker} takes {keys}.")
        if not (self.kind or self.folder):
            raise OptionError(f"System {self.name!r} says neither what it is nor where. Give a kind or a folder.")
        if self.kind in RULES:
            try:
                DecodingOptions(rule=self.kind, **self.choices)
            except OptionError as error:
                raise OptionError(f"System {self.name!r}: {error}") from error

    @property
    def description(self) -> str:
        """The system in the language of the module, without its name."""
        kind = ",".join([self.kind, *(f"{key}={_shown(value)}" for key, value in self.choices.items())])
        folder = "" if self.folder is None else str(self.folder)
        if folder and not _has_slash(folder):
            folder = f"./{folder}"
        return ":".join(part for part in (folder, kind) if part)


def parse_system(text: str) -> System:
    """A system from its description.

    Raises:
        OptionError: it does not follow the language, or options contradict its kind.
    """
    named = _NAMED.fullmatch(text.strip())
    name, body = named.groups() if named else (None, text.strip())
    folder, rest = _split_folder(body)
    if folder is not None and name is None:
        raise OptionError(f"System {text!r} is in a folder and needs a name: NAME={text}.")
    kind, *pairs = rest.split(",")
    return System(name or body, kind.strip(), folder, dict(_pair(pair, text) for pair in pairs))


def parse_systems(texts: Iterable[str], adapters: Sequence[str]) -> tuple[System, ...]:
    """Systems from descriptions, `all` being those of `all_systems`.

    Raises:
        OptionError: as `parse_system`, or two systems have the same name.
    """
    systems: list[System] = []
    for text in texts:
        systems += all_systems(adapters) if text.strip() == ALL else [parse_system(text)]
    names = [system.name for system in systems]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise OptionError(f"Two systems are named {twice[0]!r}. Give them names: --system NAME=...")
    return tuple(systems)


def all_systems(adapters: Sequence[str]) -> tuple[System, ...]:
    """Every kind of a bundle with these adapters."""
    if not adapters:
        return (System(BASE, BASE),)
    forms = map(parse_system, (f"{HYPOTHESIS},score=total", f"{HYPOTHESIS},score=root,switch_cost=0.5"))
    kinds = (BASE, *adapters, OWN, *SHARED_RULES, HYPOTHESIS)
    return (*(System(kind, kind) for kind in kinds), *forms, System(ORACLE, ORACLE))


def read_systems(path: Path) -> list[str]:
    """Descriptions from a systems file.

    Raises:
        OptionError: it cannot be read, or is not a map from name to description.
    """
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise OptionError(f"--systems {path} cannot be read as YAML or JSON: {error}") from error
    if not isinstance(content, dict) or not all(isinstance(value, str) for value in content.values()):
        raise OptionError(f"--systems {path} is not a map from names to descriptions, as in `DAS: hypothesis`.")
    return [f"{name}={body}" for name, body in content.items()]


def _split_folder(body: str) -> tuple[Path | None, str]:
    """`FOLDER:rest`, `FOLDER` or `rest`; a folder is told by a slash."""
    head, _, tail = body.rpartition(":")
    if _has_slash(head):
        return Path(head), tail
    return (Path(body), "") if _has_slash(body) else (None, body)


def _has_slash(text: str) -> bool:
    return "/" in text or "\\" in text


def _pair(text: str, system: str) -> tuple[str, Any]:
    key, mark, value = (part.strip() for part in text.partition("="))
    key = key.replace("-", "_")
    if not mark or key not in _READERS:
        raise OptionError(f"System {system!r}: {text!r} was given, KEY=VALUE is expected; keys: {', '.join(_READERS)}.")
    try:
        return key, _READERS[key](value)
    except (ValueError, KeyError):
        raise OptionError(f"System {system!r}: {value!r} is not a value for {key}.") from None


def _shown(value: object) -> str:
    if isinstance(value, tuple):
        return "+".join(value)
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)
