"""The DAS paper's tables II, IV and V, and BLoRA's measures, from a `WerReport`.

A cell is WER in %, with the relative change against the base in % and an arrow; * where the paired bootstrap's p-value
is below 0.05.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from das_asr.benchmarks.forgetting import adaptation_drop, backward_gain, forgetting
from das_asr.benchmarks.wer_report import SIGNIFICANT, change_cell, markdown_table, percent, rate_cell
from das_asr.benchmarks.wer_stats import WerStatistics
from das_asr.training.blora.sparsity import Sparsity

__all__ = ["forgetting_table", "table_ii", "table_iv", "table_v"]


def table_ii(
    statistics: WerStatistics,
    methods: Mapping[str, tuple[str, str]],
    sets: Sequence[str] | None = None,
    base: str | None = None,
) -> str:
    """What adapting the encoder too does: one row per method and set.

    Args:
        statistics: of the report.
        methods: label of a method -> systems with the decoder alone, and with encoder and decoder, adapted.
        sets: None is all.
        base: system of the changes; None is the report's baseline.
    """
    base = base or statistics.report.baseline
    rows = [
        [label, name, *(_cell(statistics, system, base, name) for system in systems)]
        for label, systems in methods.items()
        for name in _sets(statistics, sets)
    ]
    return markdown_table(["method", "set", "decoder", "encoder and decoder"], rows)


def table_iv(
    statistics: WerStatistics,
    rows: Mapping[str, str],
    sets: Sequence[str] | None = None,
    base: str | None = None,
) -> str:
    """Systems x domains.

    Args:
        statistics: of the report.
        rows: label -> system, in the order of the table, as in {"Original": "base", "FT music": "ft-music"}.
        sets: None is all.
        base: system of the changes; None is the report's baseline.
    """
    base, names = base or statistics.report.baseline, _sets(statistics, sets)
    cells = [[label, *(_cell(statistics, system, base, name) for name in names)] for label, system in rows.items()]
    return markdown_table(["system", *names], cells)


def table_v(statistics: WerStatistics, system: str, sets: Sequence[str], base: str | None = None) -> str:
    """What joint decoding does to general speech: one row per set, and their mean where there are several."""
    base = base or statistics.report.baseline
    columns: list[tuple[str, str | Sequence[str]]] = [(name, name) for name in sets]
    columns += [("mean", sets)] * (len(sets) > 1)
    rows = [
        [
            title,
            rate_cell(statistics.rate(base, names)),
            rate_cell(statistics.rate(system, names)),
            change_cell(statistics.compare(system, base, names)),
        ]
        for title, names in columns
    ]
    return markdown_table(["set", base, system, "change in %"], rows)


def forgetting_table(
    statistics: WerStatistics,
    adapters: Mapping[str, Sparsity],
    learned: Sequence[str],
    retained: Sequence[str],
) -> str:
    """What adaptation taught and cost: one row per adapter, compared with the first, and the base above them.

    Args:
        statistics: of a report whose baseline is the base.
        adapters: systems, each with the share of its elements that are next to nothing.
        learned: sets of the domains that were learned, in their order; the drop is on the last.
        retained: sets that the base could do, for F and the backward gain.
    """
    base, other = statistics.report.baseline, next(iter(adapters))
    head = ["system", *(f"WER {name}" for name in learned), f"drop on {learned[-1]}, %"]
    head += [f"F {name}, points" for name in retained]
    head += ["backward gain, %", "below 1e-3: A / B / both / s B A, %"]
    rates = [rate_cell(statistics.rate(base, name)) for name in learned]
    rows = [[base, *rates, "", *(rate_cell(statistics.rate(base, name)) + " WER" for name in retained), "", ""]]
    for system, small in adapters.items():
        lost = forgetting(statistics, system, base, retained)
        gain = None if system == other else backward_gain(statistics, system, other, base, retained)
        drop = adaptation_drop(statistics, system, other, learned[-1])
        rows.append(
            [
                system,
                *(rate_cell(statistics.rate(system, name)) for name in learned),
                "" if system == other else change_cell(drop),
                *(rate_cell(lost[name]) for name in retained),
                "" if gain is None else rate_cell(gain),
                " / ".join(percent(share) for share in (small.a, small.b, small.both, small.update)),
            ]
        )
    return markdown_table(head, rows)


def _cell(statistics: WerStatistics, system: str, base: str, name: str) -> str:
    """`24.3 (↓35.2 *)`; the base has no change."""
    rate = percent(statistics.rate(system, name).value)
    change = statistics.compare(system, base, name)
    if system == base or change.relative is None:
        return rate
    shown = f"{100 * abs(change.relative.value):.1f}"
    arrow = "=" if float(shown) == 0 else "↓" if change.relative.value < 0 else "↑"
    return f"{rate} ({arrow}{shown}{' *' if change.p_value < SIGNIFICANT else ''})"


def _sets(statistics: WerStatistics, sets: Sequence[str] | None) -> list[str]:
    return list(statistics.report.sets if sets is None else sets)
