"""`das-bench wer`, `das-bench tune`, `das-bench tables` and `das-bench forgetting`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from das_asr.benchmarks.output import check_folders, write_whole
from das_asr.runtime.console import Command, NamedFolder
from das_asr.runtime.errors import OptionError

__all__ = [
    "EXISTING",
    "FILE",
    "FOLDER",
    "common_options",
    "forgetting_command",
    "numbers",
    "say",
    "shared_choices",
    "tables_command",
    "tune_command",
    "wer_command",
]

F = TypeVar("F", bound=Callable[..., Any])

FILE = click.Path(dir_okay=False, path_type=Path)
FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)
EXISTING = click.Path(exists=True, path_type=Path)
FIGURE = click.option("--figure", type=FILE, help="Picture to write: .png, .svg or .pdf.")


def common_options(batch_size: int = 16) -> Callable[[F], F]:
    """Options of every command that decodes test sets."""
    options = [
        click.option("--bundle", "-b", required=True, type=FOLDER, help="What `das-export` wrote."),
        click.option(
            "--test",
            "tests",
            multiple=True,
            required=True,
            metavar="[NAME=]FOLDER",
            help="AudioFolder or JSON Lines manifest; without a name it is split by its column `domain`.",
        ),
        click.option(
            "--normalization",
            type=click.Choice(["paper", "whisper"]),
            default="paper",
            show_default=True,
            help="Lower case without punctuation, or Whisper's rules for English.",
        ),
        click.option("--wake-word", "wake_words", multiple=True, help="Removed at the start of texts; repeatable."),
        click.option("--spellings", type=EXISTING, help="normalizer.json or checkpoint that has it, for `whisper`."),
        click.option("--language", help="Code or English name; detected if the model knows several."),
        click.option("--max-tokens", type=int, help="Longest text of a row in tokens."),
        click.option("--batch-size", default=batch_size, show_default=True, help="Utterances decoded together."),
        click.option("--device", default="cpu", show_default=True, help="cpu, cuda or cuda:N."),
        click.option("--threads", type=int, help="Threads; by default all cores."),
        click.option("--skip-unfit", is_flag=True, help="Leave out audio that is too long or too short."),
        click.option("--output", "-o", required=True, type=FILE, help="JSON file to write."),
    ]
    return lambda command: functools.reduce(lambda wrapped, option: option(wrapped), reversed(options), command)


@click.command("wer", cls=Command)
@common_options()
@FIGURE
@click.option("--system", "named", multiple=True, help="[NAME=][FOLDER:]KIND, or `all` (the default); repeatable.")
@click.option("--systems", "listed", type=EXISTING, help="YAML or JSON map from names to such descriptions.")
@click.option("--baseline", default="base", show_default=True, help="System that the others are compared with.")
@click.option("--resamples", default=5000, show_default=True, help="Bootstrap resamples.")
@click.option("--seed", default=0, show_default=True, help="Of the bootstrap.")
@click.option("--markdown", type=FILE, help="Tables to write; without it they go to standard output.")
@click.option("--worst", type=FILE, help="HTML page of the worst sentences to write.")
@click.option("--worst-system", help="The system that --worst is about; by default the first joint one.")
@click.option("--worst-count", default=20, show_default=True, help="Sentences of each set on that page.")
def wer_command(
    bundle: Path,
    tests: tuple[str, ...],
    named: tuple[str, ...],
    listed: Path | None,
    output: Path,
    figure: Path | None,
    markdown: Path | None,
    worst: Path | None,
    **options: Any,
) -> None:
    """Word error rates of systems on test sets, with intervals and significance.

    A system is a KIND (base, own, oracle, hypothesis, paper, gain, deviation-max or an adapter's name) with options, as
    in `hypothesis,switch_cost=0.5` or `DAS=gain,tau=0.1`, or is in a further folder, as in
    `ft-music=build/ft-music:base`.
    """
    from das_asr.benchmarks.machine import quiet_libraries
    from das_asr.benchmarks.significance import Bootstrap
    from das_asr.benchmarks.testsets import parse_source, read_sets
    from das_asr.benchmarks.wer import WerOptions, evaluate
    from das_asr.benchmarks.wer_plot import check_picture, plot_wer
    from das_asr.benchmarks.wer_report import render_wer
    from das_asr.benchmarks.wer_stats import WerStatistics
    from das_asr.benchmarks.wer_systems import ALL, parse_systems, read_systems
    from das_asr.benchmarks.worst import default_system, render_worst
    from das_asr.runtime.manifest import read_manifest

    check_folders(output=output, figure=figure, markdown=markdown, worst=worst)
    check_picture(figure, "--figure")
    bootstrap = Bootstrap(options["resamples"], options["seed"])
    adapters = tuple(entry.name for entry in read_manifest(bundle).adapters)
    described = [*named, *(read_systems(listed) if listed else ())]
    systems = parse_systems(described or [ALL], adapters)
    if (page := options["worst_system"]) and page not in {system.name for system in systems} | {"base"}:
        raise OptionError(f"--worst-system {page!r} is none of the systems. Name one of them.")
    chosen = WerOptions(bundle=bundle, baseline=options["baseline"], **shared_choices(options))
    with quiet_libraries():
        report = evaluate(systems, read_sets([parse_source(text) for text in tests]), chosen, say)
    statistics = WerStatistics(report, bootstrap)
    write_whole(output, report.to_json())
    text = render_wer(statistics)
    if markdown:
        write_whole(markdown, text)
    else:
        click.echo(text, nl=False)
    if figure:
        plot_wer(statistics, figure)
    if worst:
        write_whole(worst, render_worst(report, page or default_system(report), options["worst_count"]))


@click.command("tune", cls=Command)
@common_options()
@FIGURE
@click.option("--rule", "rules", multiple=True, help="Shared-history rule to try; by default all; `none` for none.")
@click.option("--taus", help="Comma-separated thresholds to try.")
@click.option("--switch-costs", help="Comma-separated switch costs of hypothesis to try.")
@click.option("--retain", multiple=True, help="Set that must not become worse than with the base; repeatable.")
@click.option("--allowance", default=0.0, show_default=True, help="By how many points of WER it may all the same.")
@click.option("--apply", is_flag=True, help="Print the options of the best setting alone.")
def tune_command(
    bundle: Path,
    tests: tuple[str, ...],
    rules: tuple[str, ...],
    taus: str | None,
    switch_costs: str | None,
    retain: tuple[str, ...],
    output: Path,
    figure: Path | None,
    apply: bool,
    **options: Any,
) -> None:
    """The best rule and threshold on development sets.

    It has the lowest mean WER over the sets among the settings that are no worse than the base on the sets to retain:
    by default those without an adapter of their name.
    """
    from das_asr.benchmarks.machine import quiet_libraries
    from das_asr.benchmarks.testsets import parse_source, read_sets
    from das_asr.benchmarks.tune import TuneOptions, tune
    from das_asr.benchmarks.tune_report import render_tuning
    from das_asr.benchmarks.wer_plot import check_picture, plot_tuning

    check_folders(output=output, figure=figure)
    check_picture(figure, "--figure")
    lists = {"taus": taus, "switch_costs": switch_costs}
    grid: dict[str, Any] = {name: numbers(name, text) for name, text in lists.items() if text is not None}
    if rules:
        grid["rules"] = () if rules == ("none",) else rules
    chosen = TuneOptions(
        bundle=bundle, retained=retain or None, allowance=options["allowance"] / 100, **grid, **shared_choices(options)
    )
    with quiet_libraries():
        report = tune(read_sets([parse_source(text) for text in tests]), chosen, say)
    write_whole(output, report.to_json())
    if figure:
        plot_tuning(report, figure)
    click.echo(report.best.flags() if apply else render_tuning(report), nl=apply)


@click.command("tables", cls=Command)
@click.option(
    "--report",
    "reports",
    multiple=True,
    required=True,
    type=NamedFolder(),
    help="Title and result of `das-bench wer`, TITLE=FILE; repeatable.",
)
@click.option("--output", "-o", required=True, type=FILE, help="Markdown file to write.")
def tables_command(reports: tuple[tuple[str, Path], ...], output: Path) -> None:
    """The DAS paper's tables II, IV and V from results whose systems are named as in benchmarks/tables.yaml."""
    from das_asr.benchmarks.paper_tables import render_paper_tables
    from das_asr.benchmarks.wer_result import read_report
    from das_asr.benchmarks.wer_stats import WerStatistics

    check_folders(output=output)
    sections = [render_paper_tables(title, WerStatistics(read_report(path))) for title, path in reports]
    write_whole(output, "\n".join(sections))


@click.command("forgetting", cls=Command)
@click.argument("report", type=EXISTING)
@click.option(
    "--adapter",
    "adapters",
    multiple=True,
    required=True,
    type=NamedFolder(),
    help="System of the report and the folder of its adapter, NAME=DIR; the first is what the others are held against.",
)
@click.option("--learned", multiple=True, required=True, help="Set of a domain that was learned, in order; repeatable.")
@click.option("--retained", multiple=True, required=True, help="Set that the base could do; repeatable.")
@click.option("--title", default="Forgetting", show_default=True, help="Heading of the table.")
@click.option("--output", "-o", required=True, type=FILE, help="Markdown file to write.")
def forgetting_command(
    report: Path,
    adapters: tuple[tuple[str, Path], ...],
    learned: tuple[str, ...],
    retained: tuple[str, ...],
    title: str,
    output: Path,
) -> None:
    """BLoRA's measures from a result of `das-bench wer`: what adapters learned, forgot, and how sparse they are."""
    from das_asr.benchmarks.tables import forgetting_table
    from das_asr.benchmarks.wer_report import facts
    from das_asr.benchmarks.wer_result import read_report
    from das_asr.benchmarks.wer_stats import WerStatistics
    from das_asr.training.blora.sparsity import measure_sparsity

    check_folders(output=output)
    found = read_report(report)
    small = {name: measure_sparsity(folder) for name, folder in adapters}
    table = forgetting_table(WerStatistics(found), small, learned, retained)
    write_whole(output, f"## {title}\n\nWER and F in %; {facts(found)}.\n\n{table}\n")


def shared_choices(options: dict[str, Any]) -> dict[str, Any]:
    """Wording, decoding and the rest of what these commands pass on."""
    from das_asr.benchmarks.wer_decode import DecodeOptions
    from das_asr.benchmarks.wording import Wording

    running = ("device", "threads", "batch_size", "language", "max_tokens")
    return {
        "wording": Wording(options["normalization"], options["wake_words"], options["spellings"]),
        "decoding": DecodeOptions(**{name: options[name] for name in running}),
        "skip_unfit": options["skip_unfit"],
    }


def numbers(name: str, text: str) -> tuple[float, ...]:
    """`0.5,4` -> (0.5, 4.0), for the option `--name`.

    Raises:
        OptionError: the text is no list of numbers.
    """
    try:
        return tuple(float(item) for item in text.split(","))
    except ValueError:
        flag = name.replace("_", "-")
        raise OptionError(f"--{flag} {text!r} is not a list of numbers such as 0.01,0.025,0.1.") from None


def say(text: str) -> None:
    """Tells how far a command is, beside its result."""
    click.echo(text, err=True)
