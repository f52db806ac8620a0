"""Compiled engines of a bundle: what each was built for, which one fits, and every check before one is opened.

    name = find_engine(bundle, manifest, library="tensorrt-rtx", target="sm86", precision="fp16")
    use = EngineUse("tensorrt-rtx", "1.7.1.116", "sm86", "fp16", batch=1, rows=4, rank=32)
    record = check_engine(bundle, manifest, name, use)
    content = read_engine_file(bundle, manifest, name, DECODER_ENGINE)

An engine is a program: a library that is handed a damaged or foreign one may crash or worse. So files are compared with
the manifest's hashes and their first bytes are looked at before any library sees them.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from das_asr.runtime.contract import longest_run
from das_asr.runtime.errors import BackendError, BundleError
from das_asr.runtime.manifest import Manifest, from_plain

__all__ = [
    "CACHE_FOLDER",
    "DECODER_ENGINE",
    "ENCODER_ENGINE",
    "ENGINES_FOLDER",
    "ENGINE_RECORD",
    "PREFILL_PROFILE",
    "RECORD_VERSION",
    "STEP_PROFILE",
    "EngineLimits",
    "EngineRecord",
    "EngineUse",
    "check_engine",
    "engine_name",
    "find_engine",
    "read_engine_file",
    "read_record",
]

ENGINES_FOLDER = "engines"
CACHE_FOLDER = "cache"
"""What makes building and loading faster, in a bundle; it may be deleted at any time."""
ENGINE_RECORD = "engine.json"
ENCODER_ENGINE = "encoder.engine"
DECODER_ENGINE = "decoder.engine"
RECORD_VERSION = 2

PREFILL_PROFILE = 0
STEP_PROFILE = 1
"""Optimisation profiles of the decoder's engine; the encoder's has one."""

_NAME = re.compile(r"(tensorrt|tensorrt-rtx)-(sm\d{2,3})-([a-z0-9]+)")
_FIRST_BYTES = {"tensorrt-rtx": b"vtrt"}  # what its files begin with; of `tensorrt` none is documented


@dataclass(frozen=True)
class EngineLimits:
    """The largest sizes that an engine takes; the smallest is always 1."""

    max_batch: int = 8  # utterances
    max_rows: int = 26  # the base and its adapters
    max_rank: int = 64  # of any adapter

    def covering(self, batch: int = 1, rows: int = 1, rank: int = 1) -> EngineLimits:
        """Limits that take these sizes too."""
        return EngineLimits(max(self.max_batch, batch), max(self.max_rows, rows), max(self.max_rank, rank))


@dataclass(frozen=True)
class EngineRecord:
    """`engine.json`: what the engines beside it were built from and for."""

    record_version: int
    library: str  # "tensorrt" or "tensorrt-rtx"
    library_version: str
    target: str  # compute capability, e.g. "sm86"
    precision: str
    limits: EngineLimits
    longest_run: int  # new tokens of one run of the decoder
    workspace: int  # bytes of scratch memory the builder could plan with; 0 is no limit
    sources: dict[str, str]  # graph files in the bundle -> sha256


@dataclass(frozen=True)
class EngineUse:
    """What somebody is about to do with an engine, on which machine."""

    library: str
    library_version: str
    target: str
    precision: str
    batch: int = 1
    rows: int = 1
    rank: int = 1


def engine_name(library: str, target: str, precision: str) -> str:
    """Name of an engine: its folder below `engines/`, and its key in the manifest."""
    return f"{library}-{target}-{precision}"


def find_engine(bundle: Path, manifest: Manifest, *, library: str, target: str, precision: str) -> str:
    """Name of the bundle's engine for a library, a GPU and a precision.

    Raises:
        BackendError: it has none; the message lists those it has.
    """
    name = engine_name(library, target, precision)
    if name not in manifest.engines:
        raise BackendError(
            f"{bundle} has no engine {name}; it has {', '.join(manifest.engines) or 'none'}. "
            f"Build it: {_command(bundle, library, target, precision)}"
        )
    return name


def read_record(bundle: Path, manifest: Manifest, name: str) -> EngineRecord:
    """Reads an engine's `engine.json`.

    Raises:
        BackendError: the bundle has no engine of that name.
        BundleError: the file is missing, changed or of another version.
    """
    if name not in manifest.engines:
        raise BackendError(f"{bundle} has no engine {name}; it has {', '.join(manifest.engines) or 'none'}.")
    data = json.loads(read_engine_file(bundle, manifest, name, ENGINE_RECORD))
    if not isinstance(data, dict) or data.get("record_version") != RECORD_VERSION:
        raise BundleError(
            f"{bundle}: the {ENGINE_RECORD} of {name} is not of version {RECORD_VERSION}. Build it again with this "
            "version of das-asr: das-export engine"
        )
    try:
        return from_plain(EngineRecord, data, ENGINE_RECORD)
    except (TypeError, ValueError) as error:
        raise BundleError(f"{bundle}: engine {name}: {error}. Build it again with `das-export engine`.") from error


def check_engine(bundle: Path, manifest: Manifest, name: str, use: EngineUse) -> EngineRecord:
    """Checks that an engine can do what is asked of it on this machine.

    Args:
        bundle: the bundle.
        manifest: of the bundle.
        name: of the engine.
        use: what is going to be done.

    Returns:
        What the engine was built for.

    Raises:
        BackendError: naming everything that does not fit, with the command that builds an engine that does.
        BundleError: its record is missing, changed or of another version.
    """
    record = read_record(bundle, manifest, name)
    if problems := list(_mismatches(manifest, record, use)):
        limits = record.limits.covering(use.batch, use.rows, use.rank)
        command = _command(bundle, use.library, use.target, use.precision, limits)
        raise BackendError(f"Engine {name} does not fit: {'; '.join(problems)}. Build one that does: {command}")
    return record


def read_engine_file(bundle: Path, manifest: Manifest, name: str, file: str) -> bytes:
    """Content of an engine's file, proved to be the one that was built.

    Raises:
        BundleError: it is missing, truncated, changed, or an engine of another library.
    """
    library, target, precision = _parts(name)
    path = bundle / ENGINES_FOLDER / name / file
    mend = f"Copy the whole bundle, or build the engine again: {_command(bundle, library, target, precision)}"
    if not path.is_file():
        raise BundleError(f"{path} is missing. {mend}")
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != manifest.engines[name].files.get(file):
        raise BundleError(f"{path} ({len(content)} bytes) differs from the hash in the manifest. {mend}")
    first = _FIRST_BYTES.get(library, b"")
    if path.suffix == ".engine" and not content.startswith(first):
        raise BundleError(f"{path} is no engine of {library}: it begins with {content[: len(first)]!r}. {mend}")
    return content


# --- Details ---


def _mismatches(manifest: Manifest, record: EngineRecord, use: EngineUse) -> Iterator[str]:
    for what, built, wanted in (
        ("built with", record.library, use.library),
        (f"built with {record.library}", record.library_version, use.library_version),
        ("built for compute capability", record.target, use.target),
        ("built in", record.precision, use.precision),
    ):
        if built != wanted:
            yield f"it was {what} {built}, here it is {wanted}"
    for what, largest, wanted_size in (
        ("utterances", record.limits.max_batch, use.batch),
        ("rows", record.limits.max_rows, use.rows),
        ("as rank", record.limits.max_rank, use.rank),
        ("new tokens in a run", record.longest_run, longest_run(manifest.dimensions)),
    ):
        if wanted_size > largest:
            yield f"it takes up to {largest} {what}, {wanted_size} are wanted"
    if stale := [file for file, sha256 in record.sources.items() if manifest.files.get(file) != sha256]:
        yield f"it was built from other files than the bundle has now ({', '.join(stale)})"


def _parts(name: str) -> tuple[str, str, str]:
    """Library, target and precision of an engine's name."""
    found = _NAME.fullmatch(name)
    if found is None:  # it becomes a path and a command line
        raise BundleError(f"The manifest names an engine {name!r}, which is no engine's name. Do not use this bundle.")
    library, target, precision = found.groups()
    return library, target, precision


def _command(bundle: Path, library: str, target: str, precision: str, limits: EngineLimits | None = None) -> str:
    usual, wanted = EngineLimits(), limits or EngineLimits()
    sizes = [
        f" --{field.replace('_', '-')} {value}"
        for field, value in vars(wanted).items()
        if value != getattr(usual, field)
    ]
    return f"das-export engine {bundle} --target {target} --precision {precision} --library {library}{''.join(sizes)}"
