"""`das-export`: checkpoints to a verified bundle, and a look at bundles that exist.

    das-export onnx --base DIR --adapter music=DIR --output bundle
    das-export inspect bundle
    das-export verify bundle --base DIR

Nothing is done here that `das_asr.export` does not offer.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import signal
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from das_asr.export import AdapterSource, ExportOptions, export_bundle, inspect_bundle, verify_bundle
from das_asr.export.options import PRECISIONS
from das_asr.runtime.console import Group, NamedFolder
from das_asr.runtime.contract import RULE_CODES
from das_asr.runtime.manifest import Manifest, ParityReport, VariantReport

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
    "--force",
    is_flag=True,
    help="Replace the bundle at --output once the new one is complete and verified; keep precisions that differ much.",
)
@_as_json
def onnx(adapters: Sequence[tuple[str, Path]], as_json: bool, sample_audio: Sequence[Path], **choices: Any) -> None:
    """Export a base and its adapters to ONNX.

    The bundle appears at --output only when its graphs compute what transformers and PEFT compute, on every row.
    """
    sources = tuple(AdapterSource(name, directory) for name, directory in adapters)
    options = ExportOptions(adapters=sources, sample_audio=tuple(sample_audio), **choices)
    with _told(quiet=as_json), _terminable():
        manifest = export_bundle(options)
    if as_json:
        _print_json({"output": str(options.output), "manifest": dataclasses.asdict(manifest)})
    else:
        _print_parity(manifest.parity)
        _print_variants(manifest.variants)
        click.echo(f"Wrote {options.output}: {', '.join(_rows(manifest))}")


@main.command()
@click.argument("bundle", type=_BUNDLE)
@_as_json
def inspect(bundle: Path, as_json: bool) -> None:
    """Show what BUNDLE says about itself."""
    manifest = inspect_bundle(bundle)
    if as_json:
        _print_json(dataclasses.asdict(manifest))
    else:
        _print_manifest(manifest)


@main.command()
@click.argument("bundle", type=_BUNDLE)
@click.option("--base", help="Its base, to compare with; by default the recorded folder if it still exists.")
@_as_json
def verify(bundle: Path, base: str | None, as_json: bool) -> None:
    """Check every file of BUNDLE against its hash and, with the base at hand, the graphs against PyTorch."""
    with _told(quiet=as_json):
        found = verify_bundle(bundle, base)
    if as_json:
        _print_json(dataclasses.asdict(found))
        return
    _print_parity(found.parity)
    click.echo(f"{bundle}: {found.files} files are as the manifest says")
    if found.skipped:
        click.echo(f"The graphs were not compared with PyTorch: {found.skipped}.")


# --- What is shown ---


def _print_json(document: Mapping[str, Any]) -> None:
    click.echo(json.dumps(document, indent=2, ensure_ascii=False))


def _rows(manifest: Manifest) -> list[str]:
    return ["base", *(entry.name for entry in manifest.adapters)]


def _print_parity(parity: Mapping[str, ParityReport]) -> None:
    for precision, report in parity.items():
        relative = report.max_logit_difference / report.largest_logit
        click.echo(
            f"Parity {precision}: logits differ by at most {report.max_logit_difference:.2g} "
            f"({relative:.1e} of the largest, {report.tolerance:.0e} allowed), on average by "
            f"{report.mean_logit_difference:.2g}"
        )
        for name, effect in report.adapter_effects.items():
            click.echo(f"  adapter {name} moves the base's logits by up to {effect:.3g}")
        click.echo(
            f"  {report.tokens_compared} tokens compared (rules {', '.join(report.rules)}), "
            f"{report.tokens_differing} where PyTorch itself is undecided"
        )


def _print_variants(variants: Mapping[str, VariantReport]) -> None:
    for precision, report in variants.items():
        if report.not_compared is not None:
            click.echo(f"Precision {precision}: not compared with fp32, for {report.not_compared}")
            continue
        line = (
            f"Precision {precision}: {report.tokens_differing} of {report.tokens_compared} tokens "
            f"({report.disagreement:.1%}) other than with fp32"
        )
        if report.wer is not None and report.wer_fp32 is not None:
            line += f"; WER {report.wer:.2%}, with fp32 {report.wer_fp32:.2%}, on {report.words} words"
        click.echo(line)


def _print_manifest(manifest: Manifest) -> None:
    dims = manifest.dimensions
    lines = {
        "base": f"{manifest.base.id}{f' at {manifest.base.revision}' if manifest.base.revision else ''}",
        "weights": manifest.base.sha256,
        "network": f"d_model {dims.d_model}, {dims.encoder_layers} + {dims.decoder_layers} layers, {dims.mels} mels",
        "vocabulary": f"{dims.vocabulary} tokens, languages: {', '.join(manifest.tokens.languages) or 'English only'}",
        "window": f"{manifest.audio.window_seconds:g} s of audio, {dims.text_positions} tokens",
        "rule": f"{manifest.rule}, tau {manifest.tau:g}",
        "precisions": ", ".join(manifest.precisions),
        "made": f"{manifest.created} with das-asr {manifest.tools.get('das-asr', '?')}",
    }
    for name, value in lines.items():
        click.echo(f"{name + ':':<12}{value}")
    for row, entry in enumerate(manifest.adapters, start=1):
        click.echo(f"row {row}:      {entry.name}, rank {entry.rank}, {', '.join(entry.target_modules)}")
    _print_parity(manifest.parity)
    _print_variants(manifest.variants)


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
    level = log.level
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
