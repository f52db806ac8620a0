"""How close a step and the encoder come to what the machine can do, in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from das_asr.benchmarks.floor import floor_ms
from das_asr.benchmarks.rates import Rates
from das_asr.benchmarks.wer_report import markdown_table

__all__ = ["floor_section"]


def floor_section(records: Iterable[tuple[str, Mapping[str, Any]]], rates: Rates, threads: int) -> list[str]:
    """A caption and a table; nothing where no record has a demand.

    Args:
        records: titles, and figures of one system each; those without a demand are passed over.
        rates: of the machine.
        threads: that the rates are of.
    """
    rows = [
        [title, part, *_cells(record["demand"][part], record[f"{part}_ms"], rates)]
        for title, record in records
        if "demand" in record
        for part in ("step", "encoder")
    ]
    if not rows:
        return []
    head = ["system", "part", "ms", "MB read", "ms at that rate", "%", "G operations", "ms at that rate", "%"]
    return [_caption(rates, threads), markdown_table(head, rows)]


def _cells(demand: Mapping[str, int], measured: Mapping[str, float], rates: Rates) -> list[str]:
    floor, operations = floor_ms(demand, rates), (demand["fp32"] + demand["int8"]) / 1e9
    cells = [f"{measured['median']:.1f}"]
    for amount, least in ((f"{demand['bytes'] / 1e6:.0f}", floor["read"]), (f"{operations:.2f}", floor["compute"])):
        cells += [amount, f"{least:.1f}", f"{100 * least / measured['median']:.0f}"]
    return cells


def _caption(rates: Rates, threads: int) -> str:
    return (
        f"The floor: with {threads} thread{'s' * (threads > 1)} this machine reads {rates.read / 1e9:.1f} GB/s and "
        f"computes {rates.fp32 / 1e9:.0f} GFLOP/s in float32 and {rates.int8 / 1e9:.0f} Gop/s in 8 bits. A part that "
        "reads and computes at once takes at least the longer of the two times; the shares say how close it comes. "
        "What stays in the caches is read faster than that."
    )
