"""A picture of `das-bench peers` results: our time over CTranslate2's by number of adapters, and everybody's time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from das_asr.benchmarks.peers.engines import ENGINES
from das_asr.benchmarks.peers.report import ratio_to_base, targets_of
from das_asr.benchmarks.plot import save_figure
from das_asr.runtime.errors import OptionError

__all__ = ["plot_peers"]

STYLES = {"das": "-", "das-hypothesis": ":"}


def plot_peers(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Writes the picture; its format follows from the file name.

    Raises:
        OptionError: nothing to draw, or a file name that matplotlib cannot write.
    """
    from matplotlib.figure import Figure

    forced = [result for result in results if result["runs"]]
    if not forced:
        raise OptionError("The results hold no forced comparison, so there is nothing to plot.")
    figure = Figure(figsize=(12.8, 2 + 3.2 * len(forced)), layout="constrained")
    places = figure.subplots(len(forced), 2, squeeze=False)
    for result, (ratios, times) in zip(forced, places, strict=True):
        _ratios(ratios, result)
        _times(times, result)
    save_figure(figure, path)


def _ratios(axes: Any, result: dict[str, Any]) -> None:
    threads = result["arguments"]["threads"]
    domains = sorted({run["domains"] for run in result["runs"] if run["engine"] == "das"})
    for colour, precision in enumerate(("fp32", "int8")):
        for engine, style in STYLES.items():
            points = [(count, ratio_to_base(result, engine, precision, count)) for count in domains]
            points = [point for point in points if point[1] is not None]
            if points:
                label = f"{ENGINES[engine].title}, {precision}"
                axes.plot(*zip(*points, strict=True), style, color=f"C{colour}", marker="o", markersize=4, label=label)
        aims = sorted((count, aim) for count, aim in targets_of(result, precision).items() if count in domains)
        if aims:
            axes.plot(*zip(*aims, strict=True), "_", color=f"C{colour}", markersize=14, label=f"aim, {precision}")
    axes.axhline(1.0, color="grey", linewidth=1)
    axes.set_title(f"time over CTranslate2's on the base alone, {threads} thread{'s' * (threads > 1)}", fontsize=10)
    axes.set_xlabel("domains (LoRA adapters)")
    axes.set_ylim(bottom=0)
    axes.grid(visible=True, alpha=0.3)
    if axes.get_legend_handles_labels()[0]:  # there are none without CTranslate2
        axes.legend(fontsize=8)


def _times(axes: Any, result: dict[str, Any]) -> None:
    """Bars of the base alone, by everybody, slowest first."""
    runs = sorted(
        (run for run in result["runs"] if not run["domains"]), key=lambda run: run["from_features_ms"]["median"]
    )
    names = [run["side"] for run in runs]
    encoder = [run["encoder_ms"]["median"] for run in runs]
    rest = [run["from_features_ms"]["median"] - part for run, part in zip(runs, encoder, strict=True)]
    axes.barh(names, encoder, label="encoder")
    axes.barh(names, rest, left=encoder, label=f"{result['arguments']['tokens']} tokens")
    axes.set_title("the base alone, ms from features to tokens", fontsize=10)
    axes.grid(visible=True, axis="x", alpha=0.3)
    axes.legend(fontsize=8)
