"""Benchmark reports: taking turns, counting, the tables, and the commands that write them or refuse to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from das_asr.benchmarks import machine, report
from das_asr.benchmarks.cli import main
from das_asr.benchmarks.rtf import RtfOptions, agreement, interleave
from das_asr.benchmarks.timing import Summary, Utterance, percentile, summarize
from das_asr.runtime.errors import OptionError

# Measuring


class Recorder:
    """A system that notes its turns."""

    def __init__(self, name: str, turns: list[str]) -> None:
        self.name, self.turns = name, turns

    def transcribe(self, audio: Any) -> Utterance:
        self.turns.append(self.name)
        return Utterance((len(self.turns),), (), 1.0, 0.1, 0.1, 0.1, ())

    def close(self) -> None:
        """Nothing to free."""


def test_systems_take_turns_and_the_warm_up_is_dropped() -> None:
    turns: list[str] = []
    taken = interleave({name: Recorder(name, turns) for name in "abc"}, np.zeros(1, np.float32), repeats=2, warmup=1)
    assert "".join(turns) == "abc" + "bca" + "cab"
    assert [item.tokens for item in taken["a"]] == [(6,), (8,)]


def test_agreement_counts_what_differs() -> None:
    def write(*tokens: int) -> list[Utterance]:
        return [Utterance(tokens, (), 1.0, 0.1, 0.1, 0.1, ())]

    counted = agreement({"sequential-lora": write(1, 2, 3), "das": write(1, 5, 3)}, 2)
    assert counted["das"] == {"with": "sequential-lora", "equal": 2, "of": 3}


def test_summaries() -> None:
    assert percentile([1, 2, 3, 4, 5], 0.95) == pytest.approx(4.8)
    assert summarize([3.0, 1.0, 2.0]) == Summary(median=2.0, p95=pytest.approx(2.9), min=1.0, n=3)
    assert summarize([]) is None


def test_one_thread_is_pinned_to_one_core_and_released() -> None:
    before = machine.usable_cores()
    with machine.pinned(1):
        assert machine.usable_cores() == {max(before)}
    with machine.pinned(2):
        assert machine.usable_cores() == before
    assert machine.usable_cores() == before


def test_machine_and_versions_are_described() -> None:
    head = machine.result_head("rtf")
    assert (head["kind"], head["schema"]) == ("rtf", 1)
    assert head["machine"]["processor"]
    assert head["machine"]["memory_gib"] > 0
    assert {"python", "torch", "das-asr"} <= head["versions"].keys()


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"domains": (-1,)}, "--domains -1"),
        ({"tokens": 1}, "--tokens 1"),
        ({"repeats": 0}, "--repeats 0"),
        ({"ranks": ()}, "--rank"),
    ],
)
def test_senseless_options_are_refused(choice: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        RtfOptions(**choice)


# Tables


def _result() -> dict[str, Any]:
    """A result with round numbers: transformers 100 ms; sequential 100 and 180; DAS 50 and 60."""
    totals = {
        0: {"transformers": 100, "sequential-lora": 100, "das": 50},
        3: {"transformers": 100, "sequential-lora": 180, "peft-mixed": 250, "das": 60},
    }
    runs = []
    for domains, systems in totals.items():
        for system, total in systems.items():
            summary = {"median": total, "p95": total + 1, "min": total - 1, "n": 2}
            parts = dict.fromkeys(("features", "encoder", "prefill", "step", "token", "selection", "host"), summary)
            runs.append(
                {
                    "system": system, "domains": domains, "rank": 32, "rtf": total / 1000, "rtfx": 1000 / total,
                    "ratio_to_transformers": {**summary, "median": total / 100}, "total_ms": summary,
                    "memory_mib": 700.4, "agreement": {"with": system, "equal": 30, "of": 30}, "rows": {"0": 30},
                    **{f"{part}_ms": value for part, value in parts.items()},
                }
            )  # fmt: skip
    return {
        "kind": "rtf", "date": "2026-01-02T03:04:05+00:00", "window_seconds": 30.0, "runs": runs, "free_running": None,
        "machine": {"processor": "Some CPU", "architecture": "x86_64", "cores": 4},
        "versions": {"torch": "1.0"}, "arguments": {"model": "m", "tokens": 30, "threads": 1, "repeats": 2},
    }  # fmt: skip


TABLE = """\
m, LoRA rank 32, 30 s of audio, 30 tokens, fp32, 1 thread of Some CPU (x86_64, 4 cores); medians of 2 interleaved \
repeats; torch 1.0; 2026-01-02.

| RTF (x transformers) by domains | 0 | 3 |
| --- | --- | --- |
| transformers, base only | 0.100 | 0.100 |
| PyTorch, sequential LoRA | 0.100 (1.00) | 0.180 (1.80) |
| PEFT, mixed batch | - | 0.250 (2.50) |
| DAS, shared history | 0.050 (0.50) | 0.060 (0.60) |

Overhead: extra time of a whole utterance over the same system without adapters, both relative to transformers in \
their own repeats because the machine's speed drifts, beside Table VI of the DAS paper \
(arXiv 2501.12501, on a V100 GPU).

| domains | parallel, DAS paper | parallel, here | sequential, DAS paper | sequential, here | \
K + 1 decodes, here | PEFT, here | sequential / parallel, DAS paper | sequential / parallel, here |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |
| 3 | 9.4 % | 20.0 % | 38.1 % | 80.0 % | - | 150.0 % | 4.05 | 4.00 |"""


def test_the_table_says_what_was_measured() -> None:
    result = _result()
    assert report.render_rtf_table([result]) == TABLE
    assert report.overhead(result["runs"], "peft-mixed", 3) == pytest.approx(1.5)
    assert report.overhead(result["runs"], "das", 10) is None
    result["runs"][-1]["rtf"] = 0.061
    assert report.render_rtf_table([result]) != TABLE


def test_the_table_goes_between_the_markers_and_nowhere_else() -> None:
    begin, end = report.MARKERS
    text = f"# Title\n\n{begin}\nold\n{end}\n\nMore.\n"
    once = report.replace_between_markers(text, TABLE)
    assert once == f"# Title\n\n{begin}\n{TABLE}\n{end}\n\nMore.\n"
    assert report.replace_between_markers(once, TABLE) == once
    for broken in ("none", f"{begin} only", f"{end}\n{begin}", f"{begin}{begin}{end}"):
        with pytest.raises(OptionError, match="once each"):
            report.replace_between_markers(broken, TABLE)


# The command


def test_report_command_writes_table_report_and_picture(tmp_path: Path) -> None:
    result, readme = tmp_path / "r.json", tmp_path / "README.md"
    result.write_text(json.dumps(_result()))
    readme.write_text("\n".join(report.MARKERS))
    outputs = ["--readme", readme, "--markdown", tmp_path / "r.md", "--plot", tmp_path / "r.png"]
    done = CliRunner().invoke(main, ["report", str(result), *map(str, outputs)])
    assert done.exit_code == 0, done.output
    assert TABLE in readme.read_text()
    assert "700" in (tmp_path / "r.md").read_text()
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "r.json", "r.md", "r.png"]
    assert TABLE in CliRunner().invoke(main, ["report", str(result)]).output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rtf", "--output", "missing/r.json"], "there is no folder"),
        (["rtf", "--output", "r.json", "--threads", "4096"], "--threads 4096"),
        (["rtf", "--output", "r.json", "--audio", "clip.wav"], "--bundle"),
        (["report", "clip.wav"], "das-bench rtf"),
    ],
)
def test_commands_refuse_with_a_message(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("clip.wav").write_text("{}")
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 1
    assert message in done.stderr
    assert "Traceback" not in done.output
