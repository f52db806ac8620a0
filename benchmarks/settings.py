"""Word errors and time of one bundle under several settings of a call, side by side in one run.

    settings = context_settings((1.0,))
    report = compare_settings(settings, read_sets([("music", Path("music"))]), SettingsOptions(bundle=Path("bundle")))
    print(render_settings(WerStatistics(report)))

Every batch is decoded under all settings in turn, in a rotated order, before the next one; the first once more before
all, for nothing. The result is a `WerReport` whose systems are the settings; `about["cost"]` has what each batch cost
under each of them and the rows of every step, and `about["changed_tokens"]` how many of the tokens of a set are others
than under the first setting.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from das_asr.benchmarks.machine import describe_run
from das_asr.benchmarks.output import plain_options
from das_asr.benchmarks.testsets import EvaluationSet, check_references, fit_window
from das_asr.benchmarks.wer import WerOptions, list_sentences
from das_asr.benchmarks.wer_report import markdown_table, percent, render_wer
from das_asr.benchmarks.wer_result import Outcome, SystemResult, WerReport
from das_asr.benchmarks.wer_stats import WerStatistics
from das_asr.benchmarks.wordcounts import count_errors
from das_asr.benchmarks.wording import Normalize, Words
from das_asr.runtime.audio import load_audio
from das_asr.runtime.errors import OptionError
from das_asr.runtime.options import DecodingOptions
from das_asr.runtime.results import Transcription
from das_asr.runtime.transcriber import Transcriber

__all__ = [
    "Setting",
    "SettingsOptions",
    "compare_settings",
    "context_settings",
    "pruning_settings",
    "render_settings",
]

Log = Callable[[str], None]


@dataclass(frozen=True)
class Setting:
    """Fields of `DecodingOptions` under a name."""

    name: str
    choices: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class SettingsOptions(WerOptions):
    """Options of `compare_settings`; those of `WerOptions`, and what all settings have in common.

    Attributes:
        precision: of the bundle; None is its first.
        common: fields of `DecodingOptions`.
    """

    precision: str | None = None
    common: Mapping[str, Any] = field(default_factory=dict)


def context_settings(margins: Sequence[float]) -> list[Setting]:
    """The whole window, and the audio with each margin in seconds."""
    fitted = [Setting(f"fit {margin:g} s", {"audio_context": "fit", "audio_margin": margin}) for margin in margins]
    return [Setting("window", {}), *fitted]


def pruning_settings(keep: Sequence[int], after: Sequence[int], margins: Sequence[float]) -> list[Setting]:
    """All rows, the best `keep` adapters, and rows within a margin, each after so many tokens."""
    settings = [Setting("all rows", {})]
    for tokens in after:
        settings += [
            Setting(f"auto:{count} after {tokens}", {"adapters": f"auto:{count}", "prune_after": tokens})
            for count in keep
        ]
        settings += [
            Setting(f"margin {margin:g} after {tokens}", {"prune_margin": margin, "prune_after": tokens})
            for margin in margins
        ]
    return settings


def compare_settings(
    settings: Sequence[Setting], sets: Sequence[EvaluationSet], options: SettingsOptions, log: Log = lambda _: None
) -> WerReport:
    """Decodes every set under every setting; the first is the baseline. All is checked before decoding starts.

    Raises:
        DataError: a reference has no words, or audio cannot be used.
        OptionError: a setting contradicts itself or the others' common choices.
        BundleError: the bundle cannot be used.
    """
    if len(settings) < 2:
        raise OptionError("There is one setting only, and nothing to compare it with. Give more.")
    run = describe_run()
    shared = options.decoding.choices(**options.common)
    decoding = {each.name: DecodingOptions(**_fields(shared), **each.choices) for each in settings}
    normalize = options.wording.normalizer()
    check_references(sets, normalize)
    loaded = Transcriber.load(
        options.bundle, options.decoding.device, options.decoding.threads, precision=options.precision
    )
    with loaded as transcriber:
        rows = len(transcriber.adapters) + 1
        sets = fit_window(sets, transcriber.manifest.audio.window_seconds, skip=options.skip_unfit)
        references = {each.name: [normalize(one.text) for one in each.utterances] for each in sets}
        _warm_up(transcriber, sets[0], decoding, options.decoding.batch_size)
        outcomes: dict[str, dict[str, tuple[Outcome, ...]]] = {each.name: {} for each in settings}
        costs: dict[str, list[dict[str, Any]]] = {each.name: [] for each in settings}
        changed: dict[str, dict[str, float]] = {each.name: {} for each in settings}
        for each in sets:
            log(f"{each.name}: {len(each.utterances)} utterances, {len(settings)} settings")
            decoded = _decode(transcriber, each, decoding, options.decoding.batch_size, costs)
            for name, results in decoded.items():
                outcomes[name][each.name] = _outcomes(results, references[each.name], normalize)
                changed[name][each.name] = _changed(results, decoded[settings[0].name])
    return WerReport(
        sets={each.name: list_sentences(each, references[each.name], None) for each in sets},
        systems=tuple(SystemResult(each.name, repr(each.choices), outcomes[each.name]) for each in settings),
        baseline=settings[0].name,
        wording=plain_options(options.wording),
        about={
            **run,
            "arguments": plain_options(options),
            "rows": rows,
            "cost": costs,
            "changed_tokens": changed,
        },
    )


def _fields(choices: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in choices.items() if name != "sample_rate"}


def _warm_up(
    transcriber: Transcriber, each: EvaluationSet, decoding: Mapping[str, DecodingOptions], batch_size: int
) -> None:
    """Decodes the first batch under every setting: what is read or made once would count for whoever comes first."""
    costs: dict[str, list[dict[str, Any]]] = {name: [] for name in decoding}
    first = [each.utterances[index] for index in next(_batches(each, batch_size))]
    _decode(transcriber, dataclasses.replace(each, utterances=tuple(first)), decoding, batch_size, costs)


def _decode(
    transcriber: Transcriber,
    each: EvaluationSet,
    decoding: Mapping[str, DecodingOptions],
    batch_size: int,
    costs: Mapping[str, list[dict[str, Any]]],
) -> dict[str, list[Transcription]]:
    """Results by setting, in the order of the sentences; adds what each batch cost to `costs`."""
    rate, names = transcriber.manifest.audio.sample_rate, list(decoding)
    found: dict[str, dict[int, Transcription]] = {name: {} for name in names}
    for turn, chunk in enumerate(_batches(each, batch_size)):
        samples = [load_audio(each.utterances[index].audio, target_rate=rate) for index in chunk]
        start = turn % len(names)
        for name in names[start:] + names[:start]:
            results = transcriber.transcribe_batch(samples, decoding[name], sample_rate=rate)
            found[name].update(zip(chunk, results, strict=True))
            costs[name].append(_cost(each.name, results))
    return {name: [results[index] for index in range(len(each.utterances))] for name, results in found.items()}


def _batches(each: EvaluationSet, size: int) -> Iterator[list[int]]:
    """Indices of the sentences, those of similar length together."""
    order = sorted(range(len(each.utterances)), key=lambda index: each.utterances[index].duration or 0.0)
    return (order[start : start + size] for start in range(0, len(order), size))


def _cost(name: str, results: Sequence[Transcription]) -> dict[str, Any]:
    """What one batch cost, in seconds."""
    timings = results[0].timings
    stages = {stage: getattr(timings, stage) for stage in ("encoder", "prefill", "steps", "total")}
    return {"set": name, "utterances": len(results), "audio": timings.audio_duration, **stages} | {
        "step_rows": timings.step_rows
    }


def _outcomes(
    results: Sequence[Transcription], references: Sequence[Words], normalize: Normalize
) -> tuple[Outcome, ...]:
    errors = count_errors(references, [normalize(result.text) for result in results])
    return tuple(
        Outcome(result.text, (int(row[0]), int(row[1]), int(row[2])), result.adapter)
        for result, row in zip(results, errors, strict=True)
    )


def _changed(results: Sequence[Transcription], baseline: Sequence[Transcription]) -> float:
    """Edits between the tokens of two decodings, as a share of the second's."""
    pairs = [(one.tokens, other.tokens) for one, other in zip(results, baseline, strict=True) if other.tokens]
    written, before = ([tuple(map(str, tokens)) for tokens in side] for side in zip(*pairs, strict=True))
    return float(count_errors(before, written).sum() / sum(map(len, before)))


# --- Shown ---


def render_settings(statistics: WerStatistics) -> str:
    """The tables of `das-bench wer`, and what each setting cost."""
    report = statistics.report
    about = "Cost, within this run: time as a share of the first setting's, and the mean number of rows in a step."
    head = ["setting", "encoder", "steps", "one step", "all", "rows in a step", "row-steps", "tokens changed, %"]
    first = _sums(report.about["cost"][report.baseline])
    rows = []
    for system in report.systems:
        sums, changed = _sums(report.about["cost"][system.name]), report.about["changed_tokens"][system.name]
        shares = [_share(sums[stage], first[stage]) for stage in ("encoder", "steps", "step", "total")]
        mean = f"{sums['row_steps'] / max(sums['count'], 1):.2f}"
        tokens = ", ".join(percent(changed[name]) for name in report.sets)
        rows.append([system.name, *shares, mean, _share(sums["row_steps"], first["row_steps"]), tokens])
    return "\n\n".join([render_wer(statistics).rstrip("\n"), about, markdown_table(head, rows)]) + "\n"


def _sums(costs: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    sums = {stage: float(sum(cost[stage] for cost in costs)) for stage in ("encoder", "steps", "total")}
    rows = [count for cost in costs for count in cost["step_rows"]]
    return {**sums, "row_steps": sum(rows), "count": len(rows), "step": sums["steps"] / max(len(rows), 1)}


def _share(value: float, first: float) -> str:
    return f"{value / first:.3f}" if first else "-"
