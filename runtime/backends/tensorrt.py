"""Native TensorRT engines of a bundle, on the GPU they were built for; nothing is ever built here.

An engine is used through execution contexts. Runs whose sizes vary (encoder, prompts) share one per profile and set its
tensors each time; every number of utterances and attended slots of the step has a context of its own, whose addresses
are set once, so that it can be recorded as a CUDA graph. All contexts share one piece of scratch memory: what runs on
one stream runs in turn.

TensorRT-RTX compiles its kernels when it first runs them. What it compiled is kept in the bundle's cache folder, and
loading runs everything once.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from das_asr.runtime.adapters import read_stack
from das_asr.runtime.backends import BackendOptions
from das_asr.runtime.backends.cuda_device import gpu_target
from das_asr.runtime.backends.engine_files import (
    CACHE_FOLDER,
    DECODER_ENGINE,
    ENCODER_ENGINE,
    PREFILL_PROFILE,
    STEP_PROFILE,
    EngineUse,
    check_engine,
    engine_name,
    find_engine,
    read_engine_file,
)
from das_asr.runtime.backends.memory import Buffer
from das_asr.runtime.backends.static import Graphs, StaticBackend
from das_asr.runtime.backends.tensorrt_library import Library, installed_libraries, load_library
from das_asr.runtime.contract import DType
from das_asr.runtime.errors import BackendError
from das_asr.runtime.manifest import Manifest

if TYPE_CHECKING:
    from das_asr.runtime.backends.cuda_memory import CudaGraph, CudaMemory

__all__ = ["EngineBound", "EngineProgram", "choose_engine", "load_backend", "open_engine"]

_log = logging.getLogger(__name__)
_DTYPES: dict[str, DType] = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16"}


class EngineProgram:
    """One deserialised engine; see `runner.Program`."""

    def __init__(self, library: Library, engine: Any, memory: CudaMemory, cache: Path, *, cuda_graphs: bool) -> None:
        trt = library.module
        self.engine, self.memory, self.cuda_graphs = engine, memory, cuda_graphs
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        self.inputs = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        self.outputs = [name for name in names if name not in self.inputs]
        self._settings, self._cache = _settings(trt, engine, cache)
        self._cache_file = cache
        self._shared: dict[int, Any] = {}  # profile -> context of the runs whose sizes vary
        self._scratch: Buffer | None = None

    @property
    def dtype(self) -> DType:
        """Of what the engine writes on the device for the next engine or run."""
        name = next(name for name in self.outputs if name.startswith(("cross_", "present_")))
        return _DTYPES[self.engine.get_tensor_dtype(name).name]

    def bind(self, tensors: Mapping[str, Buffer], *, repeated: bool) -> EngineBound:
        """Binds every tensor that the engine has."""
        several = self.engine.num_optimization_profiles > 1
        profile = STEP_PROFILE if several and tensors["ids"].shape[2] == 1 else PREFILL_PROFILE
        if repeated:
            return EngineBound(self, self.context(profile), tensors, repeated=True)
        if profile not in self._shared:
            self._shared[profile] = self.context(profile)
        return EngineBound(self, self._shared[profile], tensors, repeated=False)

    def context(self, profile: int) -> Any:
        """A new execution context without memory of its own."""
        context = self.engine.create_execution_context(self._settings)
        if context is None or not context.set_optimization_profile_async(profile, self.memory.stream):
            raise BackendError(f"TensorRT made no execution context for profile {profile}. Free memory on the GPU.")
        return context

    def scratch(self, size: int) -> Buffer:
        """Memory for activations, shared by all contexts; who still holds a smaller one may go on using it."""
        if self._scratch is None or self._scratch.nbytes < size:
            self._scratch = self.memory.allocate((max(size, 1),), "uint8")
        return self._scratch

    def save_cache(self) -> None:
        """Keeps the kernels that were compiled so far, for the next time the engine is loaded."""
        if self._cache is None:
            return
        try:
            self._cache_file.parent.mkdir(exist_ok=True)
            partial = self._cache_file.with_name(f".{self._cache_file.name}.partial")
            partial.write_bytes(bytes(self._cache.serialize()))
            partial.replace(self._cache_file)
        except OSError as error:  # a read-only bundle costs time, not answers
            _log.warning("compiled kernels cannot be kept: %s; every load compiles them again", error)


class EngineBound:
    """One context with all its tensors set; see `runner.Bound`."""

    def __init__(self, program: EngineProgram, context: Any, tensors: Mapping[str, Buffer], *, repeated: bool) -> None:
        self._program, self._context, self._repeated = program, context, repeated
        self._tensors = tensors
        self._scratch: Buffer | None = None
        self._runs = 0
        self._graph: CudaGraph | None = None

    def run(self) -> None:
        """See `Bound`: the first run of a step is plain, the second is recorded, the rest repeat the record."""
        if self._graph is not None:
            self._graph.launch()
            return
        if self._scratch is None or not self._repeated:  # others have set the tensors of a shared context since
            self._set()
        if self._repeated and self._runs and self._program.cuda_graphs and self._can_be_recorded():
            self._graph = self._program.memory.record(self._execute)
            self._graph.launch()
        else:
            self._execute()
        self._runs += 1

    def _set(self) -> None:
        program, context = self._program, self._context
        done = [context.set_input_shape(name, self._tensors[name].shape) for name in program.inputs]
        done += [
            context.set_tensor_address(name, self._tensors[name].address)
            for name in (*program.inputs, *program.outputs)
        ]
        if not all(done) or context.infer_shapes():  # which raises where sizes were refused, and names what is missing
            shapes = {name: self._tensors[name].shape for name in program.inputs}
            raise BackendError(
                f"TensorRT refuses tensors of these shapes: {shapes}. Build the engine again with larger limits: "
                "das-export engine"
            )
        self._scratch = program.scratch(context.update_device_memory_size_for_shapes())
        context.set_device_memory(self._scratch.address, self._scratch.nbytes)

    def _can_be_recorded(self) -> bool:
        """TensorRT-RTX cannot while it still compiles kernels in the background; `tensorrt` always can."""
        asked = getattr(self._context, "is_stream_capturable", None)
        return asked is None or bool(asked(self._program.memory.stream))

    def _execute(self) -> None:
        if not self._context.execute_async_v3(self._program.memory.stream):
            raise BackendError("TensorRT could not run the engine; its log on standard error says why.")


def load_backend(directory: Path, manifest: Manifest, options: BackendOptions, precision: str | None) -> StaticBackend:
    """The bundle's engine for this GPU.

    Args:
        directory: the bundle.
        manifest: of the bundle.
        options: which GPU, and whose engines.
        precision: of the engine; None takes the bundle's first that there is one in, see `choose_engine`.

    Raises:
        BackendError: TensorRT or the GPU is missing, or no engine fits them.
        BundleError: an engine's file is missing, damaged or foreign.
    """
    from das_asr.runtime.backends.cuda_memory import CudaMemory

    memory = CudaMemory(options.device_id)
    target = gpu_target(options.device_id)
    assert target is not None, "there is a GPU without a compute capability"
    library, name = choose_engine(directory, manifest, target, precision, options.library)
    # Engines take adapters as inputs and carry none.
    stack = read_stack(directory, [entry.name for entry in manifest.adapters], manifest.dimensions)
    record = check_engine(directory, manifest, name, _use(library, target, name, 1, stack.rows, stack.rank))
    if not manifest.engines[name].verified:
        _log.warning("engine %s has never been compared with float32; `das-export verify --device cuda` does", name)

    def check(batch: int, rows: int, rank: int) -> None:
        limits = record.limits
        if batch > limits.max_batch or rows > limits.max_rows or rank > limits.max_rank:
            check_engine(directory, manifest, name, _use(library, target, name, batch, rows, rank))

    encoder, decoder = (
        open_engine(directory, manifest, name, file, library, memory, cuda_graphs=options.cuda_graphs)
        for file in (ENCODER_ENGINE, DECODER_ENGINE)
    )
    graphs = Graphs(encoder, decoder, decoder.dtype, alone=False, check=check)
    backend = StaticBackend(memory, graphs, manifest.dimensions, stack)
    backend.warm_up()
    for program in (encoder, decoder):
        program.save_cache()
    return backend


def choose_engine(
    directory: Path, manifest: Manifest, target: str, precision: str | None, library: str | None = None
) -> tuple[Library, str]:
    """The library to use and the name of the engine for a GPU.

    Args:
        directory: the bundle.
        manifest: of the bundle.
        target: compute capability, e.g. "sm86".
        precision: of the engine; None tries those of the bundle's graphs in their order, then all others.
        library: whose engine; None tries those that are installed.

    Raises:
        BackendError: no library is installed, or the bundle has no engine for it and this GPU.
        OptionError: there is no such library.
    """
    libraries = installed_libraries() if library is None else (library,)
    built = (name.rpartition("-")[2] for name in manifest.engines)
    precisions = [*manifest.precisions, *built] if precision is None else [precision]
    for wanted in precisions:
        for candidate in libraries:
            name = engine_name(candidate, target, wanted)
            if name in manifest.engines:
                return load_library(candidate), name
    chosen = load_library(libraries[0] if libraries else None)  # refuses if there is none
    return chosen, find_engine(directory, manifest, library=chosen.name, target=target, precision=precisions[0])


def open_engine(
    directory: Path,
    manifest: Manifest,
    name: str,
    file: str,
    library: Library,
    memory: CudaMemory,
    *,
    cuda_graphs: bool,
) -> EngineProgram:
    """Deserialises one engine of a bundle.

    Raises:
        BundleError: the file is missing, damaged or foreign.
        BackendError: the library cannot open it here.
    """
    content = read_engine_file(directory, manifest, name, file)
    engine = library.module.Runtime(_logger(library)).deserialize_cuda_engine(content)
    if engine is None:
        raise BackendError(
            f"{library} cannot open {name}/{file} on this GPU; its log on standard error says why. Look at "
            "`nvidia-smi`, or build the engine again on this machine: das-export engine"
        )
    cache = directory / CACHE_FOLDER / f"{name}-{Path(file).stem}.kernels"
    return EngineProgram(library, engine, memory, cache, cuda_graphs=cuda_graphs)


def _use(library: Library, target: str, name: str, batch: int, rows: int, rank: int) -> EngineUse:
    return EngineUse(library.name, library.version, target, name.rpartition("-")[2], batch, rows, rank)


def _settings(trt: Any, engine: Any, file: Path) -> tuple[Any, Any]:
    """What contexts are made with, and the cache of compiled kernels where the library has one."""
    strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
    if not hasattr(trt, "IRuntimeCache"):
        return strategy, None
    settings = engine.create_runtime_config()
    settings.set_execution_context_allocation_strategy(strategy)
    cache = settings.create_runtime_cache()
    if file.is_file() and not cache.deserialize(file.read_bytes()):
        _log.warning("%s is of another GPU, driver or version; kernels are compiled again", file)
    settings.set_runtime_cache(cache)
    return settings, cache


_loggers: dict[str, Any] = {}  # a process keeps the first logger that a library sees


def _logger(library: Library) -> Any:
    trt = library.module
    if library.name not in _loggers:
        _loggers[library.name] = trt.Logger(trt.Logger.WARNING)
    return _loggers[library.name]
