"""`das-bench peers`: every side on the same audio, one repeat after the other, the order rotated from repeat to repeat.

Two parts, each with processes of its own:

    forced   one window of audio, the same number of tokens from everybody; ratios are medians over the repeats of the
             time from features to tokens, for features are extracted by whatever the peer brings
    free     labelled speech transcribed to its true length: word error rate beside real-time factor
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from das_asr.benchmarks.audio import window_audio
from das_asr.benchmarks.bundles import check_base
from das_asr.benchmarks.figures import figures, ratios, summary
from das_asr.benchmarks.floor import demands
from das_asr.benchmarks.machine import quiet_libraries
from das_asr.benchmarks.models import SAMPLE_RATE, check_length, prompt_ids, resolve_model
from das_asr.benchmarks.peers.engines import ENGINES, UnavailableError
from das_asr.benchmarks.peers.process import SideProcess
from das_asr.benchmarks.peers.sides import Log, PeersOptions, Prepared, Refused, Side, bare_name, plan, prepare
from das_asr.benchmarks.peers.speech import Heard, measure_speech, read_speech
from das_asr.benchmarks.rates import measure_rates
from das_asr.benchmarks.rtf import interleave
from das_asr.benchmarks.timing import Utterance
from das_asr.runtime.manifest import read_manifest
from das_asr.runtime.utterances import Utterance as Labelled

__all__ = ["YARDSTICKS", "open_sides", "prepare_peers", "run_peers"]

YARDSTICKS = ("ctranslate2 fp32", "ctranslate2 int8", "transformers fp32")
"""Sides that all others are divided by, where they run."""


def run_peers(options: PeersOptions, log: Log) -> dict[str, Any]:
    """Converts, measures, and returns what the results file holds beside machine and options."""
    speech = _checked_speech(options)
    prepared = prepare_peers(options, log)
    checkpoint = prepared.checkpoint
    rates = measure_rates(options.threads)
    forced, refused = _forced(prepared, options, log) if options.domains else ([], list(prepared.refused))
    free = _free(prepared, speech, options, log) if speech else None
    rates = rates.best(measure_rates(options.threads))
    return {
        "window_seconds": len(window_audio(checkpoint)) / SAMPLE_RATE,
        "rates": asdict(rates),
        "runs": forced,
        "refused": [asdict(item) for item in refused],
        "speech": free,
    }


def _checked_speech(options: PeersOptions) -> tuple[Labelled, ...]:
    """The labelled speech, if any; it and the bundle are checked before hours are spent on the rest.

    Raises:
        DataError: a clip cannot be used.
        OptionError: the bundle is of another base.
    """
    if options.speech is None:
        return ()
    checkpoint = resolve_model(options.model)
    if options.bundle is not None:
        check_base(options.bundle, checkpoint, "--model")
    return read_speech(options.speech, len(window_audio(checkpoint)) / SAMPLE_RATE)


def prepare_peers(options: PeersOptions, log: Log) -> Prepared:
    """Exports and converts what is not there yet."""
    checkpoint = resolve_model(options.model)
    check_length(checkpoint, options.tokens)
    with quiet_libraries():
        return prepare(checkpoint, options, log)


@contextlib.contextmanager
def open_sides(
    sides: Sequence[Side], prepared: Prepared, options: PeersOptions, tokens: int | None, log: Log
) -> Iterator[tuple[dict[Side, SideProcess], list[Refused]]]:
    """Loads all sides that can be loaded, each with a first window of audio; each stays stopped until it is asked.

    Raises:
        UnavailableError: the runtime itself cannot run.
    """
    refused: list[Refused] = []
    audio = window_audio(prepared.checkpoint)
    with contextlib.ExitStack() as stack:
        opened: dict[Side, SideProcess] = {}
        for side in sides:
            ours = ENGINES[side.engine].domains
            folder = Path() if ours else prepared.folders.get((side.engine, side.precision))
            if folder is None:
                continue
            log(f"loading {side.name}")
            try:
                process = SideProcess(side.engine, prepared.work(side, options, tokens), folder, options.tools)
                stack.callback(process.close)
                process.transcribe(audio)  # some peers find only now that the model is not for them
            except UnavailableError as error:
                if ours:
                    raise
                refused.append(Refused(side.engine, side.precision, str(error)))
                log(f"{side.name}: {error}")
            else:
                opened[side] = process
        yield opened, refused


def _forced(prepared: Prepared, options: PeersOptions, log: Log) -> tuple[list[dict[str, Any]], list[Refused]]:
    audio = window_audio(prepared.checkpoint)
    sides = list(plan(options, options.domains))
    with open_sides(sides, prepared, options, options.tokens, log) as (opened, refused):
        named = {side.name: process for side, process in opened.items()}
        taken = interleave(named, audio, options.repeats, options.warmup)
        past = len(prompt_ids(prepared.checkpoint)) + options.tokens // 2
        records = []
        for side, process in opened.items():
            record = _record(side, taken, len(audio) / SAMPLE_RATE)
            if ENGINES[side.engine].domains:
                record["demand"] = demands(prepared.bundles[side.domains], side.precision, past)
            record |= {"versions": process.versions, "memory_mib": process.finish()}
            records.append(record)
            log(f"{side.name:28} {record['from_features_ms']['median']:8.1f} ms from features to tokens")
    return records, [*prepared.refused, *refused]


def _record(side: Side, taken: Mapping[str, Sequence[Utterance]], seconds: float) -> dict[str, Any]:
    mine, bare = _from_features(taken[side.name]), bare_name(side.precision)
    divisors = (*YARDSTICKS, bare) if ENGINES[side.engine].domains else YARDSTICKS
    record = {**asdict(side), "side": side.name, **figures(taken[side.name], seconds)}
    record["from_features_ms"] = summary(mine)
    record["ratios"] = {name: ratios(mine, _from_features(taken[name])) for name in divisors if name in taken}
    record["agreement"] = _agreement(side, taken)
    return record


def _from_features(utterances: Sequence[Utterance]) -> list[float]:
    return [utterance.total - utterance.features for utterance in utterances]


def _agreement(side: Side, taken: Mapping[str, Sequence[Utterance]]) -> dict[str, Any]:
    """Tokens that equal those of the first float32 side which must write the same."""
    exact = [name for name in taken if name.split()[1] == "fp32"]
    alike = [name for name in exact if _history(name) == _history(side.name)]
    reference = alike[0] if alike else side.name
    expected, written = taken[reference][0].tokens, taken[side.name][0].tokens
    equal = sum(a == b for a, b in zip(expected, written, strict=False))
    return {"with": reference, "equal": equal, "of": len(expected), "written": len(written)}


def _history(name: str) -> str:
    """What decides the tokens: the base alone, or K adapters with shared or own histories."""
    engine, _, *domains = name.split()
    return "base" if not domains or domains == ["K=0"] else f"{engine} {domains[0]}"


def _free(prepared: Prepared, speech: Sequence[Labelled], options: PeersOptions, log: Log) -> dict[str, Any]:
    bundles = dict(prepared.bundles)
    counts = {0}
    if options.bundle is not None:
        domains = read_manifest(options.bundle).rows - 1
        counts.add(domains)
        bundles[domains] = options.bundle
    prepared = Prepared(prepared.checkpoint, bundles, prepared.folders, prepared.refused)
    planned = list(plan(options, sorted(counts)))
    lacking = {side: reason for side in planned if (reason := _lack(side, bundles))}
    sides = [side for side in planned if side not in lacking]
    with open_sides(sides, prepared, options, None, log) as (opened, refused):
        named = {side.name: process for side, process in opened.items()}
        heard: dict[str, Heard]
        found, heard = measure_speech(named, prepared.checkpoint, speech, options.repeats, options.warmup)
        for name, item in heard.items():
            item["ratios"] = {
                yardstick: ratios(item["seconds"], heard[yardstick]["seconds"])
                for yardstick in YARDSTICKS
                if yardstick in heard
            }
            log(f"{name:28} WER {100 * item['wer']:.1f} %, RTF {item['rtf']:.4f}")
    refused += [Refused(side.engine, side.precision, reason) for side, reason in lacking.items()]
    return {**found, "runs": heard, "refused": [asdict(item) for item in refused]}


def _lack(side: Side, bundles: Mapping[int, Path]) -> str | None:
    """Why a bundle of the user's cannot be a side's: it lacks the precision."""
    if not ENGINES[side.engine].domains:
        return None
    present = read_manifest(bundles[side.domains]).precisions
    return None if side.precision in present else f"--bundle has {', '.join(present)} and no {side.precision}"
