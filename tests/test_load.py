"""The load test: requests are served or refused, and figures hang together; a peer's batched pipeline beside it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from das_asr.benchmarks import machine, models
from das_asr.benchmarks.audio import find_audio, window_audio
from das_asr.benchmarks.cli import main
from das_asr.benchmarks.load_options import LoadOptions
from das_asr.benchmarks.load_peer import COMPARED, NOT_COMPARED, check_peer, measure_peer, render_peer
from das_asr.benchmarks.peers.engines import ENGINES, Tools, UnavailableError, versions_of
from das_asr.benchmarks.peers.process import SideProcess, convert
from das_asr.benchmarks.systems import Work
from das_asr.benchmarks.vocabulary import Vocabulary
from das_asr.runtime.audio import load_audio
from das_asr.runtime.errors import DasError, OptionError
from tests.bundles import make_bundle

PEER = "faster-whisper"
PUBLISHED_WINDOW = models.RandomShape(
    d_model=64, layers=2, heads=4, ffn=128, text_positions=32,
    vocabulary=Vocabulary(text_tokens=400, languages=("en", "de")),
)  # fmt: skip
"""Small, but with the window of the published models, which the peer's pipeline has built in."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with machine.quiet_libraries():
        return models.make_checkpoint(tmp_path_factory.mktemp("models") / "small", PUBLISHED_WINDOW)


@pytest.fixture(scope="module")
def bundle(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with machine.quiet_libraries():
        adapters = models.make_adapters(checkpoint, checkpoint.parent / "adapters", 4, 2)
    return make_bundle(checkpoint, {path.name: path for path in adapters}, tmp_path_factory.mktemp("bundles") / "b")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the peer converts goes nowhere else."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def _load(bundle: Path, audio: Path, output: Path, *options: object) -> Result:
    arguments = ["load", "--bundle", bundle, "--audio", audio, "--output", output, *options]
    return CliRunner().invoke(main, list(map(str, arguments)))


def _needs_peer() -> None:
    try:
        versions_of(PEER)
    except UnavailableError as error:
        pytest.skip(str(error))


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
        (["--peer", PEER], "Give both, or neither"),
        (["--base", "benchmarks/demo/base"], "Give both, or neither"),
        (["--repeats", "0"], "--repeats is 0"),
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


# --- The peer ---


def test_the_batched_pipeline_writes_what_the_peer_writes_of_each_clip_alone(checkpoint: Path, tmp_path: Path) -> None:
    _needs_peer()
    window = window_audio(checkpoint)
    noise = np.random.default_rng(1).standard_normal(len(window)).astype(np.float32)
    clips = [window, noise, noise[:-4001]]  # cut a little, for the pipeline pads otherwise
    convert(PEER, "fp32", checkpoint, tmp_path / "converted", Tools())
    process = SideProcess(PEER, Work(checkpoint, (), None), tmp_path / "converted", Tools())
    try:
        alone = tuple(process.transcribe(clip).tokens for clip in clips)
        burst = process.transcribe_all(clips, 2)
    finally:
        process.close()
    assert burst.tokens == alone
    assert burst.seconds > 0
    assert alone[0] != alone[1]  # or their order would not be tested


def test_the_command_compares_with_the_peer(bundle: Path, checkpoint: Path, repo: Path, tmp_path: Path) -> None:
    _needs_peer()
    options = ["--requests", 10, "--rates", 1, "--max-batch", 4, "--repeats", 2, "--peer", PEER, "--base", checkpoint]
    done = _load(bundle, repo / "benchmarks/demo/audio", tmp_path / "load.json", *options)
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "load.json").read_text())["peer"]
    assert (found["utterances"], found["precision"], found["refused"]) == (10, "fp32", None)
    assert found["versions"] == versions_of(PEER)
    runs = {(run["system"], run["domains"], run["batch"]): run for run in found["runs"]}
    sides = ((PEER, 0), ("das", 0), ("das", 2))
    assert set(runs) == {(*side, batch) for side in sides for batch in (1, 4)}
    limit = PUBLISHED_WINDOW.text_positions // 2
    assert found["max_tokens"] == limit
    for (system, domains, batch), run in runs.items():
        middle = sum(run["seconds"]) / 2
        assert len(run["seconds"]) == 2
        assert run["tokens"] == 10 * limit  # random weights never end a text, so everybody writes up to the limit
        assert run["tokens_per_second"] == pytest.approx(run["tokens"] / middle)
        assert run["rtfx"] == pytest.approx(found["audio_seconds"] / middle)
        pairs = zip(run["seconds"], runs[PEER, 0, batch]["seconds"], strict=True)
        assert run["ratio_to_peer"]["median"] == pytest.approx(sum(mine / other for mine, other in pairs) / 2)
        assert (run["same_texts"] is None) == (domains > 0)
        assert system != PEER or run["same_texts"] == 10
    assert runs["das", 0, 4]["same_texts"] == runs["das", 0, 1]["same_texts"]
    for words in ("Beside faster-whisper", "| DAS, K = 2 | 4 |", *COMPARED, *NOT_COMPARED):
        assert words in done.stdout


def _peer_options(bundle: Path, base: Path, **choices: Any) -> LoadOptions:
    return LoadOptions(bundle=bundle, audio=(), peer=PEER, base=base, max_batch=2, **choices)


def test_a_checkpoint_that_the_pipeline_cannot_batch_is_not_comparable(
    demo_bundle: Path, demo_base: Path, repo: Path
) -> None:
    """The demo's window is 8 s."""
    _needs_peer()
    clips = [load_audio(path, target_rate=16_000) for path in find_audio([repo / "benchmarks/demo/audio"])[:2]]
    options = _peer_options(demo_bundle, demo_base)
    check_peer(options)
    found = measure_peer(options, clips, [].append)
    assert (
        found["refused"] == "its batched pipeline pads every utterance to 3000 frames; this checkpoint's window has 800"
    )
    assert found["runs"] == []
    assert f"Not comparable with this checkpoint: {found['refused']}" in render_peer(found)


def test_what_cannot_be_compared_at_all_is_refused(
    demo_bundle: Path, demo_base: Path, checkpoint: Path, tmp_path: Path
) -> None:
    _needs_peer()
    refused: list[tuple[dict[str, Any], type[DasError], str]] = [
        ({"base": tmp_path / "nothing"}, OptionError, "--base .*nothing' is neither .* nor a Whisper checkpoint"),
        ({"base": checkpoint}, OptionError, "--base .* has .* Give a bundle of that model"),
        ({"precision": "int4"}, OptionError, "--precision is int4, faster-whisper has fp32 and int8"),
        ({"threads": 4096}, OptionError, "--threads 4096"),
    ]
    for choices, error, message in refused:
        with pytest.raises(error, match=message):
            check_peer(replace(_peer_options(demo_bundle, demo_base), **choices))


def test_a_peer_that_is_not_installed_is_one_message(
    demo_bundle: Path, demo_base: Path, repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ENGINES, PEER, replace(ENGINES[PEER], distributions=("das-asr-no-such-package",)))
    options = ["--peer", PEER, "--base", demo_base]
    done = _load(demo_bundle, repo / "benchmarks/demo/audio", tmp_path / "load.json", *options)
    assert done.exit_code == 1
    assert "das-asr-no-such-package is not installed; see the extra `peers`" in done.output
    assert not (tmp_path / "load.json").exists()
