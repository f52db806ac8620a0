"""ONNX Runtime's TensorRT provider, as far as it can be tried without one: on the CPU, and what is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from das_asr.runtime import BackendError, OptionError, Transcriber
from das_asr.runtime.adapters import read_stack
from das_asr.runtime.backends import BackendOptions, ort_tensorrt, sessions
from das_asr.runtime.backends.memory import HostMemory
from das_asr.runtime.backends.onnxruntime_static import on_both, open_graphs
from das_asr.runtime.backends.ort_tensorrt import limits_of, profiles, refuse_larger
from das_asr.runtime.backends.placement import CPU
from das_asr.runtime.backends.tensorrt_library import installed_libraries
from das_asr.runtime.contract import DECODER_STATIC_FILE, ENCODER_FILE
from das_asr.runtime.manifest import read_manifest

Clips = list[tuple[Path, str, str]]


@pytest.fixture
def transcriber(demo_bundle: Path) -> Iterator[Transcriber]:
    """The graphs as this backend opens them, on the CPU."""
    manifest = read_manifest(demo_bundle)
    stack = read_stack(demo_bundle, [entry.name for entry in manifest.adapters], manifest.dimensions)
    check = partial(refuse_larger, limits_of(manifest))
    backend = open_graphs(
        demo_bundle, manifest, BackendOptions(threads=1), HostMemory(ahead=True), on_both({CPU: {}}), stack, check
    )
    with Transcriber(manifest, demo_bundle, backend) as opened:
        yield opened


def texts(results: list[Any]) -> list[Any]:
    return [(result.tokens, result.adapter, [token.row for token in result.provenance]) for result in results]


def test_adapters_are_fed_and_swapped(
    transcriber: Transcriber, demo_bundle: Path, demo_adapters: dict[str, Path], demo_audio: Clips
) -> None:
    clips = [path for path, _, _ in demo_audio[:4]]
    with Transcriber.load(demo_bundle, threads=1) as growing:
        assert texts(transcriber.transcribe_batch(clips)) == texts(growing.transcribe_batch(clips))
        for opened in (transcriber, growing):
            opened.unload_adapter("music")
            opened.load_adapter("renamed", demo_adapters["music"])
        for choice in ({}, {"adapters": ("renamed",)}, {"rule": "base"}):
            assert texts(transcriber.transcribe_batch(clips, **choice)) == texts(
                growing.transcribe_batch(clips, **choice)
            )


def test_more_than_the_engines_take_is_refused(transcriber: Transcriber, demo_audio: Clips) -> None:
    with pytest.raises(BackendError, match=r"takes up to 8 utterances, 26 rows.*rank 64; 9 utterance\(s\), 4 rows"):
        transcriber.transcribe_batch([demo_audio[0][0]] * 9)


def test_the_bundles_own_adapters_are_within_the_profiles(demo_bundle: Path) -> None:
    manifest = read_manifest(demo_bundle)
    large = tuple(dataclasses.replace(entry, rank=100) for entry in manifest.adapters)
    manifest = dataclasses.replace(manifest, adapters=large * 10)
    refuse_larger(limits_of(manifest), 8, 31, 100)
    for file, name in ((ENCODER_FILE, "lora_cv_a0"), (DECODER_STATIC_FILE, "lora_sq_a0")):
        _, usual, largest = profiles(manifest)[file].shapes[name]
        assert (usual[0], usual[1], usual[3]) == (1, 31, 100)
        assert (largest[0], largest[1], largest[3]) == (1, 31, 100)


def test_recording_steps_is_refused(demo_bundle: Path) -> None:
    with pytest.raises(OptionError, match=r"cuda_graphs=True does not go with backend='ort-tensorrt'"):
        Transcriber.load(demo_bundle, "cuda", backend="ort-tensorrt", cuda_graphs=True)


@pytest.mark.parametrize("choice", [{"device": "cuda", "backend": "ort-tensorrt"}, {}])
def test_only_engines_are_of_a_library(demo_bundle: Path, choice: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=r"library='tensorrt' is for backend='tensorrt'"):
        Transcriber.load(demo_bundle, library="tensorrt", **choice)


@pytest.mark.skipif("tensorrt" in installed_libraries(), reason="is about a machine without the library")
def test_the_library_is_loaded_before_the_provider(demo_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where ONNX Runtime itself has the provider, which here it has not."""
    monkeypatch.setattr(sessions, "require_provider", lambda _: None)
    with pytest.raises(BackendError, match=r"tensorrt is not installed\. Install `das-asr\[tensorrt\]`"):
        ort_tensorrt.load_backend(demo_bundle, demo_bundle, read_manifest(demo_bundle), BackendOptions("cuda"))
