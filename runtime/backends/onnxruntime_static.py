"""ONNX Runtime on the graph with the static cache: every tensor bound by its address, nothing allocated per step.

This is how ONNX Runtime is used on a GPU. It runs on a CPU as well, where the growing cache is faster; the tests make
use of that.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from das_asr.runtime.adapters import Stack
from das_asr.runtime.backends import BackendOptions
from das_asr.runtime.backends.memory import Buffer, HostMemory, Memory
from das_asr.runtime.backends.placement import CPU, CUDA, fallen_back
from das_asr.runtime.backends.sessions import ENGINE_ERRORS, open_session, require_provider
from das_asr.runtime.backends.static import Graphs, StaticBackend, unlimited
from das_asr.runtime.contract import ALONE, DECODER_STATIC_FILE, ENCODER_FILE, DType
from das_asr.runtime.errors import BackendError, BundleError
from das_asr.runtime.manifest import Manifest

__all__ = [
    "OnnxBound",
    "OnnxProgram",
    "Providers",
    "cuda_options",
    "load_backend",
    "on_both",
    "open_graphs",
    "refuse_strays",
]

Providers = Mapping[str, Mapping[str, str]]

_DTYPES: dict[str, DType] = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(bfloat16)": "bfloat16"}
_BFLOAT16 = 16  # onnx.TensorProto.BFLOAT16, which NumPy has no type for
_NAMED = 20  # nodes that a message lists


class OnnxProgram:
    """One session; see `runner.Program`."""

    def __init__(self, session: Any, memory: Memory, *, cuda_graphs: bool) -> None:
        self.session = session
        self._memory, self._cuda_graphs = memory, cuda_graphs
        self._inputs = {item.name for item in (*session.get_inputs(), *session.get_overridable_initializers())}
        self._outputs = {item.name for item in session.get_outputs()}
        self._graph_ids = count(1)

    @property
    def dtype(self) -> DType:
        """Of what the graph writes on the device for the next graph or run."""
        kinds = {item.type for item in self.session.get_outputs() if item.name.startswith(("cross_", "present_"))}
        (kind,) = kinds
        return _DTYPES[kind]

    def bind(self, tensors: Mapping[str, Buffer], *, repeated: bool) -> OnnxBound:
        """Binds every tensor that the graph has; with CUDA graphs each binding that is repeated gets one of its own."""
        binding = self.session.io_binding()
        for name, buffer in tensors.items():
            if name in self._inputs:
                binding.bind_input(name, *self._place(buffer))
            if name in self._outputs:
                binding.bind_output(name, *self._place(buffer))
        options = onnxruntime.RunOptions()
        if self._memory.device == "cuda":
            # What comes next on the stream waits for this run by itself; the host need not.
            options.add_run_config_entry("disable_synchronize_execution_providers", "1")
            graph = next(self._graph_ids) if repeated and self._cuda_graphs else -1
            options.add_run_config_entry("gpu_graph_id", str(graph))
        return OnnxBound(self.session, binding, options, (self._memory, *tensors.values()))

    def _place(self, buffer: Buffer) -> tuple[str, int, Any, tuple[int, ...], int]:
        """Device, its number, element type, shape and address, as `bind_input` takes them."""
        kind: Any = _BFLOAT16 if buffer.dtype == "bfloat16" else np.dtype(buffer.dtype).type
        device, number = ("cpu", 0) if buffer.host else (self._memory.device, self._memory.device_id)
        return device, number, kind, buffer.shape, buffer.address


class OnnxBound:
    """One IO binding; see `runner.Bound`."""

    def __init__(self, session: Any, binding: Any, options: Any, held: tuple[object, ...]) -> None:
        self._session, self._binding, self._options = session, binding, options
        self._held = held  # the binding knows addresses only, the session its stream

    def run(self) -> None:
        """See `Bound`.

        Raises:
            BackendError: the device has no memory left for the engine's own tensors, or a library that it needs is
                missing there.
        """
        try:
            self._session.run_with_iobinding(self._binding, self._options)
        except (*ENGINE_ERRORS, RuntimeError) as error:  # what it raises while running is no class of its own
            if "allocate memory" in str(error) or "out of memory" in str(error):
                raise BackendError(
                    f"ONNX Runtime is out of memory: {error}. Decode fewer utterances at a time or with fewer "
                    "adapters, use a precision of fewer bits, or free the device."
                ) from error
            raise BackendError(
                f"ONNX Runtime {onnxruntime.__version__} could not run a graph: {error}. On a GPU, check that the CUDA "
                "libraries and cuDNN are there (`das-asr[gpu]` brings them), or load another precision."
            ) from error


def load_backend(graphs: Path, manifest: Manifest, options: BackendOptions) -> StaticBackend:
    """The graphs of a precision on the CPU or, through the CUDA provider, on a GPU.

    Raises:
        BackendError: a package, the provider or the device is missing, or nodes fell back to the CPU.
        BundleError: the bundle has no graph with the static cache.
    """
    if options.kind == "cpu":
        return open_graphs(graphs, manifest, options, HostMemory(), on_both({CPU: {}}))
    require_provider(CUDA)
    from das_asr.runtime.backends.cuda_memory import CudaMemory

    memory = CudaMemory(options.device_id)
    providers = on_both({CUDA: cuda_options(memory.stream, options), CPU: {}})
    return open_graphs(graphs, manifest, options, memory, providers)


def on_both(providers: Providers) -> dict[str, Providers]:
    """The same providers for both graphs."""
    return {ENCODER_FILE: providers, DECODER_STATIC_FILE: providers}


def cuda_options(stream: int, options: BackendOptions) -> dict[str, str]:
    """Options of the CUDA provider."""
    return {
        "device_id": str(options.device_id),
        "user_compute_stream": str(stream),
        "enable_cuda_graph": str(int(options.cuda_graphs)),
        "use_tf32": "0",  # float32 means float32; who wants fewer bits says so by the precision
        "arena_extend_strategy": "kSameAsRequested",
    }


def open_graphs(
    graphs: Path,
    manifest: Manifest,
    options: BackendOptions,
    memory: Memory,
    providers: Mapping[str, Providers],
    stack: Stack | None = None,
    check: Callable[[int, int, int], None] = unlimited,
) -> StaticBackend:
    """Opens both graphs and, where another provider than the CPU's is asked for, makes sure that it runs them.

    Args:
        graphs: folder of a precision.
        manifest: of the bundle.
        options: of the backend.
        memory: where the graphs' tensors lie.
        providers: of each graph file.
        stack: the bundle's adapters, where the graphs' own copy of them is not to be used; adapters are then inputs
            without a default.
        check: see `Graphs`.
    """
    path = graphs / DECODER_STATIC_FILE
    if not path.is_file():
        raise BundleError(f"{graphs} has no {DECODER_STATIC_FILE}, which this needs. Export the bundle again.")
    wanted = next(iter(providers[path.name]))
    watched = wanted != CPU
    with tempfile.TemporaryDirectory() as folder:
        encoder, decoder = (
            OnnxProgram(
                open_session(
                    file,
                    options,
                    providers[file.name],
                    profile=f"{folder}/{file.stem}" if watched else None,
                    defaults=stack is None,
                ),
                memory,
                cuda_graphs=options.cuda_graphs and file == path,
            )
            for file in (graphs / ENCODER_FILE, path)
        )
        alone = ALONE in encoder.session.get_modelmeta().custom_metadata_map
        own = (manifest.rows, max((adapter.rank for adapter in manifest.adapters), default=1))
        programs = Graphs(encoder, decoder, decoder.dtype, alone, check)
        backend = StaticBackend(memory, programs, manifest.dimensions, stack or own)
        if watched:
            backend.warm_up()
            profiles = [Path(program.session.end_profiling()) for program in (encoder, decoder)]
            if not options.allow_cpu_nodes:
                refuse_strays(profiles, options, wanted)
    return backend


def refuse_strays(profiles: list[Path], options: BackendOptions, wanted: str) -> None:
    """Refuses graphs of which a node ran elsewhere than asked for.

    Raises:
        BackendError: with the list.
    """
    nodes = [node for profile in profiles for node in fallen_back(profile, wanted)]
    if nodes:
        listed = ", ".join(nodes[:_NAMED]) + (f" and {len(nodes) - _NAMED} more" if len(nodes) > _NAMED else "")
        raise BackendError(
            f"On device {options.device!r}, ONNX Runtime runs {len(nodes)} node(s) elsewhere than with {wanted}, or "
            f"copies for them: {listed}. Use a newer ONNX Runtime or another precision, or accept the loss with "
            "allow_cpu_nodes=True."
        )
