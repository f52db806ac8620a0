"""The two TensorRT libraries with one Python API: which are installed, and which one is meant.

`tensorrt` is for data-centre GPUs and builds engines on the GPU that will run them. `tensorrt-rtx` builds ahead of
time, without a GPU, and compiles its kernels when an engine is loaded. Neither opens the other's engines.
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from typing import Any

from das_asr.runtime.errors import BackendError, OptionError

__all__ = ["LIBRARIES", "Library", "installed_libraries", "load_library"]

LIBRARIES: dict[str, tuple[str, ...]] = {
    "tensorrt": ("tensorrt",),
    "tensorrt-rtx": ("tensorrt_rtx", "tensorrt_rtx_bindings"),
}
"""Modules of each library; the second name of TensorRT-RTX is that of its wheel without the package around it."""


@dataclass(frozen=True)
class Library:
    """An imported TensorRT."""

    name: str  # one of LIBRARIES
    version: str
    module: Any

    def __str__(self) -> str:
        return f"{self.name} {self.version}"


def installed_libraries() -> tuple[str, ...]:
    """Names of the libraries that can be imported, without importing them."""
    return tuple(name for name, modules in LIBRARIES.items() if any(map(importlib.util.find_spec, modules)))


def load_library(name: str | None = None) -> Library:
    """Imports a TensorRT.

    Args:
        name: which one; None takes the one that is installed.

    Raises:
        OptionError: there is no library of that name, or both are installed and none is named.
        BackendError: it is not installed, or cannot be loaded.
    """
    installed = installed_libraries()
    if name is not None and name not in LIBRARIES:
        raise OptionError(f"The TensorRT library is {name!r}, expected {' or '.join(LIBRARIES)}.")
    if name is None and len(installed) > 1:
        raise OptionError(f"{' and '.join(installed)} are both installed. Say which one is meant, as --library does.")
    if name is not None and name not in installed:
        raise BackendError(f"{name} is not installed. Install `das-asr[{name}]`.")
    if not installed:
        raise BackendError(
            f"{' or '.join(LIBRARIES)} is not installed. Install `das-asr[tensorrt-rtx]`, which builds engines without "
            "a GPU, or on a machine with a data-centre GPU `das-asr[tensorrt]`."
        )
    chosen = name or installed[0]
    found = next(module for module in LIBRARIES[chosen] if importlib.util.find_spec(module))
    try:
        module = importlib.import_module(found)
    except (ImportError, OSError) as error:  # a shared library that is missing or of another version
        raise BackendError(f"{chosen} is installed but cannot be loaded: {error}. Install it again.") from error
    return Library(chosen, str(module.__version__), module)
