"""A page of the sentences that a system gets most wrong: what was said, and what was written by which row."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape

from das_asr.benchmarks.wer_report import wording_text
from das_asr.benchmarks.wer_result import Outcome, Sentence, WerReport
from das_asr.benchmarks.wer_systems import ORACLE
from das_asr.runtime.results import BASE

__all__ = ["default_system", "render_worst"]

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 60em; padding: 0 1em; color: #222 }
table { border-collapse: collapse; margin: 0 0 1.4em; width: 100% }
td { padding: .15em .6em; vertical-align: top; border-top: 1px solid #ddd }
td:first-child { width: 11em; color: #666 }
.heard { background: #f3f3f3 }
span.row { border-radius: 3px; padding: 0 .2em }
"""
_COLORS = ("#e8e8e8", "#ffd9b3", "#bfe3ff", "#c9efc4", "#f5c6e6", "#fff1a8", "#d9cff5", "#c4f0ea")


def default_system(report: WerReport) -> str:
    """The first system that is neither the baseline nor the oracle nor one row alone, else the last."""
    rows = {row for found in report.sets.values() for sentence in found for row in sentence.rows}
    alone = {report.baseline, BASE, ORACLE, "own", *rows}
    joint = [system.name for system in report.systems if system.name not in alone]
    return joint[0] if joint else report.systems[-1].name


def render_worst(report: WerReport, system: str, count: int = 20) -> str:
    """An HTML page with up to `count` sentences of every set, those with the most errors first.

    Raises:
        OptionError: there is no such system.
    """
    outcomes = report.system(system).outcomes
    colors = _colors(report, system)
    body = [f"<h1>Worst sentences of {escape(system)}</h1>", f"<p>{_legend(colors)}</p>"]
    body.append(f"<p>Errors as substitutions + insertions + deletions; {escape(wording_text(report.wording))}.</p>")
    for name, sentences in report.sets.items():
        ranked = sorted(range(len(sentences)), key=lambda index: -sum(outcomes[name][index].errors))
        wrong = [index for index in ranked if sum(outcomes[name][index].errors)]
        body.append(f"<h2>{escape(name)}: {len(wrong)} of {len(sentences)} with errors</h2>")
        body += ["\n".join(_entry(sentences[index], outcomes[name][index], colors)) for index in wrong[:count]]
    head = f'<meta charset="utf-8"><title>Worst sentences of {escape(system)}</title><style>{_STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n' + "\n".join(body) + "\n</body></html>\n"


def _entry(sentence: Sentence, outcome: Outcome, colors: dict[str, str]) -> Iterator[str]:
    substitutions, insertions, deletions = outcome.errors
    tally = f"{substitutions} + {insertions} + {deletions} of {sentence.words} words"
    yield f'<table><tr class="heard"><td>{escape(sentence.audio)}<br>{tally}</td><td>{escape(sentence.text)}</td></tr>'
    yield f"<tr><td>written</td><td>{_provenance(outcome, colors)}</td></tr>"
    for row, text in sentence.rows.items():
        yield f"<tr><td>{_mark(row, row, colors)} alone</td><td>{escape(text)}</td></tr>"
    yield "</table>"


def _provenance(outcome: Outcome, colors: dict[str, str]) -> str:
    """The text with the colour of the row behind each word."""
    if outcome.adapter is not None:
        return _mark(outcome.text, outcome.adapter, colors)
    return " ".join(_mark(word, row, colors) for word, row in outcome.words)


def _mark(text: str, row: str, colors: dict[str, str]) -> str:
    color = colors.get(row, _COLORS[0])
    return f'<span class="row" style="background:{color}" title="{escape(row)}">{escape(text)}</span>'


def _legend(colors: dict[str, str]) -> str:
    return " ".join(_mark(row, row, colors) for row in colors)


def _colors(report: WerReport, system: str) -> dict[str, str]:
    """A colour for each row that appears, the base first; with many rows they repeat."""
    rows = dict.fromkeys([BASE])
    for name, sentences in report.sets.items():
        for sentence, outcome in zip(sentences, report.system(system).outcomes[name], strict=True):
            rows |= dict.fromkeys([*sentence.rows, *(row for _, row in outcome.words)])
    return {row: _COLORS[place and 1 + (place - 1) % (len(_COLORS) - 1)] for place, row in enumerate(rows)}
