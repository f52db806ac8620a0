"""Backends by name. The file of a backend imports its engine; it is imported only when it is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from das_asr.runtime.backends.base import Backend
from das_asr.runtime.errors import BackendError, OptionError
from das_asr.runtime.manifest import Manifest

__all__ = ["BACKENDS", "BackendOptions", "create_backend"]

_PACKAGES = {
    "onnxruntime": "ONNX Runtime",
    "cuda": "cuda-bindings",
    "tensorrt": "TensorRT",
    "tensorrt_rtx": "TensorRT for RTX",
}
_REMEDY = {
    "onnxruntime": "Install `das-asr[cpu]` or, for NVIDIA GPUs, `das-asr[gpu]`.",
    "ort-tensorrt": "Install `das-asr[gpu,tensorrt]`.",
    "tensorrt": "Install `das-asr[tensorrt]` or `das-asr[tensorrt-rtx]`.",
}
BACKENDS = ("onnxruntime", "ort-tensorrt", "tensorrt")
_MOST_THREADS = 1024  # each graph starts as many; a slip of the finger must not use up the machine's processes


@dataclass(frozen=True)
class BackendOptions:
    """Where and how to run.

    Attributes:
        device: `cpu`, `cuda`, or `cuda:N`.
        threads: threads of one run of a graph; None leaves it to the engine (all cores).
        spinning: let idle threads of the pool spin while a run waits for them. Faster on an otherwise idle machine,
            ruinous on a busy one, so it is off unless asked for. Without effect on one thread.
        huge_pages: ask Linux to keep the weights in pages of 2 MB, see `huge_pages.py`; costs a fraction of a second
            at loading.
        allow_cpu_nodes: on a GPU, accept that ONNX Runtime runs nodes on the CPU, or otherwise than with the provider
            that was asked for.
        cuda_graphs: on a GPU, record each step and have the GPU repeat it at one call; not with `ort-tensorrt`.
        library: with `tensorrt`, whose engines to run, `tensorrt` or `tensorrt-rtx`; None takes any that is installed.
    """

    device: str = "cpu"
    threads: int | None = None
    spinning: bool = False
    huge_pages: bool = True
    allow_cpu_nodes: bool = False
    cuda_graphs: bool = False
    library: str | None = None

    def __post_init__(self) -> None:
        kind, _, index = self.device.partition(":")
        if kind not in ("cpu", "cuda") or (index and not (kind == "cuda" and index.isdigit())):
            raise OptionError(f"device is {self.device!r}, expected 'cpu', 'cuda' or 'cuda:N'.")
        if self.threads is not None and not 1 <= self.threads <= _MOST_THREADS:
            raise OptionError(f"threads is {self.threads}, expected 1 to {_MOST_THREADS}, or None for all cores.")

    @property
    def kind(self) -> str:
        """`cpu` or `cuda`."""
        return self.device.partition(":")[0]

    @property
    def device_id(self) -> int:
        """Which of several."""
        return int(self.device.partition(":")[2] or 0)


def create_backend(
    name: str, directory: Path, manifest: Manifest, options: BackendOptions, precision: str | None = None
) -> Backend:
    """Loads a bundle's graphs, or its engines, of one precision.

    Raises:
        OptionError: there is no backend of that name, the bundle lacks the precision, or options contradict each other.
        BackendError: a package is missing, or the device cannot be had.
        BundleError: the bundle lacks what this backend runs.
    """
    if name not in BACKENDS:
        raise OptionError(f"backend is {name!r}, expected one of: {', '.join(BACKENDS)}.")
    if name != "onnxruntime" and options.kind != "cuda":
        raise OptionError(f"backend={name!r} runs on GPUs only, device is {options.device!r}. Give device='cuda'.")
    if name == "ort-tensorrt" and options.cuda_graphs:
        # It keeps one recording per session, whatever `gpu_graph_id` says, and would replay it for other sizes.
        raise OptionError(
            "cuda_graphs=True does not go with backend='ort-tensorrt', which records one step only. Leave it out, or "
            "use backend='onnxruntime' or 'tensorrt'."
        )
    if name != "tensorrt" and options.library is not None:
        raise OptionError(f"library={options.library!r} is for backend='tensorrt', backend is {name!r}. Leave it out.")
    try:
        return _create(name, directory, manifest, options, precision)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in _PACKAGES:
            raise
        raise BackendError(f"{_PACKAGES[missing]} is not installed. {_REMEDY[name]}") from error


def _create(name: str, directory: Path, manifest: Manifest, options: BackendOptions, precision: str | None) -> Backend:
    """Imports the file of a backend, which imports its engine."""
    if name == "tensorrt":
        from das_asr.runtime.backends import tensorrt

        return tensorrt.load_backend(directory, manifest, options, precision)
    graphs = manifest.graphs(directory, precision)
    if name == "ort-tensorrt":
        from das_asr.runtime.backends import ort_tensorrt

        return ort_tensorrt.load_backend(directory, graphs, manifest, options)
    if name == "onnxruntime" and options.kind == "cpu":
        from das_asr.runtime.backends.onnxruntime import OnnxRuntimeBackend

        return OnnxRuntimeBackend(directory, graphs, manifest, options)
    from das_asr.runtime.backends import onnxruntime_static

    return onnxruntime_static.load_backend(graphs, manifest, options)
