"""Where a run keeps its state, and how its result appears: whole or not at all.

While it trains, everything lies in `OUTPUT.partial` beside the output; `run.json` in it says what run it is of, and a
run with other options refuses to go on from it.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from das_asr.runtime.errors import TrainingError
from das_asr.training.finetune.processes import is_main_process

__all__ = ["check_output", "open_work", "published", "work_folder"]

_RUN = "run.json"


def work_folder(output: Path) -> Path:
    """Where the run that makes `output` keeps its state."""
    return output.with_name(f"{output.name}.partial")


def check_output(output: Path) -> None:
    """Refuses an output that exists.

    Raises:
        TrainingError: it does.
    """
    if output.exists() or output.is_symlink():
        raise TrainingError(f"{output} exists. Choose another --output, or remove it first.")


def open_work(output: Path, run: Mapping[str, Any], *, restart: bool) -> Path:
    """Makes the work folder of a run, or opens the one that the same run left behind.

    Args:
        output: what the run will make.
        run: whatever decides on the result, as JSON.
        restart: throw away what an earlier run left.

    Raises:
        TrainingError: another run left it, or it cannot be made.
    """
    work = work_folder(output)
    if restart and is_main_process():
        shutil.rmtree(work, ignore_errors=True)
    wanted = json.loads(json.dumps(dict(run), sort_keys=True))
    if (work / _RUN).is_file():
        _compare(json.loads((work / _RUN).read_text(encoding="utf-8")), wanted, work)
        return work
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrainingError(f"{work} cannot be made: {error.strerror}. Choose another --output.") from error
    if is_main_process():
        _write(work / _RUN, wanted)
    return work


def _compare(found: Mapping[str, Any], wanted: Mapping[str, Any], work: Path) -> None:
    changed = [key for key in sorted({*found, *wanted}) if found.get(key) != wanted.get(key)]
    if changed:
        shown = ", ".join(f"{key} ({found.get(key)!r} then, {wanted.get(key)!r} now)" for key in changed[:3])
        raise TrainingError(
            f"{work} holds an unfinished run with other options: {shown}. Give the same options to go on, --restart to "
            "throw it away, or another --output."
        )


def _write(path: Path, content: Mapping[str, Any]) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    temporary.replace(path)


@contextlib.contextmanager
def published(output: Path) -> Iterator[Path]:
    """Yields a folder that takes the name `output` when the block ends well; otherwise it is removed.

    Raises:
        TrainingError: something appeared at `output` meanwhile.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    folder = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    try:
        folder.mkdir()
        yield folder
        for path in folder.iterdir():  # safetensors makes files that only their owner can read
            path.chmod(folder.stat().st_mode & 0o666)
        check_output(output)
        folder.rename(output)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
