"""Pictures of word error rates: bars with intervals, and rates over the threshold tau."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from das_asr.benchmarks.tune import MEAN, Trial, TuneReport
from das_asr.benchmarks.wer_stats import WerStatistics
from das_asr.runtime.errors import OptionError
from das_asr.runtime.results import BASE

__all__ = ["check_picture", "plot_tuning", "plot_wer"]

_FORMATS = (".png", ".svg", ".pdf")


def check_picture(path: Path | None, option: str) -> None:
    """Refuses a name that no picture can be written under.

    Raises:
        OptionError: naming the option.
    """
    if path is not None and path.suffix.lower() not in _FORMATS:
        raise OptionError(f"{option} {path}: unknown picture format {path.suffix!r}. Use .png, .svg or .pdf.")


def plot_wer(statistics: WerStatistics, path: Path) -> None:
    """Writes one group of bars per set and one bar per system, with intervals.

    Raises:
        OptionError: a file name that is not that of a picture.
    """
    from matplotlib import colormaps

    check_picture(path, "--figure")
    systems, sets = [system.name for system in statistics.report.systems], list(statistics.report.sets)
    figure, (axes,) = _figure(1, (max(6.4, 0.22 * len(systems) * len(sets) + 2), 4.8))
    width = 0.85 / len(systems)
    shades = colormaps["tab10" if len(systems) <= 10 else "tab20"]
    for place, system in enumerate(systems):
        rates = [statistics.rate(system, name) for name in sets]
        left = [index + (place - (len(systems) - 1) / 2) * width for index in range(len(sets))]
        heights = [100 * rate.value for rate in rates]
        axes.bar(left, heights, width, label=system, color=shades(place % shades.N))
        low = [100 * (rate.value - (rate.value if rate.low is None else rate.low)) for rate in rates]
        high = [100 * ((rate.value if rate.high is None else rate.high) - rate.value) for rate in rates]
        # A percentile interval need not contain the figure itself when there are few sentences.
        bounds = [[max(0.0, value) for value in side] for side in (low, high)]
        axes.errorbar(left, heights, bounds, fmt="none", ecolor="black", elinewidth=0.8, capsize=1.5)
    axes.set_xticks(range(len(sets)), sets)
    axes.set_ylabel(f"WER in %, with {100 * statistics.bootstrap.level:g} % intervals")
    axes.grid(visible=True, axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    _save(figure, path)


def plot_tuning(report: TuneReport, path: Path) -> None:
    """Writes WER over tau, one panel per set and one for the mean; what has no tau is a level line.

    Raises:
        OptionError: a file name that is not that of a picture.
    """
    check_picture(path, "--figure")
    names = [*report.sets, MEAN]
    figure, panels = _figure(len(names), (3.4 * len(names), 3.8))
    for axes, name in zip(panels, names, strict=True):
        for rule in report.shared_rules:
            curve = [(trial.tau, 100 * trial.rate(name)) for trial in report.trials if trial.rule == rule]
            axes.plot(*zip(*sorted(curve), strict=True), marker="o", markersize=3, label=rule)
        for label, trial, style in _levels(report):
            axes.axhline(100 * trial.rate(name), linestyle=style, color="black", linewidth=1, label=label)
        axes.set_title(name, fontsize=10)
        axes.set_xlabel("tau")
        axes.grid(visible=True, alpha=0.3)
    panels[0].set_ylabel("WER in %")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    _save(figure, path)


def _levels(report: TuneReport) -> list[tuple[str, Trial, str]]:
    base = next(trial for trial in report.trials if trial.rule == BASE)
    free = [trial for trial in report.trials if trial.tau is None and trial.rule != BASE and trial.applicable]
    best = min(free, key=lambda trial: trial.rate(MEAN), default=base)
    return [(BASE, base, ":"), (best.description, best, "--")][: 1 + (best is not base)]


def _figure(panels: int, size: tuple[float, float]) -> tuple[Any, list[Any]]:
    # Figure and canvas only: pyplot would pick a window system and keep every figure alive.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, [figure.add_subplot(1, panels, place + 1) for place in range(panels)]


def _save(figure: Any, path: Path) -> None:
    """Whole or not at all."""
    scratch = path.with_name(f".{path.stem}.part{path.suffix}")
    try:
        figure.savefig(scratch, dpi=150)
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)
