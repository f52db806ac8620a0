"""Settings of a call side by side: `das-bench context` and `das-bench prune`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from das_asr.benchmarks.cli import main
from das_asr.benchmarks.replay import Trace
from das_asr.benchmarks.settings import context_settings, pruning_settings
from das_asr.benchmarks.wer_result import read_report
from das_asr.runtime import DecodingOptions, Transcriber


@pytest.fixture(scope="module")
def few(repo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six of the demo clips."""
    folder, source = tmp_path_factory.mktemp("few"), repo / "benchmarks/demo/audio"
    lines = (source / "metadata.jsonl").read_text(encoding="utf-8").splitlines()[:6]
    for line in lines:
        name = json.loads(line)["file_name"]
        (folder / name).symlink_to(source / name)
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def run(bundle: Path, few: Path, output: Path, *options: str) -> tuple[dict[str, Any], str]:
    arguments = [*options, "--bundle", str(bundle), "--test", f"few={few}", "--language", "en", "--threads", "1"]
    done = CliRunner().invoke(main, [*arguments, "--output", str(output)])
    assert done.exit_code == 0, done.output
    return json.loads(output.read_text(encoding="utf-8")), done.stdout


def test_settings_have_names_and_make_sense() -> None:
    assert [each.name for each in context_settings((0.0, 1.5))] == ["window", "fit 0 s", "fit 1.5 s"]
    settings = pruning_settings((1, 3), (4, 8), (0.5,))
    assert [each.name for each in settings] == [
        "all rows",
        *("auto:1 after 4", "auto:3 after 4", "margin 0.5 after 4"),
        *("auto:1 after 8", "auto:3 after 8", "margin 0.5 after 8"),
    ]
    assert all(DecodingOptions(**each.choices).prunes for each in settings[1:])


def test_prune_reports_rows_tokens_and_words(demo_bundle: Path, few: Path, tmp_path: Path) -> None:
    output = tmp_path / "prune.json"
    result, text = run(demo_bundle, few, output, "prune", "--keep", "1", "--after", "3", "--margins", "0.01")
    costs, changed = result["about"]["cost"], result["about"]["changed_tokens"]
    assert list(costs) == ["all rows", "auto:1 after 3", "margin 0.01 after 3"]
    assert changed["all rows"] == {"few": 0.0}
    for runs in costs.values():
        assert [run["utterances"] for run in runs] == [1] * 6
        assert all(0 < run["encoder"] + run["prefill"] + run["steps"] < run["total"] for run in runs)
        assert all(run["step_rows"][:2] == [4, 4] for run in runs)
    pruned = [rows for run in costs["auto:1 after 3"] for rows in run["step_rows"][2:]]
    assert set(pruned) == {2}
    report = read_report(output)  # what `das-bench wer` writes, so its other commands read it
    assert report.baseline == "all rows"
    assert [system.name for system in report.systems] == list(costs)
    assert text.count("auto:1 after 3") >= 4
    assert "rows in a step" in text
    _replays(demo_bundle, output, tmp_path / "replay.json")


def _replays(bundle: Path, result: Path, output: Path) -> None:
    arguments = ["replay", str(result), "--bundle", str(bundle), "--utterances", "3", "--output", str(output)]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.output
    runs = {run["setting"]: run for run in json.loads(output.read_text(encoding="utf-8"))["runs"]}
    assert list(runs) == ["all rows", "auto:1 after 3", "margin 0.01 after 3"]
    assert all(len(run["seconds"]) == 3 and run["step_ms"] > 0 for run in runs.values())
    assert runs["auto:1 after 3"]["row_steps"] < runs["all rows"]["row_steps"]
    assert "| auto:1 after 3 |" in done.stdout


def test_a_trace_is_scaled_to_the_rows_of_another_bundle() -> None:
    assert Trace("auto:1", 4, ((4, 4, 2), (3, 2))).scaled(26, 2) == [[26, 26], [20, 13]]


def test_context_reports_what_a_shorter_window_costs(demo_bundle: Path, few: Path, tmp_path: Path) -> None:
    result, text = run(demo_bundle, few, tmp_path / "r.json", "context", "--margins", "30,0.5", "--batch-size", "3")
    changed = result["about"]["changed_tokens"]
    assert changed["fit 30 s"] == {"few": 0.0}  # the whole window
    assert changed["fit 0.5 s"]["few"] < 0.1
    assert [run["utterances"] for run in result["about"]["cost"]["window"]] == [3, 3]
    assert "| fit 0.5 s |" in text


def test_the_first_batch_is_decoded_once_more_before_anything_counts(
    demo_bundle: Path, few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode, batches = Transcriber.transcribe_batch, []

    def counted(self: Transcriber, audio: Any, options: DecodingOptions, **choices: Any) -> Any:
        batches.append((options.audio_context, hash(audio[0].tobytes())))
        return decode(self, audio, options, **choices)

    monkeypatch.setattr(Transcriber, "transcribe_batch", counted)
    result, _ = run(demo_bundle, few, tmp_path / "r.json", "context", "--margins", "1")
    assert len(batches) == 2 * (1 + 6)
    assert {batches.count(each) for each in batches[:2]} == {2}
    assert len(set(batches[:2])) == 2
    assert all(len(runs) == 6 for runs in result["about"]["cost"].values())


def test_tables_can_go_to_a_file(demo_bundle: Path, few: Path, tmp_path: Path) -> None:
    table = tmp_path / "table.md"
    _, text = run(demo_bundle, few, tmp_path / "r.json", "context", "--margins", "1", "--markdown", str(table))
    assert text == ""
    assert "| fit 1 s |" in table.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["context", "--margins", "wide"], "--margins 'wide' is not a list of numbers"),
        (["context", "--margins", "-1"], "audio_margin is -1.0"),
        (["prune", "--keep", "1.5"], "'1.5' is not a list of whole numbers"),
        (["prune", "--keep", "none"], "There is one setting only"),
        (["prune", "--rule", "paper", "--margins", "1"], "prune_margin belongs to rule='hypothesis'"),
        (["prune", "--after", "0"], "prune_after is 0"),
    ],
)
def test_wrong_options_are_refused(
    demo_bundle: Path, few: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    arguments = [*options, "--bundle", str(demo_bundle), "--test", f"few={few}", "--output", str(tmp_path / "r.json")]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code
    assert message in done.output
    assert not (tmp_path / "r.json").exists()


def test_only_results_with_rows_can_be_replayed(demo_bundle: Path, few: Path, tmp_path: Path) -> None:
    arguments = ["replay", str(few / "metadata.jsonl"), "--bundle", str(demo_bundle), "--output", str(tmp_path / "r")]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code
    assert "has no rows of steps" in done.output
