"""The ONNX Runtime backend with the engine's profiler on."""

from __future__ import annotations

from pathlib import Path

from das_asr.runtime.backends import BackendOptions
from das_asr.runtime.backends.onnxruntime import OnnxRuntimeBackend
from das_asr.runtime.manifest import Manifest

__all__ = ["ProfiledBackend"]


class ProfiledBackend(OnnxRuntimeBackend):
    """Writes a trace of every run of both graphs."""

    def __init__(self, folder: Path, bundle: Path, manifest: Manifest, options: BackendOptions, precision: str) -> None:
        """Loads the graphs of a precision; traces go to `folder`."""
        super().__init__(bundle, manifest.graphs(bundle, precision), manifest, options, profiles=folder)

    def end_profiling(self) -> dict[str, Path]:
        """Stops both profiles and returns the traces by graph."""
        sessions = {"encoder": self._encoder, "decoder": self._decoder}
        return {name: Path(session.end_profiling()) for name, session in sessions.items()}
