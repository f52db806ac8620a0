"""What `das-bench wer` found: every sentence with the errors of every system, for any statistic to be made again."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from das_asr.benchmarks.wordcounts import Counts
from das_asr.runtime.errors import OptionError

__all__ = ["Outcome", "Sentence", "SystemResult", "WerReport", "merge_reports", "read_report"]

KIND, SCHEMA = "wer", 1


@dataclass(frozen=True)
class Sentence:
    """What was said."""

    audio: str  # relative to its set
    text: str  # as in the set
    words: int  # after normalization
    rows: Mapping[str, str] = dataclasses.field(default_factory=dict)  # each row's own text, where it was decoded


@dataclass(frozen=True)
class Outcome:
    """What a system wrote of one sentence."""

    text: str
    errors: tuple[int, int, int]  # substitutions, insertions, deletions
    adapter: str | None = None  # the row whose text it is; None with a shared history or a `switch_cost`
    words: tuple[tuple[str, str], ...] = ()  # where `adapter` is None: each word and its row


@dataclass(frozen=True)
class SystemResult:
    """A system on every set."""

    name: str
    description: str
    outcomes: Mapping[str, tuple[Outcome, ...]]  # by set


@dataclass(frozen=True)
class WerReport:
    """Systems x sets.

    Attributes:
        sets: sentences by set.
        systems: in the order of the tables.
        baseline: name of the system that the others are compared with.
        wording: how texts were compared.
        about: date, versions, machine and arguments; free of meaning for the statistics.
    """

    sets: Mapping[str, tuple[Sentence, ...]]
    systems: tuple[SystemResult, ...]
    baseline: str
    wording: Mapping[str, Any]
    about: Mapping[str, Any]

    def system(self, name: str) -> SystemResult:
        """The system of that name.

        Raises:
            OptionError: there is none.
        """
        for system in self.systems:
            if system.name == name:
                return system
        known = ", ".join(repr(system.name) for system in self.systems)
        raise OptionError(f"There is no system {name!r} in the results; there are {known}.")

    def sentences(self, name: str) -> tuple[Sentence, ...]:
        """The sentences of a set.

        Raises:
            OptionError: there is no set of that name.
        """
        if name not in self.sets:
            raise OptionError(f"There is no set {name!r} in the results; there are {', '.join(map(repr, self.sets))}.")
        return self.sets[name]

    def words(self, name: str) -> NDArray[np.int64]:
        """Reference words [N] of a set's sentences."""
        return np.array([sentence.words for sentence in self.sentences(name)], np.int64)

    def errors(self, system: str, name: str) -> Counts:
        """Errors [N, 3] of a system on a set, by kind."""
        self.sentences(name)
        return np.array([outcome.errors for outcome in self.system(system).outcomes[name]], np.int64)

    def wer(self, system: str, name: str) -> float:
        """Corpus-level word error rate as a fraction."""
        return float(self.errors(system, name).sum() / self.words(name).sum())

    def to_json(self) -> str:
        """One JSON document."""
        return json.dumps({"kind": KIND, "schema": SCHEMA, **dataclasses.asdict(self)}, ensure_ascii=False) + "\n"

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> WerReport:
        """The report of a parsed document."""
        return cls(
            sets={name: tuple(Sentence(**one) for one in sentences) for name, sentences in data["sets"].items()},
            systems=tuple(_system(system) for system in data["systems"]),
            baseline=data["baseline"],
            wording=data["wording"],
            about=data["about"],
        )


def _system(data: Mapping[str, Any]) -> SystemResult:
    outcomes = {name: tuple(map(_outcome, found)) for name, found in data["outcomes"].items()}
    return SystemResult(data["name"], data["description"], outcomes)


def _outcome(data: Mapping[str, Any]) -> Outcome:
    substitutions, insertions, deletions = data["errors"]
    words = tuple((word, row) for word, row in data["words"])
    return Outcome(data["text"], (substitutions, insertions, deletions), data["adapter"], words)


def read_report(path: Path) -> WerReport:
    """Reads what `das-bench wer` wrote.

    Raises:
        OptionError: the file cannot be read, or is something else.
    """
    hint = "Give a file that `das-bench wer` wrote with --output."
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OptionError(f"{path} cannot be read as JSON ({error}). {hint}") from error
    if not isinstance(data, dict) or (data.get("kind"), data.get("schema")) != (KIND, SCHEMA):
        raise OptionError(f"{path} is not a result of `das-bench wer` in schema {SCHEMA}. {hint}")
    try:
        return WerReport.from_dict(data)
    except (KeyError, TypeError, ValueError) as error:
        raise OptionError(f"{path} is damaged ({type(error).__name__}: {error}). {hint}") from error


def merge_reports(reports: Sequence[WerReport]) -> WerReport:
    """One report of the systems of several runs over the same sentences; the first of a name counts.

    Raises:
        OptionError: none was given, or they differ in sentences or in how texts were compared.
    """
    if not reports:
        raise OptionError("There are no results to merge. Give at least one file of `das-bench wer`.")
    first = reports[0]
    systems: dict[str, SystemResult] = {}
    for report in reports:
        if report.wording != first.wording or _spoken(report) != _spoken(first):
            raise OptionError("The results are over different sentences or normalizations. Run them on the same sets.")
        for system in report.systems:
            systems.setdefault(system.name, system)
    return dataclasses.replace(first, systems=tuple(systems.values()))


def _spoken(report: WerReport) -> dict[str, list[tuple[str, str, int]]]:
    return {name: [(one.audio, one.text, one.words) for one in found] for name, found in report.sets.items()}
