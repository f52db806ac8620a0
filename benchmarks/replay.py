"""Step times of a pruned run on another bundle: the rows of every step as `das-bench prune` recorded them.

Which rows a run keeps is a matter of trained adapters, what a step costs is one of shapes. So the rows of a run with a
small model and many adapters are replayed, in proportion, on a large model whose weights do not matter. A replayed
batch has as many steps as the recorded one; before a step with fewer rows than the one before, it is cut.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from das_asr.benchmarks.machine import pinned, result_head
from das_asr.benchmarks.output import plain_path
from das_asr.benchmarks.wer_report import markdown_table
from das_asr.runtime.adapter_sets import AdapterSet, AdapterSets
from das_asr.runtime.backends import BackendOptions, create_backend
from das_asr.runtime.backends.base import Backend, Control, Encoded
from das_asr.runtime.contract import RULE_CODES
from das_asr.runtime.errors import OptionError
from das_asr.runtime.manifest import Manifest, read_manifest

__all__ = ["Trace", "read_traces", "render_replay", "replay"]

_PROMPT = 4  # tokens, as Whisper's is


@dataclass(frozen=True)
class Trace:
    """The rows of every step of every batch under one setting."""

    setting: str
    rows: int  # that the batches began with
    steps: tuple[tuple[int, ...], ...]  # by batch

    def scaled(self, rows: int, most: int) -> list[list[int]]:
        """The same shares of another number of rows, rounded up, in at most so many steps."""
        return [[-(-count * rows // self.rows) for count in batch[:most]] for batch in self.steps]


def read_traces(path: Path) -> list[Trace]:
    """The traces in a result of `das-bench prune`, that of all rows first.

    Raises:
        OptionError: the file is none.
    """
    try:
        about = json.loads(path.read_text(encoding="utf-8"))["about"]
        rows, costs = about["rows"], about["cost"]
        return [Trace(name, rows, tuple(tuple(run["step_rows"]) for run in runs)) for name, runs in costs.items()]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OptionError(f"{path} has no rows of steps ({error!r}). Give a result of `das-bench prune`.") from error


def replay(
    traces: Sequence[Trace],
    bundle: Path,
    *,
    threads: int = 1,
    utterances: int = 20,
    log: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Seconds of all steps under every setting, interleaved batch by batch.

    Args:
        traces: of the same batches; the first is what the others are compared with.
        bundle: the shapes.
        threads: of a run; with 1 the process is pinned to a core.
        utterances: how many of the batches to replay, spread evenly over all.
        log: told how far it is.
    """
    manifest = read_manifest(bundle)
    if manifest.rows < 2:
        raise OptionError(f"{bundle} has no adapters, so there is no row to leave out. Give another bundle.")
    head = result_head("replay")
    backend = create_backend("onnxruntime", bundle, manifest, BackendOptions(threads=threads))
    count, room = len(traces[0].steps), manifest.dimensions.text_positions - _PROMPT
    batches = {trace.setting: trace.scaled(manifest.rows, room) for trace in traces}
    chosen = [int(index) for index in np.linspace(0, count - 1, min(utterances, count)).round()]
    seconds: dict[str, list[float]] = {trace.setting: [] for trace in traces}
    with pinned(threads):
        player = _Player(backend, manifest, bundle)
        player.play([manifest.rows, 1])  # the first cut reads adapters from the disk
        for trace in traces:
            player.play(batches[trace.setting][chosen[0]])
        for turn, index in enumerate(chosen):
            log(f"batch {turn + 1} of {len(chosen)}")
            start = turn % len(traces)
            for trace in [*traces[start:], *traces[:start]]:
                seconds[trace.setting].append(player.play(batches[trace.setting][index]))
    backend.close()
    runs = [_summary(name, times, [batches[name][index] for index in chosen]) for name, times in seconds.items()]
    return {
        **head,
        "bundle": plain_path(bundle),
        "rows": manifest.rows,
        "threads": threads,
        "runs": runs,
    }


def _summary(setting: str, seconds: Sequence[float], batches: Sequence[Sequence[int]]) -> dict[str, Any]:
    counts = [count for batch in batches for count in batch]
    return {
        "setting": setting,
        "seconds": list(seconds),
        "steps": len(counts),
        "row_steps": sum(counts),
        "step_ms": 1000 * sum(seconds) / max(len(counts), 1),
    }


class _Player:
    """One utterance of silence, decoded with as many rows as it is told."""

    def __init__(self, backend: Backend, manifest: Manifest, bundle: Path) -> None:
        self._backend, self._dims = backend, manifest.dimensions
        self._sets = AdapterSets(backend, manifest, bundle)
        self._all: AdapterSet = self._sets.get(None)
        features = np.zeros((1, self._dims.mels, self._dims.frames), np.float32)
        self._encoded: Encoded = backend.encode(features, self._all.loaded)

    def play(self, steps: Sequence[int]) -> float:
        """Seconds of steps with these numbers of rows, cuts included and the prompt not."""
        rows = len(self._all.rows)
        batch = self._backend.start(self._encoded, self._all.loaded, self._control(rows))
        last = np.array([_PROMPT - 1])
        batch.run(np.zeros(1, np.int64), last, np.zeros((1, rows, _PROMPT), np.int64))
        began = perf_counter()
        for step, count in enumerate(steps):
            if count < rows:
                rows = count
                kept = self._sets.subset(self._all, range(rows))
                batch.keep_rows(np.arange(rows), np.ones((1, rows), np.bool_), kept)
            batch.run(np.array([_PROMPT + step]), last)
        return perf_counter() - began

    def _control(self, rows: int) -> Control:
        no_bias = np.zeros((1, self._dims.vocabulary), np.float32)
        return Control(
            rule=np.array([RULE_CODES["hypothesis"]]),
            tau=np.zeros(1, np.float32),
            token_bias=no_bias,
            first_token_bias=no_bias,
            row_mask=np.ones((1, rows), np.bool_),
            first_valid=np.zeros(1, np.int64),
        )


def render_replay(result: Mapping[str, Any]) -> str:
    """A table in Markdown."""
    first = result["runs"][0]
    rows = [
        [
            run["setting"],
            f"{run['row_steps'] / max(run['steps'], 1):.2f}",
            f"{run['step_ms']:.2f}",
            f"{run['step_ms'] / first['step_ms']:.3f}",
        ]
        for run in result["runs"]
    ]
    head = ["setting", "rows in a step", "ms per step, cuts included", f"x {first['setting']}"]
    return markdown_table(head, rows) + "\n"
