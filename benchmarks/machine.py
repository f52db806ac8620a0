"""The machine a benchmark ran on: what it is, and how it is held still while measuring."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
import sys
import warnings
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from das_asr.runtime.errors import OptionError

__all__ = ["describe_machine", "describe_run", "hold_threads", "limit_threads", "package_versions", "quiet_libraries"]

PACKAGES = ("das-asr", "torch", "transformers", "peft", "onnx", "onnxruntime", "onnxruntime-gpu", "numpy", "tokenizers")
POOLS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def describe_machine() -> dict[str, Any]:
    """Processor, cores, memory, system and frequency governor; None for what cannot be read."""
    import psutil

    memory = psutil.virtual_memory()
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "usable_cores": len(_usable_cores()),
        "memory_gib": round(memory.total / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
        "architecture": platform.machine(),
        "governor": _first_line(Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")),
        "load_before": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
    }


def describe_run() -> dict[str, Any]:
    """Date, versions and, inside a checkout, the commit."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "versions": {"python": platform.python_version(), **package_versions()},
    }


def package_versions() -> dict[str, str]:
    """Installed versions of the packages that matter to speed."""
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def limit_threads(threads: int) -> None:
    """Sizes the thread pools that are read from the environment; call it before any heavy import.

    Raises:
        OptionError: more threads than cores this process may use.
    """
    if threads > (usable := len(_usable_cores())):
        raise OptionError(f"--threads {threads}: this process may use {usable} core(s). Ask for at most that many.")
    for name in POOLS:
        os.environ[name] = str(threads)


@contextlib.contextmanager
def hold_threads(threads: int) -> Iterator[None]:
    """Gives PyTorch `threads` threads; with one thread also pins the process to one core, and undoes both at the end.

    A single thread that the scheduler moves between cores loses its caches; several threads place themselves.
    """
    import torch

    before, cores = torch.get_num_threads(), _usable_cores()
    torch.set_num_threads(threads)
    pinned = threads == 1 and hasattr(os, "sched_setaffinity")
    if pinned:
        # The last core: the first one usually serves the interrupts.
        os.sched_setaffinity(0, {max(cores)})
    try:
        yield
    finally:
        torch.set_num_threads(before)
        if pinned:
            os.sched_setaffinity(0, cores)


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keeps progress bars and advice of transformers off the terminal while the context lasts."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with warnings.catch_warnings():
        # PEFT still asks transformers for a property by its former name.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        try:
            yield
        finally:
            logging.set_verbosity(level)
            if bars:
                logging.enable_progress_bar()


def _usable_cores() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def _processor() -> str | None:
    path = Path("/proc/cpuinfo")
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    if sys.platform == "darwin":
        return _output("sysctl", "-n", "machdep.cpu.brand_string")
    return platform.processor() or None


def _first_line(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8").splitlines()[0]
    except (OSError, IndexError):
        return None


def _commit() -> str | None:
    here = Path(__file__).resolve()
    # An installed copy may lie inside somebody else's checkout, whose commit says nothing about this package.
    if not _git("ls-files", "--error-unmatch", here.name):
        return None
    commit = _git("rev-parse", "--short=12", "HEAD")
    return f"{commit}+changes" if _git("status", "--porcelain", "--untracked-files=no") else commit


def _git(*arguments: str) -> str | None:
    return _output("git", "-C", str(Path(__file__).resolve().parent), *arguments)


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
