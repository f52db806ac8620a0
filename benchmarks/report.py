"""Tables from the JSON files of `das-bench rtf`: pure functions from results to Markdown.

The README's table is `render_rtf_table` of the committed results, so it cannot say anything that was not measured.

Overhead is the whole utterance's time over that of the same system without adapters, minus one. Both times are first
divided by transformers' own in the same repeats, so that a machine that was slower in one of the two runs does not
count as overhead. This is also how the DAS paper's Table VI defines it, for the real-time factor.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from das_asr.benchmarks.floor_report import floor_section
from das_asr.benchmarks.rates import Rates
from das_asr.benchmarks.systems import SYSTEMS, YARDSTICK
from das_asr.runtime.errors import OptionError

__all__ = [
    "MARKERS",
    "PAPER_TABLE_VI",
    "overhead",
    "render_report",
    "render_rtf_table",
    "replace_between_markers",
]

MARKERS = ("<!-- rtf:begin -->", "<!-- rtf:end -->")

PAPER_TABLE_VI: dict[int, dict[str, float]] = {
    3: {"parallel": 0.094, "sequential": 0.381},
    10: {"parallel": 0.184},
    25: {"parallel": 0.848},
}
"""Overhead by number of domains on a V100 GPU, arXiv 2501.12501; a value that is missing is not known here."""

SEQUENTIAL, PARALLEL = "sequential-lora", "das"

Record = Mapping[str, Any]
Result = Mapping[str, Any]


def render_rtf_table(results: Sequence[Result]) -> str:
    """The README's tables: RTF and ratio of every system, and the overheads beside the paper's."""
    parts = []
    for result in results:
        for rank in _ranks(result):
            records = _select(result, rank)
            parts += [_caption(result, rank), _overall(records), _overheads(records)]
        if result.get("free_running"):
            parts.append(_free_running(result["free_running"]))
    return "\n\n".join(part for part in parts if part)


def render_report(results: Sequence[Result]) -> str:
    """Everything: the README's tables, then the parts of an utterance, memory and agreement."""
    parts = ["# Real-time factor", render_rtf_table(results)]
    for result in results:
        for rank in _ranks(result):
            records = _select(result, rank)
            parts += [f"## Parts of an utterance, rank {rank}", _caption(result, rank), _phases(records)]
            parts += ["Tokens and memory:", _checks(records)]
            if "rates" in result:
                named = [(f"{_title(record['system'])}, K = {record['domains']}", record) for record in records]
                parts += floor_section(named, Rates(**result["rates"]), result["arguments"]["threads"])
    return "\n\n".join(parts) + "\n"


def replace_between_markers(text: str, table: str, markers: tuple[str, str] = MARKERS) -> str:
    """Puts a table between two markers of a Markdown text.

    Raises:
        OptionError: the text does not have each marker once, in order.
    """
    begin, end = markers
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise OptionError(f"The README must have the lines {begin} and {end}, once each and in this order.")
    head, _, rest = text.partition(begin)
    return f"{head}{begin}\n{table}\n{end}{rest.partition(end)[2]}"


def overhead(records: Iterable[Record], system: str, domains: int) -> float | None:
    """Relative extra time of a system with adapters over itself without; None where either was not measured.

    Systems that need adapters are compared with the sequential one without any: it is the same loop over the same base.
    """
    found = {(record["system"], record["domains"]): record["ratio_to_transformers"]["median"] for record in records}
    bare = SEQUENTIAL if SYSTEMS[system].needs_adapters else system
    adapted, base = found.get((system, domains)), found.get((bare, 0))
    return None if adapted is None or base is None else float(adapted / base - 1)


def _overall(records: Sequence[Record]) -> str:
    domains = _domains(records)
    rows = []
    for system in _systems(records):
        cells = {record["domains"]: record for record in records if record["system"] == system}
        rows.append([_title(system), *(_rtf_cell(cells.get(count)) for count in domains)])
    return _table(["RTF (x transformers) by domains", *map(str, domains)], rows)


def _rtf_cell(record: Record | None) -> str:
    if record is None:
        return "-"
    ratio = record["ratio_to_transformers"]["median"]
    return f"{record['rtf']:.3f}" if record["system"] == YARDSTICK else f"{record['rtf']:.3f} ({ratio:.2f})"


def _overheads(records: Sequence[Record]) -> str:
    head = ["domains", "parallel, DAS paper", "parallel, here", "sequential, DAS paper", "sequential, here"]
    head += ["K + 1 decodes, here", "PEFT, here", "sequential / parallel, DAS paper", "sequential / parallel, here"]
    rows = []
    for domains in (count for count in _domains(records) if count):
        paper = PAPER_TABLE_VI.get(domains, {})
        here = {"parallel": overhead(records, PARALLEL, domains), "sequential": overhead(records, SEQUENTIAL, domains)}
        cells = [_percent(values.get(kind)) for kind in ("parallel", "sequential") for values in (paper, here)]
        cells += [_percent(overhead(records, system, domains)) for system in ("sequential-decodes", "peft-mixed")]
        rows.append([str(domains), *cells, _quotient(paper), _quotient(here)])
    caption = (
        "Overhead: extra time of a whole utterance over the same system without adapters, both relative to "
        "transformers in their own repeats because the machine's speed drifts, beside Table VI of the DAS paper "
        "(arXiv 2501.12501, on a V100 GPU)."
    )
    return f"{caption}\n\n{_table(head, rows)}" if rows else ""


def _quotient(values: Mapping[str, float | None]) -> str:
    parallel, sequential = values.get("parallel"), values.get("sequential")
    # An overhead within the noise of zero makes no denominator.
    return f"{sequential / parallel:.2f}" if parallel and sequential and parallel > 0.005 else "-"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _phases(records: Sequence[Record]) -> str:
    head = ["domains", "system", "total ms (p95, min)", "features", "encoder", "prefill", "step (p95)"]
    head += ["selection", "host", "ms/token", "RTFx"]
    rows = []
    for record in records:
        total, step = record["total_ms"], record["step_ms"]
        row = [str(record["domains"]), _title(record["system"])]
        row += [f"{total['median']:.0f} ({total['p95']:.0f}, {total['min']:.0f})"]
        row += [_median(record[f"{part}_ms"]) for part in ("features", "encoder", "prefill")]
        row += [f"{step['median']:.1f} ({step['p95']:.1f})" if step else "-"]
        row += [_median(record[f"{part}_ms"]) for part in ("selection", "host", "token")]
        rows.append([*row, f"{record['rtfx']:.1f}"])
    return _table(head, rows)


def _median(summary: Mapping[str, float] | None) -> str:
    return "-" if summary is None else f"{summary['median']:.1f}"


def _checks(records: Sequence[Record]) -> str:
    rows = []
    for record in records:
        counted, memory = record["agreement"], record["memory_mib"]
        same = f"{counted['equal']}/{counted['of']} of {_title(counted['with'])}"
        chosen = ", ".join(f"{row}: {count}" for row, count in record["rows"].items()) or "-"
        peak = "-" if memory is None else f"{memory:.0f}"
        rows.append([str(record["domains"]), _title(record["system"]), same, chosen, peak])
    return _table(["domains", "system", "same tokens", "row: tokens it chose", "peak MiB"], rows)


def _free_running(free: Mapping[str, Any]) -> str:
    """RTF over real audio to its true length."""
    rows = []
    for name, values in free["systems"].items():
        cells = [f"{values['rtf']:.3f}", f"{values['rtfx']:.1f}", f"{values['ratio_to_transformers']['median']:.2f}"]
        rows.append([_title(name), *cells, str(values["tokens"])])
    caption = (
        f"Real audio, decoded to its true length: {free['files']} files, {free['audio_seconds']:.1f} s in all, "
        f"{len(free['adapters'])} adapters ({', '.join(free['adapters'])})."
    )
    return caption + "\n\n" + _table(["system", "RTF", "RTFx", "x transformers", "tokens"], rows)


def _caption(result: Result, rank: int) -> str:
    machine, arguments, versions = result["machine"], result["arguments"], result["versions"]
    named = ("torch", "transformers", "peft", "onnxruntime")
    packages = ", ".join(f"{name} {versions[name]}" for name in named if name in versions)
    threads = arguments["threads"]
    return (
        f"{arguments['model']}, LoRA rank {rank}, {result['window_seconds']:g} s of audio, {arguments['tokens']} "
        f"tokens, {arguments.get('precision', 'fp32')}, "
        f"{threads} thread{'s' * (threads > 1)} of {machine['processor']} ({machine['architecture']}, "
        f"{machine['cores']} cores); medians of {arguments['repeats']} interleaved repeats; {packages}; "
        f"{result['date'][:10]}."
    )


def _ranks(result: Result) -> list[int]:
    return sorted({int(record["rank"]) for record in result["runs"]})


def _select(result: Result, rank: int) -> list[Record]:
    return [record for record in result["runs"] if record["rank"] == rank]


def _domains(records: Iterable[Record]) -> list[int]:
    return sorted({int(record["domains"]) for record in records})


def _systems(records: Sequence[Record]) -> Iterator[str]:
    present = {record["system"] for record in records}
    return (name for name in SYSTEMS if name in present)


def _title(system: str) -> str:
    return SYSTEMS[system].title if system in SYSTEMS else system


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
