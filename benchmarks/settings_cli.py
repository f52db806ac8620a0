"""`das-bench context` and `das-bench prune`: what a setting of a call costs in word errors, and what it saves."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from das_asr.benchmarks.arguments import whole_numbers
from das_asr.benchmarks.output import check_folders, write_result, write_whole
from das_asr.benchmarks.wer_cli import (
    EXISTING,
    FILE,
    FOLDER,
    common_options,
    numbers,
    say,
    shared_choices,
)
from das_asr.runtime.console import Command
from das_asr.runtime.options import SCORES
from das_asr.runtime.selection import RULES

if TYPE_CHECKING:
    from das_asr.benchmarks.settings import Setting

__all__ = ["context_command", "prune_command", "replay_command"]

PRECISION = click.option("--precision", help="Of the bundle; by default its first.")
RULE = click.option("--rule", type=click.Choice(RULES), help="How to choose among the rows; by default the bundle's.")
MARKDOWN = click.option("--markdown", type=FILE, help="Tables to write; without it they go to standard output.")


@click.command("context", cls=Command)
@common_options(batch_size=1)
@click.option("--margins", default="0,0.5,1,2", show_default=True, help="Seconds of silence behind the audio to try.")
@RULE
@PRECISION
@MARKDOWN
def context_command(margins: str, rule: str | None, **options: Any) -> None:
    """Whether a checkpoint tolerates audio_context="fit": word errors and time beside those of the whole window."""
    from das_asr.benchmarks.settings import context_settings

    _compare(context_settings(numbers("margins", margins)), {"rule": rule}, **options)


@click.command("prune", cls=Command)
@common_options(batch_size=1)
@click.option(
    "--keep",
    default="1,3",
    show_default=True,
    callback=whole_numbers,
    help="Numbers of adapters to keep, as in auto:3; or none.",
)
@click.option(
    "--after", default="4,8,16", show_default=True, callback=whole_numbers, help="Tokens after which rows are pruned."
)
@click.option("--margins", default="none", show_default=True, help="Margins behind the best row; rule hypothesis.")
@RULE
@click.option("--score", type=click.Choice(SCORES), default="mean", show_default=True, help="Of rule hypothesis.")
@click.option("--switch-cost", type=float, help="Of rule hypothesis.")
@PRECISION
@MARKDOWN
def prune_command(
    keep: tuple[int, ...],
    after: tuple[int, ...],
    margins: str,
    rule: str | None,
    score: str,
    switch_cost: float | None,
    **options: Any,
) -> None:
    """What pruning rows costs in tokens and word errors, and what it saves; for bundles of many adapters."""
    from das_asr.benchmarks.settings import pruning_settings

    settings = pruning_settings(keep, after, () if margins == "none" else numbers("margins", margins))
    _compare(settings, {"rule": rule, "score": score, "switch_cost": switch_cost}, **options)


@click.command("replay", cls=Command)
@click.argument("result", type=EXISTING)
@click.option("--bundle", "-b", required=True, type=FOLDER, help="Of the shapes to measure; its weights do not matter.")
@click.option("--utterances", default=20, show_default=True, help="How many to replay.")
@click.option("--threads", default=1, show_default=True, help="With 1 the process is pinned to one core.")
@click.option("--output", "-o", required=True, type=FILE, help="JSON file to write.")
def replay_command(result: Path, bundle: Path, utterances: int, threads: int, output: Path) -> None:
    """What pruning saves on another model: the rows that were live in a RESULT of `das-bench prune`, step by step."""
    from das_asr.benchmarks.replay import read_traces, render_replay, replay

    check_folders(output=output)
    measured = replay(read_traces(result), bundle, threads=threads, utterances=utterances, log=say)
    write_result(output, measured)
    click.echo(render_replay(measured), nl=False)


def _compare(
    settings: list[Setting],
    common: dict[str, Any],
    *,
    bundle: Path,
    tests: tuple[str, ...],
    precision: str | None,
    output: Path,
    markdown: Path | None,
    **options: Any,
) -> None:
    from das_asr.benchmarks.machine import quiet_libraries
    from das_asr.benchmarks.settings import SettingsOptions, compare_settings, render_settings
    from das_asr.benchmarks.testsets import parse_source, read_sets
    from das_asr.benchmarks.wer_stats import WerStatistics

    check_folders(output=output, markdown=markdown)
    chosen = SettingsOptions(bundle=bundle, precision=precision, common=common, **shared_choices(options))
    with quiet_libraries():
        report = compare_settings(settings, read_sets([parse_source(text) for text in tests]), chosen, say)
    write_whole(output, report.to_json())
    text = render_settings(WerStatistics(report))
    if markdown:
        write_whole(markdown, text)
    else:
        click.echo(text, nl=False)
