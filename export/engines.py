"""Compiles a bundle's graphs with TensorRT, into the bundle.

    build_engines(Path("bundle"), EngineOptions(targets=("sm86", "sm89"), precision="fp16"))

Each engine appears whole in `engines/<library>-<target>-<precision>/`, and the manifest that names it is replaced last.
An engine that is there and was built from the same files, for the same sizes, by the same library, is left alone. Its
adapters are inputs: other adapters, or more of them up to the limit, need no build.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import logging
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from das_asr.export.engine_process import run_build
from das_asr.export.engine_worker import BuildJob
from das_asr.export.options import EngineOptions
from das_asr.export.staging import remove_leftovers, replacing
from das_asr.runtime.backends.cuda_device import gpu_target
from das_asr.runtime.backends.engine_files import (
    CACHE_FOLDER,
    DECODER_ENGINE,
    ENCODER_ENGINE,
    ENGINE_RECORD,
    ENGINES_FOLDER,
    RECORD_VERSION,
    EngineRecord,
    engine_name,
    read_record,
)
from das_asr.runtime.backends.engine_profiles import Profile, decoder_profiles, encoder_profiles
from das_asr.runtime.backends.tensorrt_library import Library, load_library
from das_asr.runtime.contract import (
    DECODER_FILE,
    DECODER_STATIC_FILE,
    ENCODER_FILE,
    encoder_inputs,
    longest_run,
    static_decoder_inputs,
)
from das_asr.runtime.errors import BackendError, BundleError, ExportError, OptionError
from das_asr.runtime.manifest import EngineEntry, Manifest, check_files, read_manifest, sha256_of, write_manifest

__all__ = ["alone_in", "build_engines", "check_targets"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Graph:
    """One of the two graphs of an engine."""

    file: str
    engine: str
    profiles: tuple[Profile, ...]


def check_targets(options: EngineOptions) -> Library:
    """The library that engines will be built with, once it is clear that it can build for the targets on this machine.

    Raises:
        BackendError: it is not installed, or cannot build for a target here.
        OptionError: two libraries are installed and none is named.
    """
    library = load_library(options.library)
    for target in options.targets:
        _check_target(library, target)
    return library


def build_engines(bundle: Path, options: EngineOptions) -> Manifest:
    """Builds an engine for each target, unless it is there already.

    Args:
        bundle: a bundle that `export_bundle` wrote.
        options: what to build.

    Returns:
        The manifest with the engines. Those that were built now are not verified, see `verify_bundle`.

    Raises:
        BundleError: it is no bundle, or a file is missing or changed.
        BackendError: TensorRT is not installed, or cannot build for a target on this machine.
        OptionError: the bundle's own adapters do not fit the limits, or two libraries are installed and none is named.
        ExportError: a build fails, or somebody else is building in this bundle. Engines built before are kept.
    """
    bundle = bundle.resolve()
    manifest = read_manifest(bundle)
    library = check_targets(options)
    _log.info("building with %s", library)
    _check_limits(manifest, options)
    with alone_in(bundle):
        remove_leftovers(bundle / ENGINES_FOLDER)
        manifest = read_manifest(bundle)  # nobody else changes it any more
        check_files(manifest, bundle)
        for target in options.targets:
            manifest = _build(bundle, manifest, library, target, options)
    return manifest


# --- Can it be built here ---


def _check_target(library: Library, target: str) -> None:
    """Refuses a target that the library cannot build for on this machine."""
    offline = _targets_without_gpu(library)
    if offline:
        if target not in offline:
            raise BackendError(
                f"{library} builds for {', '.join(offline)}, not for {target}. Install `das-asr[tensorrt]` on a "
                "machine with that GPU and build there with --library tensorrt."
            )
        return
    present = gpu_target()
    if present != target:
        raise BackendError(
            f"{library} builds for the GPU it runs on, and {f'that is {present}' if present else 'there is none'}; "
            f"{target} was asked for. Build on a machine with that GPU, or install `das-asr[tensorrt-rtx]`, which "
            "builds for the GPUs of workstations without one, and give --library tensorrt-rtx."
        )


def _targets_without_gpu(library: Library) -> tuple[str, ...]:
    """Compute capabilities that the library can build for ahead of time; none for `tensorrt`."""
    if library.name == "tensorrt":
        return ()
    names = library.module.ComputeCapability.__members__
    return tuple(name.lower() for name in names if name.startswith("SM"))


def _check_limits(manifest: Manifest, options: EngineOptions) -> None:
    rank = max((entry.rank for entry in manifest.adapters), default=1)
    for flag, needed, given in (
        ("--max-rows", manifest.rows, options.limits.max_rows),
        ("--max-rank", rank, options.limits.max_rank),
    ):
        if needed > given:
            raise OptionError(f"{flag} is {given}, but the bundle's own adapters need {needed}. Give at least that.")


# --- Building ---


def _build(bundle: Path, manifest: Manifest, library: Library, target: str, options: EngineOptions) -> Manifest:
    """Builds one engine unless it is up to date; the manifest that is now on the disk."""
    name = engine_name(library.name, target, options.precision)
    record = _record(manifest, library, target, options)
    if _is_current(bundle, manifest, name, record):
        _log.info("%s is up to date", name)
        return manifest
    _log.info("building %s", name)
    advice = "Engines take about twice the size of their graphs; free some space, or leave out a target."
    with replacing(bundle / ENGINES_FOLDER / name, advice) as folder:
        with _source(bundle, manifest, options.precision, folder) as graphs:
            for graph in _graphs(manifest, options):
                run_build(_job(graph, graphs, folder, bundle, record))
        text = json.dumps(dataclasses.asdict(record), indent=2)
        (folder / ENGINE_RECORD).write_text(text + "\n", encoding="utf-8")
        files = {path.name: sha256_of(path) for path in sorted(folder.iterdir())}
    engines = manifest.engines | {name: EngineEntry(files, verified=False, report=None)}
    manifest = dataclasses.replace(manifest, engines=dict(sorted(engines.items())))
    write_manifest(manifest, bundle)
    return manifest


@contextlib.contextmanager
def _source(bundle: Path, manifest: Manifest, precision: str, folder: Path) -> Iterator[Path]:
    """Folder with the graphs in the precision: the bundle's own, or made for the time of the build."""
    if precision in manifest.precisions:
        yield manifest.graphs(bundle, precision)
        return
    from das_asr.export.half import write_half

    _log.info("converting the graphs to %s", precision)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        graphs = Path(scratch) / precision
        write_half(bundle, precision, manifest.dimensions, graphs)
        yield graphs


def _record(manifest: Manifest, library: Library, target: str, options: EngineOptions) -> EngineRecord:
    """What the engine is going to be built from and for."""
    own = options.precision != "fp32" and options.precision in manifest.precisions
    files = (ENCODER_FILE, DECODER_STATIC_FILE, *(f"{file}.data" for file in (ENCODER_FILE, DECODER_FILE)))
    read = [f"{options.precision}/{file}" if own else file for file in files]
    if missing := [file for file in read if file not in manifest.files]:
        raise BundleError(
            f"The bundle has no {', '.join(missing)}: an older das-asr exported it. Export it again to build engines."
        )
    return EngineRecord(
        record_version=RECORD_VERSION,
        library=library.name,
        library_version=library.version,
        target=target,
        precision=options.precision,
        limits=options.limits,
        longest_run=longest_run(manifest.dimensions),
        workspace=options.workspace or 0,
        sources={file: manifest.files[file] for file in read},
    )


def _is_current(bundle: Path, manifest: Manifest, name: str, record: EngineRecord) -> bool:
    if name not in manifest.engines:
        return False
    try:
        there = read_record(bundle, manifest, name)
    except BundleError as error:
        _log.info("%s", error)
        return False
    files = manifest.engines[name].files
    folder = bundle / ENGINES_FOLDER / name
    return there == record and all(
        (folder / file).is_file() and sha256_of(folder / file) == sha256 for file, sha256 in files.items()
    )


def _graphs(manifest: Manifest, options: EngineOptions) -> tuple[_Graph, _Graph]:
    dims, limits = manifest.dimensions, options.limits
    return (
        _Graph(ENCODER_FILE, ENCODER_ENGINE, encoder_profiles(encoder_inputs(dims), manifest, limits)),
        _Graph(DECODER_STATIC_FILE, DECODER_ENGINE, decoder_profiles(static_decoder_inputs(dims), manifest, limits)),
    )


def _job(graph: _Graph, graphs: Path, folder: Path, bundle: Path, record: EngineRecord) -> BuildJob:
    # TensorRT-RTX measures nothing while building, so it has no timings to keep.
    timings = f"timings-{record.library}-{record.library_version}-{record.target}.bin"
    return BuildJob(
        library=record.library,
        target=record.target,
        graph=str(graphs / graph.file),
        engine=str(folder / graph.engine),
        profiles=graph.profiles,
        workspace=record.workspace,
        exact_products=record.precision == "fp32",
        timing_cache=str(bundle / CACHE_FOLDER / timings) if record.library == "tensorrt" else None,
        inspect=gpu_target() == record.target,
    )


@contextlib.contextmanager
def alone_in(bundle: Path) -> Iterator[None]:
    """Keeps others from changing the bundle.

    Raises:
        ExportError: somebody is changing it.
    """
    handle = os.open(bundle, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise ExportError(f"Somebody else is changing {bundle}. Wait, and run this again.") from error
    finally:
        os.close(handle)
