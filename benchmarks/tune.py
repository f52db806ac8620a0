"""Choosing rule and threshold on a development set.

What rows write for themselves is decoded once; every score, exponent, bias and switch cost of `hypothesis` is then
computed from the texts and their log-probabilities. Rules with a shared history are decoded at every tau, where their
text can differ.

The best trial has the lowest mean word error rate over the sets among those that are no worse than the base on every
set that the adapters must not harm. The base itself is a trial, so there always is one.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from das_asr.benchmarks.machine import describe_run
from das_asr.benchmarks.output import plain_path
from das_asr.benchmarks.testsets import EvaluationSet, check_references, fit_window
from das_asr.benchmarks.wer import open_pool, row_errors, winners
from das_asr.benchmarks.wer_decode import Decoded, DecodeOptions, Demand, JointText, OwnTexts, decode_set
from das_asr.benchmarks.wer_plan import open_bundle
from das_asr.benchmarks.wer_reading import Reading, Score
from das_asr.benchmarks.wer_replay import SharedRule
from das_asr.benchmarks.wer_systems import SHARED_RULES
from das_asr.benchmarks.wordcounts import count_errors
from das_asr.benchmarks.wording import Normalize, Wording, Words
from das_asr.runtime.errors import OptionError
from das_asr.runtime.results import BASE
from das_asr.runtime.selection import HYPOTHESIS

__all__ = ["MEAN", "Trial", "TuneOptions", "TuneReport", "tune"]

MEAN = "mean"
"""In place of a set: the plain mean of the rates on all sets."""

TAUS = (0.0, 0.01, 0.025, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5)
EXPONENTS = (0.0, 0.25, 0.5, 0.75, 1.0)
BIASES = (-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0, 4.0)
SWITCH_COSTS = (0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True, kw_only=True)
class TuneOptions:
    """Options of `tune`.

    Attributes:
        bundle: what to tune.
        rules: with a shared history, to try at every tau; none saves their decoding.
        taus: thresholds in probability units.
        exponents: of the length in the score of `hypothesis`: 1 is `mean`, 0 is `total`.
        biases: in favour of the base, in nats for a text of the sets' median length.
        switch_costs: of `hypothesis`, to try with every score; none keeps to whole rows.
        retained: sets that must not become worse than with the base; None: those without an adapter of their name.
        allowance: by how much they may, as a difference of word error rates.
        wording: how texts are compared.
        decoding: how the bundle runs.
        skip_unfit: leave out utterances that the model cannot take.
    """

    bundle: Path
    rules: tuple[str, ...] = SHARED_RULES
    taus: tuple[float, ...] = TAUS
    exponents: tuple[float, ...] = EXPONENTS
    biases: tuple[float, ...] = BIASES
    switch_costs: tuple[float, ...] = SWITCH_COSTS
    retained: tuple[str, ...] | None = None
    allowance: float = 0.0
    wording: Wording = field(default_factory=Wording)
    decoding: DecodeOptions = field(default_factory=DecodeOptions)
    skip_unfit: bool = False

    def __post_init__(self) -> None:
        if unknown := [rule for rule in self.rules if rule not in SHARED_RULES]:
            raise OptionError(f"--rule is {unknown[0]!r}, expected {', '.join(SHARED_RULES)}.")
        if not all(0 <= tau <= 1 for tau in self.taus) or not self.taus:
            raise OptionError(f"--taus is {self.taus}, expected probabilities between 0 and 1.")
        if not (self.exponents and self.biases):
            raise OptionError("exponents and biases need at least one value each, as in (1.0,) and (0.0,).")
        if wrong := [cost for cost in self.switch_costs if not 0 <= cost < math.inf]:
            raise OptionError(f"switch_costs has {wrong[0]}, expected finite numbers of at least 0.")
        if self.allowance < 0:
            raise OptionError(f"--allowance is {self.allowance}, expected a difference of error rates of at least 0.")


@dataclass(frozen=True)
class Trial:
    """One setting and its word error rates."""

    rule: str
    wer: Mapping[str, float]  # by set, as fractions
    tau: float | None = None
    exponent: float | None = None
    base_bias: float = 0.0  # in the unit of the score
    reading: Reading | None = None  # a score or a path that no exponent can say
    allowed: bool = True  # harms none of the retained sets

    def rate(self, name: str) -> float:
        """The rate on a set, or `MEAN`."""
        return float(np.mean(list(self.wer.values()))) if name == MEAN else self.wer[name]

    @property
    def switch_cost(self) -> float | None:
        """Of a path through the rows' texts; None for whole rows."""
        return None if self.reading is None else self.reading.switch_cost

    @property
    def applicable(self) -> bool:
        """Whether `DecodingOptions` can say it; exponents between 0 and 1 are shown for comparison only."""
        return self.exponent in (None, 0.0, 1.0)

    @property
    def description(self) -> str:
        """The setting in short."""
        score = {None: None, 0.0: "score total", 1.0: "score mean"}.get(self.exponent, f"exponent {self.exponent}")
        tau = None if self.tau is None else f"tau {self.tau:g}"
        if self.reading is not None:
            score = f"score {self.reading.score}"
        switch = None if self.switch_cost is None else f"switch cost {self.switch_cost:g}"
        bias = f"base bias {self.base_bias:g}" if self.base_bias else None
        return ", ".join(part for part in (self.rule, tau, score, switch, bias) if part)

    def choices(self) -> dict[str, Any]:
        """The setting as fields of `DecodingOptions`."""
        assert self.applicable
        choices: dict[str, Any] = {"rule": self.rule}
        if self.tau is not None:
            choices["tau"] = self.tau
        if self.exponent is not None:
            choices |= {"score": "mean" if self.exponent else "total", "base_bias": self.base_bias}
        if self.reading is not None:
            choices["score"] = self.reading.score
        if self.switch_cost is not None:
            choices["switch_cost"] = self.switch_cost
        return choices

    def flags(self) -> str:
        """The setting as options of `das-transcribe`."""
        return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in self.choices().items())


@dataclass(frozen=True)
class TuneReport:
    """All trials, the base first, and what they were made on."""

    sets: Mapping[str, int]  # utterances by name
    retained: tuple[str, ...]
    trials: tuple[Trial, ...]
    wording: Mapping[str, Any]
    about: Mapping[str, Any]

    @property
    def best(self) -> Trial:
        """The lowest mean among what is allowed and applicable; the first of equals."""
        return min((trial for trial in self.trials if trial.allowed and trial.applicable), key=_mean)

    @property
    def lowest(self) -> Trial:
        """The lowest mean of all, whether it can be used or not."""
        return min(self.trials, key=_mean)

    @property
    def shared_rules(self) -> tuple[str, ...]:
        """Rules that were tried over tau."""
        return tuple(dict.fromkeys(trial.rule for trial in self.trials if trial.tau is not None))

    def to_json(self) -> str:
        """One JSON document, with the best setting as `DecodingOptions` has it."""
        best = {"description": self.best.description, "choices": self.best.choices(), "mean": self.best.rate(MEAN)}
        return json.dumps({"kind": "tune", "schema": 1, "best": best, **dataclasses.asdict(self)}, indent=1) + "\n"


def _mean(trial: Trial) -> float:
    return trial.rate(MEAN)


def tune(
    sets: Sequence[EvaluationSet], options: TuneOptions, log: Callable[[str], None] = lambda _: None
) -> TuneReport:
    """Decodes development sets and tries every setting on them.

    Raises:
        DataError: a reference has no words, or audio cannot be used.
        OptionError: the bundle has no adapters, or a retained set is missing.
        BundleError: the bundle is incomplete or damaged.
    """
    run = describe_run()
    pool = open_bundle(options.bundle)
    if not pool.adapters:
        raise OptionError(f"{options.bundle} has no adapters, so there is nothing to tune. Export it with some.")
    retained = _retained(sets, options, pool.adapters)
    normalize = options.wording.normalizer()
    check_references(sets, normalize)
    sets = fit_window(sets, pool.manifest.audio.window_seconds, skip=options.skip_unfit)
    rules = tuple(SharedRule(rule, tau, pool.adapters) for rule in options.rules for tau in sorted(set(options.taus)))
    readings = tuple(_readings((BASE, *pool.adapters), options))
    judged: dict[str, _Judged] = {}
    with open_pool(pool, options.decoding) as transcriber:
        for each in sets:
            decoded = decode_set(transcriber, each, Demand(pool.adapters, rules, readings), options.decoding)
            log(f"{each.name}: {decoded.runs} of {len(rules) * len(each.utterances)} decodings with a shared history")
            judged[each.name] = _Judged(decoded, [normalize(one.text) for one in each.utterances], normalize)
    trials = [*_own_trials(judged, options), *_read_trials(judged, readings), *_shared_trials(judged, rules)]
    base = next(trial for trial in trials if trial.rule == BASE)
    harmless = [all(trial.wer[name] <= base.wer[name] + options.allowance for name in retained) for trial in trials]
    return TuneReport(
        sets={each.name: len(each.utterances) for each in sets},
        retained=retained,
        trials=tuple(dataclasses.replace(trial, allowed=fine) for trial, fine in zip(trials, harmless, strict=True)),
        wording=json.loads(json.dumps(dataclasses.asdict(options.wording), default=str)),
        about={**run, "bundle": plain_path(options.bundle)},
    )


def _retained(sets: Sequence[EvaluationSet], options: TuneOptions, adapters: Sequence[str]) -> tuple[str, ...]:
    names = tuple(each.name for each in sets)
    if options.retained is None:
        return tuple(name for name in names if name not in adapters)
    if missing := [name for name in options.retained if name not in names]:
        raise OptionError(f"--retain {missing[0]} is none of the sets: {', '.join(names)}. Name one of them.")
    return options.retained


class _Judged:
    """A decoded set with its errors."""

    def __init__(self, decoded: Decoded, references: Sequence[Words], normalize: Normalize) -> None:
        assert decoded.own is not None
        self.own: OwnTexts = decoded.own
        self.words = sum(map(len, references))
        self.row_errors = row_errors(decoded.own, references, normalize).sum(axis=2)  # [N, R]

        def rate(texts: Sequence[JointText]) -> float:
            return float(count_errors(references, [normalize(one.text) for one in texts]).sum() / self.words)

        self.shared = {rule: rate(texts) for rule, texts in decoded.shared.items()}
        self.readings = {reading: rate(texts) for reading, texts in decoded.readings.items()}

    def hypothesis(self, exponent: float, base_bias: float) -> float:
        rows = winners(self.own, range(len(self.own.rows)), exponent, base_bias)
        return float(self.row_errors[np.arange(len(rows)), rows].sum() / self.words)


def _own_trials(judged: Mapping[str, _Judged], options: TuneOptions) -> Iterator[Trial]:
    """The base, and every score: `mean` before `total` before what lies between, small biases before large ones."""
    yield Trial(BASE, {name: float(one.row_errors[:, 0].sum() / one.words) for name, one in judged.items()})
    length = float(np.median(np.concatenate([one.own.lengths[:, 0] for one in judged.values()])))
    for exponent in sorted(set(options.exponents), key=lambda value: (value not in (0.0, 1.0), -value)):
        for nats in sorted(set(options.biases), key=lambda value: (abs(value), value)):
            bias = float(f"{nats / length**exponent:.3g}")
            wer = {name: one.hypothesis(exponent, bias) for name, one in judged.items()}
            yield Trial(HYPOTHESIS, wer, exponent=exponent, base_bias=bias)


def _readings(rows: tuple[str, ...], options: TuneOptions) -> Iterator[Reading]:
    """Whole rows by `root`, which no exponent can say, then every score at every switch cost."""
    yield Reading(rows=rows, score="root")
    scores: tuple[Score, ...] = ("mean", "total", "root")
    for score in scores:
        for cost in sorted(set(options.switch_costs)):
            yield Reading(rows=rows, score=score, switch_cost=cost)


def _read_trials(judged: Mapping[str, _Judged], readings: Sequence[Reading]) -> Iterator[Trial]:
    for reading in readings:
        yield Trial(HYPOTHESIS, {name: one.readings[reading] for name, one in judged.items()}, reading=reading)


def _shared_trials(judged: Mapping[str, _Judged], rules: Sequence[SharedRule]) -> Iterator[Trial]:
    for rule in rules:
        yield Trial(rule.name, {name: one.shared[rule] for name, one in judged.items()}, tau=rule.tau)
