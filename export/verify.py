"""Looks at a bundle that exists: what it says about itself, and whether that is true."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from das_asr.export.checkpoint import Checkpoint, load_checkpoint
from das_asr.export.clips import load_clips
from das_asr.runtime.adapters import load_adapter
from das_asr.runtime.errors import BundleError, CheckpointError
from das_asr.runtime.manifest import Manifest, ParityReport, check_files, read_manifest

__all__ = ["Verification", "inspect_bundle", "verify_bundle"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Verification:
    """What `verify_bundle` found; that it returned at all means that nothing is wrong."""

    files: int  # whose hashes are as the manifest says
    parity: dict[str, ParityReport]  # precision -> measured now; empty when the base was not at hand
    base: str | None  # the checkpoint it was compared with
    skipped: str | None  # why there was no comparison


def inspect_bundle(path: str | Path) -> Manifest:
    """Reads what a bundle says about itself; its other files are not opened.

    Raises:
        BundleError: it is not a bundle, or its manifest is damaged.
    """
    return read_manifest(Path(path))


def verify_bundle(path: str | Path, base: str | Path | None = None) -> Verification:
    """Checks every file's hash and, with the base at hand, runs the parity gate again.

    The adapters' PEFT checkpoints may be gone, so the oracle's rows are made from the adapters in the bundle, see
    `reference.delta_row`; the audio is the package's own.

    Args:
        path: the bundle.
        base: folder or hub id of its base; None takes the recorded one if it is a folder that still exists.

    Raises:
        BundleError: a file is missing or changed, or `base` is not the bundle's base.
        CheckpointError: `base` cannot be read.
        ParityError: the graphs do not compute what PyTorch computes.
        ExportError: this ONNX Runtime cannot run the graphs.
    """
    directory = Path(path)
    manifest = read_manifest(directory)
    _log.info("checking %d files", len(manifest.files))
    check_files(manifest, directory)
    checkpoint, skipped = _given(manifest, base) if base is not None else _recorded(manifest)
    if checkpoint is None:
        return Verification(len(manifest.files), {}, None, skipped)
    return Verification(len(manifest.files), _parity(directory, manifest, checkpoint), checkpoint.id, None)


def _given(manifest: Manifest, base: str | Path) -> tuple[Checkpoint, None]:
    checkpoint = load_checkpoint(base)
    if checkpoint.sha256 != manifest.base.sha256:
        raise BundleError(
            f"The bundle was made from {manifest.base.id} with weights {manifest.base.sha256[:12]}..., but {base} has "
            f"{checkpoint.sha256[:12]}... Give the base it was made from, or leave --base out to check only the files."
        )
    return checkpoint, None


def _recorded(manifest: Manifest) -> tuple[Checkpoint | None, str | None]:
    """The base at its recorded place, or why not; another checkpoint there is no fault of the bundle."""
    if not Path(manifest.base.id).is_dir():
        return None, f"the base {manifest.base.id} is not at hand; give it with --base"
    try:
        return _given(manifest, manifest.base.id)
    except (BundleError, CheckpointError) as error:
        return None, f"{manifest.base.id} no longer holds the base ({error})"


def _parity(directory: Path, manifest: Manifest, checkpoint: Checkpoint) -> dict[str, ParityReport]:
    from das_asr.export.parity import check_parity
    from das_asr.export.reference import delta_row

    paths = {entry.name: directory / "adapters" / f"{entry.name}.safetensors" for entry in manifest.adapters}
    openers = [delta_row(load_adapter(path, name, manifest.dimensions)) for name, path in paths.items()]
    samples = load_clips((), manifest.audio)
    return {"fp32": check_parity(directory, manifest, samples, checkpoint.directory, openers)}
