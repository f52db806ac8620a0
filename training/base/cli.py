"""`das-train base`: the tiny Whisper from scratch."""

from __future__ import annotations

import os
from pathlib import Path

import click

from das_asr.runtime.console import Command

__all__ = ["base"]


@click.command(cls=Command)
@click.option(
    "--output", "-o", required=True, type=click.Path(path_type=Path), help="Folder of the checkpoint to write."
)
@click.option("--work", required=True, type=click.Path(path_type=Path), help="Folder that a stopped run goes on from.")
@click.option("--sentences", default=72_000, show_default=True, help="Distinct sentences to speak.")
@click.option("--heard", default=200_000, show_default=True, help="Utterances to train on, repetitions included.")
@click.option("--vocabulary", default=1200, show_default=True, help="Size of the byte-level BPE.")
@click.option("--seed", default=0, show_default=True, help="Of text, voices and training.")
@click.option("--workers", default=os.cpu_count() or 1, show_default=True, help="Processes, and threads in training.")
def base(output: Path, work: Path, **options: int) -> None:
    """Trains the demo's tiny Whisper on synthetic speech: hours on two cores; stop and start it as you like."""
    from das_asr.training.base.recipe import BaseOptions, train_base

    path = train_base(BaseOptions(output, work, **options), click.echo)
    click.echo(f"{path} is written.")
