"""Work in a fresh process: python -m das_asr.benchmarks.worker TASK, with a specification as JSON on standard input.

Thread pools take their size from the environment when their library is loaded, and importing this package loads NumPy:
only a process that starts with the right environment has the right number of threads everywhere. A fresh process also
has a memory peak of its own.

The answer is one JSON document on standard output; what the work logs goes to standard error.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from das_asr.benchmarks.children import end_with_parent
from das_asr.runtime.errors import DasError, OptionError

__all__ = ["check_threads", "pools", "run_task"]

POOLS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
REFUSED = 3  # exit status of an error that the user can mend


def run_task(task: str, specification: Mapping[str, Any], threads: int) -> Any:
    """Runs a task with all thread pools of one size.

    Args:
        task: A name in `_perform`.
        specification: What the task is to do; paths become strings.
        threads: Size of every pool.

    Returns:
        The task's answer.

    Raises:
        DasError: the task refused; the message is its own.
        OptionError: more threads than this process may use.
    """
    check_threads(threads)
    done = subprocess.run(
        [sys.executable, "-m", "das_asr.benchmarks.worker", task],
        input=json.dumps(specification, default=str),
        stdout=subprocess.PIPE,
        text=True,
        check=False,
        env={**os.environ, **pools(threads)},
    )
    if done.returncode == REFUSED:
        raise DasError(json.loads(done.stdout)["error"])
    # Anything else is a bug, whose trace the process has printed.
    done.check_returncode()
    return json.loads(done.stdout)


def pools(threads: int) -> dict[str, str]:
    """The environment of a process whose thread pools shall have that size."""
    return dict.fromkeys(POOLS, str(threads))


def check_threads(threads: int) -> None:
    """Refuses more threads than there are cores.

    Raises:
        OptionError: naming both numbers.
    """
    from das_asr.benchmarks.machine import usable_cores

    if threads > (usable := len(usable_cores())):
        raise OptionError(f"--threads {threads}: this process may use {usable} core(s). Ask for at most that many.")


def _perform(task: str, specification: dict[str, Any]) -> Any:
    if task == "memory":
        from das_asr.benchmarks.memory import probe

        return probe(specification)
    if task == "rates":
        from das_asr.benchmarks.rates import probe_rates

        return probe_rates(specification)
    if task == "profile":
        from das_asr.benchmarks.step_profile import probe_profile

        return probe_profile(specification)
    from das_asr.benchmarks.rtf import measure

    return measure(specification)


def _main() -> int:
    end_with_parent()
    # Libraries that print to standard output must not end up in the answer.
    answer, sys.stdout = sys.stdout, sys.stderr
    try:
        result, status = _perform(sys.argv[1], json.load(sys.stdin)), 0
    except DasError as error:
        result, status = {"error": str(error)}, REFUSED
    json.dump(result, answer)
    return status


if __name__ == "__main__":
    sys.exit(_main())
