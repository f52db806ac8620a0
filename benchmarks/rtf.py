"""Real-time factor over the number of domains: one window of audio, equally many tokens in every system.

RTF is processing time over audio time, RTFx its inverse. The number of tokens is forced: without that a system that
happens to stop early would look fast. The systems of one comparison live in one process and take turns, the order
rotated from repeat to repeat, so that a disturbance of the machine hits all of them; ratios are medians of the ratios
within a repeat.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from das_asr.benchmarks.audio import window_audio
from das_asr.benchmarks.bundles import bundle_for
from das_asr.benchmarks.figures import figures, ratios
from das_asr.benchmarks.floor import demands
from das_asr.benchmarks.free import FreeOptions, run_free
from das_asr.benchmarks.machine import pinned, quiet_libraries
from das_asr.benchmarks.memory import measure_memory
from das_asr.benchmarks.models import (
    BASE_RANDOM,
    SAMPLE_RATE,
    adapter_folders,
    check_length,
    prompt_ids,
    resolve_model,
)
from das_asr.benchmarks.systems import SYSTEMS, YARDSTICK, System, Work, open_system, system_names
from das_asr.benchmarks.timing import Utterance
from das_asr.runtime.errors import OptionError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["RtfOptions", "agreement", "interleave", "measure", "run_rtf"]

Log = Callable[[str], None]


@dataclass(frozen=True)
class RtfOptions:
    """What `das-bench rtf` is asked to do."""

    model: str = BASE_RANDOM
    domains: tuple[int, ...] = (0, 1, 2, 3, 10, 25)
    ranks: tuple[int, ...] = (32,)
    tokens: int = 30
    threads: int = 1
    repeats: int = 10
    warmup: int = 2
    tau: float = 0.025
    memory: bool = True
    spinning: bool = False
    precision: str = "fp32"  # of the runtime's graphs; PyTorch stays at float32

    @classmethod
    def parse(cls, data: Mapping[str, Any]) -> RtfOptions:
        """From the JSON form of `dataclasses.asdict`."""
        return cls(**{**data, "domains": tuple(data["domains"]), "ranks": tuple(data["ranks"])})

    def __post_init__(self) -> None:
        """Refuses numbers that make no benchmark."""
        low = {"--domains": (self.domains, 0), "--rank": (self.ranks, 1)}
        low |= {"--repeats": ((self.repeats,), 1), "--warmup": ((self.warmup,), 0)}
        low |= {"--tokens": ((self.tokens,), 2), "--threads": ((self.threads,), 1)}
        for flag, (values, least) in low.items():
            if wrong := [value for value in values if value < least]:
                raise OptionError(f"{flag} {wrong[0]}: must be at least {least}.")
        if self.domains and not self.ranks:
            raise OptionError("--rank: give at least one rank.")


def measure(specification: Mapping[str, Any]) -> dict[str, Any]:
    """The whole measurement, as the process does that `worker` starts: both parts, from their options as JSON."""
    log = functools.partial(print, file=sys.stderr, flush=True)
    options = RtfOptions.parse(specification["rtf"])
    free = specification["free"] and FreeOptions.parse(specification["free"])
    return {**run_rtf(options, log), "free_running": run_free(free, log) if free else None}


def run_rtf(options: RtfOptions, log: Log) -> dict[str, Any]:
    """Measures every number of domains and rank; `runs` holds one record per system, rank and number of domains."""
    records: list[dict[str, Any]] = []
    with quiet_libraries():
        checkpoint = resolve_model(options.model)
        check_length(checkpoint, options.tokens)
        for rank in options.ranks:
            for domains in options.domains:
                log(f"{domains} domains, rank {rank}")
                adapters = tuple(adapter_folders(checkpoint, rank, domains))
                # A bundle for each number of domains: a larger one's tensors would count as this one's memory.
                bundle = bundle_for(checkpoint, adapters, rank, log, precisions=("fp32", options.precision))
                work = Work(
                    checkpoint, adapters, options.tokens, options.tau, options.threads, bundle, options.spinning,
                    options.precision,
                )  # fmt: skip
                records += _compare(work, rank, options, log)
        seconds = len(window_audio(checkpoint)) / SAMPLE_RATE
    return {"window_seconds": seconds, "runs": records}


def interleave(
    systems: Mapping[str, System], audio: NDArray[np.float32], repeats: int, warmup: int
) -> dict[str, list[Utterance]]:
    """Runs every system once per repeat, each repeat starting with another one; the warm-up is thrown away."""
    names = list(systems)
    taken: dict[str, list[Utterance]] = {name: [] for name in names}
    for repeat in range(warmup + repeats):
        first = repeat % len(names)
        for name in names[first:] + names[:first]:
            utterance = systems[name].transcribe(audio)
            if repeat >= warmup:
                taken[name].append(utterance)
    return taken


def agreement(taken: Mapping[str, Sequence[Utterance]], domains: int) -> dict[str, dict[str, Any]]:
    """How many tokens of each system equal those of the first system that must write the same."""
    references: dict[str, str] = {}
    counted = {}
    for name, utterances in taken.items():
        # Without adapters there is only the base, whatever the history.
        history = SYSTEMS[name].history if domains else "base"
        reference = references.setdefault(history, name)
        expected, written = taken[reference][0].tokens, utterances[0].tokens
        equal = sum(a == b for a, b in zip(expected, written, strict=True))
        counted[name] = {"with": reference, "equal": equal, "of": len(expected)}
    return counted


def _compare(work: Work, rank: int, options: RtfOptions, log: Log) -> list[dict[str, Any]]:
    domains = len(work.adapters)
    with pinned(options.threads), contextlib.ExitStack() as stack:
        systems = {name: open_system(name, work) for name in system_names(domains)}
        for system in systems.values():
            stack.callback(system.close)
        audio = window_audio(work.checkpoint)
        taken = interleave(systems, audio, options.repeats, options.warmup)
    agreements = agreement(taken, domains)
    past = len(prompt_ids(work.checkpoint)) + options.tokens // 2
    records = []
    for name, utterances in taken.items():
        record = {"system": name, "domains": domains, "rank": rank, "agreement": agreements[name]}
        record |= figures(utterances, len(audio) / SAMPLE_RATE)
        totals = ([item.total for item in items] for items in (utterances, taken[YARDSTICK]))
        record["ratio_to_transformers"] = ratios(*totals)
        record["memory_mib"] = measure_memory(name, work) if options.memory else None
        if name.startswith("das") and work.bundle:
            record["demand"] = demands(work.bundle, work.precision, past)
        records.append(record)
        log(_line(record))
    return records


def _line(record: Mapping[str, Any]) -> str:
    counted = record["agreement"]
    total, ratio = record["total_ms"]["median"], record["ratio_to_transformers"]["median"]
    line = f"  {record['system']:20} {total:9.1f} ms  RTF {record['rtf']:.4f}  {ratio:5.2f} x {YARDSTICK}"
    if counted["equal"] < counted["of"]:
        line += f"  DIFFERS: {counted['equal']} of {counted['of']} tokens equal {counted['with']}"
    if not record["repeatable"]:
        line += "  NOT REPEATABLE: its tokens change from repeat to repeat"
    return line
