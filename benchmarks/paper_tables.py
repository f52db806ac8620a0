"""The DAS paper's tables II, IV and V from reports of `das-bench wer`, and what joint decoding is worth beside them.

The systems are known by their names, as in `benchmarks/tables.yaml`: an adapter by its domain, `ft-DOMAIN` and
`ft-encoder-DOMAIN` for a fully fine-tuned base, `lora-multi` and `ft-multi`, and the joint ones by their rule. A table
is written with the systems that the report has.
"""

from __future__ import annotations

from collections.abc import Sequence

from das_asr.benchmarks.tables import table_ii, table_iv, table_v
from das_asr.benchmarks.wer_report import change_cell, facts, markdown_table, percent, rate_cell, set_sizes
from das_asr.benchmarks.wer_result import WerReport
from das_asr.benchmarks.wer_stats import WerStatistics
from das_asr.benchmarks.wer_systems import ORACLE, OWN

__all__ = ["joint_table", "render_paper_tables"]

_NOT_JOINT = ("base", OWN, ORACLE)


def render_paper_tables(title: str, statistics: WerStatistics) -> str:
    """All tables of one report, as a section in Markdown."""
    report = statistics.report
    domains = _domains(report)
    general = [name for name in report.sets if name not in domains]
    joint = _joint(report, domains)
    parts = [f"## {title}", _caption(report)]
    parts += ["Systems on every set (the paper's Table IV):", table_iv(statistics, _rows(report, domains, joint))]
    if joint:
        parts += [
            "Joint decoding against each domain's own adapter (against the base on general speech), change in %, and "
            "the share of the way from there to the oracle's choice:",
            joint_table(statistics, domains, general, joint),
        ]
    methods = {
        f"full, {name}": (f"ft-{name}", f"ft-encoder-{name}")
        for name in domains
        if {f"ft-{name}", f"ft-encoder-{name}"} <= _names(report)
    }
    if methods:
        parts += ["Decoder alone, or encoder and decoder (Table II):", table_ii(statistics, methods)]
    if general and joint:
        parts += [
            "General speech (Table V):",
            *(f"`{system}`\n\n{table_v(statistics, system, general)}" for system in joint),
        ]
    return "\n\n".join(parts) + "\n"


def joint_table(statistics: WerStatistics, domains: Sequence[str], general: Sequence[str], joint: Sequence[str]) -> str:
    """Joint systems x sets: WER, and the change against the best that one row alone does there.

    Args:
        statistics: of a report with the systems `own` and `oracle`.
        domains: sets that have an adapter of their own.
        general: the other sets.
        joint: names of the joint systems.
    """
    sets: list[str | list[str]] = [*domains, list(domains), *general]
    head = ["system", *domains, "mean of the domains", *general, "way to the oracle, %"]
    rows = [
        [OWN, *(rate_cell(statistics.rate(OWN, names)) for names in sets), "0"],
        [ORACLE, *(rate_cell(statistics.rate(ORACLE, names)) for names in sets), "100"],
    ]
    for system in joint:
        cells = [_joint_cell(statistics, system, names) for names in sets]
        rows.append([system, *cells, _way(statistics, system, domains)])
    return markdown_table(head, rows)


def _joint_cell(statistics: WerStatistics, system: str, names: str | list[str]) -> str:
    change = change_cell(statistics.compare(system, OWN, names))
    return f"{percent(statistics.rate(system, names).value)}: {change}"


def _way(statistics: WerStatistics, system: str, domains: Sequence[str]) -> str:
    """How much of what lies between the own adapters and the oracle is won, over the domains."""
    own, best, found = (statistics.rate(name, list(domains)).value for name in (OWN, ORACLE, system))
    return "-" if own <= best else f"{100 * (own - found) / (own - best):.0f}"


def _names(report: WerReport) -> set[str]:
    return {system.name for system in report.systems}


def _domains(report: WerReport) -> list[str]:
    return [name for name in report.sets if name in _names(report)]


def _joint(report: WerReport, domains: Sequence[str]) -> list[str]:
    single = {*_NOT_JOINT, *domains}
    names = [system.name for system in report.systems]
    return [name for name in names if name not in single and not name.startswith("ft-") and not name.endswith("-multi")]


def _rows(report: WerReport, domains: Sequence[str], joint: Sequence[str]) -> dict[str, str]:
    rows = {"Original": report.baseline}
    rows |= {f"FT {name}": f"ft-{name}" for name in domains}
    rows |= {f"LoRA-ft {name}": name for name in domains}
    rows |= {"FT-Multi": "ft-multi", "LoRA-ft-Multi": "lora-multi"}
    rows |= {f"DAS, {name}": name for name in joint}
    rows |= {"the domain's own adapter": OWN, "oracle choice": ORACLE}
    return {label: system for label, system in rows.items() if system in _names(report)}


def _caption(report: WerReport) -> str:
    return f"WER in %; sets (utterances / words): {set_sizes(report)}; {facts(report)}."
