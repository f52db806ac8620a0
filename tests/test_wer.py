"""The demo clips through the demo bundle: systems against transcriptions one by one, tuning, and the commands."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from das_asr.benchmarks.cli import main
from das_asr.benchmarks.testsets import EvaluationSet, parse_source, read_sets
from das_asr.benchmarks.tune import MEAN, TuneOptions, TuneReport, tune
from das_asr.benchmarks.tune_report import render_tuning
from das_asr.benchmarks.wer import WerOptions, evaluate, winners
from das_asr.benchmarks.wer_decode import DecodeOptions, OwnTexts
from das_asr.benchmarks.wer_replay import chosen_rows
from das_asr.benchmarks.wer_result import WerReport, read_report
from das_asr.benchmarks.wer_systems import parse_systems
from das_asr.benchmarks.wordcounts import count_errors
from das_asr.benchmarks.wording import paper_rules
from das_asr.runtime import Transcriber
from das_asr.runtime.errors import DataError, OptionError

DECODING = DecodeOptions(threads=1, batch_size=4)
TAUS = (0.025, 0.3)
ADAPTERS = ("music", "weather", "sports")


@pytest.fixture(scope="module")
def sets(repo: Path) -> tuple[EvaluationSet, ...]:
    return read_sets([(None, repo / "benchmarks" / "demo" / "audio")])


@pytest.fixture(scope="module")
def transcriber(demo_bundle: Path) -> Iterator[Transcriber]:
    with Transcriber.load(demo_bundle, threads=1) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def report(demo_bundle: Path, demo_adapters: dict[str, Path], sets: tuple[EvaluationSet, ...]) -> WerReport:
    more = [
        "root=hypothesis,score=root,base_bias=-0.05,include_base=no",
        "few=hypothesis,adapters=weather,switch_cost=0.1",
        "eager=hypothesis,score=root,switch_cost=0.1",
    ]
    systems = parse_systems(["all", f"again={demo_adapters['music']}", *more], ADAPTERS)
    return evaluate(systems, sets, WerOptions(bundle=demo_bundle, decoding=DECODING))


@pytest.fixture(scope="module")
def tuned(demo_bundle: Path, sets: tuple[EvaluationSet, ...]) -> TuneReport:
    options = TuneOptions(bundle=demo_bundle, rules=("paper", "gain"), taus=TAUS[::-1], decoding=DECODING)
    return tune(sets[2:], options)


def test_sets_are_split_by_domain(sets: tuple[EvaluationSet, ...], repo: Path) -> None:
    assert [(each.name, len(each.utterances)) for each in sets] == [
        ("music", 4), ("weather", 4), ("sports", 4), ("general", 3),
    ]  # fmt: skip
    folder = repo / "benchmarks" / "demo" / "audio"
    (whole,) = read_sets([("all", folder / "metadata.jsonl")])
    assert len(whole.utterances) == 15
    assert parse_source("a=b/c") == ("a", Path("b/c"))
    assert parse_source("./a=b") == (None, Path("./a=b"))


@pytest.mark.parametrize(
    ("system", "choices"),
    [
        ("base", {"rule": "base", "adapters": ()}),
        ("paper", {"rule": "paper"}),
        ("gain", {"rule": "gain"}),
        ("deviation-max", {"rule": "deviation-max"}),
        ("hypothesis", {"rule": "hypothesis"}),
        ("hypothesis,score=total", {"rule": "hypothesis", "score": "total"}),
        ("root", {"rule": "hypothesis", "score": "root", "base_bias": -0.05, "include_base": False}),
        ("few", {"rule": "hypothesis", "adapters": ("weather",), "switch_cost": 0.1}),
        ("weather", {"rule": "hypothesis", "adapters": ("weather",), "include_base": False}),
        ("again", {"rule": "hypothesis", "adapters": ("music",), "include_base": False}),
    ],
)
def test_every_system_writes_what_the_runtime_writes(
    system: str,
    choices: dict[str, object],
    report: WerReport,
    transcriber: Transcriber,
    sets: tuple[EvaluationSet, ...],
) -> None:
    """Decoded one clip at a time, without sharing anything."""
    for each in (sets[0], sets[3]):
        outcomes = report.system(system).outcomes[each.name]
        for utterance, outcome in zip(each.utterances, outcomes, strict=True):
            alone = transcriber.transcribe(utterance.audio, no_speech_threshold=None, **choices)
            assert outcome.text == alone.text
            if system not in ("base", "again", "few"):
                assert outcome.adapter == alone.adapter
            if alone.adapter is None and system != "base":
                assert outcome.words == tuple((word.word.strip(), word.adapter) for word in alone.words)


def test_a_spliced_system_writes_what_the_runtime_writes(
    report: WerReport, transcriber: Transcriber, sets: tuple[EvaluationSet, ...]
) -> None:
    choices = {"rule": "hypothesis", "score": "root", "switch_cost": 0.1, "no_speech_threshold": None}
    mixed = 0
    for each in sets:
        outcomes = report.system("eager").outcomes[each.name]
        for utterance, outcome in zip(each.utterances, outcomes, strict=True):
            alone = transcriber.transcribe(utterance.audio, **choices)
            assert outcome.text == alone.text
            assert outcome.adapter is None
            assert outcome.words == tuple((word.word.strip(), word.adapter) for word in alone.words)
            mixed += outcome.text not in [one.text for one in alone.hypotheses]
    assert mixed


def test_own_and_oracle(report: WerReport) -> None:
    for name in ("music", "weather", "sports"):
        assert report.errors("own", name).tolist() == report.errors(name, name).tolist()
    assert report.errors("own", "general").tolist() == report.errors("base", "general").tolist()
    rows = [report.errors(row, name).sum(axis=1) for name in report.sets for row in ("base", *ADAPTERS)]
    by_set = [np.min(rows[start : start + 4], axis=0).tolist() for start in range(0, 16, 4)]
    assert [report.errors("oracle", name).sum(axis=1).tolist() for name in report.sets] == by_set


def test_the_adapters_help_their_domain(report: WerReport) -> None:
    """The figures of the demo, as `das-bench demo` prints them over all clips."""
    total = {
        system: sum(report.errors(system, name).sum() for name in report.sets) for system in ("base", "hypothesis")
    }
    assert total["hypothesis"] < total["base"]
    assert sum(report.words(name).sum() for name in report.sets) == 103


def test_the_report_keeps_the_rows_and_round_trips(report: WerReport, tmp_path: Path) -> None:
    sentence = report.sets["music"][0]
    assert list(sentence.rows) == ["base", *ADAPTERS, "again"]
    assert sentence.rows["again"] == sentence.rows["music"]
    path = tmp_path / "r.json"
    path.write_text(report.to_json())
    again = read_report(path)
    assert again == report


def test_winners_are_those_of_the_runtime() -> None:
    own = OwnTexts(
        rows=("base", "a", "b"),
        texts=(("", "", ""),) * 2,
        means=np.array([[-0.5, -0.4, -0.4], [-1.0, -2.0, -0.9]]),
        lengths=np.array([[2, 4, 2], [3, 1, 4]]),
    )
    assert winners(own, (0, 1, 2), 1.0, 0.0).tolist() == [1, 2]  # mean; a tie goes to the lower row
    assert winners(own, (0, 1, 2), 0.0, 0.0).tolist() == [2, 1]  # totals: -1, -1.6, -0.8; -3, -2, -3.6
    assert winners(own, (0, 1, 2), 1.0, 0.2).tolist() == [0, 0]
    assert winners(own, (1, 2), 1.0, 9.0).tolist() == [1, 2]


def test_rules_choose_as_in_their_definition() -> None:
    confidences = np.array([[0.5, 0.6, 0.1], [0.5, 0.52, 0.1], [0.5, 0.52, 0.44], [0.9, 0.2, 0.8]])
    assert chosen_rows("paper", 0.05, confidences).tolist() == [1, 2, 2, 1]
    assert chosen_rows("gain", 0.05, confidences).tolist() == [1, 0, 0, 0]
    assert chosen_rows("deviation-max", 0.05, confidences).tolist() == [1, 1, 1, 0]


def test_tuning_agrees_with_decoding_at_every_tau(
    tuned: TuneReport, transcriber: Transcriber, sets: tuple[EvaluationSet, ...]
) -> None:
    trials = [trial for trial in tuned.trials if trial.tau is not None]
    assert [(trial.rule, trial.tau) for trial in trials] == [(rule, tau) for rule in ("paper", "gain") for tau in TAUS]
    for trial in trials:
        for each in sets[2:]:
            audio = [utterance.audio for utterance in each.utterances]
            found = transcriber.transcribe_batch(audio, rule=trial.rule, tau=trial.tau, no_speech_threshold=None)
            references = [paper_rules(utterance.text) for utterance in each.utterances]
            errors = count_errors(references, [paper_rules(one.text) for one in found]).sum()
            assert trial.wer[each.name] == errors / sum(map(len, references))


def test_tuning_tries_every_score_at_every_switch_cost(tuned: TuneReport, report: WerReport) -> None:
    read = {trial.description: trial for trial in tuned.trials if trial.reading is not None}
    costs = ("0.25", "0.5", "0.75", "1")
    assert list(read) == [
        "hypothesis, score root",
        *(f"hypothesis, score {score}, switch cost {cost}" for score in ("mean", "total", "root") for cost in costs),
    ]
    spliced = read["hypothesis, score root, switch cost 0.5"]
    name = "hypothesis,score=root,switch_cost=0.5"
    assert spliced.wer == {each: report.wer(name, each) for each in ("sports", "general")}
    assert spliced.flags() == "--rule hypothesis --score root --switch-cost 0.5"
    assert all(trial.applicable for trial in read.values())
    shown = render_tuning(tuned)
    assert all(f"| {description} |" in shown for description in read)


def test_tuning_retains_what_has_no_adapter(tuned: TuneReport, report: WerReport) -> None:
    base = tuned.trials[0]
    assert base.wer == {name: report.wer("base", name) for name in ("sports", "general")}
    assert tuned.retained == ("general",)
    assert all(trial.allowed == (trial.wer["general"] <= base.wer["general"]) for trial in tuned.trials)
    usable = [trial for trial in tuned.trials if trial.allowed and trial.applicable]
    assert tuned.best.rate(MEAN) == min(trial.rate(MEAN) for trial in usable)
    mean = next(trial for trial in tuned.trials if trial.exponent == 1 and trial.base_bias == 0)
    assert mean.wer["sports"] == report.wer("hypothesis", "sports")
    assert mean.flags() == "--rule hypothesis --score mean --base-bias 0.0"
    assert any(not trial.applicable for trial in tuned.trials)
    assert json.loads(tuned.to_json())["best"]["choices"] == tuned.best.choices()


def test_the_wer_command_writes_everything(demo_bundle: Path, sets: tuple[EvaluationSet, ...], tmp_path: Path) -> None:
    audio = sets[0].source
    outputs = {"--output": "r.json", "--markdown": "r.md", "--figure": "r.svg", "--worst": "w.html"}
    arguments = ["wer", "--bundle", demo_bundle, "--test", audio, "--threads", "1", "--system", "DAS=hypothesis"]
    arguments += [part for option, name in outputs.items() for part in (option, tmp_path / name)]
    done = CliRunner().invoke(main, list(map(str, arguments)))
    assert done.exit_code == 0, done.output
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(outputs.values())
    written = read_report(tmp_path / "r.json")
    assert [system.name for system in written.systems] == ["base", "DAS"]
    first = 100 * written.wer("DAS", next(iter(written.sets)))
    assert f"| DAS | {first:.1f} [" in (tmp_path / "r.md").read_text()
    assert "Worst sentences of DAS" in (tmp_path / "w.html").read_text()
    assert "<svg" in (tmp_path / "r.svg").read_text()


def test_the_tune_command(demo_bundle: Path, sets: tuple[EvaluationSet, ...], tmp_path: Path) -> None:
    arguments = ["tune", "--bundle", demo_bundle, "--test", sets[0].source, "--threads", "1", "--rule", "gain"]
    arguments += [
        "--taus",
        "0.1",
        "--switch-costs",
        "0.5",
        "--output",
        tmp_path / "t.json",
        "--figure",
        tmp_path / "t.png",
    ]
    done = CliRunner().invoke(main, [*map(str, arguments), "--apply"])
    assert done.exit_code == 0, done.output
    assert done.stdout == "--rule hypothesis --score root\n"
    assert (tmp_path / "t.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "t.json").read_text())["kind"] == "tune"


@pytest.fixture
def folder(tmp_path: Path, sets: tuple[EvaluationSet, ...]) -> Path:
    """An AudioFolder with one clip."""
    made = tmp_path / "clips"
    made.mkdir()
    shutil.copy(sets[0].utterances[0].audio, made / "a.flac")
    (made / "metadata.jsonl").write_text(json.dumps({"file_name": "a.flac", "text": "olly"}) + "\n")
    return made


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--wake-word", "olly"], "have no words"),
        (["--system", "rock"], "neither an adapter"),
        (["--baseline", "gain"], "'gain'"),
        (["--output", "missing/r.json"], "there is no folder"),
        (["--figure", "r.txt"], "--figure r.txt"),
        (["--batch-size", "0"], "at least 1"),
        (["--test", "clips"], "no `domain`"),
        (["--test", "x=clips"], "Two test sets"),
        (["--worst-system", "rock"], "none of the systems"),
        (["--resamples", "5"], "at least 100"),
    ],
)
def test_the_wer_command_refuses_with_a_message(
    more: list[str], message: str, folder: Path, demo_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parent)
    arguments = ["wer", "--bundle", str(demo_bundle), "--test", "x=clips", "--output", "r.json", "--system", "base"]
    done = CliRunner().invoke(main, [*arguments, *more])
    assert done.exit_code == 1
    assert message in done.stderr
    assert not Path("r.json").exists()


def test_audio_that_the_model_cannot_take(folder: Path, demo_bundle: Path) -> None:
    import soundfile

    soundfile.write(folder / "long.wav", np.full(16_000 * 9, 0.1, np.float32), 16_000)
    with (folder / "metadata.jsonl").open("a") as lines:
        lines.write(json.dumps({"file_name": "long.wav", "text": "nine seconds"}) + "\n")
    found = read_sets([("x", folder)])
    systems = parse_systems(["base"], ())
    with pytest.raises(DataError, match="1 of 2 utterances"):
        evaluate(systems, found, WerOptions(bundle=demo_bundle))
    report = evaluate(systems, found, WerOptions(bundle=demo_bundle, decoding=DECODING, skip_unfit=True))
    assert [sentence.audio for sentence in report.sets["x"]] == ["a.flac"]
    (folder / "long.wav").write_bytes(b"RIFF")
    with pytest.raises(DataError, match="cannot be read as audio"):
        evaluate(systems, found, WerOptions(bundle=demo_bundle))


def test_silence_is_an_empty_text(folder: Path, demo_bundle: Path) -> None:
    import soundfile

    soundfile.write(folder / "a.flac", np.zeros(16_000, np.float32), 16_000)
    options = WerOptions(bundle=demo_bundle, decoding=DECODING)
    report = evaluate(parse_systems(["all"], ADAPTERS), read_sets([("x", folder)]), options)
    assert all(report.errors(system.name, "x").tolist() == [[0, 0, 1]] for system in report.systems)


def test_a_bundle_without_adapters_cannot_be_tuned(
    demo_bundle: Path, tmp_path: Path, sets: tuple[EvaluationSet, ...]
) -> None:
    shutil.copytree(demo_bundle, tmp_path / "bundle")
    manifest = json.loads((tmp_path / "bundle" / "manifest.json").read_text())
    manifest["adapters"] = []
    (tmp_path / "bundle" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(OptionError, match="nothing to tune"):
        tune(sets, TuneOptions(bundle=tmp_path / "bundle"))
    with pytest.raises(OptionError, match="none of the sets"):
        tune(sets, TuneOptions(bundle=demo_bundle, retained=("rock",)))


@pytest.mark.parametrize(
    "wrong",
    [
        {"rules": ("base",)},
        {"taus": (2.0,)},
        {"taus": ()},
        {"exponents": ()},
        {"switch_costs": (-1.0,)},
        {"allowance": -1.0},
    ],
)
def test_tuning_that_cannot_be(wrong: dict[str, object]) -> None:
    with pytest.raises(OptionError):
        TuneOptions(bundle=Path("b"), **wrong)  # type: ignore[arg-type]
