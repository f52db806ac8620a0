"""Adapters loaded into and taken out of a running Transcriber: the same as a bundle exported with that set."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from das_asr.runtime import AdapterError, OptionError, StepCandidates, Transcriber, Transcription
from tests.bundles import make_bundle
from tests.checkpoints import make_adapter, make_base
from tests.rules import Gate

Clips = list[tuple[Path, str, str]]
Bundles = Callable[..., Path]


@pytest.fixture(scope="module")
def bundles(
    tmp_path_factory: pytest.TempPathFactory, demo_base: Path, demo_adapters: dict[str, Path], wide: Path
) -> Bundles:
    """Makes, once each, bundles of the demo base with the named adapters."""
    folder = tmp_path_factory.mktemp("bundles")
    known = {**demo_adapters, "wide": wide}

    def make(*names: str) -> Path:
        output = folder / "-".join(("base", *names))
        return output if output.exists() else make_bundle(demo_base, {name: known[name] for name in names}, output)

    return make


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory, demo_base: Path) -> Path:
    """An adapter for the demo base of a larger rank than any of the demo's."""
    return make_adapter(demo_base, tmp_path_factory.mktemp("wide") / "wide", rank=80, alpha=40, scale_b=0.1)


@pytest.fixture
def clips(demo_audio: Clips) -> list[Path]:
    return [path for path, _, _ in demo_audio[1:8:5]]


class Recorder:
    """Chooses the most confident row and keeps the logits of every step."""

    name = "recorder"
    needs_logits = True

    def __init__(self) -> None:
        self.logits: list[NDArray[np.float32]] = []

    def choose(self, step: StepCandidates) -> Any:
        assert step.logits is not None
        self.logits.append(step.logits)
        return step.logprobs.argmax(axis=1)


def assert_same(one: Transcriber, other: Transcriber, clips: list[Path]) -> None:
    """Tokens, rows and logits of two Transcribers agree."""
    assert one.adapters == other.adapters
    for rule in ("hypothesis", "paper"):
        for here, there in zip(
            one.transcribe_batch(clips, rule=rule), other.transcribe_batch(clips, rule=rule), strict=True
        ):
            assert written(here) == written(there)
    recorders = Recorder(), Recorder()
    one.transcribe_batch(clips, rule=recorders[0])
    other.transcribe_batch(clips, rule=recorders[1])
    logits = [np.stack(recorder.logits) for recorder in recorders]
    assert logits[0].shape == logits[1].shape
    difference = np.abs(logits[0] - logits[1])
    assert difference.max() < 1e-5, f"logits differ by {difference.max():.2g}, on average by {difference.mean():.2g}"


def written(result: Transcription) -> tuple[Any, ...]:
    return result.rows, result.tokens, [token.row for token in result.provenance], [
        item.tokens for item in result.hypotheses
    ]  # fmt: skip


def test_a_loaded_adapter_is_a_row_like_those_of_the_bundle(
    bundles: Bundles, demo_adapters: dict[str, Path], clips: list[Path]
) -> None:
    with (
        Transcriber.load(bundles("music", "weather"), threads=1) as running,
        Transcriber.load(bundles("music", "weather", "sports"), threads=1) as exported,
    ):
        before = [written(result) for result in running.transcribe_batch(clips)]
        running.load_adapter("sports", demo_adapters["sports"])
        assert_same(running, exported, clips)
        running.unload_adapter("sports")
        assert [written(result) for result in running.transcribe_batch(clips)] == before


def test_an_unloaded_adapter_is_gone(bundles: Bundles, clips: list[Path]) -> None:
    with (
        Transcriber.load(bundles("music", "weather", "sports"), threads=1) as running,
        Transcriber.load(bundles("music", "sports"), threads=1) as exported,
    ):
        running.unload_adapter("weather")
        assert_same(running, exported, clips)
        with pytest.raises(OptionError, match="no adapter 'weather'"):
            running.transcribe(clips[0], adapters=("weather",))


def test_a_bundle_of_the_base_alone_takes_adapters(
    bundles: Bundles, demo_adapters: dict[str, Path], clips: list[Path]
) -> None:
    with (
        Transcriber.load(bundles(), threads=1) as running,
        Transcriber.load(bundles("music", "weather", "sports"), threads=1) as exported,
    ):
        assert running.adapters == ()
        for name, directory in demo_adapters.items():
            running.load_adapter(name, directory)
        assert_same(running, exported, clips)


def test_all_adapters_may_be_taken_out(bundles: Bundles, clips: list[Path]) -> None:
    with (
        Transcriber.load(bundles("music", "sports"), threads=1) as running,
        Transcriber.load(bundles(), threads=1) as exported,
    ):
        running.unload_adapter("music")
        running.unload_adapter("sports")
        assert_same(running, exported, clips)


def test_an_adapter_of_a_larger_rank_than_the_bundles(bundles: Bundles, wide: Path, clips: list[Path]) -> None:
    with (
        Transcriber.load(bundles("music"), threads=1) as running,
        Transcriber.load(bundles("music", "wide"), threads=1) as exported,
    ):
        assert exported.manifest.adapters[1].rank == 80 > exported.manifest.adapters[0].rank
        running.load_adapter("wide", wide)
        assert_same(running, exported, clips)


def test_a_name_can_be_given_to_another_adapter(
    bundles: Bundles, demo_adapters: dict[str, Path], clips: list[Path]
) -> None:
    with (
        Transcriber.load(bundles("music", "weather"), threads=1) as running,
        Transcriber.load(bundles("sports"), threads=1) as exported,
    ):
        first = written(running.transcribe(clips[0], adapters=("music",)))
        running.unload_adapter("music")
        running.load_adapter("music", demo_adapters["sports"])
        second = running.transcribe(clips[0], adapters=("music",))
        assert second.rows == ("base", "music")
        assert written(second) != first
        assert written(second)[1:] == written(exported.transcribe(clips[0]))[1:]


def test_subsets_follow_the_set(bundles: Bundles, demo_adapters: dict[str, Path], clips: list[Path]) -> None:
    with Transcriber.load(bundles("music", "weather"), threads=1) as running:
        weather = written(running.transcribe(clips[0], adapters=("weather",)))
        running.load_adapter("sports", demo_adapters["sports"])
        assert written(running.transcribe(clips[0], adapters=("weather",))) == weather
        assert running.transcribe(clips[0], adapters=("sports", "music")).rows == ("base", "sports", "music")


# --- What cannot be loaded ---


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory, demo_adapters: dict[str, Path]) -> dict[str, Path]:
    """Folders that are no adapters of the demo base, by what is wrong with them."""
    folder = tmp_path_factory.mktemp("bad")
    folders = {name: folder / name for name in ("cut", "unnamed", "empty", "other")}
    for name in ("cut", "unnamed"):
        shutil.copytree(demo_adapters["sports"], folders[name])
    weights = folders["cut"] / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    (folders["unnamed"] / "adapter_config.json").unlink()
    folders["empty"].mkdir()
    make_adapter(make_base(folder / "base", d_model=32), folders["other"])
    return {**folders, "missing": folder / "missing"}


@pytest.fixture(scope="module")
def running(bundles: Bundles) -> Iterator[Transcriber]:
    with Transcriber.load(bundles("music", "weather"), threads=1) as transcriber:
        yield transcriber


@pytest.mark.parametrize("kind", ["cut", "unnamed", "empty", "other", "missing"])
def test_a_bad_adapter_leaves_the_set_as_it_was(
    running: Transcriber, bad: dict[str, Path], clips: list[Path], kind: str
) -> None:
    before = written(running.transcribe(clips[0]))
    with pytest.raises(AdapterError, match=kind):
        running.load_adapter("sports", bad[kind])
    assert running.adapters == ("music", "weather")
    assert written(running.transcribe(clips[0])) == before


@pytest.mark.parametrize("name", ["music", "Music", "base", "../x", ""])
def test_a_bad_name_leaves_the_set_as_it_was(
    running: Transcriber, demo_adapters: dict[str, Path], clips: list[Path], name: str
) -> None:
    before = running.transcribe(clips[0])
    with pytest.raises(OptionError, match=r"named|cannot name"):
        running.load_adapter(name, demo_adapters["sports"])
    assert running.adapters == ("music", "weather")
    assert written(running.transcribe(clips[0])) == written(before)
    swapped = running.transcribe(clips[0], adapters=("weather", "music"))  # made anew from what is known of each
    texts = {item.adapter: item.tokens for item in before.hypotheses}
    assert {item.adapter: item.tokens for item in swapped.hypotheses} == texts


def test_an_adapter_that_is_not_loaded_cannot_be_unloaded(running: Transcriber) -> None:
    with pytest.raises(OptionError, match="no adapter 'sports' to unload; loaded: music, weather"):
        running.unload_adapter("sports")
    assert running.adapters == ("music", "weather")


def test_a_failure_of_the_device_leaves_the_set_as_it_was(
    running: Transcriber, demo_adapters: dict[str, Path], clips: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(stack: Any) -> Any:
        raise MemoryError

    before = written(running.transcribe(clips[0]))
    with monkeypatch.context() as patch:
        patch.setattr(running._backend, "load_stack", fail)
        with pytest.raises(MemoryError):
            running.load_adapter("sports", demo_adapters["sports"])
    assert running.adapters == ("music", "weather")
    assert written(running.transcribe(clips[0])) == before


# --- Requests in flight ---


class Ungated(Gate):
    """The same without the halt."""

    def choose(self, step: StepCandidates) -> Any:
        return step.logprobs.argmax(axis=1)


@pytest.mark.parametrize("change", ["load", "unload"])
def test_a_running_request_keeps_the_set_it_started_with(
    bundles: Bundles, demo_adapters: dict[str, Path], clips: list[Path], change: str
) -> None:
    with Transcriber.load(bundles("music", "weather"), threads=1) as running:
        undisturbed = written(running.transcribe(clips[0], rule=Ungated()))
        gate, results = Gate(2), []
        request = threading.Thread(target=lambda: results.append(running.transcribe(clips[0], rule=gate)))
        request.start()
        assert gate.reached.wait(30)
        if change == "load":
            running.load_adapter("sports", demo_adapters["sports"])
        else:
            running.unload_adapter("music")
        after = running.transcribe(clips[0], rule=Ungated())  # another request is not held up
        gate.opened.set()
        request.join(30)
        assert written(results[0]) == undisturbed
        assert after.rows == ("base", *running.adapters) != results[0].rows
