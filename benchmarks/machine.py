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

__all__ = [
    "describe_run",
    "package_versions",
    "pinned",
    "quiet_libraries",
    "result_head",
    "usable_cores",
]

PACKAGES = ("das-asr", "torch", "transformers", "peft", "onnx", "onnxruntime", "onnxruntime-gpu", "numpy", "tokenizers")


def result_head(kind: str) -> dict[str, Any]:
    """How a results file begins; `kind` is the command's name, by which those that read the file know what is in it.

    To be asked for before anything is measured: the load of the machine is that of the moment.
    """
    return {"kind": kind, "schema": 1, **describe_run()}


def describe_run() -> dict[str, Any]:
    """Date, versions, machine and, inside a checkout, the commit."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "versions": {"python": platform.python_version(), **package_versions()},
        "machine": _machine(),
    }


def package_versions() -> dict[str, str]:
    """Installed versions of the packages that matter to speed."""
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def usable_cores() -> set[int]:
    """Cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


@contextlib.contextmanager
def pinned(threads: int) -> Iterator[None]:
    """Pins the calling thread to one core where there is to be one thread, for as long as the context lasts.

    A single thread that the scheduler moves between cores loses its caches; several threads place themselves.
    """
    cores = usable_cores()
    if threads > 1 or not hasattr(os, "sched_setaffinity"):
        yield
        return
    # The last core: the first one usually serves the interrupts.
    os.sched_setaffinity(0, {max(cores)})
    try:
        yield
    finally:
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


def _machine() -> dict[str, Any]:
    """Processor, cores, memory, system and frequency governor; None for what cannot be read."""
    import psutil

    memory = psutil.virtual_memory()
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "usable_cores": len(usable_cores()),
        "memory_gib": round(memory.total / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
        "architecture": platform.machine(),
        "governor": _first_line(Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")),
        "load_before": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
    }


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
