"""Compiles one graph with TensorRT. Runs as a process of its own: a fault in the builder takes its process down.

`engine_process.py` starts `main`, writes one job to its input and reads one JSON object per line from its output:
`progress`, then `warnings` when all is well, or `error`. When its input closes, whoever started it is gone; it then
removes the folder it writes to and ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from das_asr.runtime.backends.engine_profiles import Profile
from das_asr.runtime.backends.graph_defaults import without_defaults
from das_asr.runtime.backends.tensorrt_library import Library, load_library
from das_asr.runtime.errors import DasError, ExportError
from das_asr.runtime.manifest import from_plain

__all__ = ["BuildJob", "attach_timings", "build", "main", "parse_network"]

_SECONDS_BETWEEN_NEWS = 2.0
_INT64_NOTICE = "Int64 binding"  # a reminder to bind int64 tensors as such, once for each of them

Say = Callable[[str], None]


@dataclass(frozen=True)
class BuildJob:
    """One graph to compile. Paths are text because the job crosses a pipe as JSON."""

    library: str
    target: str  # compute capability, e.g. "sm86"
    graph: str  # ONNX file; its weights lie beside it
    engine: str  # file to write
    profiles: tuple[Profile, ...]
    workspace: int  # bytes of scratch memory that the builder may plan with; 0 is no limit
    exact_products: bool  # float32 products in float32, not in TF32
    timing_cache: str | None  # file that is read if it exists, and replaced
    inspect: bool  # the GPU is there: save what the engine's layers became


def main() -> None:
    """Reads a job from standard input, builds it, and says so on standard output."""
    pipe = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)  # what the library itself prints goes to standard error

    def tell(kind: str, content: object) -> None:
        pipe.write(json.dumps({kind: content}) + "\n")

    line = sys.stdin.readline()
    if not line:  # whoever started this was gone before it could say what to build
        return
    job = from_plain(BuildJob, json.loads(line), "job")
    threading.Thread(target=_end_when_orphaned, args=(Path(job.engine).parent,), daemon=True).start()
    try:
        tell("warnings", build(job, lambda text: tell("progress", text)))
    except DasError as error:
        tell("error", str(error))


def _end_when_orphaned(folder: Path) -> None:
    sys.stdin.read()
    shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(OSError):  # other engines are there
        folder.parent.rmdir()
    os._exit(1)


def build(job: BuildJob, say: Say) -> list[str]:
    """Compiles the graph and writes the engine.

    Args:
        job: what to build.
        say: is told how far it is, every few seconds.

    Returns:
        What the builder warned of.

    Raises:
        ExportError: the builder refuses; the message has its reasons.
        BackendError: the library cannot be loaded.
    """
    library = load_library(job.library)
    trt = library.module
    log = _logger(trt)
    builder = trt.Builder(log)
    network, _parser = parse_network(library, builder, log, Path(job.graph))
    config = _config(job, trt, builder, network)
    timings = None if job.timing_cache is None else attach_timings(config, Path(job.timing_cache))
    config.progress_monitor = _monitor(trt, say)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise ExportError(
            f"{library} cannot build {Path(job.graph).name} for {job.target}: {' '.join(log.errors)} "
            "If memory is short, give more --workspace or smaller limits; if the GPU lacks the precision, another "
            "--precision."
        )
    with Path(job.engine).open("wb") as file:
        file.write(memoryview(engine))
    if timings is not None and job.timing_cache is not None:
        _replace(Path(job.timing_cache), bytes(timings.serialize()))
    if job.inspect:
        _inspect(trt, log, engine, Path(job.engine))
    return list(log.warnings)


def parse_network(library: Library, builder: Any, log: Any, graph: Path) -> tuple[Any, Any]:
    """Reads a graph into a strongly typed network, adapters as true inputs: (network, its parser).

    Every tensor keeps the type that the graph gives it. The parser holds the weights, so it must outlive the network.

    Raises:
        BundleError: the file is no graph.
        ExportError: the library cannot read the graph.
    """
    trt = library.module
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse(without_defaults(graph), str(graph)):
        reasons = "; ".join(
            f"{error.node_name()}: {error.desc()}" for error in map(parser.get_error, range(parser.num_errors))
        )
        raise ExportError(f"{library} cannot read {graph.name}: {reasons or ' '.join(log.errors)}")
    _allow_plain_attention(trt, network)
    return network, parser


def _allow_plain_attention(trt: Any, network: Any) -> None:
    """Lets an attention without a fused kernel (float32, unusual head sizes) be built from its products and softmax."""
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            layer.__class__ = trt.IAttentionInputLayer  # TensorRT's way to a layer's own members from Python
            layer.attention.decomposable = True


def _config(job: BuildJob, trt: Any, builder: Any, network: Any) -> Any:
    config = builder.create_builder_config()
    if hasattr(config, "set_compute_capability"):  # `tensorrt` has no choice: it builds for the GPU it runs on
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, job.target.upper()), 0)
    if job.exact_products:
        config.clear_flag(trt.BuilderFlag.TF32)
    if job.workspace:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, job.workspace)
    if job.inspect:
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    for profile in job.profiles:
        config.add_optimization_profile(_profile(builder, network, profile))
    return config


def attach_timings(config: Any, file: Path) -> Any:
    """The timings that the builder starts from and adds to; they must outlive the build.

    Those in the file may be of another GPU or driver with the same target, or damaged. Then it starts from none.
    """
    timings = config.create_timing_cache(file.read_bytes() if file.is_file() else b"")
    if timings is None or not config.set_timing_cache(timings, ignore_mismatch=False):
        timings = config.create_timing_cache(b"")
        config.set_timing_cache(timings, ignore_mismatch=False)
    return timings


def _profile(builder: Any, network: Any, sizes: Profile) -> Any:
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        if tensor.is_shape_tensor:
            profile.set_shape_input(tensor.name, *sizes.values[tensor.name])
        elif tensor.name in sizes.shapes:
            profile.set_shape(tensor.name, *sizes.shapes[tensor.name])
    return profile


def _replace(path: Path, content: bytes) -> None:
    path.parent.mkdir(exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(content)
    partial.replace(path)


def _inspect(trt: Any, log: Any, engine: Any, path: Path) -> None:
    """Saves what became of the layers beside the engine, as JSON; needs the GPU that the engine is for."""
    opened = trt.Runtime(log).deserialize_cuda_engine(engine)
    if opened is None:
        raise ExportError(f"{path.name} was built, but cannot be opened on this GPU: {' '.join(log.errors)}")
    report = opened.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
    path.with_suffix(".layers.json").write_text(report, encoding="utf-8")


# --- What the library calls ---


def _logger(trt: Any) -> Any:
    """Collects errors and warnings. A process keeps the first logger it sees, so there is one per process."""

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []
            self.warnings: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                self.errors.append(message)
            elif severity == trt.ILogger.WARNING and _INT64_NOTICE not in message:
                self.warnings.append(message)

    return Log()


def _monitor(trt: Any, say: Say) -> Any:
    """Tells the outermost phases as they start, and how far an inner one is every few seconds."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self._steps: dict[str, int] = {}
            self._next = 0.0
            self._lock = threading.Lock()  # the builder's threads call

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            with self._lock:
                self._steps[name] = steps
                if parent is None:
                    self._tell(name)

        def step_complete(self, name: str, step: int) -> bool:
            with self._lock:
                if self._steps[name] > 1 and time.monotonic() > self._next:
                    self._tell(f"{name}, {step + 1} of {self._steps[name]}")
            return True

        def phase_finish(self, name: str) -> None:
            with self._lock:
                self._steps.pop(name, None)

        def _tell(self, text: str) -> None:
            self._next = time.monotonic() + _SECONDS_BETWEEN_NEWS
            say(text)

    return Monitor()
