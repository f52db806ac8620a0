"""Runs a bundle's engines on the GPU and compares what they write with float32 on the CPU.

An engine is built without being run: until this has happened on a GPU like the one it is for, nothing shows that it
computes what the graphs compute, and the manifest says `verified: false`.
"""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

from das_asr.export.clips import load_clips
from das_asr.export.engines import alone_in
from das_asr.export.variants import MOST_DIFFERENT, compare_with_float32
from das_asr.runtime.backends import BackendOptions
from das_asr.runtime.backends.cuda_device import gpu_target
from das_asr.runtime.backends.engine_files import EngineRecord, read_engine_file, read_record
from das_asr.runtime.backends.tensorrt_library import installed_libraries
from das_asr.runtime.errors import BackendError, OptionError, ParityError
from das_asr.runtime.manifest import EngineEntry, Manifest, VariantReport, read_manifest, write_manifest

__all__ = ["check_engine_files", "verify_engines"]

_log = logging.getLogger(__name__)


def check_engine_files(bundle: Path, manifest: Manifest) -> int:
    """Compares every file of every engine with its hash; returns how many there are.

    Raises:
        BundleError: one is missing or changed.
    """
    for name, entry in manifest.engines.items():
        for file in entry.files:
            read_engine_file(bundle, manifest, name, file)
    return sum(len(entry.files) for entry in manifest.engines.values())


def verify_engines(bundle: Path, device: str) -> dict[str, VariantReport]:
    """Runs every engine that this machine can run, and marks it as verified in the manifest.

    Args:
        bundle: the bundle; its files are checked already.
        device: `cuda` or `cuda:N`.

    Returns:
        What was measured, by the engine's name.

    Raises:
        OptionError: it is no such device.
        BackendError: there is no such GPU, no TensorRT, or no engine for them.
        ParityError: an engine writes something else than float32; it is marked as not verified.
    """
    if BackendOptions(device).device == "cpu":
        raise OptionError("--device is 'cpu', but engines run on a GPU only. Give cuda or cuda:N, or leave it out.")
    manifest = read_manifest(bundle)
    records = {name: read_record(bundle, manifest, name) for name in manifest.engines}
    names = _runnable(bundle, records, device)
    samples = load_clips((), manifest.audio)
    reports = {}
    for name in names:
        _log.info("running %s", name)
        record = records[name]
        choices = {"device": device, "backend": "tensorrt", "precision": record.precision, "library": record.library}
        reports[name] = compare_with_float32(bundle, manifest, choices, samples, ())
        _mark(bundle, name, reports[name])
        _check(name, reports[name])
    return reports


def _runnable(bundle: Path, records: dict[str, EngineRecord], device: str) -> list[str]:
    """Names of the engines for this machine's GPU and library."""
    if not records:
        raise BackendError(f"{bundle} has no engines to run. Build one: das-export engine {bundle} --target sm86")
    target, installed = gpu_target(int(device.partition(":")[2] or 0)), installed_libraries()
    targets = ", ".join(sorted({record.target for record in records.values()}))
    missing = []
    if target is None:
        missing.append(f"an NVIDIA GPU with its driver at {device!r} (the engines are for {targets})")
    if not installed:
        missing.append("TensorRT (install `das-asr[tensorrt]` or `das-asr[tensorrt-rtx]`)")
    if missing:
        raise BackendError(
            f"The engines cannot be run here and stay unverified: this machine lacks {' and '.join(missing)}. "
            f"Run `das-export verify {bundle} --device {device}` where there is one."
        )
    names = [name for name, record in records.items() if record.target == target and record.library in installed]
    if not names:
        raise BackendError(
            f"{bundle} has the engines {', '.join(records)}; this machine has {target} and {', '.join(installed)}. "
            f"Build one for it with `das-export engine {bundle} --target {target}`."
        )
    return names


def _mark(bundle: Path, name: str, report: VariantReport) -> None:
    with alone_in(bundle):
        manifest = read_manifest(bundle)
        entry = EngineEntry(manifest.engines[name].files, report.disagreement <= MOST_DIFFERENT, report)
        write_manifest(dataclasses.replace(manifest, engines=manifest.engines | {name: entry}), bundle)


def _check(name: str, report: VariantReport) -> None:
    if report.disagreement > MOST_DIFFERENT:
        raise ParityError(
            f"Engine {name} writes {report.tokens_differing} of {report.tokens_compared} tokens of the sample clips "
            f"({report.disagreement:.1%}) otherwise than float32; {MOST_DIFFERENT:.0%} are allowed. Do not use it; "
            "build it again with --precision fp32."
        )
