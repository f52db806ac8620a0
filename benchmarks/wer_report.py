"""Tables of a `WerReport` in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from das_asr.benchmarks.significance import Interval
from das_asr.benchmarks.wer_result import WerReport
from das_asr.benchmarks.wer_stats import Comparison, WerStatistics
from das_asr.benchmarks.wordcounts import KINDS

__all__ = [
    "SIGNIFICANT",
    "change_cell",
    "facts",
    "markdown_table",
    "percent",
    "rate_cell",
    "render_wer",
    "set_sizes",
    "wording_text",
]

SIGNIFICANT = 0.05
FEW = 30  # utterances


def render_wer(statistics: WerStatistics) -> str:
    """The whole report: rates with intervals, changes against the baseline, and errors by kind."""
    report, level = statistics.report, f"{100 * statistics.bootstrap.level:g} %"
    bootstrap = statistics.bootstrap
    resampled = f"{bootstrap.resamples} bootstrap resamples of the utterances, seed {bootstrap.seed}"
    parts = ["# Word error rates", _caption(report)]
    parts += [f"WER in %, with {level} intervals from {resampled}.", _rates(statistics)]
    if small := [name for name, found in report.sets.items() if len(found) < FEW]:
        parts.append(f"Intervals and p-values over fewer than {FEW} utterances mean little: {', '.join(small)}.")
    if len(report.systems) > 1:
        parts.append(
            f"Relative change against `{report.baseline}` with its {level} interval, and the two-sided p-value of the "
            f"paired bootstrap, not corrected for the number of comparisons; * where it is below {SIGNIFICANT}."
        )
        parts.append(_changes(statistics))
    parts += [f"Errors in % of the reference words: {', '.join(KINDS)}.", _kinds(report), "Systems:", _systems(report)]
    return "\n\n".join(parts) + "\n"


def rate_cell(rate: Interval) -> str:
    """`24.3 [20.1, 28.9]`."""
    return f"{percent(rate.value)}{_bounds(rate, percent)}"


def change_cell(change: Comparison) -> str:
    """`-35.2 * [-41.0, -28.8] p=0.0004`."""
    if change.relative is None:
        return "-"
    star = " *" if change.p_value < SIGNIFICANT else ""
    return f"{_signed(change.relative.value)}{star}{_bounds(change.relative, _signed)} p={change.p_value:.2g}"


def percent(share: float) -> str:
    """A share in percent, without the sign of percent."""
    return f"{100 * share:.1f}"


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; bars in cells are escaped."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |" for cells in lines)


def wording_text(wording: Mapping[str, Any]) -> str:
    """How texts were compared, in words."""
    parts = [f"normalization `{wording['style']}`"]
    if wording["style"] == "whisper":
        parts.append("American spellings" if wording["spellings"] else "spellings as they are")
    if wording["wake_words"]:
        parts.append(f"without the wake words {', '.join(wording['wake_words'])}")
    return ", ".join(parts)


def set_sizes(report: WerReport) -> str:
    """`music 225 / 1702, ...`: utterances and words of every set."""
    return ", ".join(f"{name} {len(found)} / {report.words(name).sum()}" for name, found in report.sets.items())


def facts(report: WerReport) -> str:
    """How texts were compared, then machine, versions, commit and date as far as they are known."""
    return "; ".join(filter(None, [wording_text(report.wording), _origin(report)]))


def _origin(report: WerReport) -> str:
    about = report.about
    machine, versions = about.get("machine") or {}, about.get("versions") or {}
    parts = [str(machine.get("processor") or "")]
    parts += [f"{name} {versions[name]}" for name in ("onnxruntime", "torch") if name in versions]
    parts += [f"commit {about['commit']}"] if about.get("commit") else []
    return ", ".join(filter(None, [*parts, str(about.get("date") or "")[:10]]))


def _signed(share: float) -> str:
    return f"{100 * share:+.1f}"


def _bounds(interval: Interval, show: Any) -> str:
    if interval.low is None or interval.high is None:
        return ""
    return f" [{show(interval.low)}, {show(interval.high)}]"


def _caption(report: WerReport) -> str:
    return f"Sets (utterances / words): {set_sizes(report)}; {facts(report)}."


def _rates(statistics: WerStatistics) -> str:
    sets = _columns(statistics.report)
    head = ["system", *(title for title, _ in sets)]
    rows = [
        [system.name, *(rate_cell(statistics.rate(system.name, names)) for _, names in sets)]
        for system in statistics.report.systems
    ]
    return markdown_table(head, rows)


def _changes(statistics: WerStatistics) -> str:
    report, sets = statistics.report, _columns(statistics.report)
    rows = [
        [system.name, *(change_cell(statistics.compare(system.name, report.baseline, names)) for _, names in sets)]
        for system in report.systems
        if system.name != report.baseline
    ]
    return markdown_table(["system, change in %", *(title for title, _ in sets)], rows)


def _columns(report: WerReport) -> list[tuple[str, str | list[str]]]:
    """Every set, and where there are several their mean."""
    columns: list[tuple[str, str | list[str]]] = [(name, name) for name in report.sets]
    return columns if len(columns) < 2 else [*columns, ("mean", list(report.sets))]


def _kinds(report: WerReport) -> str:
    rows = []
    for system in report.systems:
        cells = []
        for name in report.sets:
            shares = report.errors(system.name, name).sum(axis=0) / report.words(name).sum()
            cells.append(" / ".join(map(percent, shares)))
        rows.append([system.name, *cells])
    return markdown_table(["system", *report.sets], rows)


def _systems(report: WerReport) -> str:
    return "\n".join(f"- `{system.name}`: `{system.description}`" for system in report.systems)
