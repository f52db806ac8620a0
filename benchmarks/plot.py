"""A picture of `das-bench rtf` results: RTF over the number of domains, one panel per result file and rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from das_asr.benchmarks.systems import SYSTEMS
from das_asr.runtime.errors import OptionError

__all__ = ["plot_rtf", "save_figure"]


def plot_rtf(results: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Writes the picture; its format follows from the file name.

    Raises:
        OptionError: nothing to draw, or a file name that matplotlib cannot write.
    """
    # Figure only: pyplot would pick a window system and keep every figure alive.
    from matplotlib.figure import Figure

    panels = [(result, rank) for result in results for rank in sorted({run["rank"] for run in result["runs"]})]
    if not panels:
        raise OptionError("The results hold no runs over numbers of domains, so there is nothing to plot.")
    figure = Figure(figsize=(6.4 * len(panels), 4.4), layout="constrained")
    for place, (result, rank) in enumerate(panels, start=1):
        _panel(figure.add_subplot(1, len(panels), place), result, rank)
    save_figure(figure, path)


def save_figure(figure: Any, path: Path) -> None:
    """Writes a matplotlib figure; the format follows from the file name.

    Raises:
        OptionError: matplotlib cannot write that format.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    if path.suffix.lstrip(".").lower() not in FigureCanvasAgg(figure).get_supported_filetypes():
        raise OptionError(f"--plot {path}: unknown picture format {path.suffix!r}. Use .png, .svg or .pdf.")
    figure.savefig(path, dpi=150)


def _panel(axes: Any, result: Mapping[str, Any], rank: int) -> None:
    for system, info in SYSTEMS.items():
        points = sorted(
            (run["domains"], run["rtf"]) for run in result["runs"] if run["system"] == system and run["rank"] == rank
        )
        if points:
            style = "-" if system.startswith("das") else "--"
            axes.plot(*zip(*points, strict=True), style, marker="o", markersize=4, label=info.title)
    threads = result["arguments"]["threads"]
    axes.set_title(f"rank {rank}, {threads} thread{'s' * (threads > 1)}, {result['machine']['processor']}", fontsize=10)
    axes.set_xlabel("domains (LoRA adapters)")
    axes.set_ylabel("real-time factor (lower is faster)")
    axes.set_yscale("log")
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.legend(fontsize=8)
