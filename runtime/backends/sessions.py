"""ONNX Runtime sessions: opening a graph on a provider, and what can go wrong."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as engine  # pyright: ignore[reportAttributeAccessIssue]

from das_asr.runtime.backends import BackendOptions
from das_asr.runtime.backends.graph_defaults import without_defaults
from das_asr.runtime.backends.placement import CPU
from das_asr.runtime.errors import BackendError

__all__ = ["ENGINE_ERRORS", "open_session", "require_provider"]

ENGINE_ERRORS = (
    engine.EPFail,
    engine.Fail,
    engine.InvalidArgument,
    engine.InvalidGraph,
    engine.InvalidProtobuf,
    engine.NoSuchFile,
    engine.NotImplemented,
    engine.RuntimeException,
)
"""What the engine raises when it cannot load or run a graph."""

_WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"
_ERRORS_ONLY = 3  # a level below warns about every overridable initializer at each load


def open_session(
    path: Path,
    options: BackendOptions,
    providers: Mapping[str, Mapping[str, str]],
    *,
    profile: str | None = None,
    defaults: bool = True,
) -> Any:
    """Loads a graph.

    Args:
        path: of the ONNX file.
        options: threads and device.
        providers: to use, in the order of preference, with their options.
        profile: write a profile of every run to a file whose path begins so.
        defaults: keep those of the graph's inputs; without them, every input must be fed.

    Raises:
        BundleError: the file is no graph.
        BackendError: the file cannot be loaded, or a provider did not come up.
    """
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = _ERRORS_ONLY
    if options.threads is not None:
        settings.intra_op_num_threads = options.threads
    settings.add_session_config_entry("session.intra_op.allow_spinning", str(int(options.spinning)))
    if profile is not None:
        settings.enable_profiling, settings.profile_file_prefix = True, profile
    for provider in providers:
        require_provider(provider)
    graph: Path | bytes = path
    if not defaults:
        graph = without_defaults(path)
        settings.add_session_config_entry(_WEIGHTS_FOLDER, str(path.parent))
    try:
        session = onnxruntime.InferenceSession(graph, settings, providers=[(p, dict(o)) for p, o in providers.items()])
    except engine.NotImplemented as error:
        raise BackendError(
            f"ONNX Runtime {onnxruntime.__version__} cannot compute {path} on device {options.device!r}: {error}. "
            "Load another precision, such as precision='fp32'; bf16 needs a GPU."
        ) from error
    except ENGINE_ERRORS as error:
        raise BackendError(
            f"ONNX Runtime {onnxruntime.__version__} cannot load {path} on device {options.device!r}: {error}. "
            "Check the file (`verify_files=True` does), the driver, and whether a newer version is needed."
        ) from error
    missing = [provider for provider in providers if provider not in session.get_providers()]
    if missing:  # the engine only logs when a provider fails to come up
        raise BackendError(
            f"{missing[0]} did not come up on device {options.device!r}; the engine offers "
            f"{', '.join(session.get_providers())}. Check the GPU driver and CUDA libraries, or use device='cpu'."
        )
    return session


def require_provider(provider: str) -> None:
    """Refuses a provider that this build of the engine lacks; loads the libraries of one for GPUs.

    Raises:
        BackendError: naming those that it has.
    """
    available = onnxruntime.get_available_providers()
    if provider not in available:
        raise BackendError(
            f"This build of ONNX Runtime has no {provider} (it has {', '.join(available)}). "
            "Install `das-asr[gpu]` in an environment without `onnxruntime`, or use device='cpu'."
        )
    if provider != CPU:
        onnxruntime.preload_dlls()  # where pip puts CUDA's libraries, nobody else looks for them
