"""`das-bench`: comparisons of speed and of word errors, and the tables made from them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import click

from das_asr.benchmarks.arguments import whole_numbers
from das_asr.benchmarks.load_options import PEERS, LoadOptions
from das_asr.benchmarks.output import check_folders, write_result, write_whole
from das_asr.benchmarks.peers_cli import peers_command
from das_asr.benchmarks.settings_cli import context_command, prune_command, replay_command
from das_asr.benchmarks.wer_cli import forgetting_command, numbers, tables_command, tune_command, wer_command
from das_asr.runtime.console import Group
from das_asr.runtime.errors import OptionError

__all__ = ["main"]

FILE = click.Path(exists=True, path_type=Path)
OUTPUT = click.Path(dir_okay=False, path_type=Path)


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="das-asr")
def main() -> None:
    """Measures speed and word errors and makes tables from the results."""


main.add_command(wer_command)
main.add_command(peers_command)
main.add_command(tune_command)
main.add_command(tables_command)
main.add_command(forgetting_command)
main.add_command(context_command)
main.add_command(prune_command)
main.add_command(replay_command)


@main.command()
@click.option("--model", "-m", default="whisper-base-random", show_default=True, help="Checkpoint, or this random one.")
@click.option("--domains", default="0,1,2,3,10,25", show_default=True, callback=whole_numbers, help="K, or none.")
@click.option(
    "--rank", "ranks", default="32", show_default=True, callback=whole_numbers, help="LoRA ranks of the adapters."
)
@click.option("--tokens", default=30, show_default=True, help="New tokens, forced on every system.")
@click.option("--threads", default=1, show_default=True, help="With 1 the process is pinned to one core.")
@click.option("--repeats", default=10, show_default=True, help="Interleaved repeats that count.")
@click.option("--warmup", default=2, show_default=True, help="Repeats before them that do not.")
@click.option("--spinning/--no-spinning", default=False, show_default=True, help="Let the runtime's threads spin.")
@click.option("--precision", default="fp32", show_default=True, help="Of the runtime's graphs.")
@click.option("--memory/--no-memory", default=True, show_default=True, help="Peak memory, each system in a process.")
@click.option("--audio", multiple=True, type=FILE, help="File or folder to decode to its true length; repeatable.")
@click.option("--bundle", type=FILE, help="Exported bundle of --model, for --audio.")
@click.option("--output", "-o", required=True, type=OUTPUT, help="JSON file to write.")
def rtf(audio: tuple[Path, ...], bundle: Path | None, output: Path, **options: Any) -> None:
    """Real-time factor over the number of domains, and over real audio."""
    from das_asr.benchmarks.free import FreeOptions
    from das_asr.benchmarks.machine import result_head
    from das_asr.benchmarks.rates import measure_rates
    from das_asr.benchmarks.rtf import RtfOptions
    from das_asr.benchmarks.worker import run_task

    check_folders(output=output)
    chosen = RtfOptions(**options)
    free = FreeOptions.of(audio, bundle, chosen)
    before = result_head("rtf")
    specification = {"rtf": dataclasses.asdict(chosen), "free": free and dataclasses.asdict(free)}
    rates = measure_rates(chosen.threads)
    measured = run_task("rtf", specification, chosen.threads)
    rates = rates.best(measure_rates(chosen.threads))
    result = {**before, "arguments": dataclasses.asdict(chosen), "rates": dataclasses.asdict(rates), **measured}
    write_result(output, result)
    click.echo(json.dumps({"output": str(output), "runs": len(result["runs"])}))


@main.command()
@click.argument("results", nargs=-1, required=True, type=FILE)
@click.option("--markdown", type=OUTPUT, help="Full report to write.")
@click.option("--plot", type=OUTPUT, help="Picture to write: .png, .svg or .pdf.")
@click.option(
    "--readme", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="File to put the table in."
)
def report(results: tuple[Path, ...], markdown: Path | None, plot: Path | None, readme: Path | None) -> None:
    """Tables and a picture from results of `rtf`, of `peers`, or of `gpu_check`, of which there is no picture.

    With no option, the report goes to standard output.
    """
    from das_asr.benchmarks.kinds import read_kind
    from das_asr.benchmarks.report import replace_between_markers

    kind, data = read_kind(results)
    if plot and kind.plot is None:
        raise OptionError(f"--plot {plot}: there is no picture of what `{kind.command}` measures. Leave it out.")
    if markdown:
        write_whole(markdown, kind.report(data))
    if readme:
        text = readme.read_text(encoding="utf-8")
        write_whole(readme, replace_between_markers(text, kind.table(data), kind.markers))
    if plot and kind.plot:
        kind.plot(data, plot)
    if not (markdown or plot or readme):
        click.echo(kind.report(data), nl=False)


@main.command()
@click.option("--bundle", "-b", required=True, type=FILE, help="What `das-export` wrote.")
@click.option("--audio", multiple=True, required=True, type=FILE, help="File or folder of clips; repeatable.")
@click.option("--requests", default=100, show_default=True, help="Of each measurement.")
@click.option("--rates", default="0.5,0.7,0.9,4", show_default=True, help="Shares of the capacity.")
@click.option("--patterns", default="all", show_default=True, help="Which adapters: all, same, uniform, zipf; a list.")
@click.option("--max-batch", default=8, show_default=True, help="Utterances decoded together.")
@click.option("--max-queue", default=64, show_default=True, help="Requests that may wait.")
@click.option("--threads", default=1, show_default=True, help="Of a run of a graph.")
@click.option("--precision", help="Of the bundle; by default its first.")
@click.option("--seed", default=0, show_default=True, help="Of arrivals, clips and adapters.")
@click.option("--peer", type=click.Choice(PEERS), help="A program to compare with, all utterances at hand.")
@click.option("--base", type=click.Path(path_type=Path), help="Checkpoint that the bundle is of, for --peer.")
@click.option("--repeats", default=3, show_default=True, help="Interleaved repeats of the comparison with --peer.")
@click.option("--output", "-o", required=True, type=OUTPUT, help="JSON file to write.")
def load(audio: tuple[Path, ...], rates: str, patterns: str, output: Path, **options: Any) -> None:
    """Throughput and latency under Poisson arrivals: continuous batching, static batches, one at a time.

    With --peer, also what faster-whisper's batched pipeline does with the same utterances on the base alone.
    """
    from das_asr.benchmarks.load import measure_load, render_load
    from das_asr.benchmarks.machine import result_head

    check_folders(output=output)
    chosen = LoadOptions(audio=audio, rates=numbers("rates", rates), patterns=tuple(patterns.split(",")), **options)
    before = result_head("load")
    result = {**before, **measure_load(chosen, lambda text: click.echo(text, err=True))}
    write_result(output, result)
    click.echo(render_load(result), nl=False)


@main.command()
@click.option("--model", "-m", default="whisper-base-random", show_default=True, help="Checkpoint, or this random one.")
@click.option("--domains", default="0,3,25", show_default=True, callback=whole_numbers, help="K, a list.")
@click.option("--rank", default=32, show_default=True, help="LoRA rank of the adapters.")
@click.option("--precision", default="fp32", show_default=True, help="Of the graphs.")
@click.option("--tokens", default=30, show_default=True, help="New tokens of each utterance.")
@click.option("--threads", default=1, show_default=True, help="With 1 the process is pinned to one core.")
@click.option("--repeats", default=3, show_default=True, help="Utterances that count.")
@click.option("--spinning/--no-spinning", default=False, show_default=True, help="Let idle threads spin.")
@click.option("--output", "-o", type=OUTPUT, help="JSON file to write.")
def profile(output: Path | None, **options: Any) -> None:
    """Where the time of a step and of the encoder goes: by part of the network and by operator."""
    from das_asr.benchmarks.machine import result_head
    from das_asr.benchmarks.step_profile import ProfileOptions, measure_profiles, render_profiles

    check_folders(output=output)
    chosen = ProfileOptions(**options)
    before = result_head("profile")
    measured = measure_profiles(chosen, lambda text: click.echo(text, err=True))
    result = {**before, "arguments": dataclasses.asdict(chosen), **measured}
    if output:
        write_result(output, result)
    click.echo(render_profiles(result), nl=False)


@main.command()
@click.argument("bundle", type=FILE)
@click.option("--base", required=True, type=FILE, help="Checkpoint that the bundle was exported from.")
@click.option("--clips", required=True, type=FILE, help="Folder with audio and a metadata.jsonl.")
def demo(bundle: Path, base: Path, clips: Path) -> None:
    """Spoken sentences through several rules, with word error rates and speed beside PyTorch."""
    from das_asr.benchmarks.machine import quiet_libraries
    from das_asr.benchmarks.showcase import read_clips, run_demo

    spoken = read_clips(clips)
    with quiet_libraries():
        run_demo(bundle, base, spoken, click.echo)


if __name__ == "__main__":
    main()
