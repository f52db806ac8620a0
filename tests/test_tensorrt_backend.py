"""The TensorRT backends without a GPU: which engine is chosen, and how execution contexts are used.

TensorRT's Python objects are stood in for by ones that compute with ONNX Runtime and are stricter than the real ones;
every method they have, the real ones have too. What only a GPU can show is in `test_gpu.py`.
"""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("cuda.bindings.runtime", reason="needs cuda-bindings, of the extra [tensorrt-rtx]")
pytest.importorskip("tensorrt_rtx_bindings", reason="needs the wheels of the extra [tensorrt-rtx]")

import tensorrt_rtx_bindings as trt

from das_asr.export import build_engines
from das_asr.runtime import BackendError, OptionError, Transcriber
from das_asr.runtime.adapters import read_stack
from das_asr.runtime.backends import BackendOptions, cuda_memory, tensorrt
from das_asr.runtime.backends.cuda_memory import CudaMemory
from das_asr.runtime.backends.engine_files import CACHE_FOLDER, DECODER_ENGINE, EngineLimits
from das_asr.runtime.backends.engine_profiles import Profile, decoder_profiles, encoder_profiles
from das_asr.runtime.backends.memory import Buffer, HostMemory
from das_asr.runtime.backends.onnxruntime_static import OnnxProgram
from das_asr.runtime.backends.ort_tensorrt import profiles, tensorrt_options
from das_asr.runtime.backends.placement import CPU
from das_asr.runtime.backends.sessions import open_session
from das_asr.runtime.backends.static import Graphs, StaticBackend
from das_asr.runtime.backends.tensorrt import EngineProgram, choose_engine, open_engine
from das_asr.runtime.backends.tensorrt_library import Library
from das_asr.runtime.contract import (
    DECODER_STATIC_FILE,
    ENCODER_FILE,
    encoder_inputs,
    encoder_outputs,
    static_decoder_inputs,
    static_decoder_outputs,
)
from das_asr.runtime.manifest import EngineEntry, Manifest, read_manifest
from tests.bundles import make_bundle, texts
from tests.cuda_stand_in import StandIn
from tests.engines import make_small_bundle, needs_tensorrt_rtx, no_gpu, options
from tests.rules import LONG_PROMPT

Clips = list[tuple[Path, str, str]]
LIBRARY = Library("tensorrt-rtx", str(trt.__version__), trt)
SCRATCH = 5000  # bytes that a context asks for


class StreamMemory(HostMemory):
    """Host memory with what a GPU's has besides; nothing is asynchronous."""

    stream = 7

    def __init__(self) -> None:
        super().__init__(ahead=True)
        self.recorded = 0
        self.launched = 0

    def record(self, work: Callable[[], None]) -> Any:
        self.recorded += 1

        def launch() -> None:
            self.launched += 1
            work()

        return SimpleNamespace(launch=launch)


class Context:
    """An `IExecutionContext` that refuses what the real one would not survive."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self._profile = engine, -1
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._memory = (0, 0)

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        assert stream == self._engine.memory.stream
        self._profile = profile
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert name in self._engine.inputs
        smallest, _, largest = self._engine.profiles[self._profile].shapes.get(name, (shape, shape, shape))
        self._shapes[name] = shape
        return all(low <= size <= high for low, size, high in zip(smallest, shape, largest, strict=True))

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._addresses[name] = address
        return name == "attended" or address % 256 == 0

    def infer_shapes(self) -> list[str]:
        names = {*self._engine.inputs, *self._engine.outputs}
        return sorted((names - self._addresses.keys()) | (self._engine.inputs.keys() - self._shapes.keys()))

    def update_device_memory_size_for_shapes(self) -> int:
        return SCRATCH

    def set_device_memory(self, address: int, size: int) -> None:
        assert address % 256 == 0
        self._memory = (address, size)

    def is_stream_capturable(self, stream: int) -> bool:
        return bool(stream == self._engine.memory.stream)

    def execute_async_v3(self, stream: int) -> bool:
        assert self._memory[1] >= SCRATCH
        assert stream == self._engine.memory.stream
        shapes, addresses = dict(self._shapes), dict(self._addresses)  # what comes later changes nothing of this run
        self._engine.queue(lambda: self._engine.run(shapes, addresses))
        return True


class Engine:
    """An `ICudaEngine` around an ONNX graph."""

    memory: Any
    queue: Callable[[Callable[[], None]], None]

    def __init__(self, graph: Path, inputs: list[Any], outputs: list[Any], sizes: tuple[Profile, ...]) -> None:
        self._program = OnnxProgram(
            open_session(graph, BackendOptions(threads=1), {CPU: {}}), HostMemory(), cuda_graphs=False
        )
        self.inputs, self.outputs = ({spec.name: spec for spec in specs} for specs in (inputs, outputs))
        self.profiles = sizes
        self.contexts: list[Context] = []
        self.num_io_tensors = len(self.inputs) + len(self.outputs)
        self.num_optimization_profiles = len(sizes)

    def get_tensor_name(self, index: int) -> str:
        return [*self.inputs, *self.outputs][index]

    def get_tensor_mode(self, name: str) -> Any:
        return trt.TensorIOMode.INPUT if name in self.inputs else trt.TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> Any:
        return {"float32": trt.DataType.FLOAT, "int64": trt.DataType.INT64}[self.outputs[name].dtype]

    def create_runtime_config(self) -> Any:
        cache = SimpleNamespace(serialize=lambda: b"kernels", deserialize=lambda content: content == b"kernels")
        chosen: list[Any] = []
        return SimpleNamespace(
            set_execution_context_allocation_strategy=chosen.append,
            create_runtime_cache=lambda: cache,
            set_runtime_cache=chosen.append,
            chosen=chosen,
        )

    def create_execution_context(self, settings: Any) -> Context:
        assert settings.chosen[0] == trt.ExecutionContextAllocationStrategy.USER_MANAGED
        self.contexts.append(Context(self))
        return self.contexts[-1]

    def run(self, shapes: dict[str, tuple[int, ...]], addresses: dict[str, int]) -> None:
        sizes: dict[str, int] = {}
        for name, spec in self.inputs.items():
            sizes |= {str(key): size for key, size in zip(spec.shape, shapes[name], strict=True)}
        sizes |= {"audio": sizes["frames"] // 2} if "frames" in sizes else {}
        tensors = {}
        for name, spec in (self.inputs | self.outputs).items():
            shape = tuple(int(sizes.get(str(size), size)) for size in spec.shape)
            tensors[name] = Buffer(addresses[name], shape, spec.dtype, None)
        self._program.bind(tensors, repeated=False).run()


@dataclasses.dataclass
class Opened:
    transcriber: Transcriber
    memory: Any
    encoder: Engine
    decoder: Engine
    programs: tuple[EngineProgram, EngineProgram]


CALLS: list[dict[str, Any]] = [
    {"rule": "hypothesis"},
    {"rule": "paper"},
    {"adapters": ("sports",), "audio_context": "fit"},
    {"prompt": LONG_PROMPT, "max_tokens": 8},
]


def open_engines(
    bundle: Path, folder: Path, *, cuda_graphs: bool, limits: EngineLimits | None = None, gpu: StandIn | None = None
) -> Opened:
    manifest, memory = read_manifest(bundle), StreamMemory() if gpu is None else CudaMemory(0)
    dims, limits = manifest.dimensions, limits or EngineLimits()
    ins, outs = encoder_inputs(dims), encoder_outputs(dims)
    encoder = Engine(bundle / ENCODER_FILE, ins, outs, encoder_profiles(ins, manifest, limits))
    ins, outs = static_decoder_inputs(dims), static_decoder_outputs(dims)
    decoder = Engine(bundle / DECODER_STATIC_FILE, ins, outs, decoder_profiles(ins, manifest, limits))
    for engine in (encoder, decoder):
        engine.memory, engine.queue = memory, gpu.queue if gpu is not None else lambda work: work()
    programs = tuple(
        EngineProgram(LIBRARY, engine, memory, folder / CACHE_FOLDER / name, cuda_graphs=cuda_graphs)  # type: ignore[arg-type]
        for engine, name in ((encoder, "encoder"), (decoder, "decoder"))
    )
    stack = read_stack(bundle, [entry.name for entry in manifest.adapters], dims)
    backend = StaticBackend(memory, Graphs(*programs, programs[1].dtype, alone=False), dims, stack)
    return Opened(Transcriber(manifest, bundle, backend), memory, encoder, decoder, programs)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, demo_base: Path, demo_adapters: dict[str, Path]) -> Path:
    return make_bundle(demo_base, demo_adapters, tmp_path_factory.mktemp("tensorrt") / "bundle")


@pytest.fixture(scope="module")
def growing(bundle: Path) -> Iterator[Transcriber]:
    with Transcriber.load(bundle, threads=1) as transcriber:
        yield transcriber


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_engines_write_what_the_graphs_write(
    bundle: Path, growing: Transcriber, demo_audio: Clips, tmp_path: Path, cuda_graphs: bool
) -> None:
    opened = open_engines(bundle, tmp_path, cuda_graphs=cuda_graphs)
    clips = [path for path, _, _ in demo_audio[:4]]
    with opened.transcriber as transcriber:
        for choice in CALLS:
            assert texts(transcriber.transcribe_batch(clips, **choice)) == texts(
                growing.transcribe_batch(clips, **choice)
            )
            alone = [transcriber.transcribe(clip, **choice) for clip in clips]
            assert texts(alone) == texts([growing.transcribe(clip, **choice) for clip in clips])
        served = [future.result(60) for future in [transcriber.submit(clip) for clip in clips]]
        assert texts(served) == texts([growing.transcribe(clip) for clip in clips])
    assert bool(opened.memory.recorded) == bool(opened.memory.launched) == cuda_graphs
    if cuda_graphs:
        assert opened.memory.launched > 5 * opened.memory.recorded
    assert len(opened.encoder.contexts) == 1


def test_engines_on_the_memory_of_a_gpu(
    bundle: Path, growing: Transcriber, demo_audio: Clips, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a stand-in for the CUDA runtime, which does things when it is told to, or when a graph is launched."""
    gpu = StandIn()
    monkeypatch.setattr(cuda_memory, "cuda", gpu)
    clips = [path for path, _, _ in demo_audio[:4]]
    opened = open_engines(bundle, tmp_path, cuda_graphs=True, gpu=gpu)
    with opened.transcriber as transcriber:
        for choice in CALLS:
            assert texts(transcriber.transcribe_batch(clips, **choice)) == texts(
                growing.transcribe_batch(clips, **choice)
            )
        transcriber.transcribe_batch(clips)
        used = gpu.used
        for _ in range(5):
            transcriber.transcribe_batch(clips)
        assert gpu.used == used
        served = [future.result(60) for future in [transcriber.submit(clip) for clip in clips]]
        assert texts(served) == texts([growing.transcribe(clip) for clip in clips])
    assert gpu.launches > 30
    del opened, transcriber, served
    gc.collect()
    assert (gpu.blocks, gpu.pinned, gpu.handles) == ({}, {}, {})  # all of it was freed


def test_limits_of_an_engine_are_told(bundle: Path, demo_audio: Clips, tmp_path: Path) -> None:
    opened = open_engines(bundle, tmp_path, cuda_graphs=False, limits=EngineLimits(max_batch=2))
    with opened.transcriber as transcriber:
        transcriber.transcribe_batch([demo_audio[0][0]] * 2)
        with pytest.raises(BackendError, match=r"refuses tensors of these shapes.*larger limits"):
            transcriber.transcribe_batch([demo_audio[0][0]] * 3)


def test_compiled_kernels_are_kept(bundle: Path, tmp_path: Path) -> None:
    (program, _) = open_engines(bundle, tmp_path, cuda_graphs=False).programs
    program.save_cache()
    assert (tmp_path / CACHE_FOLDER / "encoder").read_bytes() == b"kernels"
    assert [path.name for path in (tmp_path / CACHE_FOLDER).iterdir()] == ["encoder"]


@pytest.mark.parametrize(("ours", "theirs"), [(Context, trt.IExecutionContext), (Engine, trt.ICudaEngine)])
def test_the_stand_ins_have_only_what_tensorrt_has(ours: type, theirs: type) -> None:
    assert {name for name in vars(ours) if not name.startswith("_")} - {"run"} <= set(dir(theirs))


@pytest.mark.parametrize(
    ("target", "precision", "chosen"),
    [("sm86", None, "tensorrt-rtx-sm86-fp32"), ("sm86", "fp16", "tensorrt-rtx-sm86-fp16"),
     ("sm89", None, "tensorrt-rtx-sm89-bf16")],
)  # fmt: skip
def test_the_engine_for_this_gpu_is_chosen(manifest: Manifest, target: str, precision: str | None, chosen: str) -> None:
    library, name = choose_engine(Path("bundle"), manifest, target, precision)
    assert (library.name, name) == ("tensorrt-rtx", chosen)


@pytest.mark.parametrize(
    ("precisions", "library", "chosen"),
    [(("fp16", "fp32"), None, "tensorrt-sm86-fp16"), (("fp32", "fp16"), None, "tensorrt-sm86-fp32"),
     (("fp16",), "tensorrt-rtx", "tensorrt-rtx-sm86-fp16"), (("fp16",), "tensorrt", "tensorrt-sm86-fp16"),
     (("int8",), "tensorrt-rtx", "tensorrt-rtx-sm86-bf16")],
)  # fmt: skip
def test_of_two_libraries_one_can_be_named(
    manifest: Manifest, monkeypatch: pytest.MonkeyPatch, precisions: tuple[str, ...], library: str | None, chosen: str
) -> None:
    monkeypatch.setattr(tensorrt, "installed_libraries", lambda: ("tensorrt", "tensorrt-rtx"))
    monkeypatch.setattr(tensorrt, "load_library", lambda name: Library(name, "1", None))
    engines = dict.fromkeys(("tensorrt-sm86-fp16", "tensorrt-sm86-fp32"), manifest.engines["tensorrt-rtx-sm86-fp32"])
    both = dataclasses.replace(
        manifest, precisions=precisions, engines=dict(sorted((engines | manifest.engines).items()))
    )
    found, name = choose_engine(Path("bundle"), both, "sm86", None, library)
    assert (f"{found.name}-sm86", name) == (chosen.rpartition("-")[0], chosen)


def test_a_library_that_does_not_exist_is_told(manifest: Manifest) -> None:
    with pytest.raises(OptionError, match="library is 'trt', expected tensorrt or tensorrt-rtx"):
        choose_engine(Path("bundle"), manifest, "sm86", None, "trt")


@pytest.mark.parametrize(("target", "precision"), [("sm75", None), ("sm89", "fp16")])
def test_without_an_engine_the_command_is_told(manifest: Manifest, target: str, precision: str | None) -> None:
    with pytest.raises(BackendError, match=rf"has no engine .*das-export engine bundle --target {target}"):
        choose_engine(Path("bundle"), manifest, target, precision)


@pytest.fixture
def manifest(bundle: Path) -> Manifest:
    names = ("tensorrt-rtx-sm86-bf16", "tensorrt-rtx-sm86-fp16", "tensorrt-rtx-sm86-fp32", "tensorrt-rtx-sm89-bf16")
    return dataclasses.replace(
        read_manifest(bundle), engines=dict.fromkeys(names, EngineEntry({}, verified=False, report=None))
    )


def test_onnx_runtimes_provider_is_told_every_size(bundle: Path) -> None:
    manifest = read_manifest(bundle)
    dims = manifest.dimensions
    named = {ENCODER_FILE: encoder_inputs(dims), DECODER_STATIC_FILE: static_decoder_inputs(dims)}
    for file, profile in profiles(manifest).items():
        options = tensorrt_options(profile, Path("cache"), 7, BackendOptions("cuda:1"), "fp16")
        assert (options["device_id"], options["user_compute_stream"], options["trt_fp16_enable"]) == ("1", "7", "True")
        dynamic = {spec.name for spec in named[file] if any(isinstance(size, str) for size in spec.shape)}
        bounds = []
        for bound in ("min", "opt", "max"):
            listed = dict(item.split(":") for item in options[f"trt_profile_{bound}_shapes"].split(","))
            assert listed.keys() - {"attended"} == dynamic
            bounds.append([np.array(listed[name].split("x"), int) for name in sorted(dynamic)])
        assert all((low <= usual).all() and (usual <= high).all() for low, usual, high in zip(*bounds, strict=True))


@no_gpu
@needs_tensorrt_rtx
def test_a_real_engine_without_a_gpu_is_an_error(tmp_path: Path) -> None:
    small = make_small_bundle(tmp_path)
    manifest = build_engines(small, options())
    (name,) = manifest.engines
    memory: Any = StreamMemory()
    with pytest.raises(BackendError, match=rf"cannot open {name}/decoder.engine on this GPU"):
        open_engine(small, manifest, name, DECODER_ENGINE, LIBRARY, memory, cuda_graphs=False)
    with pytest.raises(BackendError, match="There is no CUDA device 0"):
        Transcriber.load(small, "cuda", backend="tensorrt")
