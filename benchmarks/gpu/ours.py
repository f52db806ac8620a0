"""The runtime's backends in the comparison on a GPU: features in, tokens out, no text in between."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from das_asr.benchmarks.bundles import bundle_for
from das_asr.benchmarks.gpu.pytorch import TAU, Task
from das_asr.runtime.adapter_sets import AdapterSet
from das_asr.runtime.adapters import stack_adapters
from das_asr.runtime.backends import BackendOptions, create_backend
from das_asr.runtime.backends.cuda_device import gpu_target
from das_asr.runtime.backends.engine_files import EngineLimits, engine_name
from das_asr.runtime.backends.tensorrt_library import installed_libraries
from das_asr.runtime.decoding import decode
from das_asr.runtime.errors import BackendError
from das_asr.runtime.job import Job
from das_asr.runtime.manifest import read_manifest
from das_asr.runtime.options import DecodingOptions
from das_asr.runtime.peft_checkpoint import read_adapter
from das_asr.runtime.tokenizer import Tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from numpy.typing import NDArray

__all__ = ["OUR_SYSTEMS", "OurSystem", "build_engine", "prepared_bundle"]

OUR_SYSTEMS = {
    "das-onnxruntime": ("onnxruntime", False),
    "das-onnxruntime-graphs": ("onnxruntime", True),
    "das-ort-tensorrt": ("ort-tensorrt", False),
    "das-tensorrt": ("tensorrt", False),
    "das-tensorrt-graphs": ("tensorrt", True),
}
"""Backend, and whether steps are recorded as CUDA graphs; ONNX Runtime's TensorRT provider keeps one per session."""

_LARGEST_BATCH = 16  # that engines are built for


class OurSystem:
    """A bundle without adapters, onto which those of the task are loaded."""

    def __init__(self, name: str, task: Task, bundle: Path) -> None:
        kind, cuda_graphs = OUR_SYSTEMS[name]
        if kind == "tensorrt":
            build_engine(bundle, task.precision, task.device)
        self._manifest = read_manifest(bundle)
        options = BackendOptions(task.device, cuda_graphs=cuda_graphs)
        self._backend = create_backend(kind, bundle, self._manifest, options, task.precision)
        dims = self._manifest.dimensions
        adapters = [read_adapter(folder, folder.name, dims) for folder in task.adapters]
        names = tuple(adapter.name for adapter in adapters)
        stack = stack_adapters(adapters, dims)
        self._adapters = AdapterSet(names, self._backend.load_stack(stack), stack)
        self._tokenizer = Tokenizer.from_file(bundle / "tokenizer.json", self._manifest.tokens)

    def transcribe(self, features: NDArray[np.float32], tokens: int) -> list[list[int]]:
        """Writes exactly so many tokens for features [B, mels, frames]."""
        end = self._manifest.tokens.end_of_text
        options = DecodingOptions(
            language="en", rule="paper", tau=TAU, max_tokens=tokens, suppress_tokens=(end,), no_speech_threshold=None
        )
        job = Job(self._manifest, self._tokenizer, self._adapters, options, len(features))
        plan, stack = job.plan(), self._adapters.loaded
        decoded = decode(
            self._backend.start(self._backend.encode(features, stack), stack, plan.control), job.prompts(), plan
        )
        utterances = range(len(features))
        return [[int(c[u, r[u]]) for c, r in zip(decoded.candidates, decoded.rows, strict=True)] for u in utterances]

    def close(self) -> None:
        """Frees the graphs."""
        self._backend.close()


def prepared_bundle(checkpoint: Path, precisions: tuple[str, ...], log: Callable[[str], None]) -> Path:
    """The base's bundle in the given precisions, exported on first use.

    It has no adapters: what the comparison needs is loaded onto it, so one bundle serves any number.
    """
    return bundle_for(checkpoint, (), 1, log, precisions=("fp32", *precisions))


def build_engine(bundle: Path, precision: str, device: str, library: str | None = None) -> str:
    """Builds the engine of a precision for a GPU of this machine unless it is there; returns its name.

    Args:
        bundle: to build in.
        precision: of the engine.
        device: cuda or cuda:N.
        library: of `LIBRARIES`; None takes the first that is installed.

    Raises:
        BackendError: TensorRT is missing, or cannot build for this GPU.
        ExportError: it refuses the graphs.
    """
    from das_asr.export import EngineOptions, build_engines

    target, libraries = gpu_target(BackendOptions(device).device_id), installed_libraries()
    chosen = library or next(iter(libraries), None)
    if target is None or chosen not in libraries:
        found = " and ".join(libraries) or "not installed"
        raise BackendError(f"GPU {target}, TensorRT {found}: a GPU and {library or 'TensorRT'} are needed.")
    limits = EngineLimits(max_batch=_LARGEST_BATCH)
    build_engines(bundle, EngineOptions(targets=(target,), precision=precision, limits=limits, library=chosen))
    return engine_name(chosen, target, precision)
