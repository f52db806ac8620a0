"""Backends by name. The file of a backend imports its engine; it is imported only when it is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from das_asr.runtime.backends.base import Backend
from das_asr.runtime.errors import BackendError, OptionError
from das_asr.runtime.manifest import Manifest

__all__ = ["BACKENDS", "BackendOptions", "create_backend"]

BACKENDS = ("onnxruntime",)
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
    """

    device: str = "cpu"
    threads: int | None = None
    spinning: bool = False
    huge_pages: bool = True

    def __post_init__(self) -> None:
        kind, _, index = self.device.partition(":")
        if kind not in ("cpu", "cuda") or (index and not (kind == "cuda" and index.isdigit())):
            raise OptionError(f"device is {self.device!r}, expected 'cpu', 'cuda' or 'cuda:N'.")
        if self.threads is not None and not 1 <= self.threads <= _MOST_THREADS:
            raise OptionError(f"threads is {self.threads}, expected 1 to {_MOST_THREADS}, or None for all cores.")


def create_backend(name: str, graphs: Path, manifest: Manifest, options: BackendOptions) -> Backend:
    """Loads a bundle's graphs from the folder of a precision.

    Raises:
        OptionError: there is no backend of that name.
        BackendError: its package is missing, or the device cannot be had.
    """
    if name not in BACKENDS:
        raise OptionError(f"backend is {name!r}, expected one of: {', '.join(BACKENDS)}.")
    try:
        from das_asr.runtime.backends.onnxruntime import OnnxRuntimeBackend
    except ModuleNotFoundError as error:
        if error.name != "onnxruntime":
            raise
        raise BackendError(
            "ONNX Runtime is not installed. Install `das-asr[cpu]` or, for NVIDIA GPUs, `das-asr[gpu]`."
        ) from error
    return OnnxRuntimeBackend(graphs, manifest, options)
