"""Word error rates of systems on test sets, decoded by this package's runtime.

options = WerOptions(bundle=Path("bundle"))
report = evaluate(parse_systems(["all"], ("music", "weather")), read_sets([("music", Path("music"))]), options)
print(report.wer("hypothesis", "music"))
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from das_asr.benchmarks.machine import describe_run
from das_asr.benchmarks.output import plain_options
from das_asr.benchmarks.testsets import EvaluationSet, check_references, fit_window
from das_asr.benchmarks.wer_decode import Decoded, DecodeOptions, JointText, OwnTexts, decode_set
from das_asr.benchmarks.wer_plan import Entrant, Pool, make_pools
from das_asr.benchmarks.wer_reading import RereadingTranscriber
from das_asr.benchmarks.wer_result import Outcome, Sentence, SystemResult, WerReport
from das_asr.benchmarks.wer_systems import ORACLE, OWN, System
from das_asr.benchmarks.wordcounts import Counts, count_errors
from das_asr.benchmarks.wording import Normalize, Wording, Words
from das_asr.runtime.errors import OptionError
from das_asr.runtime.results import BASE

__all__ = ["WerOptions", "evaluate", "list_sentences", "open_pool", "row_errors", "winners"]

Rows = NDArray[np.int64]
Log = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class WerOptions:
    """Options of `evaluate`.

    Attributes:
        bundle: the one that systems without a folder decode with.
        wording: how texts are compared.
        decoding: how the bundles run.
        baseline: the system that the others are compared with; `base` is added where it is missing.
        skip_unfit: leave out utterances that the model cannot take, instead of refusing the set.
    """

    bundle: Path
    wording: Wording = field(default_factory=Wording)
    decoding: DecodeOptions = field(default_factory=DecodeOptions)
    baseline: str = BASE
    skip_unfit: bool = False


def evaluate(
    systems: Sequence[System], sets: Sequence[EvaluationSet], options: WerOptions, log: Log = lambda _: None
) -> WerReport:
    """Decodes every set with every system and counts the errors; everything is checked before decoding starts.

    Raises:
        DataError: a reference has no words, or audio cannot be used.
        OptionError: a system does not fit its bundle, or there is no baseline.
        BundleError, AdapterError, ExportError: a folder of a system is broken.
    """
    run = describe_run()
    systems = _with_baseline(systems, options.baseline)
    normalize = options.wording.normalizer()
    check_references(sets, normalize)
    pools = make_pools(options.bundle, systems, log)
    window = min(pool.manifest.audio.window_seconds for pool in pools)
    sets = fit_window(sets, window, skip=options.skip_unfit)
    references = {each.name: [normalize(utterance.text) for utterance in each.utterances] for each in sets}
    found: dict[str, dict[str, tuple[Outcome, ...]]] = {system.name: {} for system in systems}
    rows: dict[str, OwnTexts] = {}
    for pool in pools:
        for name, outcomes in _run_pool(pool, sets, references, normalize, options, rows, log):
            found[name].update(outcomes)
    return WerReport(
        sets={each.name: list_sentences(each, references[each.name], rows.get(each.name)) for each in sets},
        systems=tuple(SystemResult(system.name, system.description, found[system.name]) for system in systems),
        baseline=options.baseline,
        wording=plain_options(options.wording),
        about={**run, "arguments": plain_options(options)},
    )


def winners(own: OwnTexts, eligible: Sequence[int], exponent: float, base_bias: float) -> Rows:
    """The row [N] with the best score: total log-probability / length ** exponent, ties to the lowest row.

    Args:
        own: texts of N sentences and R rows.
        eligible: indices of the rows that may win, rising.
        exponent: 1 is the runtime's score `mean`, 0 is `total`.
        base_bias: added to the score of row 0.
    """
    scores = own.means * own.lengths ** (1.0 - exponent)
    scores[:, 0] += base_bias
    columns = np.array(eligible, np.int64)
    best: Rows = columns[scores[:, columns].argmax(axis=1)]
    return best


def row_errors(own: OwnTexts, references: Sequence[Words], normalize: Normalize) -> NDArray[np.int64]:
    """Errors [N, R, 3] of every row's own text."""
    columns = [[normalize(texts[row]) for texts in own.texts] for row in range(len(own.rows))]
    return np.stack([count_errors(references, column) for column in columns], axis=1)


def open_pool(pool: Pool, options: DecodeOptions) -> RereadingTranscriber:
    """The bundle of a pool with its further adapters; its files have been checked."""
    transcriber = RereadingTranscriber.load(pool.bundle, options.device, options.threads, verify_files=False)
    assert isinstance(transcriber, RereadingTranscriber)
    for name, folder in pool.extra.items():
        transcriber.load_adapter(name, folder)
    return transcriber


def _with_baseline(systems: Sequence[System], baseline: str) -> tuple[System, ...]:
    if any(system.name == baseline for system in systems):
        return tuple(systems)
    if baseline != BASE:
        names = ", ".join(repr(system.name) for system in systems) or "none"
        raise OptionError(f"--baseline {baseline!r} is none of the systems: {names}. Name one of them, or add it.")
    return (System(BASE, BASE), *systems)


def _run_pool(
    pool: Pool,
    sets: Sequence[EvaluationSet],
    references: Mapping[str, Sequence[Words]],
    normalize: Normalize,
    options: WerOptions,
    rows: dict[str, OwnTexts],
    log: Log,
) -> list[tuple[str, dict[str, tuple[Outcome, ...]]]]:
    """Outcomes of a pool's systems by set; the first pool that writes rows of their own leaves them in `rows`."""
    if not pool.entrants:
        return []
    results = []
    with open_pool(pool, options.decoding) as transcriber:
        for each in sets:
            log(f"{each.name}: {len(each.utterances)} utterances, {len(pool.entrants)} systems of {pool.bundle}")
            decoded = decode_set(transcriber, each, pool.demand(), options.decoding)
            if decoded.own is not None and pool.bundle == options.bundle:
                rows[each.name] = decoded.own
            judge = _Judge(each.name, decoded, references[each.name], normalize)
            results += [(entrant.system.name, {each.name: judge.outcomes(entrant)}) for entrant in pool.entrants]
    return results


class _Judge:
    """What each system of a pool wrote of one set, and its errors."""

    def __init__(self, name: str, decoded: Decoded, references: Sequence[Words], normalize: Normalize) -> None:
        self._name, self._decoded, self._references, self._normalize = name, decoded, references, normalize
        self._errors = None if decoded.own is None else row_errors(decoded.own, references, normalize)

    def outcomes(self, entrant: Entrant) -> tuple[Outcome, ...]:
        if entrant.shared is not None:
            return self._joint(self._decoded.shared[entrant.shared])
        if entrant.reading is not None:
            return self._joint(self._decoded.readings[entrant.reading])
        own, errors_by_row = self._decoded.own, self._errors
        assert own is not None
        assert errors_by_row is not None
        return tuple(
            Outcome(own.texts[index][row], _triple(errors_by_row[index, row]), own.rows[row])
            for index, row in enumerate(self._choose(entrant, own, errors_by_row).tolist())
        )

    def _joint(self, written: Sequence[JointText]) -> tuple[Outcome, ...]:
        errors = count_errors(self._references, [self._normalize(one.text) for one in written])
        return tuple(
            Outcome(one.text, _triple(row), one.adapter, one.words) for one, row in zip(written, errors, strict=True)
        )

    def _choose(self, entrant: Entrant, own: OwnTexts, errors: NDArray[np.int64]) -> Rows:
        """The row [N] of every sentence that is the system's text."""
        eligible = np.array([own.rows.index(row) for row in entrant.rows], np.int64)
        if entrant.kind == ORACLE:
            fewest: Rows = eligible[errors[:, eligible].sum(axis=2).argmin(axis=1)]
            return fewest
        if entrant.kind == OWN:
            return np.full(len(own.texts), own.rows.index(self._name) if self._name in entrant.rows else 0)
        return winners(own, eligible.tolist(), entrant.exponent, entrant.base_bias)


def _triple(row: Counts) -> tuple[int, int, int]:
    substitutions, insertions, deletions = map(int, row)
    return substitutions, insertions, deletions


def list_sentences(each: EvaluationSet, references: Sequence[Words], own: OwnTexts | None) -> tuple[Sentence, ...]:
    """The sentences of a set with their words, and what each row wrote of them where that is known."""
    folder = each.source if each.source.is_dir() else each.source.parent
    found = []
    for index, (utterance, words) in enumerate(zip(each.utterances, references, strict=True)):
        audio = utterance.audio
        name = str(audio.relative_to(folder)) if audio.is_relative_to(folder) else audio.name
        texts = {} if own is None else dict(zip(own.rows, own.texts[index], strict=True))
        found.append(Sentence(name, utterance.text, len(words), texts))
    return tuple(found)
