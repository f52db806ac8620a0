"""Test sets: spoken sentences by name, and the checks on them that come before any decoding."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from das_asr.benchmarks.wording import Normalize
from das_asr.runtime.audio import MIN_SECONDS
from das_asr.runtime.errors import DataError
from das_asr.runtime.utterances import Utterance, read_utterances

__all__ = ["EvaluationSet", "check_references", "fit_window", "parse_source", "read_sets"]


@dataclass(frozen=True)
class EvaluationSet:
    """Sentences whose word error rate is one figure. A set named like an adapter is that adapter's domain."""

    name: str
    source: Path
    utterances: tuple[Utterance, ...]


def parse_source(text: str) -> tuple[str | None, Path]:
    """`NAME=FOLDER` -> (name, folder), `FOLDER` -> (None, folder); a name holds no slash."""
    name, mark, path = text.partition("=")
    return (name, Path(path)) if mark and name and path and not {"/", "\\"} & set(name) else (None, Path(text))


def read_sets(sources: Sequence[tuple[str | None, Path]]) -> tuple[EvaluationSet, ...]:
    """Reads AudioFolders or JSON Lines manifests; one without a name is split by its `domain` column.

    Raises:
        DataError: a source is broken or empty, lacks a name and domains, or two sets have the same name.
    """
    sets: list[EvaluationSet] = []
    for name, path in sources:
        utterances = read_utterances(path)
        sets += _by_domain(path, utterances) if name is None else [EvaluationSet(name, path, tuple(utterances))]
    names = [each.name for each in sets]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise DataError(f"Two test sets are named {twice[0]!r}. Give them names: --test NAME=FOLDER.")
    if not sets:
        raise DataError("There is no test set. Give at least one: --test NAME=FOLDER.")
    return tuple(sets)


def _by_domain(path: Path, utterances: Sequence[Utterance]) -> list[EvaluationSet]:
    domains: dict[str, list[Utterance]] = {}
    for number, utterance in enumerate(utterances, start=1):
        if not utterance.domain:
            raise DataError(f"{path}, row {number} has no `domain`. Give the set a name: --test NAME={path}.")
        domains.setdefault(utterance.domain, []).append(utterance)
    return [EvaluationSet(domain, path, tuple(members)) for domain, members in domains.items()]


def check_references(sets: Sequence[EvaluationSet], normalize: Normalize) -> None:
    """Refuses utterances of which nothing is left to recognise.

    Raises:
        DataError: with their number and the first of them.
    """
    for each in sets:
        empty = [utterance for utterance in each.utterances if not normalize(utterance.text)]
        if empty:
            raise DataError(
                f"Set {each.name!r}: {len(empty)} of {len(each.utterances)} references have no words after "
                f"normalization, first {empty[0].audio.name} ({empty[0].text!r}). Take them out of {each.source}."
            )


def fit_window(
    sets: Sequence[EvaluationSet], window_seconds: float, *, skip: bool = False
) -> tuple[EvaluationSet, ...]:
    """The sets with the duration of every utterance; what the model cannot take is refused, or left out.

    Args:
        sets: as read.
        window_seconds: longest audio that the model hears.
        skip: leave such utterances out.

    Raises:
        DataError: audio cannot be read, is too long or too short, or nothing is left of a set.
    """
    return tuple(_fit(each, window_seconds, skip=skip) for each in sets)


def _fit(each: EvaluationSet, window_seconds: float, *, skip: bool) -> EvaluationSet:
    timed = [dataclasses.replace(utterance, duration=_seconds(utterance.audio)) for utterance in each.utterances]
    fitting = tuple(one for one in timed if one.duration and MIN_SECONDS <= one.duration <= window_seconds)
    unfit = len(timed) - len(fitting)
    if unfit and not skip:
        first = next(one for one in timed if one not in fitting)
        raise DataError(
            f"Set {each.name!r}: {unfit} of {len(timed)} utterances are not between {MIN_SECONDS} and "
            f"{window_seconds:g} s long, first {first.audio.name} with {first.duration:.2f} s. Split them, or leave "
            "them out with --skip-unfit."
        )
    if not fitting:
        raise DataError(f"Set {each.name!r}: no utterance is between {MIN_SECONDS} and {window_seconds:g} s long.")
    return dataclasses.replace(each, utterances=fitting)


def _seconds(path: Path) -> float:
    """Duration by the file's header."""
    import soundfile

    try:
        return float(soundfile.info(path).duration)
    except soundfile.LibsndfileError as error:
        raise DataError(f"{path} cannot be read as audio: {error}. Mend it or take it out of the set.") from error
