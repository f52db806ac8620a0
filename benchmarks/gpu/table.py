"""The papers' table on a device: time over the number of domains, of every system that can run.

All systems of one precision, batch and number of domains are in one process and take turns. The step is what a token
more costs: the difference between two lengths, over the difference of their tokens; so it is the same quantity for
systems that can be looked into and for those that cannot.
"""

from __future__ import annotations

import functools
import gc
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from das_asr.benchmarks.figures import summary
from das_asr.benchmarks.floor import Demand, step_demand
from das_asr.benchmarks.gpu.clock import Device
from das_asr.benchmarks.gpu.floor import count_kernels
from das_asr.benchmarks.gpu.ours import OUR_SYSTEMS, OurSystem, prepared_bundle
from das_asr.benchmarks.gpu.pytorch import PYTORCH_SYSTEMS, Task
from das_asr.benchmarks.models import adapter_folders, prompt_ids
from das_asr.runtime.contract import DECODER_STATIC_FILE
from das_asr.runtime.errors import OptionError
from das_asr.runtime.manifest import read_manifest

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["GPU_SYSTEMS", "Plan", "System", "measure_table", "step_needs"]

GPU_SYSTEMS = (*PYTORCH_SYSTEMS, *OUR_SYSTEMS)
_BASE_ALONE = ("transformers", "transformers-compiled")

Log = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """What is compared.

    Attributes:
        checkpoint: of the base.
        device: cpu, cuda or cuda:N.
        precisions: fp32, fp16.
        batches: utterances that are decoded together.
        domains: numbers of adapters.
        systems: names in `GPU_SYSTEMS`.
        rank: of the adapters.
        tokens: new tokens of the longer of the two lengths; the shorter is a third.
        repeats: that count.
        warmup: that do not.
    """

    checkpoint: Path
    device: str
    precisions: tuple[str, ...] = ("fp16", "fp32")
    batches: tuple[int, ...] = (1, 16)
    domains: tuple[int, ...] = (0, 1, 2, 3, 10, 25)
    systems: tuple[str, ...] = GPU_SYSTEMS
    rank: int = 32
    tokens: int = 30
    repeats: int = 5
    warmup: int = 2

    def __post_init__(self) -> None:
        if unknown := set(self.systems) - set(GPU_SYSTEMS):
            raise OptionError(f"--system {min(unknown)!r} is not one of {', '.join(GPU_SYSTEMS)}.")
        if self.tokens < 6 or self.repeats < 1 or self.warmup < 0:
            raise OptionError("At least 6 tokens and 1 repeat are needed.")

    @property
    def short(self) -> int:
        """Tokens of the shorter length."""
        return self.tokens // 3


class System(Protocol):
    """Something that writes tokens."""

    def transcribe(self, features: NDArray[np.float32], tokens: int) -> list[list[int]]:
        """Writes exactly so many tokens for features [B, mels, frames]."""
        ...

    def close(self) -> None:
        """Gives its memory back."""
        ...


def measure_table(plan: Plan, log: Log) -> Iterator[dict[str, Any]]:
    """One record per system, precision, batch and number of domains; what failed has `error` instead of figures."""
    ours = any(name in OUR_SYSTEMS for name in plan.systems)
    bundle = prepared_bundle(plan.checkpoint, plan.precisions, log) if ours else None
    for precision in plan.precisions:
        for domains in plan.domains:
            adapters = tuple(adapter_folders(plan.checkpoint, plan.rank, domains))
            task = Task(plan.checkpoint, adapters, precision, plan.device)
            for batch in plan.batches:
                log(f"{precision}, {domains} domains, batch {batch}")
                for record in _compare(plan, task, batch, bundle):
                    log(_line(record))
                    yield {"precision": precision, "domains": domains, "batch": batch, **record}


def _compare(plan: Plan, task: Task, batch: int, bundle: Path | None) -> Iterator[dict[str, Any]]:
    """Opens every system that can run, lets them take turns, and closes them."""
    device, opened, memory = Device(plan.device), {}, {}
    features = _features(plan, batch)
    for name in plan.systems:
        if reason := _unfit(name, task):
            yield {"system": name, "error": reason}
            continue
        device.release()
        before = device.memory()
        try:
            opened[name] = _open(name, task, bundle)
            for tokens in (plan.short, plan.tokens) * plan.warmup:
                opened[name].transcribe(features, tokens)
        except Exception as error:  # noqa: BLE001  # a system that cannot run is a result, and the others go on
            opened.pop(name, None)
            gc.collect()
            yield {"system": name, "error": f"{type(error).__name__}: {error}"[:2000]}
            continue
        after = device.memory()
        memory[name] = None if before is None or after is None else after - before
    try:
        times = _take_turns(plan, device, opened, features)
        for name, system in opened.items():
            record = {"system": name, **_numbers(plan, times[name], task, batch), "memory_bytes": memory[name]}
            record["tokens"] = system.transcribe(features, plan.tokens)[0]
            if device.cuda and name in OUR_SYSTEMS and bundle is not None:
                record |= _step(plan, task, batch, system, features, bundle)
            yield record
    finally:
        for system in opened.values():
            system.close()
        opened.clear()
        gc.collect()


def _unfit(name: str, task: Task) -> str | None:
    """Why a system has nothing to do in a comparison."""
    if name in _BASE_ALONE and task.adapters:
        return "decodes the base alone; its figures are those of 0 domains"
    return "has no adapters to mix" if name == "peft-mixed" and not task.adapters else None


def _open(name: str, task: Task, bundle: Path | None) -> System:
    if name in PYTORCH_SYSTEMS:
        return PYTORCH_SYSTEMS[name](task)
    assert bundle is not None
    return OurSystem(name, task, bundle)


def _features(plan: Plan, batch: int) -> NDArray[np.float32]:
    """Log-mel features of one window, the same for every utterance: [B, mels, frames]."""
    import numpy as np
    from transformers import WhisperFeatureExtractor

    from das_asr.benchmarks.audio import window_audio
    from das_asr.benchmarks.models import SAMPLE_RATE

    extractor = WhisperFeatureExtractor.from_pretrained(plan.checkpoint, local_files_only=True)
    audio = window_audio(plan.checkpoint)
    one = extractor(audio, sampling_rate=SAMPLE_RATE, return_tensors="np").input_features.astype(np.float32)
    return np.repeat(one, batch, axis=0)


def _take_turns(
    plan: Plan, device: Device, systems: Mapping[str, System], features: NDArray[np.float32]
) -> dict[str, dict[int, list[float]]]:
    """Seconds of every repeat, by system and number of tokens; each repeat begins with another system."""
    names = list(systems)
    times: dict[str, dict[int, list[float]]] = {name: {plan.short: [], plan.tokens: []} for name in names}
    for repeat in range(plan.repeats if names else 0):
        first = repeat % len(names)
        for name in names[first:] + names[:first]:
            for tokens, taken in times[name].items():
                taken.append(device.seconds(functools.partial(systems[name].transcribe, features, tokens)))
    return times


def _numbers(plan: Plan, times: Mapping[int, Sequence[float]], task: Task, batch: int) -> dict[str, Any]:
    """Milliseconds of the whole batch and of a step, and the real-time factor over the audio of all its utterances."""
    from das_asr.benchmarks.audio import window_audio
    from das_asr.benchmarks.models import SAMPLE_RATE

    more = plan.tokens - plan.short
    steps = [(long - short) / more for short, long in zip(times[plan.short], times[plan.tokens], strict=True)]
    audio = batch * len(window_audio(task.checkpoint)) / SAMPLE_RATE
    return {
        "total_ms": summary(times[plan.tokens]),
        "step_ms": summary(steps),
        "rtf": statistics.median(times[plan.tokens]) / audio,
    }


def _step(
    plan: Plan, task: Task, batch: int, system: System, features: NDArray[np.float32], bundle: Path
) -> dict[str, Any]:
    """What the floor of a step is computed from: its demand, and kernels counted as the time is, by a difference."""
    lengths = (plan.short, plan.tokens)
    counted = [count_kernels(functools.partial(system.transcribe, features, tokens)) for tokens in lengths]
    kernels = (counted[1] - counted[0]) / (plan.tokens - plan.short)
    return {"step_kernels": kernels, "demand": {"step": asdict(step_needs(plan, task, batch, bundle))}}


def step_needs(plan: Plan, task: Task, batch: int, bundle: Path) -> Demand:
    """Of a step in the middle of those whose time is measured."""
    manifest = read_manifest(bundle)
    return step_demand(
        manifest.graphs(bundle, task.precision) / DECODER_STATIC_FILE, manifest.dimensions, task.rows,
        past=len(prompt_ids(task.checkpoint)) + (plan.short + plan.tokens) // 2, batch=batch,
        rank=plan.rank if task.adapters else 1,
    )  # fmt: skip


def _line(record: Mapping[str, Any]) -> str:
    if "error" in record:
        return f"  {record['system']:24} did not run: {record['error'].splitlines()[0][:150]}"
    total, step = record["total_ms"]["median"], record["step_ms"]["median"]
    return f"  {record['system']:24} {total:9.2f} ms  step {step:7.3f} ms  RTF {record['rtf']:.5f}"
