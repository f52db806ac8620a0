"""Bundles for the benchmark, exported as a user would and kept in the cache.

The parity gate of an export replays every row in PyTorch, which takes minutes with many rows. A cached bundle is used
again only as long as the base, the adapters and the code that made it are byte for byte the same.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from das_asr.benchmarks.models import SAMPLE_RATE, cache_root
from das_asr.runtime.errors import ExportError, OptionError
from das_asr.runtime.manifest import MANIFEST_NAME, read_manifest, sha256_of

__all__ = ["bundle_for", "check_base"]

CLIP_SECONDS = 2


def bundle_for(
    checkpoint: Path,
    adapters: Sequence[Path],
    rank: int,
    log: Callable[[str], None],
    cache: Path | None = None,
    precisions: Sequence[str] = ("fp32",),
) -> Path:
    """The bundle of a base and its adapters, exported on first use.

    Args:
        checkpoint: The base.
        adapters: PEFT folders in the order of the rows.
        rank: Of the adapters; with their number it names the bundle.
        log: Told before an export begins.
        cache: Folder to keep bundles in instead of the user's.
        precisions: Of the graphs; fp32 is made in any case. What the smaller ones write is not judged: on random
            weights it says nothing.
    """
    folder = (cache or cache_root()) / "bundles"
    smaller = [name for name in precisions if name != "fp32"]
    prefix = f"{checkpoint.name}-k{len(adapters)}-r{rank}{''.join(f'+{name}' for name in smaller)}-"
    bundle = folder / (prefix + _digest(checkpoint, adapters))
    if (bundle / MANIFEST_NAME).is_file():
        return bundle
    folder.mkdir(parents=True, exist_ok=True)
    # One bundle of a kind: each is hundreds of megabytes, and an outdated one is never used again.
    for outdated in folder.glob(f"{prefix}*"):
        shutil.rmtree(outdated, ignore_errors=True)
    log(f"exporting {len(adapters)} adapters of rank {rank}, kept in {folder}")
    try:
        _export(checkpoint, adapters, ("fp32", *smaller), bundle)
    except ExportError:
        if not (bundle / MANIFEST_NAME).is_file():  # else another process was faster
            raise
    return bundle


def check_base(bundle: Path, checkpoint: Path, flag: str) -> None:
    """Refuses a bundle that was exported from other weights than a checkpoint's; `flag` is what named that one.

    Raises:
        OptionError: saying which is of what.
        BundleError: the bundle cannot be read.
    """
    from das_asr.export.checkpoint import load_checkpoint

    base, weights = read_manifest(bundle).base, load_checkpoint(checkpoint).sha256
    if base.sha256 != weights:
        raise OptionError(
            f"--bundle {bundle} was exported from {base.id} with weights {base.sha256[:12]}..., {flag} {checkpoint} "
            f"has {weights[:12]}... Give a bundle of that model."
        )


def _export(checkpoint: Path, adapters: Sequence[Path], precisions: tuple[str, ...], output: Path) -> None:
    from das_asr.export.bundle import export_bundle
    from das_asr.export.options import AdapterSource, ExportOptions

    sources = tuple(AdapterSource(path.name, path) for path in adapters)
    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Kept because of --force")
        # One short clip: all tokens are compared again when the systems run.
        samples = (_clip(Path(scratch) / "clip.wav"),)
        export_bundle(
            ExportOptions(
                base=str(checkpoint),
                output=output,
                adapters=sources,
                precisions=precisions,
                sample_audio=samples,
                force=len(precisions) > 1,
            )
        )


def _clip(path: Path) -> Path:
    import numpy as np
    import soundfile

    time = np.arange(CLIP_SECONDS * SAMPLE_RATE) / SAMPLE_RATE
    soundfile.write(path, 0.3 * np.sin(2 * np.pi * 220 * time) * np.sin(5 * time), SAMPLE_RATE)
    return path


def _digest(checkpoint: Path, adapters: Sequence[Path]) -> str:
    """Of everything that decides what is in the bundle: weights, settings, and the code of exporter and runtime."""
    import das_asr.export
    import das_asr.runtime

    code = [folder for package in (das_asr.export, das_asr.runtime) for folder in map(Path, package.__path__)]
    files = [path for folder in code for path in sorted(folder.rglob("*.py"))]
    # The order of the adapters is that of the rows, so it counts.
    files += [path for folder in (checkpoint, *adapters) for path in sorted(folder.iterdir()) if path.is_file()]
    return _sha256(files)[:12]


def _sha256(files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.name}\0{sha256_of(path)}\0".encode())
    return digest.hexdigest()
