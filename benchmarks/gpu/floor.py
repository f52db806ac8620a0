"""What a step cannot be faster than on a GPU: the bandwidth of its memory, and the launches that a step makes.

What a step must read is told by `step_demand`, as on a CPU.
"""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any

import torch

from das_asr.benchmarks.gpu.clock import Device

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["count_kernels", "measure_device"]

_COPY_BYTES = 1 << 30
_NODES = 1000
_REPEATS = 10


def measure_device(device: Device) -> dict[str, float]:
    """Copy bandwidth in bytes per second, counting what is read and written, and seconds of an empty graph node."""
    source = torch.empty(_COPY_BYTES, dtype=torch.uint8, device=device.name)
    target = torch.empty_like(source)
    copies = [device.seconds(lambda: target.copy_(source)) for _ in range(_REPEATS)]
    return {
        "copy_bytes_per_second": 2 * _COPY_BYTES / min(copies[1:]),
        "graph_node_seconds": _node_seconds(device),
    }


def _node_seconds(device: Device) -> float:
    """Time of one kernel that does nothing worth mentioning, in a CUDA graph of many."""
    number = torch.zeros(1, device=device.name)
    number.add_(1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(_NODES):
            number.add_(1)
    return statistics.median(device.seconds(graph.replay) for _ in range(_REPEATS)) / _NODES


def count_kernels(work: Callable[[], Any]) -> int:
    """Kernels that work launches on the GPU, those of other libraries included."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        work()
        torch.cuda.synchronize()
    return sum(
        event.device_type.name == "CUDA" and not event.name.startswith(("Memcpy", "Memset"))
        for event in profiler.events() or ()
    )
