"""One side of the comparison in its own process: `python -m das_asr.benchmarks.peers.side`.

The first line of standard input is a specification as JSON; every answer is a line of JSON on standard output.

    {"convert": true, ...}   converts the checkpoint and ends
    {"convert": false, ...}  loads the peer; then each request is a line, and behind it samples as float32:
        {"samples": [n], "batch": null}       one clip, answered by an `Utterance`
        {"samples": [n, ...], "batch": size}  clips to be transcribed in batches, answered by a `Burst`
        {"samples": [], ...}                  asks for the peak of memory and ends

What cannot be done is answered by {"refused": reason}.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

from das_asr.benchmarks.children import end_with_parent
from das_asr.benchmarks.peers.engines import ENGINES, load_engine, versions_of
from das_asr.benchmarks.systems import BatchSystem, System, Work
from das_asr.benchmarks.timing import Burst, Utterance
from das_asr.runtime.errors import DasError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["main"]

_END = '{"samples": []}'  # what the end of the input means


def main() -> None:
    """Does what the specification on standard input says."""
    # What libraries print, from C as well, must not end up among the answers.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    end_with_parent()  # a stopped process would not see that its input is closed
    sys.excepthook = functools.partial(_answer_trace, answers)
    specification = json.loads(sys.stdin.buffer.readline())
    try:
        with _quiet(specification):
            if specification["convert"]:
                _convert(specification)
                _answer(answers, {"converted": True})
            else:
                _serve(specification, answers)
    except DasError as error:
        _answer(answers, {"refused": str(error)})
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("das_asr"):
            raise
        _answer(answers, {"refused": f"the package {error.name} is not installed"})


def _quiet(specification: Mapping[str, Any]) -> AbstractContextManager[None]:
    """Keeps transformers quiet where it is used; elsewhere it is not even loaded, for it would count as memory."""
    if not specification["convert"] and "transformers" not in ENGINES[specification["engine"]].distributions:
        return nullcontext()
    from das_asr.benchmarks.machine import quiet_libraries

    return quiet_libraries()


def _convert(specification: Mapping[str, Any]) -> None:
    from das_asr.benchmarks.models import publish

    engine = load_engine(specification["engine"])
    checkpoint, tool = Path(specification["checkpoint"]), specification["whisper_cpp"]
    publish(
        Path(specification["folder"]),
        lambda folder: engine.convert(checkpoint, specification["precision"], folder, Path(tool) if tool else None),
    )


def _serve(specification: Mapping[str, Any], answers: TextIO) -> None:
    import numpy as np

    from das_asr.benchmarks.machine import pinned
    from das_asr.benchmarks.memory import peak_memory

    work = Work.parse(specification["work"])
    with pinned(work.threads):  # from the start: pools take over where their maker may run
        system = load_engine(specification["engine"]).open(work, Path(specification["folder"]))
        _answer(answers, {"versions": versions_of(specification["engine"])})
        while (asked := json.loads(sys.stdin.buffer.readline() or _END))["samples"]:
            # Copies, for some peers want to write into them.
            clips = [np.frombuffer(sys.stdin.buffer.read(4 * count), np.float32).copy() for count in asked["samples"]]
            _answer(answers, asdict(_heard(system, clips, asked["batch"])))
        _answer(answers, {"memory_mib": peak_memory()})
        system.close()


def _heard(system: System, clips: Sequence[NDArray[np.float32]], size: int | None) -> Utterance | Burst:
    if size is None:
        return system.transcribe(*clips)
    assert isinstance(system, BatchSystem)  # no other is asked
    return system.transcribe_all(clips, size)


def _answer_trace(
    answers: TextIO, kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """A peer that breaks does not take part; its trace goes to standard error as ever."""
    sys.__excepthook__(kind, error, trace)
    _answer(answers, {"refused": f"{kind.__name__}: {error}".splitlines()[0]})


def _answer(answers: TextIO, answer: Mapping[str, Any]) -> None:
    answers.write(json.dumps(answer) + "\n")
    answers.flush()


if __name__ == "__main__":
    main()
