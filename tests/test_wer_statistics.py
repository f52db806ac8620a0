"""Bootstrap against closed forms and enumeration, statistics and tables of a made-up report."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

from das_asr.benchmarks.forgetting import adaptation_drop, backward_gain, forgetting
from das_asr.benchmarks.significance import Bootstrap, p_value, percentiles
from das_asr.benchmarks.tables import forgetting_table, table_ii, table_iv, table_v
from das_asr.benchmarks.wer_report import render_wer
from das_asr.benchmarks.wer_result import Outcome, Sentence, SystemResult, WerReport, merge_reports, read_report
from das_asr.benchmarks.wer_stats import WerStatistics
from das_asr.benchmarks.worst import default_system, render_worst
from das_asr.runtime.errors import OptionError
from das_asr.training.blora.sparsity import Sparsity

MANY = Bootstrap(resamples=40_000)


def make_report(errors: Mapping[str, Mapping[str, Sequence[int]]], words: int = 10) -> WerReport:
    """Substitutions by system, set and sentence; every sentence has the same number of words."""
    systems = tuple(
        SystemResult(
            name, name, {each: tuple(Outcome("<x>", (e, 0, 0), "base") for e in found) for each, found in by.items()}
        )
        for name, by in errors.items()
    )
    first = next(iter(errors.values()))
    sets = {
        name: tuple(Sentence(f"{i}.wav", "said", words) for i in range(len(found))) for name, found in first.items()
    }
    return WerReport(sets, systems, "base", {"style": "paper", "wake_words": [], "spellings": None}, {})


def test_the_interval_is_the_binomial_one() -> None:
    """One word per sentence, wrong or right: the resampled number of errors is binomial."""
    wrong, total = 12, 40
    counts = np.array([[1]] * wrong + [[0]] * (total - wrong))
    samples = MANY.sums(counts, "set")[:, 0]
    share = wrong / total
    assert samples.mean() / total == pytest.approx(share, abs=0.002)
    assert samples.std() / total == pytest.approx(math.sqrt(share * (1 - share) / total), rel=0.02)
    exact = [math.comb(total, k) * share**k * (1 - share) ** (total - k) for k in range(total + 1)]
    low, high = percentiles(samples, 0.95)
    cumulative = np.cumsum(exact)
    assert low == np.searchsorted(cumulative, 0.025)
    assert high == np.searchsorted(cumulative, 0.975)


def test_rates_of_resamples_are_those_of_all_possible_ones() -> None:
    """Three sentences have 27 resamples: every rate comes as often as it should, for two systems at once."""
    counts = np.array([[4, 0, 1], [5, 2, 0], [9, 3, 3]])
    sums = MANY.sums(counts, "set")
    found = {
        tuple(row): number / len(sums) for row, number in zip(*np.unique(sums, axis=0, return_counts=True), strict=True)
    }
    expected: dict[tuple[float, ...], float] = {}
    for drawn in itertools.product(range(3), repeat=3):
        key = tuple(counts[list(drawn)].sum(axis=0).astype(float))
        expected[key] = expected.get(key, 0) + 1 / 27
    assert found.keys() == expected.keys()
    assert max(abs(found[key] - expected[key]) for key in expected) < 0.01


def test_blocks_of_resamples_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = np.arange(20).reshape(10, 2)
    whole = Bootstrap(200).sums(counts, "set")
    monkeypatch.setattr("das_asr.benchmarks.significance._DRAWN_AT_ONCE", 70)
    np.testing.assert_array_equal(Bootstrap(200).sums(counts, "set"), whole)
    assert not np.array_equal(Bootstrap(200).sums(counts, "other set"), whole)
    assert not np.array_equal(Bootstrap(200, seed=1).sums(counts, "set"), whole)


def test_p_values() -> None:
    assert p_value(np.zeros(99)) == 1
    assert p_value(np.ones(99)) == pytest.approx(2 / 100)
    assert p_value(-np.ones(99)) == pytest.approx(2 / 100)
    assert p_value(np.array([-1.0] * 10 + [1.0] * 89)) == pytest.approx(2 * 11 / 100)


def test_percentiles_without_enough_samples_have_no_bounds() -> None:
    samples = np.linspace(0, 1, 101)
    assert percentiles(samples, 0.9) == pytest.approx((0.05, 0.95))
    samples[:10] = np.nan
    assert percentiles(samples, 0.9) == (None, None)


@pytest.mark.parametrize("wrong", [{"resamples": 10}, {"seed": -1}, {"level": 1.0}])
def test_a_bootstrap_that_cannot_be(wrong: dict[str, float]) -> None:
    with pytest.raises(OptionError):
        Bootstrap(**wrong)  # type: ignore[arg-type]


def test_equal_systems_do_not_differ_and_better_ones_do() -> None:
    generator = np.random.default_rng(0)
    base = generator.integers(1, 6, 200)
    better = base - (generator.random(200) < 0.5)
    statistics = WerStatistics(make_report({"base": {"s": base}, "same": {"s": base}, "better": {"s": better}}))
    same, change = statistics.compare("same", "base", "s"), statistics.compare("better", "base", "s")
    assert (same.difference.value, same.difference.low, same.difference.high, same.p_value) == (0, 0, 0, 1)
    assert change.p_value < 0.001
    assert change.relative is not None
    assert change.relative.value == pytest.approx(better.sum() / base.sum() - 1)
    low, high = change.relative.low, change.relative.high
    assert low is not None
    assert high is not None
    assert low < change.relative.value < high < 0
    # Paired: the interval of the difference is far narrower than those of the rates.
    rate = statistics.rate("base", "s")
    assert rate.low is not None
    assert change.difference.low is not None
    assert change.difference.value - change.difference.low < (rate.value - rate.low) / 2


def test_a_mean_is_over_sets_and_not_over_words() -> None:
    report = make_report({"base": {"a": [5] * 10, "b": [1] * 40}})
    assert WerStatistics(report).rate("base", ["a", "b"]).value == pytest.approx(0.3)


def test_a_perfect_baseline_has_no_relative_change() -> None:
    statistics = WerStatistics(make_report({"base": {"a": [0, 0]}, "x": {"a": [1, 2]}}))
    assert statistics.compare("x", "base", "a").relative is None
    assert "| x | - |" in render_wer(statistics)


def test_reports_round_trip_and_merge(tmp_path: Path) -> None:
    report = make_report({"base": {"a": [1, 2]}, "x": {"a": [0, 1]}})
    path = tmp_path / "r.json"
    path.write_text(report.to_json())
    assert read_report(path) == report
    other = make_report({"base": {"a": [9, 9]}, "y": {"a": [3, 3]}})
    merged = merge_reports([report, other])
    assert [system.name for system in merged.systems] == ["base", "x", "y"]
    assert merged.wer("base", "a") == 0.15
    with pytest.raises(OptionError, match="different"):
        merge_reports([report, make_report({"y": {"a": [3]}})])
    with pytest.raises(OptionError, match="no system 'z'"):
        report.errors("z", "a")
    with pytest.raises(OptionError, match="no set 'z'"):
        report.errors("x", "z")
    for broken in ("{", "{}", '{"kind": "wer", "schema": 1}'):
        path.write_text(broken)
        with pytest.raises(OptionError):
            read_report(path)


def test_tables_say_what_the_report_says() -> None:
    report = make_report(
        {
            "base": {"music": [4] * 50, "general": [2] * 50},
            "ft": {"music": [2] * 50, "general": [3] * 50},
            "das": {"music": [3] * 50, "general": [2] * 50},
        }
    )
    statistics = WerStatistics(report)
    assert table_iv(statistics, {"Original": "base", "FT": "ft", "DAS": "das"}).splitlines() == [
        "| system | music | general |",
        "| --- | --- | --- |",
        "| Original | 40.0 | 20.0 |",
        "| FT | 20.0 (↓50.0 *) | 30.0 (↑50.0 *) |",
        "| DAS | 30.0 (↓25.0 *) | 20.0 (=0.0) |",
    ]
    assert "| FT | music | 20.0 (↓50.0 *) | 30.0 (↓25.0 *) |" in table_ii(statistics, {"FT": ("ft", "das")}, ["music"])
    lines = table_v(statistics, "das", ["music", "general"]).splitlines()
    assert lines[3].startswith("| general | 20.0 [20.0, 20.0] | 20.0 [20.0, 20.0] | +0.0 [+0.0, +0.0] p=1")
    assert lines[4].startswith("| mean | 30.0 [30.0, 30.0] | 25.0 [25.0, 25.0] | -16.7 *")


def _bayesian_report() -> WerReport:
    return make_report(
        {
            "base": {"new": [6] * 40, "a": [2] * 40, "b": [1] * 40},
            "lora": {"new": [3] * 40, "a": [4] * 40, "b": [3] * 40},
            "blora": {"new": [3] * 39 + [6], "a": [3] * 40, "b": [2] * 40},
        }
    )


def test_measures_of_forgetting() -> None:
    statistics = WerStatistics(_bayesian_report())
    assert forgetting(statistics, "blora", "base", ["a", "b"])["b"].value == pytest.approx(0.1)
    gain = backward_gain(statistics, "blora", "lora", "base", ["a", "b"])
    assert gain is not None
    assert (gain.value, gain.low, gain.high) == pytest.approx((0.5, 0.5, 0.5))
    drop = adaptation_drop(statistics, "blora", "lora", "new").relative
    assert drop is not None
    assert drop.value == pytest.approx(3 / 120)
    assert drop.low == 0
    assert backward_gain(statistics, "blora", "base", "base", ["a"]) is None
    small = {"lora": Sparsity(1e-3, 0.1, 0.2, 0.15, 0.3), "blora": Sparsity(1e-3, 0.5, 0.25, 0.375, 1.0)}
    base, lora, blora = forgetting_table(statistics, small, ["new"], ["a", "b"]).splitlines()[2:]
    assert base == "| base | 60.0 [60.0, 60.0] |  | 20.0 [20.0, 20.0] WER | 10.0 [10.0, 10.0] WER |  |  |"
    assert lora.endswith("| 20.0 [20.0, 20.0] | 20.0 [20.0, 20.0] |  | 10.0 / 20.0 / 15.0 / 30.0 |")
    assert "| 50.0 [50.0, 50.0] | 50.0 / 25.0 / 37.5 / 100.0 |" in blora
    assert "| +2.5 [+0.0, " in blora


def test_an_uncertain_denominator_leaves_the_gain_without_bounds() -> None:
    """LoRA forgets by the count, but not in a third of the resamples."""
    lora = [10] + [0] * 3 + [2] * 36
    errors = {"base": {"a": [2] * 40}, "lora": {"a": lora}, "blora": {"a": [2] * 40}}
    gain = backward_gain(WerStatistics(make_report(errors)), "blora", "lora", "base", ["a"])
    assert gain is not None
    assert (gain.value, gain.low, gain.high) == (1, None, None)


def test_the_page_of_worst_sentences_is_ordered_and_escaped() -> None:
    report = make_report({"base": {"a": [0, 1, 3]}, "das": {"a": [0, 3, 1]}})
    page = render_worst(report, "das", count=1)
    assert default_system(report) == "das"
    assert "2 of 3 with errors" in page
    assert "1.wav" in page
    assert "2.wav" not in page
    assert "&lt;x&gt;" in page
    assert "<x>" not in page
