"""Tables from the results of `das-bench peers`: pure functions from results to Markdown.

Several results of the same comparison, one per number of threads, make one report.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from das_asr.benchmarks.floor_report import floor_section
from das_asr.benchmarks.models import BASE_RANDOM
from das_asr.benchmarks.peers.engines import ENGINES
from das_asr.benchmarks.peers.sides import bare_name
from das_asr.benchmarks.rates import Rates
from das_asr.benchmarks.report import PAPER_TABLE_VI
from das_asr.benchmarks.wer_report import markdown_table
from das_asr.runtime.errors import OptionError

__all__ = ["PEERS_MARKERS", "TARGETS", "ratio_to_base", "render_peers", "render_peers_table", "standing", "targets_of"]

PEERS_MARKERS = ("<!-- peers:begin -->", "<!-- peers:end -->")

TARGETS: dict[tuple[str, int], dict[int, float]] = {
    ("fp32", 1): {0: 0.70, 3: 0.80, 10: 0.95, 25: 1.25},
    ("fp32", 2): {0: 0.58, 3: 0.68, 10: 0.82, 25: 1.05},
    ("int8", 1): {0: 0.58, 3: 0.65, 10: 0.76, 25: 1.00},
    ("int8", 2): {0: 0.50, 3: 0.56, 10: 0.68, 25: 0.92},
}
"""Aims of this project for Whisper-base shapes and 30 tokens: precision and threads -> K -> time over CTranslate2's."""

SHARED, OWN = "das", "das-hypothesis"

MAY_DIFFER = ("threads", "spinning", "speech", "bundle")
"""Arguments of results that make one report; speech has a table for each."""

Record = Mapping[str, Any]
Result = Mapping[str, Any]


def render_peers_table(results: Sequence[Result]) -> str:
    """For the README: the peers, and DAS with shared history, where own histories take the same time.

    Raises:
        OptionError: the results are not of one comparison.
    """
    forced = _by_threads(results)
    parts = [_caption(forced)] if forced else []
    for result in forced:
        parts += [_threads_line(result), _peers({**result, "runs": _without_own(result)})]
    parts += [part for result in results if result["speech"] for part in _speech(result)]
    return "\n\n".join(parts)


def render_peers(results: Sequence[Result]) -> str:
    """Everything: where we stand, all times, parts of an utterance, the floor, memory, and who could not take part."""
    forced = _by_threads(results)
    parts = ["# Peers", *([_caption(forced), *standing(forced)] if forced else [])]
    parts += [part for result in results if result["speech"] for part in _speech(result)]
    for result in forced:
        parts += [f"## {_threads_line(result)}", _peers(result), "Parts of an utterance:", _parts(result)]
        named = [(_title(record), record) for record in result["runs"]]
        parts += floor_section(named, Rates(**result["rates"]), result["arguments"]["threads"])
        parts += [*_memory(result)]
    parts += [_refused(results)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _without_own(result: Result) -> list[Record]:
    return [record for record in result["runs"] if record["engine"] != OWN]


def ratio_to_base(result: Result, engine: str, precision: str, domains: int) -> float | None:
    """Our time from features to tokens over that of CTranslate2 on the base alone, at the same precision."""
    # Without adapters both histories are one.
    return _ratio(result, SHARED if domains == 0 else engine, precision, domains, f"ctranslate2 {precision}")


def _ratio(result: Result, engine: str, precision: str, domains: int, divisor: str) -> float | None:
    """The median of the ratios of one side to another within a repeat; None where there are none."""
    for record in result["runs"]:
        if (record["engine"], record["precision"], record["domains"]) == (engine, precision, domains):
            ratio = record["ratios"].get(divisor)
            return None if ratio is None else float(ratio["median"])
    return None


def targets_of(result: Result, precision: str) -> dict[int, float]:
    """What is aimed at, by K; nothing for other models and numbers of tokens."""
    arguments = result["arguments"]
    if (arguments["model"], arguments["tokens"]) != (BASE_RANDOM, 30):
        return {}
    return TARGETS.get((precision, arguments["threads"]), {})


# --- Where we stand ---


def standing(results: Sequence[Result]) -> Iterator[str]:
    """Our times over CTranslate2's, and what adapters add to ours: paragraphs and tables."""
    if not any("das" in record["engine"] for result in results for record in result["runs"]):
        return
    columns = [(precision, result) for precision in ("fp32", "int8") for result in results]
    domains = sorted(
        {record["domains"] for result in results for record in result["runs"] if record["engine"] == "das"}
    )
    head = ["K", *(f"{precision} / {precision}, {_threads(result)}" for precision, result in columns)]
    for engine, title in ((SHARED, "shared history"), (OWN, "own histories")):
        rows = []
        for count in domains:
            cells = [_aimed(result, engine, precision, count) for precision, result in columns]
            rows.append([str(count), *cells])
        aims = " (in brackets what is aimed at)" if engine == SHARED else ""
        yield f"DAS, {title}, over CTranslate2 on the base alone{aims}:"
        yield markdown_table(head, rows)
    rows = []
    for count in (count for count in domains if count):
        cells = [
            _overhead(result, engine, precision, count) for engine in (SHARED, OWN) for precision, result in columns
        ]
        paper = PAPER_TABLE_VI.get(count, {}).get("parallel")
        rows.append([str(count), "-" if paper is None else f"{100 * paper:.1f}", *cells])
    yield (
        f"What K adapters add to our own time without any, in % ({_how(results)}), beside the DAS paper's (V100 GPU, "
        "arXiv 2501.12501):"
    )
    yield markdown_table(["K", "paper", *(f"{kind}, {name}" for kind in ("shared", "own") for name in head[1:])], rows)


def _aimed(result: Result, engine: str, precision: str, domains: int) -> str:
    ratio = ratio_to_base(result, engine, precision, domains)
    target = targets_of(result, precision).get(domains) if engine == SHARED else None
    if ratio is None:
        return "-"
    return f"{ratio:.2f}" + (f" ({target:.2f})" if target is not None else "")


def _overhead(result: Result, engine: str, precision: str, domains: int) -> str:
    ratio = _ratio(result, engine, precision, domains, bare_name(precision))
    if ratio is None:  # as in results of before this was recorded
        adapted, bare = (ratio_to_base(result, engine, precision, count) for count in (domains, 0))
        ratio = None if adapted is None or bare is None else adapted / bare
    return "-" if ratio is None else f"{100 * (ratio - 1):.1f}"


def _how(results: Sequence[Result]) -> str:
    """What the overheads are; those of older results are not taken within the repeats."""
    ours = [record for result in results for record in result["runs"] if ENGINES[record["engine"]].domains]
    within = all(bare_name(record["precision"]) in record["ratios"] for record in ours)
    return "medians of the ratios within a repeat" if within else "quotients of the medians above"


# --- Peers ---


def _peers(result: Result) -> str:
    yardsticks = ("transformers fp32", "ctranslate2 fp32", "ctranslate2 int8")
    rows = []
    for record in result["runs"]:
        ratios = [record["ratios"].get(name) for name in yardsticks]
        times = [f"{record['from_features_ms']['median']:.0f}", f"{record['encoder_ms']['median']:.0f}"]
        times += [f"{record['token_ms']['median']:.1f}"]
        rows.append(
            [
                _title(record),
                *times,
                *("-" if ratio is None else f"{ratio['median']:.2f}" for ratio in ratios),
                f"{record['memory_mib']:.0f}",
            ]
        )
    head = ["system", "features to tokens, ms", "encoder, ms", "ms/token", "x transformers", "x CTranslate2"]
    return markdown_table([*head, "x CTranslate2 int8", "peak MiB"], rows)


def _parts(result: Result) -> str:
    rows = []
    for record in result["runs"]:
        whole, agreed = record["from_features_ms"], record["agreement"]
        row = [_title(record), f"{whole['median']:.1f} ({whole['p95']:.1f}, {whole['min']:.1f})"]
        row += [_median(record[f"{part}_ms"]) for part in ("features", "encoder", "prefill", "step", "host", "token")]
        same = f"{agreed['equal']}/{agreed['of']} of {agreed['with']}"
        versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
        rows.append([*row, same, str(agreed["written"]), versions])
    head = ["system", "features to tokens (p95, min)", "features", "encoder", "prefill", "step", "host", "ms/token"]
    return markdown_table([*head, "same tokens", "written", "versions"], rows)


def _median(summary: Mapping[str, float] | None) -> str:
    return "-" if summary is None or not summary["median"] else f"{summary['median']:.1f}"


def _memory(result: Result) -> Iterator[str]:
    """What the largest number of adapters adds to the peak of memory."""
    ours = [record for record in result["runs"] if record["engine"] == SHARED]
    lines = []
    for precision in ("fp32", "int8"):
        peaks = {record["domains"]: record["memory_mib"] for record in ours if record["precision"] == precision}
        if 0 in peaks and (most := max(peaks)):
            lines.append(f"{precision}: {peaks[most]:.0f} MiB at K = {most}, {peaks[most] / peaks[0]:.2f} times K = 0")
    if lines:
        yield "Peak of memory, " + "; ".join(lines) + "."


def _refused(results: Sequence[Result]) -> str:
    lists = [result["refused"] for result in results]
    lists += [result["speech"]["refused"] for result in results if result["speech"]]
    rows = sorted({(item["engine"], item["precision"], item["reason"]) for items in lists for item in items})
    if not rows:
        return ""
    return "Not compared:\n\n" + markdown_table(["peer", "precision", "reason"], rows)


# --- Speech ---


def _speech(result: Result) -> Iterator[str]:
    speech = result["speech"]
    yield (
        f"{result['arguments']['model']}, {speech['clips']} clips of speech to their true length "
        f"({speech['audio_seconds']:.0f} s, {speech['words']} words), {_threads(result)}; features included:"
    )
    rows = []
    for name, heard in speech["runs"].items():
        ratio = heard["ratios"].get("ctranslate2 fp32")
        cells = [f"{100 * heard['wer']:.1f}", f"{heard['rtf']:.4f}", f"{heard['rtfx']:.0f}", str(heard["tokens"])]
        rows.append([name, *cells, "-" if ratio is None else f"{ratio['median']:.2f}"])
    yield markdown_table(["system", "WER, %", "RTF", "RTFx", "tokens", "x CTranslate2"], rows)


# --- Words ---


def _title(record: Record) -> str:
    info = ENGINES[record["engine"]]
    domains = f", K = {record['domains']}" if info.domains else ""
    title = info.title if record["domains"] or not info.domains else "DAS"
    return f"{title}, {record['precision']}{domains}"


def _caption(results: Sequence[Result]) -> str:
    first = results[0]
    machine, arguments = first["machine"], first["arguments"]
    versions: dict[str, dict[str, None]] = {}  # the sides may have several of one package
    for record in (record for result in results for record in result["runs"]):
        for name, version in record["versions"].items():
            versions.setdefault(name, {})[version] = None
    packages = ", ".join(f"{name} {' and '.join(found)}" for name, found in versions.items())
    return (
        f"{arguments['model']}, LoRA rank {arguments['rank']}, {first['window_seconds']:g} s of audio, "
        f"{arguments['tokens']} tokens, on {machine['processor']} ({machine['architecture']}, {machine['cores']} "
        f"cores); medians of {arguments['repeats']} interleaved repeats from features to tokens; {packages}; "
        f"{first['date'][:10]}."
    )


def _threads_line(result: Result) -> str:
    idle = "spin" if result["arguments"]["spinning"] else "sleep"
    return f"{_threads(result).capitalize()}; idle threads of DAS {idle}"


def _threads(result: Result) -> str:
    threads = result["arguments"]["threads"]
    return f"{threads} thread{'s' * (threads > 1)}"


def _by_threads(results: Sequence[Result]) -> list[Result]:
    """Those with a forced comparison.

    Raises:
        OptionError: they differ in more than threads, so one caption would not be true of all.
    """
    forced = sorted((result for result in results if result["runs"]), key=lambda result: result["arguments"]["threads"])
    settings = [_settings(result) for result in forced]
    for one, other in pairwise(settings):
        names = one.keys() | other.keys()
        if wrong := sorted(name for name in names if one.get(name) != other.get(name)):
            raise OptionError(
                f"One result has {wrong[0]} {one.get(wrong[0])!r}, another {other.get(wrong[0])!r}. Make a report of "
                "each: results of one report differ in threads and spinning only."
            )
    return forced


def _settings(result: Result) -> dict[str, Any]:
    """What the caption and all tables have in common."""
    machine = {name: result["machine"][name] for name in ("processor", "architecture", "cores")}
    return machine | {name: value for name, value in result["arguments"].items() if name not in MAY_DIFFER}
