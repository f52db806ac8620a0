"""Results files by the command that wrote them: how each kind is read, told and drawn."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from das_asr.benchmarks.gpu.report import GPU_COMMAND, GPU_MARKERS, render_gpu, render_gpu_table
from das_asr.benchmarks.peers.plot import plot_peers
from das_asr.benchmarks.peers.report import PEERS_MARKERS, render_peers, render_peers_table
from das_asr.benchmarks.plot import plot_rtf
from das_asr.benchmarks.report import MARKERS, render_report, render_rtf_table
from das_asr.runtime.errors import OptionError

__all__ = ["KINDS", "Kind", "read_kind", "read_results"]

Results = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Kind:
    """What can be made of the results of one command."""

    command: str  # what writes them
    report: Callable[[Results], str]
    table: Callable[[Results], str]  # for the README
    markers: tuple[str, str]
    plot: Callable[[Results, Path], None] | None  # None where there is no picture


KINDS = {
    "rtf": Kind("das-bench rtf", render_report, render_rtf_table, MARKERS, plot_rtf),
    "peers": Kind("das-bench peers", render_peers, render_peers_table, PEERS_MARKERS, plot_peers),
    "gpu": Kind(GPU_COMMAND, render_gpu, render_gpu_table, GPU_MARKERS, None),
}


def read_kind(paths: Sequence[Path]) -> tuple[Kind, list[dict[str, Any]]]:
    """Reads result files of one kind.

    Raises:
        OptionError: a file is missing, or is not a result of a command of `KINDS`, or they are of several.
    """
    results = read_results(paths)
    names = {result["kind"] for result in results}
    if len(names) > 1:
        raise OptionError(f"The files are results of {' and '.join(sorted(names))}. Give those of one command.")
    return KINDS[names.pop()], results


def read_results(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """Reads result files.

    Raises:
        OptionError: a file is missing, or is not a result of a command of `KINDS`.
    """
    commands = " or ".join(f"`{kind.command}`" for kind in KINDS.values())
    results = []
    for path in paths:
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            hint = f"Give files that {commands} wrote with --output."
            raise OptionError(f"{path} cannot be read as JSON ({error}). {hint}") from error
        if not isinstance(data, dict) or data.get("kind") not in KINDS:
            raise OptionError(f"{path} is not a result of {commands}. Give files that it wrote with --output.")
        results.append(data)
    return results
