"""`das-export`: checkpoints to a verified bundle, and a look at bundles that exist.

    das-export onnx --base DIR --adapter music=DIR --output bundle
    das-export engine bundle --target sm86
    das-export inspect bundle
    das-export verify bundle --base DIR

Nothing is done here that `das_asr.export` does not offer.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import signal
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click

from das_asr.export import (
    AdapterSource,
    EngineOptions,
    ExportOptions,
    build_engines,
    export_bundle,
    inspect_bundle,
    verify_bundle,
)
from das_asr.export.options import ENGINE_PRECISIONS, PRECISIONS
from das_asr.export.show import (
    print_engine_report,
    print_engines,
    print_json,
    print_manifest,
    print_parity,
    print_variants,
    row_names,
)
from das_asr.runtime.backends.engine_files import EngineLimits
from das_asr.runtime.backends.tensorrt_library import LIBRARIES
from das_asr.runtime.console import Group, NamedFolder, Size
from das_asr.runtime.contract import RULE_CODES

__all__ = ["main"]

_BUNDLE = click.Path(path_type=Path)
_as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON document and nothing else.")


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(package_name="das-asr")
def main() -> None:
    """Make bundles for das-transcribe from a Whisper and its LoRA adapters, and check them."""


@main.command()
@click.option("--base", required=True, help="Folder of a Hugging Face Whisper checkpoint, or a hub id.")
@click.option("--revision", help="Branch, tag or commit of a hub id.")
@click.option(
    "--adapter",
    "adapters",
    multiple=True,
    type=NamedFolder(),
    help="PEFT LoRA checkpoint and the name of its row; up to 64, in the order of their rows.",
)
@click.option("--output", required=True, type=_BUNDLE, help="Bundle to write; missing folders above it are made.")
@click.option(
    "--precision",
    "precisions",
    default="fp32",
    callback=lambda _, __, text: tuple(name.strip() for name in text.split(",")),
    help=f"Of the graphs' weights, as a list of {', '.join(PRECISIONS)}; the first is the runtime's default.",
)
@click.option(
    "--rule",
    type=click.Choice(tuple(RULE_CODES)),
    default="hypothesis",
    help="Selection rule the runtime uses unless told otherwise.",
)
@click.option("--tau", type=float, default=0.025, help="Threshold of the rule in probability units.")
@click.option(
    "--sample-audio",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Clips that the parity gate decodes, instead of those of the package.",
)
@click.option(
    "--eval-manifest",
    type=click.Path(path_type=Path),
    help="Labelled speech (AudioFolder or JSON Lines) on which the precisions' word error rates are compared.",
)
@click.option(
    "--engine",
    "targets",
    multiple=True,
    metavar="TARGET",
    help="GPU to compile the graphs for as well, such as sm86, as `das-export engine` does when given nothing else.",
)
@click.option(
    "--force",
    is_flag=True,
    help="Replace the bundle at --output once the new one is complete and verified; keep precisions that differ much.",
)
@_as_json
def onnx(
    adapters: Sequence[tuple[str, Path]],
    as_json: bool,
    sample_audio: Sequence[Path],
    targets: Sequence[str],
    **choices: Any,
) -> None:
    """Export a base and its adapters to ONNX.

    The bundle appears at --output only when its graphs compute what transformers and PEFT compute, on every row.
    """
    sources = tuple(AdapterSource(name, directory) for name, directory in adapters)
    engines = EngineOptions(targets=tuple(targets)) if targets else None
    options = ExportOptions(adapters=sources, sample_audio=tuple(sample_audio), engines=engines, **choices)
    with _told(quiet=as_json), _terminable():
        manifest = export_bundle(options)
    if as_json:
        print_json({"output": str(options.output), "manifest": dataclasses.asdict(manifest)})
    else:
        print_parity(manifest.parity)
        print_variants(manifest.variants)
        print_engines(manifest.engines)
        click.echo(f"Wrote {options.output}: {', '.join(row_names(manifest))}")


@main.command()
@click.argument("bundle", type=_BUNDLE)
@click.option(
    "--target",
    "targets",
    multiple=True,
    required=True,
    help="Compute capability of a GPU to build for, such as sm86; give it again for another.",
)
@click.option(
    "--precision", type=click.Choice(ENGINE_PRECISIONS), default="fp16", help="Of weights, activations and caches."
)
@click.option("--max-batch", type=int, default=EngineLimits.max_batch, help="Most utterances decoded together.")
@click.option("--max-rows", type=int, default=EngineLimits.max_rows, help="Most rows: the base and its adapters.")
@click.option("--max-rank", type=int, default=EngineLimits.max_rank, help="Largest rank of an adapter.")
@click.option("--workspace", type=Size(), help="GPU memory that the builder may plan with, such as 2G; all by default.")
@click.option(
    "--library", type=click.Choice(tuple(LIBRARIES)), help="TensorRT to build with; by default the one installed."
)
@_as_json
def engine(
    bundle: Path,
    targets: Sequence[str],
    as_json: bool,
    max_batch: int,
    max_rows: int,
    max_rank: int,
    **choices: Any,
) -> None:
    """Compile the graphs of BUNDLE with TensorRT, into the bundle.

    Other adapters, or more of them up to the limit, need no new engine. What is built already is left alone.
    """
    limits = EngineLimits(max_batch, max_rows, max_rank)
    options = EngineOptions(targets=tuple(targets), limits=limits, **choices)
    with _told(quiet=as_json), _terminable():
        manifest = build_engines(bundle, options)
    if as_json:
        print_json({"engines": {name: dataclasses.asdict(entry) for name, entry in manifest.engines.items()}})
    else:
        print_engines(manifest.engines)


@main.command()
@click.argument("bundle", type=_BUNDLE)
@_as_json
def inspect(bundle: Path, as_json: bool) -> None:
    """Show what BUNDLE says about itself."""
    manifest = inspect_bundle(bundle)
    if as_json:
        print_json(dataclasses.asdict(manifest))
    else:
        print_manifest(manifest)


@main.command()
@click.argument("bundle", type=_BUNDLE)
@click.option("--base", help="Its base, to compare with; by default the recorded folder if it still exists.")
@click.option("--device", help="cuda or cuda:N: run the engines there, and mark those that write what fp32 writes.")
@_as_json
def verify(bundle: Path, base: str | None, device: str | None, as_json: bool) -> None:
    """Check every file of BUNDLE against its hash and, with the base at hand, the graphs against PyTorch."""
    with _told(quiet=as_json), _terminable():
        found = verify_bundle(bundle, base, device)
    if as_json:
        print_json(dataclasses.asdict(found))
        return
    print_parity(found.parity)
    for name, report in found.engines.items():
        click.echo(f"Engine {name} ran")
        print_engine_report(report)
    click.echo(f"{bundle}: {found.files} files are as the manifest says")
    if found.skipped:
        click.echo(f"The graphs were not compared with PyTorch: {found.skipped}.")


# --- While it runs ---


class _Echo(logging.Handler):
    """Shows the exporter's progress on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        """Shows one message."""
        click.echo(record.getMessage(), err=True)


@contextlib.contextmanager
def _told(*, quiet: bool) -> Iterator[None]:
    """Shows progress unless `quiet`, and warnings as one line each."""
    log, handler = logging.getLogger("das_asr.export"), _Echo()
    level, propagate = log.level, log.propagate
    log.propagate = False  # a library that sets up the root logger would show every line twice
    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = lambda message, *_, **__: click.echo(f"Warning: {message}", err=True)
        if not quiet:
            log.addHandler(handler)
            log.setLevel(logging.INFO)
        try:
            yield
        finally:
            log.removeHandler(handler)
            log.setLevel(level)
            log.propagate = propagate


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Makes SIGTERM unwind the stack like Ctrl-C does, so that nothing half-written remains."""

    def stop(number: int, _frame: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
