"""A folder that appears whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from das_asr.runtime.errors import ExportError
from das_asr.runtime.manifest import MANIFEST_NAME

__all__ = ["check_target", "remove_leftovers", "replacing", "staged"]

_KINDS = ("partial", "old")
_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


def check_target(target: Path, *, force: bool) -> None:
    """Refuses a target that must not be written over.

    Raises:
        ExportError: it exists and `force` is not set; or it is not a bundle, which `force` does not replace either.
    """
    if not (target.exists() or target.is_symlink()):
        return
    if not force:
        raise ExportError(f"{target} exists. Choose another --output, or give --force to replace that bundle.")
    if not target.is_dir():
        raise ExportError(f"{target} is not a folder, and --force replaces only bundles. Choose another --output.")
    if not (target / MANIFEST_NAME).is_file() and any(target.iterdir()):
        raise ExportError(
            f"{target} holds files but no {MANIFEST_NAME}: it is not a bundle, and --force replaces only bundles. "
            "Choose another --output."
        )


@contextlib.contextmanager
def staged(target: Path, *, force: bool) -> Iterator[Path]:
    """Yields a new folder beside `target` that becomes the bundle of that name when the block ends well.

    Otherwise nothing remains. With `force` a bundle at the target is replaced, see `replacing`.

    Raises:
        ExportError: the target must not be written over, the disk is full, or the place cannot be written to.
    """
    target = target.resolve()
    check_target(target, force=force)
    advice = (
        "A bundle takes about the size of the base in float32 plus its adapters; free some space or choose another "
        "--output."
    )
    with replacing(target, advice) as folder:
        yield folder
        check_target(target, force=force)  # it may have appeared while the block ran


@contextlib.contextmanager
def replacing(target: Path, advice: str) -> Iterator[Path]:
    """Yields a new folder beside `target` that takes its name when the block ends well; otherwise nothing remains.

    Missing folders above the target are made, and removed again when the block fails, whatever ends it. What is at the
    target is moved aside for the moment of renaming and deleted afterwards.

    Args:
        target: an absolute path.
        advice: what to do about a full disk or a place that cannot be written to.

    Raises:
        ExportError: the disk is full, or the place cannot be written to.
    """
    made: list[Path] = []
    folder = _sibling(target, "partial")
    try:
        _open(folder, made, advice)
        yield folder
        _publish(folder, target)
        made.clear()
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        raise ExportError(f"{target} cannot be written: {error.strerror}. {advice} Nothing was left behind.") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        for parent in reversed(made):
            with contextlib.suppress(OSError):  # somebody else may have put something there
                parent.rmdir()


def remove_leftovers(folder: Path) -> None:
    """Removes what a process that was killed or lost its power left of `replacing` in `folder`.

    The caller must know that nobody else is writing there.
    """
    for kind in _KINDS:
        for left in folder.glob(f".*.{kind}-*"):
            shutil.rmtree(left)


def _sibling(target: Path, kind: str) -> Path:
    return target.with_name(f".{target.name}.{kind}-{secrets.token_hex(4)}")


def _open(folder: Path, made: list[Path], advice: str) -> None:
    """Makes `folder` and the missing folders above it, from the top down, noting the latter in `made`."""
    try:
        for parent in reversed(folder.parents):
            if not parent.is_dir():
                parent.mkdir()
                made.append(parent)
        folder.mkdir()
    except OSError as error:
        if error.errno in _NO_ROOM:
            raise
        where = f"No folder can be made in {folder.parent}: {error.strerror} ({error.filename})."
        raise ExportError(f"{where} {advice}") from error


def _publish(folder: Path, target: Path) -> None:
    """Gives `folder` the name `target`; what was there survives until that has happened."""
    for path in sorted(folder.rglob("*"), reverse=True):
        _sync(path)
    _sync(folder)
    old = _sibling(target, "old")
    try:
        if target.exists():
            target.rename(old)
        folder.rename(target)
    except BaseException:
        if old.exists() and not target.exists():
            old.rename(target)
        raise
    _sync(target.parent)
    if old.exists():
        shutil.rmtree(old)


def _sync(path: Path) -> None:
    """Waits until a file or folder is on the disk: a name must not outlive a power cut without its content."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
