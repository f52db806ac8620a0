"""What `das-export` prints."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import click

from das_asr.runtime.manifest import EngineEntry, Manifest, ParityReport, VariantReport

__all__ = [
    "print_engine_report",
    "print_engines",
    "print_json",
    "print_manifest",
    "print_parity",
    "print_variants",
    "row_names",
]


def print_json(document: Mapping[str, Any]) -> None:
    """One JSON document."""
    click.echo(json.dumps(document, indent=2, ensure_ascii=False))


def row_names(manifest: Manifest) -> list[str]:
    """The base and the adapters, in the order of their rows."""
    return ["base", *(entry.name for entry in manifest.adapters)]


def print_parity(parity: Mapping[str, ParityReport]) -> None:
    """What the parity gate measured."""
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


def print_variants(variants: Mapping[str, VariantReport]) -> None:
    """How the precisions differ from float32."""
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


def print_manifest(manifest: Manifest) -> None:
    """What a bundle says about itself."""
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
    print_parity(manifest.parity)
    print_variants(manifest.variants)
    print_engines(manifest.engines)


def print_engines(engines: Mapping[str, EngineEntry]) -> None:
    """Which engines there are, and whether each has shown that it works."""
    for name, entry in engines.items():
        line = f"Engine {name}, verified: {str(entry.verified).lower()}"
        if entry.report is None:
            line += " (built, and never run on a GPU)"
        click.echo(line)
        if entry.report is not None:
            print_engine_report(entry.report)


def print_engine_report(report: VariantReport) -> None:
    """What was measured on a GPU."""
    click.echo(
        f"  {report.tokens_differing} of {report.tokens_compared} tokens ({report.disagreement:.1%}) other than with "
        "fp32 on the CPU"
    )
