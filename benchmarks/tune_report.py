"""What `das-bench tune` found, in Markdown."""

from __future__ import annotations

from collections.abc import Iterable

from das_asr.benchmarks.tune import MEAN, Trial, TuneReport
from das_asr.benchmarks.wer_report import markdown_table, percent, wording_text
from das_asr.runtime.results import BASE

__all__ = ["render_tuning"]

BEST_OF_A_KIND = 3


def render_tuning(report: TuneReport) -> str:
    """The best setting, the base, the best few of each rule, and every score at every switch cost, with WER in %."""
    best, lowest = report.best, report.lowest
    retained = ", ".join(report.retained) or "no set"
    parts = [f"Best: {best.description}; mean WER {percent(best.rate(MEAN))} %, {retained} no worse than by the base."]
    if lowest.rate(MEAN) < best.rate(MEAN):
        reason = f"{retained} becomes worse" if not lowest.allowed else "the runtime has no such score"
        parts.append(f"Lowest of all: {lowest.description}, {percent(lowest.rate(MEAN))} %, but {reason}.")
    sizes = ", ".join(f"{name} {count}" for name, count in report.sets.items())
    parts.append(f"WER in %; utterances: {sizes}; {wording_text(report.wording)}.")
    parts.append(_table(report, _shown(report)))
    parts.append(f"Options of das-transcribe: {best.flags()}")
    return "\n\n".join(parts) + "\n"


def _shown(report: TuneReport) -> list[Trial]:
    trials = [trial for trial in report.trials if trial.rule == BASE]
    searched = [trial for trial in report.trials if trial.rule != BASE and trial.reading is None]
    for rule in dict.fromkeys(trial.rule for trial in searched):
        ranked = sorted((trial for trial in searched if trial.rule == rule), key=lambda trial: trial.rate(MEAN))
        trials += ranked[:BEST_OF_A_KIND]
    trials += [trial for trial in report.trials if trial.reading is not None]
    return trials if report.best in trials else [*trials, report.best]


def _table(report: TuneReport, trials: Iterable[Trial]) -> str:
    names = [*report.sets, MEAN]
    rows = [
        [trial.description, *(percent(trial.rate(name)) for name in names), "yes" if trial.allowed else "no"]
        for trial in trials
    ]
    return markdown_table(["setting", *names, "retains"], rows)
