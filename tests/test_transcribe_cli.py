"""`das-transcribe` as a user runs it: a process, its output and its exit status."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from das_asr.runtime import Transcriber, transcriber
from das_asr.runtime.backends import BackendOptions
from das_asr.runtime.cli import main
from das_asr.runtime.errors import BackendError
from das_asr.runtime.manifest import Manifest

Done = subprocess.CompletedProcess


def run(*arguments: object) -> Done[str]:
    command = [sys.executable, "-m", "das_asr.runtime.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def clips(demo_audio: list[tuple[Path, str, str]]) -> list[Path]:
    return [path for path, _, _ in demo_audio]


@pytest.fixture(scope="module")
def texts(demo_bundle: Path, clips: list[Path]) -> list[str]:
    """What the API says of the first two clips."""
    with Transcriber.load(demo_bundle, threads=1) as transcriber:
        return [transcriber.transcribe(path).text for path in clips[:2]]


def test_one_file_is_its_text(demo_bundle: Path, clips: list[Path], texts: list[str]) -> None:
    done = run("--bundle", demo_bundle, clips[0])
    assert (done.returncode, done.stdout, done.stderr) == (0, texts[0] + "\n", "")


def test_several_files_say_which_is_which(demo_bundle: Path, clips: list[Path], texts: list[str]) -> None:
    done = run("--bundle", demo_bundle, *clips[:2])
    assert done.returncode == 0
    assert done.stdout.splitlines() == [f"{path}: {text}" for path, text in zip(clips, texts, strict=False)]


def test_json_is_one_document_per_line(demo_bundle: Path, clips: list[Path], texts: list[str]) -> None:
    done = run("--bundle", demo_bundle, "--format", "json", *clips[:2])
    documents = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(item["file"], item["text"]) for item in documents] == list(zip(map(str, clips), texts, strict=False))
    assert documents[0]["rows"] == ["base", "music", "weather", "sports"]
    assert [item["adapter"] for item in documents[0]["hypotheses"]] == documents[0]["rows"]
    assert documents[0]["rtf"] == pytest.approx(documents[0]["timings"]["total"] / documents[0]["duration"])


def test_provenance_names_the_winner_and_where_it_departs(demo_bundle: Path, clips: list[Path]) -> None:
    with Transcriber.load(demo_bundle, threads=1) as transcriber:
        results = {path: transcriber.transcribe(path) for path in clips}
    path = next(path for path, result in results.items() if any(word.differs_from_base for word in result.words))
    done = run("--bundle", demo_bundle, "--provenance", path)
    line, legend = done.stdout.splitlines()
    departing = [word.word.strip() for word in results[path].words if word.differs_from_base]
    assert re.findall(rf"(\S+)\[{results[path].adapter}\]", line) == departing
    assert re.sub(r"\[\w+\]", "", line) == results[path].text
    assert legend.startswith(f"  hypothesis: {results[path].adapter} wins (base ")


def test_provenance_of_a_shared_history_counts_words_by_row(demo_bundle: Path, clips: list[Path]) -> None:
    done = run("--bundle", demo_bundle, "--provenance", "--rule", "paper", "--tau", 0.1, clips[0])
    counts = re.findall(r"(\w+) (\d+)", done.stdout.splitlines()[1].partition("row ")[2])
    assert [name for name, _ in counts] == ["base", "music", "weather", "sports"]
    assert sum(int(count) for _, count in counts) == len(done.stdout.splitlines()[0].split())


def test_one_bad_file_does_not_stop_the_others(
    demo_bundle: Path, clips: list[Path], texts: list[str], tmp_path: Path
) -> None:
    fake = tmp_path / "fake.wav"
    fake.write_text("this is not audio")
    done = run("--bundle", demo_bundle, clips[0], fake, tmp_path / "missing.flac", clips[1])
    assert done.returncode == 1
    assert done.stdout.splitlines() == [f"{path}: {text}" for path, text in zip(clips, texts, strict=False)]
    first, second, last = done.stderr.splitlines()
    assert first.startswith(f"{fake}: ")
    assert second.startswith(f"{tmp_path / 'missing.flac'}: ")
    assert last == "Error: 2 of 4 files could not be transcribed."


def test_adapters_are_chosen_and_added(demo_bundle: Path, demo_adapters: dict[str, Path], clips: list[Path]) -> None:
    more = f"again={demo_adapters['music']}"
    done = run(
        "--bundle", demo_bundle, "--format", "json", "--load-adapter", more, "--adapters", "again,sports", clips[0]
    )
    assert json.loads(done.stdout)["rows"] == ["base", "again", "sports"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tau", "2"], "tau is 2.0"),
        (["--adapters", "opera"], "There is no adapter 'opera'"),
        (["--device", "tpu"], "device is 'tpu'"),
        (["--threads", "0"], "threads is 0"),
        (["--rule", "paper", "--score", "total"], "score belongs to rule='hypothesis'"),
        (["--language", "xx"], "xx"),
        (["--device", "cuda", "--backend", "ort-tensorrt", "--cuda-graphs"], "cuda_graphs=True does not go with"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_options_are_one_message(demo_bundle: Path, clips: list[Path], options: list[str], message: str) -> None:
    done = run("--bundle", demo_bundle, *options, clips[0])
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], (False, False)),
        (["--cuda-graphs", "--allow-cpu-nodes"], (True, True)),
        (["--no-cuda-graphs", "--device", "cuda"], (False, False)),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options_for_gpus_reach_the_backend(
    demo_bundle: Path,
    clips: list[Path],
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    expected: tuple[bool, bool],
) -> None:
    """Without a GPU nothing runs with them, so the backend is asked for and not opened."""
    asked: list[BackendOptions] = []

    def create(
        _name: str, _directory: Path, _manifest: Manifest, given: BackendOptions, _precision: str | None
    ) -> None:
        asked.append(given)
        raise BackendError("not opened")

    monkeypatch.setattr(transcriber, "create_backend", create)
    done = CliRunner().invoke(main, ["--bundle", str(demo_bundle), *options, str(clips[0])])
    assert done.output == "Error: not opened\n"
    assert [(one.cuda_graphs, one.allow_cpu_nodes) for one in asked] == [expected]


def test_a_folder_that_is_no_bundle_is_one_message(tmp_path: Path, clips: list[Path]) -> None:
    done = run("--bundle", tmp_path, clips[0])
    assert done.returncode == 1
    assert done.stderr.startswith(f"Error: {tmp_path} is not a bundle")


def test_a_malformed_adapter_is_a_usage_error(demo_bundle: Path, clips: list[Path]) -> None:
    done = run("--bundle", demo_bundle, "--load-adapter", "music", clips[0])
    assert done.returncode == 2
    assert "NAME=DIR is expected" in done.stderr
