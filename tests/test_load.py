"""The load test: every request is served or refused, and the figures hang together."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from das_asr.benchmarks.cli import main


def test_the_command_measures_three_servers(demo_bundle: Path, repo: Path, tmp_path: Path) -> None:
    arguments = ["load", "--bundle", demo_bundle, "--audio", repo / "benchmarks/demo/audio", "--requests", "12"]
    arguments += ["--rates", "0.5,4", "--patterns", "all,zipf", "--max-queue", "3", "--output", tmp_path / "load.json"]
    done = CliRunner().invoke(main, list(map(str, arguments)))
    assert done.exit_code == 0, done.output
    result = json.loads((tmp_path / "load.json").read_text())
    assert {(run["server"], run["pattern"], run["rate"]) for run in result["runs"]} == {
        (server, pattern, rate)
        for server in ("continuous", "static", "single")
        for pattern in ("all", "zipf")
        for rate in (None, 0.5, 4.0)
    }
    for run in result["runs"]:
        assert run["served"] + run["refused"] == 12
        assert run["rate"] == 4 or run["refused"] == 0 or run["rate"] == 0.5
        latency = run["latency"]
        assert 0 < latency["p50"] <= latency["p95"] <= latency["p99"] <= run["seconds"]
        assert run["queue"]["p50"] <= latency["p99"]
        assert run["tokens_per_second"] > run["requests_per_second"]
    assert done.stdout.count("\n") == 2 + len(result["runs"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--patterns", "all,some"], "--patterns has 'some'"),
        (["--rates", "0"], "--rates is (0.0,)"),
        (["--rates", "fast"], "is not a list of numbers"),
        (["--requests", "3"], "at least 10"),
    ],
)
def test_wrong_options_are_refused(
    demo_bundle: Path, repo: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    arguments = ["load", "--bundle", demo_bundle, "--audio", repo / "benchmarks/demo/audio", *options]
    done = CliRunner().invoke(main, [*map(str, arguments), "--output", str(tmp_path / "load.json")])
    assert done.exit_code
    assert message in done.output
    assert not (tmp_path / "load.json").exists()
