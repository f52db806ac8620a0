"""The paper's tables are made of the systems that a report has, and say how far joint decoding gets."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from das_asr.benchmarks.cli import main
from das_asr.benchmarks.paper_tables import joint_table, render_paper_tables
from das_asr.benchmarks.wer_result import WerReport
from das_asr.benchmarks.wer_stats import WerStatistics
from tests.test_wer_statistics import make_report

ADAPTERS = Path(__file__).parents[1] / "benchmarks/demo/adapters"

ERRORS = {
    "base": {"music": [4, 4], "general": [2, 2]},
    "music": {"music": [3, 3], "general": [3, 3]},
    "ft-music": {"music": [2, 2], "general": [5, 5]},
    "ft-encoder-music": {"music": [3, 4], "general": [5, 5]},
    "lora-multi": {"music": [3, 3], "general": [4, 4]},
    "paper": {"music": [4, 3], "general": [3, 2]},
    "hypothesis": {"music": [2, 3], "general": [2, 2]},
    "own": {"music": [3, 3], "general": [2, 2]},
    "oracle": {"music": [2, 2], "general": [1, 1]},
}


def report(*left_out: str) -> WerReport:
    return make_report({name: found for name, found in ERRORS.items() if name not in left_out})


def rows(text: str, first: str) -> list[list[str]]:
    lines = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in text.splitlines() if "|" in line]
    return [line for line in lines if line[0] == first]


def test_every_table_is_there() -> None:
    text = render_paper_tables("own voices", WerStatistics(report()))
    assert text.startswith("## own voices\n")
    assert rows(text, "Original") == [["Original", "40.0", "20.0"]]
    assert rows(text, "FT music")[0][1].startswith("20.0 (↓50.0")
    assert rows(text, "LoRA-ft-Multi")[0][2].startswith("40.0 (↑100.0")
    assert rows(text, "DAS, hypothesis")[0][1].startswith("25.0")
    assert rows(text, "full, music")[0][1] == "music"
    assert "`hypothesis`\n\n| set | base | hypothesis |" in text


def test_joint_systems_are_measured_against_the_own_adapter_and_the_oracle() -> None:
    table = joint_table(WerStatistics(report()), ["music"], ["general"], ["paper", "hypothesis"])
    (found,) = rows(table, "hypothesis")
    assert found[1].startswith("25.0: -16.7")
    assert found[-1] == "50"  # from 30 % half of the way to 20 %
    assert rows(table, "paper")[0][-1] == "-50"
    assert rows(table, "oracle")[0][-1] == "100"


def test_what_the_report_lacks_is_left_out() -> None:
    missing = ("ft-music", "ft-encoder-music", "lora-multi", "paper", "hypothesis")
    text = render_paper_tables("few", WerStatistics(report(*missing)))
    assert "DAS" not in text
    assert "FT music" not in text
    assert "Table II" not in text
    assert rows(text, "LoRA-ft music")


def test_the_command_writes_a_section_per_report(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / f"{name}.json").write_text(report().to_json())
    reports = [f"--report=espeak={tmp_path / 'one.json'}", f"--report=slt={tmp_path / 'two.json'}"]
    done = CliRunner().invoke(main, ["tables", *reports, "--output", str(tmp_path / "tables.md")])
    assert done.exit_code == 0, done.output
    text = (tmp_path / "tables.md").read_text()
    assert text.index("## espeak") < text.index("## slt")


def test_the_command_for_forgetting_reads_the_adapters(tmp_path: Path) -> None:
    (tmp_path / "one.json").write_text(report().to_json())
    arguments = ["forgetting", str(tmp_path / "one.json"), f"--adapter=lora-multi={ADAPTERS / 'music'}"]
    arguments += [f"--adapter=music={ADAPTERS / 'sports'}", "--learned=music", "--retained=general"]
    output = tmp_path / "forgetting.md"
    done = CliRunner().invoke(main, [*arguments, "--title", "One", "--output", str(output)])
    assert done.exit_code == 0, done.output
    assert output.read_text().startswith("## One\n")
    (found,) = rows(output.read_text(), "music")
    assert found[3].startswith("10.0 ")
    assert found[4].startswith("50.0 ")
    wrong = CliRunner().invoke(main, [*arguments, "--retained=nowhere", "--output", str(tmp_path / "none.md")])
    assert wrong.exit_code == 1
    assert "nowhere" in wrong.output
    assert not (tmp_path / "none.md").exists()


@pytest.mark.parametrize(("content", "message"), [("{}", "is not a result"), (None, "cannot be read")])
def test_something_else_is_refused(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "one.json").write_text(content)
    arguments = ["tables", f"--report=x={tmp_path / 'one.json'}", "--output", str(tmp_path / "tables.md")]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 1
    assert message in done.output
    assert not (tmp_path / "tables.md").exists()
