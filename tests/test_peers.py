"""`das-bench peers`: its sides, the processes that take turns, and the command with every peer that is installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from click.testing import CliRunner

from das_asr.benchmarks import machine, models
from das_asr.benchmarks.audio import window_audio
from das_asr.benchmarks.cli import main
from das_asr.benchmarks.peers.ctranslate import starts_with_words
from das_asr.benchmarks.peers.engines import ENGINES, Tools, UnavailableError, load_engine
from das_asr.benchmarks.peers.measure import run_peers
from das_asr.benchmarks.peers.process import SideProcess, convert
from das_asr.benchmarks.peers.report import render_peers, render_peers_table, standing
from das_asr.benchmarks.peers.sides import PeersOptions, Side, plan
from das_asr.benchmarks.systems import Work
from das_asr.benchmarks.vocabulary import Vocabulary
from das_asr.runtime.errors import DataError, OptionError

SMALL = models.RandomShape(
    d_model=64, layers=2, heads=4, ffn=128, window_seconds=2, text_positions=32,
    vocabulary=Vocabulary(text_tokens=400, languages=("en", "de")),
)  # fmt: skip
TOKENS = 8


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with machine.quiet_libraries():
        return models.make_checkpoint(tmp_path_factory.mktemp("models") / "small", SMALL)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def _command(cache: Path, *arguments: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "das_asr.benchmarks.cli", *map(str, arguments)]
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache)}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


# Sides


def test_own_histories_run_with_adapters_only_and_half_precision_with_float32() -> None:
    options = PeersOptions(engines=("whisper-cpp", "ctranslate2", "das", "das-hypothesis"), precisions=("int8",))
    assert [side.name for side in plan(options, (0, 3))] == [
        "ctranslate2 int8", "das int8 K=0", "das int8 K=3", "das-hypothesis int8 K=3",
    ]  # fmt: skip
    options = PeersOptions(engines=("whisper-cpp", "transformers"), precisions=("fp32",))
    assert list(plan(options, (0, 3))) == [Side("transformers", "fp32"), Side("whisper-cpp", "fp16")]


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"engines": ("kaldi",)}, "--peers has 'kaldi'"),
        ({"precisions": ("int2",)}, "--precision has 'int2'"),
        ({"domains": (-1,)}, "--domains -1"),
        ({"tokens": 1}, "--tokens 1"),
        ({"threads": 4096}, "--threads 4096"),
        ({"bundle": Path("b")}, "--speech"),
        ({"tools": Tools({"optimum-onnx": Path("/no/python")})}, "no such file"),
        ({"tools": Tools({"kaldi": Path(sys.executable)})}, "--python has 'kaldi'"),
    ],
)
def test_senseless_options_are_refused(choice: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        PeersOptions(**choice)


def test_results_or_preparation(tmp_path: Path) -> None:
    for arguments in ([], ["--prepare", "--output", str(tmp_path / "r.json")]):
        done = CliRunner().invoke(main, ["peers", *arguments])
        assert done.exit_code == 1
        assert "--prepare" in done.output


# Processes


def _state(process: SideProcess) -> str:
    """Letter of the process's state in /proc."""
    return Path(f"/proc/{process._process.pid}/stat").read_text().rpartition(")")[2].split()[0]


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads states of processes from /proc")
def test_a_side_runs_only_while_it_is_asked(checkpoint: Path) -> None:
    audio = window_audio(checkpoint)
    work = Work(checkpoint, (), TOKENS)
    process = SideProcess("transformers", work, Path(), Tools())
    try:
        assert _state(process) == "T"
        first, second = process.transcribe(audio), process.transcribe(audio)
        assert _state(process) == "T"
        assert process.versions.keys() == {"transformers", "torch"}
        assert first.tokens == second.tokens
        assert len(first.tokens) == TOKENS
        assert len(first.steps) == TOKENS - 1
        assert first.total > first.features + first.encoder > 0
        assert 100 < process.finish() < 4000
    finally:
        process.close()


def test_what_a_peer_cannot_do_is_a_reason(checkpoint: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    with pytest.raises(UnavailableError, match=r"cannot be read as JSON|OSError"):
        SideProcess("transformers", Work(broken, (), TOKENS), Path(), Tools())
    name = next(name for name in ("openai-whisper", "whisper-cpp") if not _missing(name))
    with pytest.raises(UnavailableError, match=r"fixed to those of the published models|is not installed"):
        convert(name, "fp32", checkpoint, tmp_path / name, Tools())
    assert not (tmp_path / name).exists()


def _missing(name: str) -> str | None:
    """Why a peer cannot run in this interpreter."""
    try:
        load_engine(name)
    except UnavailableError as error:
        return str(error)
    return None


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nobody ends a child")
def test_a_child_ends_with_its_parent_however_that_ends(tmp_path: Path) -> None:
    child = f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    code = "import sys; from das_asr.benchmarks.children import run_child; "
    code += f"run_child([sys.executable, '-c', {child!r}])"
    parent = subprocess.Popen([sys.executable, "-c", code])
    _wait(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text() != "")
    pid = int((tmp_path / "pid").read_text())
    parent.kill()
    parent.wait()
    _wait(lambda: not Path(f"/proc/{pid}").exists())


def _wait(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


# The command


def test_the_command_compares_what_is_there(checkpoint: Path, cache: Path, tmp_path: Path) -> None:
    arguments = ["peers", "--model", checkpoint, "--domains", "0,2", "--rank", 4, "--tokens", TOKENS, "--repeats", 2]
    arguments += ["--peers", "transformers,ctranslate2,openai-whisper,das,das-hypothesis", "--warmup", 0]
    done = _command(cache, *arguments, "--output", tmp_path / "r.json", "--markdown", tmp_path / "r.md")
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "r.json").read_text())
    runs = {run["side"]: run for run in result["runs"]}
    ours = ["das fp32 K=0", "das fp32 K=2", "das int8 K=0", "das int8 K=2"]
    ours += ["das-hypothesis fp32 K=2", "das-hypothesis int8 K=2"]
    theirs = [] if _missing("ctranslate2") else ["ctranslate2 fp32", "ctranslate2 int8"]
    assert list(runs) == ["transformers fp32", *theirs, *ours]
    for name, run in runs.items():
        assert run["agreement"]["written"] == TOKENS
        assert run["repeatable"]
        assert run["from_features_ms"]["n"] == 2
        assert run["ratios"]["transformers fp32"]["median"] > 0
        assert run["memory_mib"] > 20
        assert ("demand" in run) == name.startswith("das")
        if "fp32" in name:
            assert run["agreement"]["equal"] == TOKENS, name
    assert runs["das fp32 K=0"]["agreement"]["with"] == "transformers fp32"
    wide, narrow = (runs[f"das {precision} K=2"]["demand"]["step"] for precision in ("fp32", "int8"))
    assert narrow["bytes"] < wide["bytes"]
    assert narrow["fp32"] + narrow["int8"] == wide["fp32"]
    assert narrow["int8"] > 0
    assert runs["transformers fp32"]["ratios"]["transformers fp32"]["median"] == 1
    refused = {item["engine"] for item in result["refused"]}
    assert refused == {"sherpa-onnx", "openai-whisper"} | (set() if theirs else {"ctranslate2"})
    text = (tmp_path / "r.md").read_text()
    for words in ("Peak of memory", "The floor", "Not compared", "DAS, own histories, int8, K = 2", "sherpa-onnx"):
        assert words in text
    assert "(0.70)" not in text  # what is aimed at belongs to other sizes
    outputs = ["--plot", tmp_path / "r.png", "--markdown", tmp_path / "again.md"]
    assert CliRunner().invoke(main, ["report", str(tmp_path / "r.json"), *map(str, outputs)]).exit_code == 0
    assert (tmp_path / "again.md").read_text() == text
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")


def test_aims_are_shown_for_the_sizes_that_they_are_of() -> None:
    summary = {"median": 1.0, "p95": 1.0, "min": 1.0, "n": 1}
    run = {
        "engine": "das", "precision": "fp32", "domains": 0, "ratios": {"ctranslate2 fp32": {**summary, "median": 0.71}},
        "from_features_ms": summary, "encoder_ms": summary, "token_ms": summary, "memory_mib": 100.0,
        "features_ms": summary, "prefill_ms": summary, "step_ms": None, "host_ms": None, "versions": {},
        "agreement": {"with": "das fp32 K=0", "equal": 30, "of": 30, "written": 30},
    }  # fmt: skip
    result = {
        "arguments": {"model": models.BASE_RANDOM, "tokens": 30, "threads": 1, "rank": 32, "repeats": 1, "spinning": 0},
        "machine": {"processor": "p", "architecture": "a", "cores": 1}, "date": "2026-01-02T", "window_seconds": 30.0,
        "runs": [run], "refused": [], "speech": None, "rates": {"read": 1.0, "fp32": 1.0, "int8": 1.0},
    }  # fmt: skip
    assert "| 0 | 0.71 (0.70) | - |" in render_peers([result])


def _forced(threads: int, **ratios: float) -> dict[str, Any]:
    """A result of DAS alone with round numbers; `ratios` are those of K = 3 to K = 0."""
    summary = {"median": 1.0, "p95": 1.0, "min": 1.0, "n": 1}
    parts = dict.fromkeys((f"{part}_ms" for part in ("from_features", "encoder", "token")), summary)
    runs = [
        {
            "engine": "das", "precision": "fp32", "domains": domains, "memory_mib": 100.0, "versions": {}, **parts,
            "ratios": {"ctranslate2 fp32": {**summary, "median": 0.8 + domains / 10}},
        }
        for domains in (0, 3)
    ]  # fmt: skip
    for run, ratio in zip(runs, (1.0, *ratios.values()), strict=False):
        if ratios:
            run["ratios"]["das fp32 K=0"] = {**summary, "median": ratio}
    return {
        "arguments": {"model": "m", "tokens": 30, "threads": threads, "rank": 4, "repeats": 1, "spinning": 0},
        "machine": {"processor": "p", "architecture": "a", "cores": 1, "load_before": threads}, "date": "2026-01-02T",
        "window_seconds": 30.0, "runs": runs, "refused": [], "speech": None,
    }  # fmt: skip


def standing_text(results: list[dict[str, Any]]) -> str:
    return "\n".join(standing(results))


def test_what_adapters_add_is_a_median_of_ratios_within_a_repeat() -> None:
    assert "| 3 | 9.4 | 25.0 | - | - | - |" in standing_text([_forced(1, three=1.25)])
    assert "in % (medians of the ratios within a repeat)" in standing_text([_forced(1, three=1.25)])
    older = standing_text([_forced(1)])
    assert "| 3 | 9.4 | 37.5 | - | - | - |" in older
    assert "in % (quotients of the medians above)" in older


def test_one_report_is_of_one_comparison() -> None:
    one, two = _forced(1, three=1.25), _forced(2, three=1.25)
    one["runs"][0]["versions"], two["runs"][1]["versions"] = {"x": "5.0", "y": "1"}, {"x": "4.0"}
    assert "; x 5.0 and 4.0, y 1; 2026-01-02." in render_peers_table([two, one])
    two["arguments"]["repeats"] = 7
    with pytest.raises(OptionError, match="One result has repeats 1, another 7"):
        render_peers_table([one, two])
    two["arguments"]["repeats"], two["machine"]["cores"] = 1, 64
    with pytest.raises(OptionError, match="One result has cores 1, another 64"):
        render_peers_table([one, two])


@pytest.mark.parametrize(("listed", "expected"), [([220, 50257], True), ([], False), (None, False)])
def test_texts_begin_as_the_checkpoint_has_it(listed: list[int] | None, expected: bool, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"begin_suppress_tokens": listed}))
    assert starts_with_words(tmp_path) == expected


def test_speech_that_cannot_be_compared_is_refused_before_anything_is_measured(
    demo_base: Path, demo_bundle: Path, demo_audio: list[tuple[Path, str, str]], checkpoint: Path, tmp_path: Path
) -> None:
    path, text, _ = demo_audio[0]
    soundfile.write(tmp_path / "long.wav", np.zeros(16000 * 31), 16000)
    lines = [{"file_name": str(path), "text": text}, {"file_name": "long.wav", "text": text}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(DataError, match=r"1 of 2 utterances are not between .* first long.wav"):
        run_peers(PeersOptions(model=str(demo_base), speech=tmp_path, bundle=demo_bundle), _never)
    with pytest.raises(OptionError, match="Give a bundle of that model"):
        run_peers(PeersOptions(model=str(checkpoint), speech=tmp_path, bundle=demo_bundle), _never)


def _never(text: str) -> None:
    raise AssertionError(text)  # whoever logs has begun to work


def test_speech_has_word_errors_beside_time(
    demo_base: Path, demo_bundle: Path, demo_audio: list[tuple[Path, str, str]], cache: Path, tmp_path: Path
) -> None:
    lines = [json.dumps({"file_name": str(path), "text": text}) for path, text, _ in demo_audio[:4]]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    arguments = ["peers", "--model", demo_base, "--domains", "none", "--speech", tmp_path, "--bundle", demo_bundle]
    arguments += ["--precision", "fp32,int8", "--repeats", 1, "--warmup", 0, "--output", tmp_path / "r.json"]
    done = _command(cache, *arguments, "--peers", "transformers,ctranslate2,das,das-hypothesis")
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "r.json").read_text())
    speech = result["speech"]
    assert (speech["clips"], result["runs"]) == (4, [])
    heard = speech["runs"]
    assert {"transformers fp32", "das fp32 K=0", "das fp32 K=3", "das-hypothesis fp32 K=3"} <= heard.keys()
    lacking = {(item["engine"], item["precision"]): item["reason"] for item in speech["refused"]}
    assert lacking["das", "int8"] == "--bundle has fp32 and no int8"
    alone = [heard[name] for name in heard if "fp32" in name and ("K=" not in name or "K=0" in name)]
    assert len({(item["wer"], item["tokens"]) for item in alone}) == 1  # the base alone writes the same everywhere
    assert 0 <= heard["das-hypothesis fp32 K=3"]["wer"] <= alone[0]["wer"] < 0.5
    assert "x CTranslate2" in render_peers([result])


@pytest.mark.parametrize("name", [name for name, info in ENGINES.items() if not info.domains])
def test_every_peer_that_is_installed_writes_what_transformers_writes(
    name: str, tmp_path: Path, one_torch_thread: None
) -> None:
    if reason := _missing(name):
        pytest.skip(reason)
    if name == "whisper-cpp":
        pytest.skip("needs a checkout of whisper.cpp")
    # Sizes small, but window and vocabulary those of the published models, to which some peers are tied.
    shape = models.RandomShape(d_model=64, layers=1, heads=1, ffn=256)
    with machine.quiet_libraries():
        checkpoint = models.make_checkpoint(tmp_path / "published", shape)
    convert(name, "fp32", checkpoint, tmp_path / "converted", Tools())
    written = []
    for engine in ("transformers", name):
        process = SideProcess(engine, Work(checkpoint, (), TOKENS), tmp_path / "converted", Tools())
        written.append(process.transcribe(window_audio(checkpoint)).tokens)
        process.close()
    assert written[0] == written[1]
    assert len(written[0]) == TOKENS


@pytest.mark.parametrize("name", ["ctranslate2", "faster-whisper"])
def test_the_first_token_is_suppressed_as_the_checkpoint_has_it(
    name: str, tmp_path: Path, one_torch_thread: None
) -> None:
    """These two take the list from the checkpoint; others have that of the published models built in."""
    if reason := _missing(name):
        pytest.skip(reason)
    with machine.quiet_libraries():
        checkpoint = models.make_checkpoint(
            tmp_path / "published", models.RandomShape(d_model=64, layers=1, heads=1, ffn=256)
        )
    before = _written("transformers", checkpoint, Path())
    settings = json.loads((checkpoint / "generation_config.json").read_text())
    (checkpoint / "generation_config.json").write_text(json.dumps(settings | {"begin_suppress_tokens": [before[0]]}))
    convert(name, "fp32", checkpoint, tmp_path / "converted", Tools())
    expected = _written("transformers", checkpoint, Path())
    assert expected[0] != before[0]
    assert _written(name, checkpoint, tmp_path / "converted") == expected


def _written(name: str, checkpoint: Path, folder: Path) -> tuple[int, ...]:
    process = SideProcess(name, Work(checkpoint, (), TOKENS), folder, Tools())
    try:
        return process.transcribe(window_audio(checkpoint)).tokens
    finally:
        process.close()
