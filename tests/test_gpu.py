"""Every way to run on a GPU, compared with float32 on the CPU. Skipped, with the reason, where something is missing.

pytest -m gpu tests/test_gpu.py
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from das_asr.export import EngineOptions, build_engines
from das_asr.export.half import write_half
from das_asr.export.variants import MOST_DIFFERENT, compare_with_float32
from das_asr.runtime import BackendError, Transcriber
from das_asr.runtime.adapter_sets import AdapterSets
from das_asr.runtime.audio import load_audio
from das_asr.runtime.backends import BackendOptions, create_backend
from das_asr.runtime.backends.base import Control
from das_asr.runtime.backends.cuda_device import gpu_target
from das_asr.runtime.backends.tensorrt_library import installed_libraries
from das_asr.runtime.manifest import Manifest, read_manifest, write_manifest
from das_asr.runtime.options import DecodingOptions
from das_asr.runtime.scheduler import SchedulerOptions
from tests.bundles import make_bundle
from tests.rules import CHOICES, LONG_PROMPT

# Where ONNX Runtime's CUDA libraries are not installed beside it, those that PyTorch brings will do, once loaded.
pytest.importorskip("torch", reason="needs PyTorch")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(gpu_target() is None, reason="there is no CUDA device, or no driver for it"),
    pytest.mark.skipif(importlib.util.find_spec("cuda") is None, reason="needs cuda-bindings"),
]

Clips = list[tuple[Path, str, str]]
TOLERANCE = {"fp32": 1e-3, "fp16": 2e-2, "bf16": 1e-1}  # of logits, relative to the largest
REQUESTS = 1000
GROWTH = 16 << 20  # bytes of device memory; the driver itself gives it out in pieces of 2 MiB


@dataclass(frozen=True)
class Way:
    """One way to run on a GPU."""

    backend: str
    precision: str
    cuda_graphs: bool

    def load(self, bundle: Path, **choices: Any) -> Transcriber:
        return Transcriber.load(bundle, "cuda", **self.choices, **choices)

    @property
    def choices(self) -> dict[str, Any]:
        return {"backend": self.backend, "precision": self.precision, "cuda_graphs": self.cuda_graphs}

    def __str__(self) -> str:
        return f"{self.backend}-{self.precision}{'-graphs' if self.cuda_graphs else ''}"


WAYS = [
    Way(backend, precision, cuda_graphs)
    for backend in ("onnxruntime", "ort-tensorrt", "tensorrt")
    for precision in ("fp32", "fp16", "bf16")
    for cuda_graphs in (False, True)
    if not (cuda_graphs and backend == "ort-tensorrt")
]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, demo_base: Path, demo_adapters: dict[str, Path]) -> Path:
    """The demo in all precisions of a GPU, with engines where TensorRT is installed."""
    output = make_bundle(demo_base, demo_adapters, tmp_path_factory.mktemp("gpu") / "bundle")
    manifest = read_manifest(output)
    for precision in ("fp16", "bf16"):
        write_half(output, precision, manifest.dimensions, output / precision)
    write_manifest(dataclasses.replace(manifest, precisions=("fp32", "fp16", "bf16")), output)
    return output


@pytest.fixture(scope="module")
def engines(bundle: Path) -> Callable[[str], None]:
    """Builds the engine of a precision on this GPU, once."""
    built: set[str] = set()

    def build(precision: str) -> None:
        if not installed_libraries():
            pytest.skip("TensorRT is not installed")
        if precision not in built:
            target = gpu_target()
            assert target is not None
            build_engines(
                bundle, EngineOptions(targets=(target,), precision=precision, library=installed_libraries()[0])
            )
            built.add(precision)

    return build


@pytest.fixture(params=WAYS, ids=str)
def way(request: pytest.FixtureRequest, engines: Callable[[str], None]) -> Way:
    chosen: Way = request.param
    onnxruntime = pytest.importorskip("onnxruntime")
    needed = {"onnxruntime": "CUDAExecutionProvider", "ort-tensorrt": "TensorrtExecutionProvider"}.get(chosen.backend)
    if needed is not None and needed not in onnxruntime.get_available_providers():
        pytest.skip(f"this build of ONNX Runtime has no {needed}")
    if chosen.backend == "tensorrt":
        engines(chosen.precision)
    return chosen


@pytest.fixture(scope="module")
def on_cpu(bundle: Path) -> Iterator[Transcriber]:
    with Transcriber.load(bundle, precision="fp32") as transcriber:
        yield transcriber


def texts(results: list[Any]) -> list[Any]:
    return [(result.tokens, [token.row for token in result.provenance]) for result in results]


def device_memory() -> int:
    """Bytes in use on the device, by all processes."""
    from das_asr.runtime.backends.cuda_memory import CudaMemory

    free, total = CudaMemory(0).free()
    return total - free


def logits(backend: Any, manifest: Manifest, bundle: Path) -> NDArray[np.float32]:
    """Logits [B, R, V] behind a prompt of two tokens, of noise."""
    dims, rows = manifest.dimensions, manifest.rows
    stack = AdapterSets(backend, manifest, bundle).get(None).loaded
    features = np.random.default_rng(0).normal(0, 0.5, (2, dims.mels, dims.frames)).astype(np.float32)
    bias = np.zeros((2, dims.vocabulary), np.float32)
    mask, zeros = np.ones((2, rows), np.bool_), np.zeros(2, np.int64)
    control = Control(zeros, np.zeros(2, np.float32), bias, bias, mask, zeros)
    start = manifest.tokens.start_of_transcript
    batch = backend.start(backend.encode(features, stack), stack, control)
    step = batch.run(zeros, zeros + 1, np.full((2, rows, 2), start), logits=True)
    assert step.logits is not None
    return step.logits


# --- The same as on the CPU ---


def test_logits(bundle: Path, way: Way) -> None:
    manifest = read_manifest(bundle)
    expected = logits(create_backend("onnxruntime", bundle, manifest, BackendOptions(), "fp32"), manifest, bundle)
    options = BackendOptions("cuda", cuda_graphs=way.cuda_graphs)
    found = logits(create_backend(way.backend, bundle, manifest, options, way.precision), manifest, bundle)
    difference = np.abs(found - expected).max() / np.abs(expected).max()
    assert difference < TOLERANCE[way.precision], f"logits differ by {difference:.2e} of the largest"


def test_tokens_of_the_demo(bundle: Path, way: Way, demo_audio: Clips) -> None:
    manifest = read_manifest(bundle)
    samples = [load_audio(path, None, target_rate=manifest.audio.sample_rate) for path, _, _ in demo_audio]
    report = compare_with_float32(bundle, manifest, {"device": "cuda", **way.choices}, samples, ())
    allowed = 0 if way.precision == "fp32" else MOST_DIFFERENT
    assert report.disagreement <= allowed, f"{report.tokens_differing} of {report.tokens_compared} tokens differ"


@pytest.mark.parametrize("choice", [*CHOICES, {"prompt": LONG_PROMPT, "max_tokens": 8}], ids=str)
def test_rules_batches_and_continuous_batching(
    bundle: Path, way: Way, on_cpu: Transcriber, demo_audio: Clips, choice: dict[str, Any]
) -> None:
    if way.precision != "fp32":
        pytest.skip("only float32 must write the very same tokens")
    clips = [path for path, _, _ in demo_audio[:5]]
    expected = texts([on_cpu.transcribe(clip, **choice) for clip in clips])
    with way.load(bundle) as transcriber:
        assert texts(transcriber.transcribe_batch(clips, **choice)) == expected
        assert (
            texts([future.result(60) for future in [transcriber.submit(clip, **choice) for clip in clips]]) == expected
        )


def test_adapters_are_swapped_while_loaded(
    bundle: Path, way: Way, on_cpu: Transcriber, demo_adapters: dict[str, Path], demo_audio: Clips
) -> None:
    """Also shows that adapters are inputs: an engine that took them for constants would go on with the old ones."""
    if way.precision != "fp32":
        pytest.skip("only float32 must write the very same tokens")
    clips = [path for path, _, _ in demo_audio[:4]]
    with way.load(bundle) as transcriber:
        for name in demo_adapters:
            transcriber.unload_adapter(name)
        expected = texts(on_cpu.transcribe_batch(clips, rule="base"))
        assert [tokens for tokens, _ in texts(transcriber.transcribe_batch(clips))] == [t for t, _ in expected]
        for name in ("sports", "music"):
            transcriber.load_adapter(name, demo_adapters[name])
        expected = texts(on_cpu.transcribe_batch(clips, adapters=("sports", "music")))
        assert texts(transcriber.transcribe_batch(clips)) == expected


def test_eight_threads(bundle: Path, way: Way, demo_audio: Clips) -> None:
    work = [(demo_audio[index % len(demo_audio)][0], choice) for index, choice in enumerate(CHOICES * 6)]
    with way.load(bundle) as transcriber:
        expected = texts([transcriber.transcribe(path, **choice) for path, choice in work])
        with ThreadPoolExecutor(8) as pool:
            results = pool.map(lambda item: transcriber.transcribe(item[0], **item[1]), work)
        assert texts(list(results)) == expected


def test_two_transcribers_on_one_gpu(bundle: Path, way: Way, demo_audio: Clips) -> None:
    clips = [path for path, _, _ in demo_audio]
    with way.load(bundle) as first, way.load(bundle) as second:
        expected = texts([first.transcribe(clip) for clip in clips])
        with ThreadPoolExecutor(2) as pool:
            both = [pool.submit(lambda own: texts([own.transcribe(c) for c in clips]), own) for own in (first, second)]
        assert [future.result() for future in both] == [expected, expected]


# --- Memory ---


def test_a_thousand_transcriptions_take_no_more_memory(bundle: Path, way: Way, demo_audio: Clips) -> None:
    with way.load(bundle) as transcriber:

        def transcribe(count: int) -> None:
            for index in range(count):
                clips = [demo_audio[(index + place) % len(demo_audio)][0] for place in range(1 + index % 3)]
                transcriber.transcribe_batch(clips, **CHOICES[index % len(CHOICES)] | {"max_tokens": 4})

        transcribe(60)
        before = device_memory()
        transcribe(REQUESTS)
        assert device_memory() - before < GROWTH


def test_closing_gives_the_memory_back(bundle: Path, way: Way, demo_audio: Clips) -> None:
    way.load(bundle).close()  # what the driver and the libraries take once, they keep
    before = device_memory()
    with way.load(bundle) as transcriber:
        transcriber.transcribe_batch([demo_audio[0][0]] * 4)
    assert device_memory() - before < GROWTH


def test_too_little_memory_is_a_clear_error(bundle: Path, way: Way, demo_audio: Clips) -> None:
    from das_asr.runtime.backends.cuda_memory import CudaMemory

    with way.load(bundle) as transcriber:
        expected = texts([transcriber.transcribe(demo_audio[0][0])])
        memory = CudaMemory(0)
        taken = memory.allocate((memory.free()[0] - (64 << 20),), "uint8")
        with pytest.raises(BackendError, match=r"[Oo]ut of memory|takes up to"):  # an engine's limit may come first
            transcriber.transcribe_batch([demo_audio[0][0]] * 256)
        del taken
        assert texts([transcriber.transcribe(demo_audio[0][0])]) == expected


def test_many_requests_are_served_together(bundle: Path, way: Way, demo_audio: Clips) -> None:
    with way.load(bundle, scheduling=SchedulerOptions(max_batch=8)) as transcriber:
        options = DecodingOptions(language="en")
        expected = texts([transcriber.transcribe(path, options) for path, _, _ in demo_audio])
        futures = [transcriber.submit(path, options) for path, _, _ in demo_audio * 4]
        assert texts([future.result(120) for future in futures]) == expected * 4
