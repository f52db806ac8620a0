"""The systems of a comparison by name: what each is, which must agree, and how it is opened.

Nothing heavy is imported here; `open_system` imports what the named system needs and no more, so that its memory can
be measured alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from das_asr.benchmarks.timing import Burst, Utterance

__all__ = [
    "SYSTEMS",
    "YARDSTICK",
    "BatchSystem",
    "History",
    "System",
    "SystemInfo",
    "Work",
    "open_system",
    "system_names",
]

History = Literal["base", "shared", "own"]

YARDSTICK = "transformers"
"""The system that every ratio is relative to."""


@dataclass(frozen=True)
class Work:
    """What every system of one comparison is asked to do."""

    checkpoint: Path  # the base, in the Hugging Face layout
    adapters: tuple[Path, ...]  # K PEFT folders; row i is adapters[i - 1]
    tokens: int | None  # new tokens, forced on every system; None lets the model end
    tau: float = 0.025
    threads: int = 1
    bundle: Path | None = None  # the same base and adapters exported; only the runtime needs it
    spinning: bool = False  # whether the runtime's idle threads spin
    precision: str = "fp32"  # of the bundle's graphs

    @classmethod
    def parse(cls, data: dict[str, Any]) -> Work:
        """From the JSON form of `dataclasses.asdict`."""
        paths = {name: None if data[name] is None else Path(data[name]) for name in ("checkpoint", "bundle")}
        return cls(**{**data, **paths, "adapters": tuple(map(Path, data["adapters"]))})


@dataclass(frozen=True)
class SystemInfo:
    """What a system is."""

    title: str
    history: History  # systems of one kind must write the same tokens; without adapters all must
    needs_adapters: bool = False
    exact: bool = True  # False where weights are quantized, so that differing tokens are no fault


SYSTEMS: dict[str, SystemInfo] = {
    YARDSTICK: SystemInfo("transformers, base only", "base"),
    "sequential-lora": SystemInfo("PyTorch, sequential LoRA", "shared"),
    "sequential-decodes": SystemInfo("PEFT, K + 1 decodes in turn", "own", needs_adapters=True),
    "peft-mixed": SystemInfo("PEFT, mixed batch", "shared", needs_adapters=True),
    "peft-forward": SystemInfo("PEFT, mixed batch, public forward", "shared", needs_adapters=True),
    "das": SystemInfo("DAS, shared history", "shared"),
    "das-hypothesis": SystemInfo("DAS, own histories", "own"),
}


class System(Protocol):
    """Something that transcribes one window and says how long each part took."""

    def transcribe(self, audio: NDArray[np.float32]) -> Utterance:
        """Transcribes float32 [samples] at 16 kHz, at most one window."""
        ...

    def close(self) -> None:
        """Gives its memory back."""
        ...


@runtime_checkable
class BatchSystem(Protocol):
    """A system that also takes many utterances at once."""

    def transcribe_all(self, clips: Sequence[NDArray[np.float32]], size: int) -> Burst:
        """Transcribes clips, each as `System.transcribe` has them, in batches of up to `size`."""
        ...


def system_names(domains: int) -> list[str]:
    """The systems that can run with so many adapters, in the order of the tables."""
    return [name for name, info in SYSTEMS.items() if domains or not info.needs_adapters]


def open_system(name: str, work: Work) -> System:
    """Loads one system."""
    if name.startswith("das"):
        from das_asr.benchmarks.ours import OursSystem

        return OursSystem(name, work)
    from das_asr.benchmarks.baselines import BASELINES

    return BASELINES[name](work)
