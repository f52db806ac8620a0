"""Options of `das-bench load`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from das_asr.runtime.errors import OptionError

__all__ = ["PATTERNS", "PEERS", "LoadOptions"]

PATTERNS = ("all", "same", "uniform", "zipf")
"""Which adapters a request asks for: all of them; the first; one, each as often; one, the n-th 1 / n times as often."""

PEERS = ("faster-whisper",)
"""Programs that take many utterances at once; see `load_peer.py`."""


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """Options of `measure_load`.

    Attributes:
        bundle: what serves.
        audio: clips that requests are drawn from.
        requests: per measurement.
        rates: of arrivals, as shares of the capacity.
        patterns: of `PATTERNS`.
        max_batch: utterances decoded together.
        max_queue: requests that may wait.
        threads: of a run of a graph.
        precision: of the bundle; None is its default.
        seed: of arrivals, clips and adapters.
        peer: of `PEERS`, to be compared with; None compares with nobody.
        base: the checkpoint that the bundle was exported from, for the peer to convert.
        repeats: interleaved, of the comparison with the peer.
    """

    bundle: Path
    audio: tuple[Path, ...]
    requests: int = 100
    rates: tuple[float, ...] = (0.5, 0.7, 0.9, 4.0)
    patterns: tuple[str, ...] = ("all",)
    max_batch: int = 8
    max_queue: int = 64
    threads: int = 1
    precision: str | None = None
    seed: int = 0
    peer: str | None = None
    base: Path | None = None
    repeats: int = 3

    def __post_init__(self) -> None:
        if wrong := [pattern for pattern in self.patterns if pattern not in PATTERNS]:
            raise OptionError(f"--patterns has {wrong[0]!r}, expected {', '.join(PATTERNS)}.")
        if not all(0 < rate <= 100 for rate in self.rates):
            raise OptionError(f"--rates is {self.rates}, expected shares of the capacity such as 0.5,0.7,4.")
        if self.requests < 10:
            raise OptionError(f"--requests is {self.requests}, expected at least 10: fewer have no percentiles.")
        if (self.peer is None) != (self.base is None):
            raise OptionError(
                f"--peer is {self.peer}, --base {self.base}: the peer converts the checkpoint that the bundle was "
                "exported from. Give both, or neither."
            )
        if self.repeats < 1:
            raise OptionError(f"--repeats is {self.repeats}, expected at least 1.")
