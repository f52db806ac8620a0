"""Runs the builder in a process of its own, so that its faults are errors here; see `engine_worker.py`."""

from __future__ import annotations

import dataclasses
import json
import logging
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO

from das_asr.export.engine_worker import BuildJob
from das_asr.runtime.errors import ExportError

__all__ = ["run_build"]

_TAIL = 2000  # characters of what the builder printed that a message repeats

_log = logging.getLogger(__name__)


def run_build(job: BuildJob) -> None:
    """Compiles one graph; progress and the builder's warnings are logged.

    Raises:
        ExportError: the builder refuses or breaks down.
    """
    command = [sys.executable, "-c", "from das_asr.export.engine_worker import main; main()"]
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as noise,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=noise, text=True, start_new_session=True
        ) as process,
    ):
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(dataclasses.asdict(job)) + "\n")
            process.stdin.flush()  # and left open: the worker ends when it closes
            done = _follow(process.stdout, Path(job.engine).stem)
            code = process.wait()
        finally:
            process.kill()
        if not done or code:
            raise ExportError(_breakdown(job, code, noise))


def _follow(output: IO[str], graph: str) -> bool:
    """Logs what the worker says; whether it said that it is done."""
    for line in output:
        ((kind, content),) = json.loads(line).items()
        if kind == "error":
            raise ExportError(content)
        if kind == "warnings":
            for warning in content:
                _log.info("%s: the builder warns: %s", graph, warning)
            return True
        _log.info("%s: %s", graph, content)
    return False


def _breakdown(job: BuildJob, code: int, noise: IO[str]) -> str:
    noise.seek(0)
    said = noise.read()[-_TAIL:].strip()
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
    return (
        f"The builder of {job.library} {how} while building {Path(job.graph).name} for {job.target}. "
        f"It said: {said or 'nothing'}"
    )
