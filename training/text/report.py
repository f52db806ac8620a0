"""What a run of text generation did and how varied its sentences are, as JSON and as text."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from das_asr.runtime.errors import DataError
from das_asr.runtime.jsonl import read_rows
from das_asr.training.text.diversity import Diversity, measure_diversity
from das_asr.training.text.evaluation_list import EvaluationList
from das_asr.training.text.grammar import Grammar

__all__ = ["TextReport", "report_on"]

_WIDEST = 40  # characters of a bar
_LISTED = 20  # values of a column
_LEAST_USED = 8  # slots


@dataclass(frozen=True)
class TextReport:
    """Figures of a file of sentences; `run` is empty where only the file is known."""

    file: str
    diversity: dict[str, Any]  # fields of `Diversity`
    run: dict[str, Any]

    @classmethod
    def read(cls, path: Path, output: Path) -> TextReport:
        """Reads the report that a run left.

        Raises:
            DataError: it cannot be read.
        """
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            return cls(str(output), found["diversity"], found["run"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{output} is complete, but its report {path} cannot be read ({error!r}). "
                f"`das-synth report {output}` measures the file."
            ) from error

    def as_json(self) -> dict[str, Any]:
        """The fields."""
        return asdict(self)

    def as_text(self) -> str:
        """For people."""
        figures = Diversity(**self.diversity)
        return "\n".join(
            [
                *_summary(self.file, figures),
                *_histogram(figures.lengths),
                *(line for column, counted in figures.counts.items() for line in _column(column, counted)),
                *_coverage(figures),
                *_overlap(figures),
                *_run(self.run),
            ]
        )


def report_on(path: Path, grammar: Grammar | None = None, exclude: Sequence[Path] = ()) -> TextReport:
    """Measures a file of sentences.

    Args:
        path: JSON Lines with `text`.
        grammar: where the sentences come from, for the coverage of its slots.
        exclude: files of evaluation sentences to compare with.

    Raises:
        DataError: a file cannot be read or is empty.
    """
    rows = list(read_rows(path))
    if not rows:
        raise DataError(f"{path} holds no rows. JSON Lines with `text` are expected.")
    excluded = EvaluationList(exclude) if exclude else None
    return TextReport(str(path), asdict(measure_diversity(rows, grammar, excluded)), {})


def _summary(file: str, figures: Diversity) -> Iterator[str]:
    yield f"{file}: {figures.rows} sentences, {figures.words} words, {figures.mean_length:.1f} per sentence"
    yield f"vocabulary {figures.vocabulary}, duplicates {figures.duplicates}"
    ratios = ", ".join(f"{size}: {ratio:.3f}" for size, ratio in figures.distinct.items())
    yield f"distinct n-grams over all, by n: {ratios}"


def _histogram(lengths: Mapping[str, int]) -> Iterator[str]:
    yield "words per sentence:"
    most = max(lengths.values(), default=1)
    for length, count in lengths.items():
        yield f"  {length:>3} {count:>7} {'#' * round(_WIDEST * count / most)}"


def _column(column: str, counted: Mapping[str, int]) -> Iterator[str]:
    yield f"{column}:"
    values = list(counted.items())
    yield from (f"  {count:>7} {value}" for value, count in values[:_LISTED])
    if len(values) > _LISTED:
        yield f"          and {len(values) - _LISTED} more"


def _coverage(figures: Diversity) -> Iterator[str]:
    if figures.templates:
        yield f"templates used: {figures.templates['used']}" + _of(figures.templates)
    if figures.slots:
        shares = {slot: used["used"] / used["of"] for slot, used in figures.slots.items() if "of" in used}
        whole = sum(share >= 1 for share in shares.values())
        yield f"slots used: {len(figures.slots)}" + (f", {whole} with every filling" if shares else "")
        for slot in sorted(shares, key=lambda slot: shares[slot])[:_LEAST_USED]:
            if shares[slot] < 1:
                used = figures.slots[slot]
                yield f"  {slot}: {used['used']:.0f} of {used['of']:.0f} fillings"


def _of(used: Mapping[str, float]) -> str:
    return f" of {used['of']:.0f}" if "of" in used else ""


def _overlap(figures: Diversity) -> Iterator[str]:
    if figures.overlap is not None:
        share = figures.overlap
        yield (
            f"{share['size']}-grams shared with the evaluation list: {share['shared']}, {share['of_generated']:.2%} of "
            f"those here, {share['of_list']:.2%} of the list's"
        )
        yield f"evaluation sentences here: {figures.excluded}, sentences near to one: {figures.near_excluded}"


def _run(run: Mapping[str, Any]) -> Iterator[str]:
    if "rejected" in run:
        turned = ", ".join(f"{count} {reason}" for reason, count in run["rejected"].items())
        yield f"turned away: {turned or 'none'}"
    if "draws" in run:
        yield f"draws: {run['draws']} of a grammar of at most {run['grammar_size']:.3g} sentences"
    if "requests" in run:
        yield (
            f"requests of this run: {run['requests']}, answers reused: {run['reused']}, asked again: "
            f"{run['asked_again']}, malformed: {run['malformed']}, failed: {run['failed']}"
        )
        yield f"tokens of this run: {run['prompt_tokens']} in prompts, {run['completion_tokens']} in answers"
