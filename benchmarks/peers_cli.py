"""The `peers` command of `das-bench`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from das_asr.benchmarks.arguments import whole_numbers
from das_asr.benchmarks.output import check_folders, plain_options, write_result, write_whole
from das_asr.runtime.console import Command, NamedFolder
from das_asr.runtime.errors import OptionError

__all__ = ["peers_command"]

FOLDER = click.Path(exists=True, path_type=Path)
OUTPUT = click.Path(dir_okay=False, path_type=Path)


@click.command("peers", cls=Command)
@click.option("--model", "-m", default="whisper-base-random", show_default=True, help="Checkpoint, or this random one.")
@click.option("--domains", default="0,1,3,10,25", show_default=True, callback=whole_numbers, help="K, or none.")
@click.option("--rank", default=32, show_default=True, help="LoRA rank of the adapters.")
@click.option("--tokens", default=30, show_default=True, help="New tokens, forced on every side.")
@click.option("--threads", default=1, show_default=True, help="Of every side; with 1 each is pinned to one core.")
@click.option("--repeats", default=7, show_default=True, help="Interleaved repeats that count.")
@click.option("--warmup", default=1, show_default=True, help="Repeats before them that do not.")
@click.option("--precision", "precisions", default="fp32,int8", show_default=True, help="Weights that are compared.")
@click.option("--peers", "engines", help="Names, comma-separated; by default all.")
@click.option("--spinning/--no-spinning", default=False, show_default=True, help="Let the runtime's threads spin.")
@click.option(
    "--python",
    "pythons",
    multiple=True,
    type=NamedFolder(),
    metavar="PEER=FILE",
    help="Interpreter of a peer; repeatable.",
)
@click.option("--whisper-cpp", type=FOLDER, help="Checkout of whisper.cpp, for its converter.")
@click.option("--speech", type=FOLDER, help="AudioFolder to transcribe freely, for word error rates.")
@click.option("--bundle", type=FOLDER, help="Exported bundle of --model with its adapters, for --speech.")
@click.option("--prepare", is_flag=True, help="Convert and export only; what is made is kept in the cache.")
@click.option("--output", "-o", type=OUTPUT, help="JSON file to write; needed unless --prepare.")
@click.option("--markdown", type=OUTPUT, help="Report to write.")
def peers_command(
    precisions: str,
    engines: str | None,
    pythons: Sequence[tuple[str, Path]],
    whisper_cpp: Path | None,
    prepare: bool,
    output: Path | None,
    markdown: Path | None,
    **options: Any,
) -> None:
    """The same checkpoint and audio through other programs, one beside the other."""
    from das_asr.benchmarks.machine import result_head
    from das_asr.benchmarks.peers.engines import ENGINES, Tools
    from das_asr.benchmarks.peers.measure import prepare_peers, run_peers
    from das_asr.benchmarks.peers.report import render_peers
    from das_asr.benchmarks.peers.sides import PeersOptions

    check_folders(output=output, markdown=markdown)
    if (output is None) != prepare:
        raise OptionError("Give --output for the results, or --prepare to measure nothing.")
    chosen = PeersOptions(
        precisions=tuple(precisions.split(",")),
        engines=tuple(engines.split(",")) if engines else tuple(ENGINES),
        tools=Tools(dict(pythons), whisper_cpp),
        **options,
    )

    def log(text: str) -> None:
        click.echo(text, err=True)

    if output is None:
        prepare_peers(chosen, log)
        return
    before = result_head("peers")
    result = {**before, "arguments": plain_options(chosen), **run_peers(chosen, log)}
    write_result(output, result)
    if markdown:
        write_whole(markdown, render_peers([result]))
    click.echo(json.dumps({"output": str(output), "runs": len(result["runs"])}))
