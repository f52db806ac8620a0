"""The static cache writes what the growing cache writes, with the same code that runs on a GPU: here on the CPU."""

from __future__ import annotations

import ast
import ctypes
import dataclasses
import gc
import shutil
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from das_asr.export.half import write_half
from das_asr.runtime import BackendError, BundleError, OptionError, StepCandidates, Transcriber, contract
from das_asr.runtime.adapter_sets import AdapterSets
from das_asr.runtime.adapters import Stack, read_stack
from das_asr.runtime.backends import BackendOptions, create_backend
from das_asr.runtime.backends.memory import Buffer, HostMemory
from das_asr.runtime.backends.onnxruntime_static import load_backend, on_both, open_graphs
from das_asr.runtime.backends.placement import CPU
from das_asr.runtime.backends.runner import Runner, Turn, attended_slots
from das_asr.runtime.backends.static import StaticBackend, adapter_tensors
from das_asr.runtime.backends.workspace import Workspace
from das_asr.runtime.decoding import DecodedBatch, Prompt, decode
from das_asr.runtime.job import Job
from das_asr.runtime.manifest import read_manifest
from das_asr.runtime.options import DecodingOptions
from das_asr.runtime.tokenizer import Tokenizer
from tests.bundles import make_bundle, texts
from tests.rules import CHOICES, LONG_PROMPT

Clips = list[tuple[Path, str, str]]
OPTIONS = BackendOptions(threads=1)


class Surest:
    """A rule on the host that wants to see all logits."""

    name = "surest"
    needs_logits = True

    def choose(self, step: StepCandidates) -> Any:
        assert step.logits is not None
        return step.logits.max(axis=2).argmax(axis=1)


CALLS = [
    *CHOICES,
    {"rule": Surest()},
    {"no_speech_threshold": None},
    {"prompt": "the weather today"},
    {"prompt": LONG_PROMPT, "no_speech_threshold": None},
    {"prompt": LONG_PROMPT, "max_tokens": 8},
    {"audio_context": "fit"},
    {"max_tokens": 3},
]


class CountingMemory(HostMemory):
    """Host memory that knows how much was asked of it, and may have an end."""

    def __init__(self, *, ahead: bool = True, limit: float = float("inf")) -> None:
        super().__init__(ahead=ahead)
        self.limit, self.allocated = limit, 0
        self.entered: set[int] = set()

    def enter(self) -> None:
        self.entered.add(threading.get_ident())

    def allocate(self, shape: tuple[int, ...], dtype: str) -> Buffer:
        assert threading.get_ident() in self.entered
        buffer = super().allocate(shape, dtype)
        if self.allocated + buffer.nbytes > self.limit:
            raise BackendError("Out of memory: the test allows no more.")
        self.allocated += buffer.nbytes
        return buffer


def static_backend(bundle: Path, memory: HostMemory | None = None, precision: str = "fp32") -> StaticBackend:
    graphs = bundle if precision == "fp32" else bundle / precision
    return open_graphs(graphs, read_manifest(bundle), OPTIONS, memory or HostMemory(), on_both({CPU: {}}))


def open_static(bundle: Path, memory: HostMemory | None = None, precision: str = "fp32") -> Transcriber:
    return Transcriber(read_manifest(bundle), bundle, static_backend(bundle, memory, precision))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, demo_base: Path, demo_adapters: dict[str, Path]) -> Path:
    return make_bundle(demo_base, demo_adapters, tmp_path_factory.mktemp("static") / "bundle")


@pytest.fixture(scope="module")
def growing(bundle: Path) -> Iterator[Transcriber]:
    with Transcriber.load(bundle, threads=1) as transcriber:
        yield transcriber


@pytest.fixture(scope="module", params=[False, True], ids=["in turn", "ahead"])
def static(request: pytest.FixtureRequest, bundle: Path) -> Iterator[Transcriber]:
    with open_static(bundle, HostMemory(ahead=request.param)) as transcriber:
        yield transcriber


# --- The same tokens ---


@pytest.mark.parametrize("choice", CALLS, ids=str)
def test_one_utterance_and_a_batch(
    growing: Transcriber, static: Transcriber, demo_audio: Clips, choice: dict[str, Any]
) -> None:
    clips = [path for path, _, _ in demo_audio]
    assert texts([static.transcribe(clips[4], **choice)]) == texts([growing.transcribe(clips[4], **choice)])
    expected = growing.transcribe_batch(clips[:5], **choice)
    results = static.transcribe_batch(clips[:5], **choice)
    assert texts(results) == texts(expected)
    for ours, theirs in zip(results, expected, strict=True):
        assert ours.avg_logprob == pytest.approx(theirs.avg_logprob, abs=1e-4)
        assert ours.no_speech_prob == pytest.approx(theirs.no_speech_prob, abs=1e-4)


@pytest.mark.parametrize("longest", [1, 5, 32, 96])
@pytest.mark.parametrize("probed", [False, True])
def test_prompts_of_different_length_share_a_batch(
    bundle: Path, longest: int, probed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Left-padded as the loop makes them; a static cache holds them without padding, fed in pieces or in one run."""
    monkeypatch.setattr(contract, "_LONGEST_RUN", longest)
    manifest = read_manifest(bundle)
    tokenizer = Tokenizer.from_file(bundle / "tokenizer.json", manifest.tokens)
    prompts = [_prompt(tokenizer, text) for text in (None, "so", LONG_PROMPT, None, "the weather today")]
    lengths = np.array([len(prompt.ids) for prompt in prompts])
    assert set(lengths > 32) == {False, True}
    shape = (len(prompts), manifest.dimensions.mels, manifest.dimensions.frames)
    features = np.random.default_rng(0).normal(0, 1, shape).astype(np.float32)
    options = DecodingOptions(language="en", max_tokens=20, no_speech_threshold=0.6 if probed else None)
    written: list[DecodedBatch] = []
    runs = []  # of the decoder, beside the steps
    for backend in (create_backend("onnxruntime", bundle, manifest, OPTIONS), static_backend(bundle)):
        adapters = AdapterSets(backend, manifest, bundle).get(None)
        plan = Job(manifest, tokenizer, adapters, options, len(prompts)).plan()
        plan = dataclasses.replace(plan, control=dataclasses.replace(plan.control, first_valid=max(lengths) - lengths))
        batch = backend.start(backend.encode(features, adapters.loaded), adapters.loaded, plan.control)
        written.append(decode(batch, prompts, plan))
        runs.append(len(batch.traffic) - len(written[-1].candidates))
    first, second = written
    assert np.array_equal(first.lengths, second.lengths)
    assert np.array_equal(first.candidates, second.candidates)
    np.testing.assert_allclose(first.logprobs, second.logprobs, atol=1e-4)
    probe = prompts[2].start + 1
    parts = (probe, max(lengths) - probe) if probed else (max(lengths),)
    assert runs == [len(parts) - 1, sum(-(-part // longest) for part in parts) - 1]


def _prompt(tokenizer: Tokenizer, text: str | None) -> Prompt:
    ids, start = tokenizer.prompt("en", "transcribe", text, 48)
    return Prompt(tuple(ids), start)


def test_half_precision(bundle: Path, demo_audio: Clips, tmp_path: Path) -> None:
    """Both caches in fp16, adapters from the bundle and loaded ones."""
    copy = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    manifest = dataclasses.replace(read_manifest(copy), precisions=("fp16",))
    write_half(copy, "fp16", manifest.dimensions, copy / "fp16")
    clips = [path for path, _, _ in demo_audio[:4]]
    growing = Transcriber(manifest, copy, create_backend("onnxruntime", copy, manifest, OPTIONS, "fp16"))
    with growing, open_static(copy, precision="fp16") as static:
        for choice in CHOICES:
            assert texts(static.transcribe_batch(clips, **choice)) == texts(growing.transcribe_batch(clips, **choice))


def test_continuous_batching(growing: Transcriber, static: Transcriber, demo_audio: Clips) -> None:
    work = [(demo_audio[index % len(demo_audio)][0], choice) for index, choice in enumerate(CALLS * 2)]
    expected = [growing.transcribe(path, **choice) for path, choice in work]
    results = [future.result(60) for future in [static.submit(path, **choice) for path, choice in work]]
    assert texts(results) == texts(expected)


def test_eight_threads(growing: Transcriber, static: Transcriber, demo_audio: Clips) -> None:
    work = [(demo_audio[index % len(demo_audio)][0], choice) for index, choice in enumerate(CALLS * 2)]
    expected = [growing.transcribe(path, **choice) for path, choice in work]
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda item: static.transcribe(item[0], **item[1]), work))
    assert texts(results) == texts(expected)


def test_adapters_are_swapped_while_loaded(
    demo_base: Path, demo_adapters: dict[str, Path], growing: Transcriber, demo_audio: Clips, tmp_path: Path
) -> None:
    clips = [path for path, _, _ in demo_audio[:4]]
    with open_static(make_bundle(demo_base, {}, tmp_path / "bundle"), HostMemory(ahead=True)) as transcriber:
        for count, name in enumerate(demo_adapters):
            transcriber.load_adapter(name, demo_adapters[name])
            names = tuple(demo_adapters)[: count + 1]
            expected = growing.transcribe_batch(clips, adapters=names)
            assert texts(transcriber.transcribe_batch(clips)) == texts(expected)
        transcriber.unload_adapter("music")
        expected = growing.transcribe_batch(clips, adapters=("weather", "sports"))
        assert texts(transcriber.transcribe_batch(clips)) == texts(expected)


def test_utterances_can_be_decoded_twice(bundle: Path, growing: Transcriber) -> None:
    """Two batches of the same encoded utterances, a step each in turns."""
    backend = static_backend(bundle, HostMemory(ahead=True))
    manifest = growing.manifest
    adapters = AdapterSets(backend, manifest, bundle).get(None)
    tokenizer = Tokenizer.from_file(bundle / "tokenizer.json", manifest.tokens)
    plan = Job(manifest, tokenizer, adapters, DecodingOptions(language="en", no_speech_threshold=None), 1).plan()
    dims = manifest.dimensions
    features = np.random.default_rng(1).normal(0, 1, (1, dims.mels, dims.frames)).astype(np.float32)
    encoded = backend.encode(features, adapters.loaded)
    batches = [backend.start(encoded, adapters.loaded, plan.control) for _ in range(2)]
    ids = np.repeat(np.array(tokenizer.prompt("en", "transcribe", None, 60)[0])[None, None], len(adapters.rows), axis=1)
    steps = [batch.run(np.zeros(1, np.int64), np.array([ids.shape[2] - 1]), ids) for batch in batches]
    for position in range(ids.shape[2], ids.shape[2] + 10):
        assert np.array_equal(steps[0].candidate, steps[1].candidate)
        steps = [batch.run(np.array([position]), np.array([ids.shape[2] - 1])) for batch in batches]


class MostConfident:
    """A rule on the host that needs no logits."""

    name = "most confident"
    needs_logits = False

    def choose(self, step: StepCandidates) -> Any:
        return step.logprobs.argmax(axis=1)


def test_no_steps_are_queued_for_a_host_that_feeds_its_own(
    bundle: Path, demo_audio: Clips, monkeypatch: pytest.MonkeyPatch
) -> None:
    queued: list[Turn] = []
    queue = Runner.queue
    monkeypatch.setattr(Runner, "queue", lambda *given: queued.append(queue(*given)) or queued[-1])
    runs = []
    for ahead in (False, True):
        queued.clear()
        with open_static(bundle, HostMemory(ahead=ahead)) as transcriber:
            transcriber.transcribe(demo_audio[0][0], rule=MostConfident())
        runs.append(len(queued))
    assert runs[0] > 5
    assert runs[1] == runs[0] + 1  # behind the prompt the host has not yet shown what it does


# --- Memory ---


def test_requests_use_the_same_memory_again(bundle: Path, demo_audio: Clips) -> None:
    memory = CountingMemory()
    with open_static(bundle, memory) as transcriber:
        for size in (1, 3, 4):
            transcriber.transcribe_batch([demo_audio[0][0]] * size)
        allocated = memory.allocated
        for size in (1, 2, 3, 4) * 5:
            transcriber.transcribe_batch([demo_audio[size][0]] * size, max_tokens=2)
        two = memory.allocated - allocated
        assert 0 < two < allocated  # one workspace more, for two utterances
        for size in (1, 2, 3, 4) * 5:
            transcriber.transcribe_batch([demo_audio[size][0]] * size, max_tokens=2)
        assert memory.allocated == allocated + two


def test_every_thread_makes_the_device_its_own(bundle: Path, demo_audio: Clips) -> None:
    memory = CountingMemory()
    with open_static(bundle, memory) as transcriber, ThreadPoolExecutor(1) as pool:
        pool.submit(transcriber.transcribe, demo_audio[0][0]).result(60)
        assert memory.entered == {pool.submit(threading.get_ident).result()}
        transcriber.submit(demo_audio[0][0]).result(60)
        assert len(memory.entered) == 2  # the scheduler's thread too


def test_too_little_memory_is_an_error_of_one_request(bundle: Path, demo_audio: Clips) -> None:
    memory = CountingMemory()
    with open_static(bundle, memory) as transcriber:
        expected = transcriber.transcribe(demo_audio[0][0]).text
        memory.limit = 2 * memory.allocated
        with pytest.raises(BackendError, match="Out of memory"):
            transcriber.transcribe_batch([demo_audio[0][0]] * 8)
        assert transcriber.transcribe(demo_audio[0][0]).text == expected


def test_what_was_warmed_up_is_used(bundle: Path, demo_audio: Clips) -> None:
    manifest, memory = read_manifest(bundle), CountingMemory()
    stack = read_stack(bundle, [entry.name for entry in manifest.adapters], manifest.dimensions)
    backend = open_graphs(bundle, manifest, OPTIONS, memory, on_both({CPU: {}}), stack)
    backend.warm_up()
    allocated = memory.allocated
    assert allocated > 0
    with Transcriber(manifest, bundle, backend) as transcriber:
        transcriber.transcribe(demo_audio[0][0])
        assert memory.allocated == allocated
        kept = weakref.ref(transcriber._adapters.get(None).loaded)
        transcriber.unload_adapter("music")
        gc.collect()
        assert kept() is None  # with its workspaces


class RememberingMemory(HostMemory):
    """Host memory that knows every buffer."""

    def __init__(self) -> None:
        super().__init__(ahead=True)
        self.buffers: list[Buffer] = []

    def allocate(self, shape: tuple[int, ...], dtype: str) -> Buffer:
        self.buffers.append(super().allocate(shape, dtype))
        return self.buffers[-1]


def test_a_request_leaves_nothing_to_the_next(bundle: Path, demo_audio: Clips) -> None:
    """Not even numbers that are no longer finite, which a weight of 0 does not silence."""
    memory, dims = RememberingMemory(), read_manifest(bundle).dimensions
    with open_static(bundle, memory) as transcriber:
        clip = demo_audio[0][0]
        expected = texts([transcriber.transcribe(clip)])
        shape = (dims.decoder_heads, dims.text_positions, dims.head_size)
        caches = [buffer for buffer in memory.buffers if buffer.shape[1:] == shape]
        assert len(caches) == 2 * dims.decoder_layers
        for cache in caches:
            ctypes.memset(cache.address, 0xFF, cache.nbytes)  # NaN
        assert texts([transcriber.transcribe(clip)]) == expected


def test_what_a_queued_run_reads_on_the_host_is_kept(bundle: Path) -> None:
    bound: list[Buffer] = []

    class Program:
        def bind(self, tensors: Any, *, repeated: bool) -> Any:
            bound.append(tensors["attended"])
            return SimpleNamespace(run=lambda: None)

    memory, dims = HostMemory(), read_manifest(bundle).dimensions
    runner = Runner(memory, Program(), Workspace(memory, dims, "float32", 1, 1, 1), {})
    for width in (2, 3, 1):
        runner.queue(np.array([0]), np.array([width - 1]), np.zeros((1, 1, width), np.int64))
    assert len(bound) == 3
    assert bound[0] is bound[1] is bound[2]


@pytest.mark.parametrize(("needed", "slots", "read"), [(1, 448, 64), (64, 448, 64), (65, 448, 128), (300, 448, 448),
                                                       (1, 24, 24), (90, 100, 100)])  # fmt: skip
def test_attended_slots_are_few_numbers(needed: int, slots: int, read: int) -> None:
    assert attended_slots(needed, slots) == read


def test_adapters_are_rounded_as_elsewhere() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    values = np.random.default_rng(0).normal(0, 3, (1, 2, 50, 7)).astype(np.float32)
    stack = Stack(("music",), 7, {"lora_sq_a0": values})
    bits = values.astype(ml_dtypes.bfloat16).view(np.uint16)
    assert np.array_equal(adapter_tensors(stack, "bfloat16")["lora_sq_a0"], bits)
    assert np.array_equal(adapter_tensors(stack, "float16")["lora_sq_a0"], values.astype(np.float16))
    assert adapter_tensors(stack, "float32")["lora_sq_a0"] is values


# --- Errors ---


def test_a_bundle_without_the_static_graph_is_refused(demo_base: Path, tmp_path: Path) -> None:
    bundle = make_bundle(demo_base, {}, tmp_path / "bundle")
    (bundle / "decoder_static.onnx").unlink()
    with pytest.raises(BundleError, match=r"no decoder_static.onnx.*Export the bundle again"):
        load_backend(bundle, read_manifest(bundle), OPTIONS)


@pytest.mark.parametrize("backend", ["tensorrt", "ort-tensorrt"])
def test_gpu_backends_need_a_gpu(bundle: Path, backend: str) -> None:
    with pytest.raises(OptionError, match=f"backend='{backend}' runs on GPUs only, device is 'cpu'"):
        Transcriber.load(bundle, backend=backend)


def test_the_cuda_runtime_has_every_call_and_says_what_is_missing(repo: Path) -> None:
    runtime = pytest.importorskip("cuda.bindings.runtime")
    tree = ast.parse((repo / "runtime" / "backends" / "cuda_memory.py").read_text("utf-8"))
    names = (node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name))
    used = {node.attr for node in names if node.value.id == "cuda"}  # type: ignore[attr-defined]
    assert len(used) > 20
    assert not [name for name in used if not hasattr(runtime, name)]
    error, count = runtime.cudaGetDeviceCount()
    if error == runtime.cudaError_t.cudaSuccess and count:
        pytest.skip("there is a CUDA device")
    from das_asr.runtime.backends.cuda_memory import CudaMemory

    with pytest.raises(BackendError, match=r"There is no CUDA device 0 \(CUDA says cudaError.*use device='cpu'"):
        CudaMemory(0)
