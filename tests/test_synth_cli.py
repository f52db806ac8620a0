"""`das-synth` as it is typed: its commands, its messages, and SIGKILL at any moment."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from das_asr.runtime.errors import OptionError, SynthesisError
from das_asr.runtime.jsonl import read_rows
from das_asr.runtime.utterances import read_utterances
from das_asr.training.synth import main
from das_asr.training.text.domain import load_domain
from das_asr.training.text.filtering import FilterOptions, filter_speech
from das_asr.training.text.generation import generate_text
from das_asr.training.text.options import TextOptions
from tests.chat_server import Reply, serve

PATIENCE = 120.0  # seconds that a subprocess may take to come so far

COMMAND = [sys.executable, "-c", "from das_asr.training.synth import main; main(prog_name='das-synth')"]


def _synth(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, list(map(str, arguments)))


def _kill_when(reached: Callable[[], bool], *arguments: str | Path) -> None:
    """Starts the command and kills it at once when `reached`; fails when it ends before."""
    process = subprocess.Popen([*COMMAND, *map(str, arguments)], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + PATIENCE
    try:
        while not reached():
            assert process.poll() is None, f"ended too early: {process.stderr and process.stderr.read()}"
            assert time.monotonic() < deadline
            time.sleep(0.005)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert process.returncode == -signal.SIGKILL


@pytest.fixture
def pizza(tmp_path: Path) -> tuple[Path, Path]:
    """A new domain and its grammar."""
    domain, grammar = tmp_path / "pizza.yaml", tmp_path / "pizza_grammar.yaml"
    done = _synth("init", "pizza", "--output", domain, "--grammar", grammar)
    assert done.exit_code == 0, done.output
    return domain, grammar


def test_help_is_instant_and_imports_nothing_heavy() -> None:
    code = """
import sys
from click.testing import CliRunner
from das_asr.training.synth import main
for command in ([], ["text"], ["init"], ["report"], ["filter"], ["speech"], ["merge"]):
    assert CliRunner().invoke(main, [*command, "--help"]).exit_code == 0, command
heavy = {"torch", "transformers", "openai", "yaml", "tqdm", "jiwer", "onnxruntime"} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_init_text_report(pizza: tuple[Path, Path], tmp_path: Path) -> None:
    domain, grammar = pizza
    output = tmp_path / "pizza.jsonl"
    (tmp_path / "test.txt").write_text("set number seven to five\n", encoding="utf-8")
    options = ("--grammar", grammar, "--count", "300", "--exclude", tmp_path / "test.txt", "--wake-words", "0.2")
    done = _synth("text", domain, "--output", output, *options)
    assert done.exit_code == 0, done.output
    assert "300 sentences" in done.output
    assert "300/300" in done.stderr  # the bar
    rows = list(read_rows(output))
    assert len(rows) == 300
    assert any(row["text"].startswith("hey assistant ") for row in rows)
    quiet = _synth("text", domain, "--output", output, *options, "--quiet")
    assert (quiet.exit_code, quiet.stderr, quiet.output.count("\n")) == (0, "", 1)
    shown = _synth("report", output, "--exclude", tmp_path / "test.txt", "--grammar", grammar)
    assert "4-grams shared with the evaluation list" in shown.output
    measured = json.loads(_synth("report", output, "--json").output)
    assert measured["diversity"]["rows"] == 300
    assert measured["diversity"]["counts"]["skill"].keys() == set(load_domain(domain).skills)


def test_a_shipped_domain_by_name_and_the_whole_in_lower_case(tmp_path: Path) -> None:
    done = _synth("text", "music", "--output", tmp_path / "m.jsonl", "--count", "50", "--case", "lower", "--quiet")
    assert done.exit_code == 0, done.output
    texts = [row["text"] for row in read_rows(tmp_path / "m.jsonl")]
    assert len(texts) == 50
    assert all(text == text.lower() for text in texts)


def test_text_from_an_endpoint(tmp_path: Path, pizza: tuple[Path, Path]) -> None:
    with serve() as server:
        done = _synth(
            *("text", pizza[0], "--output", tmp_path / "p.jsonl", "--backend", "openai", "--model", "tiny"),
            *("--base-url", server.url, "--count", "20", "--concurrency", "2", "--iterations", "1"),
        )
    assert done.exit_code == 0, done.output
    assert f"tokens of this run: {7 * len(server.requests)} in prompts" in done.output
    assert len(list(read_rows(tmp_path / "p.jsonl"))) == 20


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["text", "musik"], 1, "There is no domain 'musik'. There are "),
        (["text", "music", "--backend", "openai"], 1, "needs the name of a model"),
        (["text", "music", "--shard", "2"], 2, "i/n is expected"),
        (["text", "music", "--shard", "2/2"], 1, "i from 0 to n - 1"),
        (["text", "music", "--count", "0"], 1, "count was 0"),
        (["text", "music", "--exclude", "absent.txt"], 1, "absent.txt cannot be read"),
        (["text", "absent.yaml"], 1, "absent.yaml cannot be read"),
    ],
)
def test_mistakes_are_messages(tmp_path: Path, arguments: list[str], status: int, message: str) -> None:
    done = _synth(*arguments, "--output", tmp_path / "out.jsonl")
    assert done.exit_code == status
    assert message in done.output
    assert "Traceback" not in done.output
    assert not list(tmp_path.iterdir())


def test_an_unreachable_endpoint_is_one_message(tmp_path: Path) -> None:
    options = ("--backend", "openai", "--model", "m", "--base-url", "http://127.0.0.1:9/v1", "--quiet")
    done = _synth("text", "music", "--output", tmp_path / "out.jsonl", *options)
    assert done.exit_code == 1
    assert done.output.count("\n") == 1
    assert "cannot be reached" in done.output


@pytest.mark.parametrize("rows", [1, 700])
def test_a_killed_grammar_run_goes_on(tmp_path: Path, rows: int) -> None:
    output, part = tmp_path / "music.jsonl", tmp_path / "music.jsonl.part"
    arguments = ("text", "music", "--output", output, "--count", "3000", "--seed", "4", "--quiet")
    _kill_when(lambda: part.exists() and part.read_bytes().count(b"\n") >= rows, *arguments)
    assert not output.exists()
    there = part.read_bytes().rpartition(b"\n")[0]
    generate_text(load_domain("music"), TextOptions(count=3000, seed=4), output)
    assert output.read_bytes().startswith(there)
    generate_text(load_domain("music"), TextOptions(count=3000, seed=4), tmp_path / "whole.jsonl")
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    refused = _synth("text", "music", "--output", output, "--count", "3000", "--seed", "5")
    assert refused.exit_code == 1
    assert "seed was 4, now 5" in refused.output


@pytest.mark.parametrize("requests", [3, 25])
def test_a_killed_model_run_pays_for_nothing_twice(tmp_path: Path, requests: int, pizza: tuple[Path, Path]) -> None:
    concurrency = 3
    with serve() as server:
        server.behave = lambda _number, _body: Reply(seconds=0.02)
        output = tmp_path / "p.jsonl"
        options = TextOptions(
            count=250, backend="openai", model="tiny", base_url=server.url, iterations=1, concurrency=concurrency
        )
        _kill_when(
            lambda: len(server.requests) >= requests,
            *("text", pizza[0], "--output", output, "--count", "250", "--backend", "openai", "--model", "tiny"),
            *("--base-url", server.url, "--iterations", "1", "--concurrency", str(concurrency), "--quiet"),
        )
        assert not output.exists()
        domain = load_domain(pizza[0])
        generate_text(domain, options, output)
        prompts = server.prompts()
        assert len(prompts) - len(set(prompts)) <= concurrency  # those that were under way
        generate_text(domain, options, tmp_path / "whole.jsonl")
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert len({row["text"] for row in read_rows(output)}) == 250


@pytest.fixture
def speech(tmp_path: Path, demo_audio: list[tuple[Path, str, str]]) -> Path:
    """The demo clips, of which one has a text that nobody can hear in it."""
    folder = tmp_path / "speech"
    folder.mkdir()
    rows = []
    for index, (file, text, domain) in enumerate(demo_audio):
        shutil.copy(file, folder / file.name)
        wrong = {"text": "Quite another 3 words"} if index == 2 else {"text": text}
        rows.append({"file_name": file.name, "domain": domain, "voice": "v", **wrong})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def test_filter_keeps_what_is_misrecognised(speech: Path, demo_bundle: Path, tmp_path: Path) -> None:
    output = tmp_path / "hard.jsonl"
    done = _synth("filter", speech, "--bundle", demo_bundle, "--output", output, "--above", "0.9", "--threads", "1")
    assert done.exit_code == 0, done.output
    rows = {Path(row["audio"]).name: row for row in read_rows(output)}
    wrong = sorted(path.name for path in speech.glob("*.flac"))
    utterances = read_utterances(output)  # can be trained on
    assert len(utterances) == len(rows) < len(wrong)
    hard = next(row for row in rows.values() if row["text"] == "Quite another 3 words")
    assert hard["wer"] >= 0.9
    assert hard["transcript"]
    assert (hard["voice"], hard["domain"]) == ("v", read_utterances(speech)[2].domain)
    assert all(row["wer"] > 0.9 for row in rows.values())
    assert not output.with_name("hard.jsonl.part").exists()
    with pytest.raises(SynthesisError, match="exists and is not overwritten"):
        filter_speech(speech, demo_bundle, output)


def test_a_killed_filter_goes_on(speech: Path, demo_bundle: Path, tmp_path: Path) -> None:
    options = FilterOptions(threads=1, batch_size=2)
    whole = filter_speech(speech, demo_bundle, tmp_path / "whole.jsonl", options)
    journal = tmp_path / "hard.jsonl.part"
    _kill_when(
        lambda: journal.exists() and journal.read_bytes().count(b"\n") >= 3,
        *("filter", speech, "--bundle", demo_bundle, "--output", tmp_path / "hard.jsonl"),
        *("--threads", "1", "--batch-size", "2", "--quiet"),
    )
    with pytest.raises(SynthesisError, match="was begun with other options"):
        filter_speech(speech, demo_bundle, tmp_path / "hard.jsonl", FilterOptions(adapters=("music",)))
    report = filter_speech(speech, demo_bundle, tmp_path / "hard.jsonl", options)
    assert (report.kept, report.heard, report.wer) == (whole.kept, whole.heard, whole.wer)
    kept = [sorted(row["audio"] for row in read_rows(tmp_path / name)) for name in ("hard.jsonl", "whole.jsonl")]
    assert kept[0] == kept[1]


def test_options_of_filter() -> None:
    with pytest.raises(OptionError, match="above was -1"):
        FilterOptions(above=-1)
    with pytest.raises(OptionError, match="batch_size was 0"):
        FilterOptions(batch_size=0)


def test_the_command_is_installed(run_script: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    assert "text" in run_script("das-synth", "--help").stdout
    assert os.linesep in run_script("das-synth", "--version").stdout
