"""Processes that end when the one that started them does, however that ends."""

from __future__ import annotations

import ctypes
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

__all__ = ["end_with_parent", "run_child"]

_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of Linux
_C_LIBRARY = ctypes.CDLL(None) if sys.platform == "linux" else None  # opened before any fork


def end_with_parent() -> None:
    """Lets the kernel kill this process when its parent is gone; elsewhere than on Linux it may outlive it."""
    if _C_LIBRARY is not None:
        _C_LIBRARY.prctl(_PARENT_DEATH_SIGNAL, signal.SIGKILL)


def run_child(command: Sequence[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """Runs somebody else's program to its end, whatever its status, and returns what it printed."""
    linux = _C_LIBRARY is not None
    return subprocess.run(
        command, capture_output=True, text=True, check=False, preexec_fn=end_with_parent if linux else None, **options
    )
