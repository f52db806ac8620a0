"""Time and memory of a device: CUDA events and the driver's own account on a GPU, the clock of the CPU elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter

import torch

__all__ = ["Device"]


class Device:
    """One device; every system that is measured runs on it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.cuda = name.startswith("cuda")

    def seconds(self, work: Callable[[], object]) -> float:
        """How long work takes, from an idle device until all that it queued, on whatever stream, is done.

        On a GPU the two events lie around everything on the device, so the clock is the device's own.
        """
        if not self.cuda:
            started = perf_counter()
            work()
            return perf_counter() - started
        torch.cuda.synchronize(self.name)
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        before.record()
        work()
        torch.cuda.synchronize(self.name)  # other libraries have streams of their own, which an event does not wait for
        after.record()
        after.synchronize()
        return float(before.elapsed_time(after)) / 1e3

    def release(self) -> None:
        """Gives back what PyTorch keeps of systems that are closed or idle, so that it counts for nobody else."""
        if self.cuda:
            torch.cuda.synchronize(self.name)
            torch.cuda.empty_cache()

    def memory(self) -> int | None:
        """Bytes that everybody has taken from the driver; None where nobody counts.

        Whoever runs keeps what it once took, so after a run this holds the peak of every system alike.
        """
        if not self.cuda:
            return None
        torch.cuda.synchronize(self.name)
        free, total = torch.cuda.mem_get_info(self.name)
        return int(total - free)
