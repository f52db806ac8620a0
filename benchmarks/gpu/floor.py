"""What a step cannot be faster than on a GPU: bytes it must read over measured bandwidth, and launches it must make."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any

import torch

from das_asr.benchmarks.gpu.clock import Device

if TYPE_CHECKING:
    from collections.abc import Callable

    from das_asr.runtime.manifest import Dimensions

__all__ = ["count_kernels", "measure_device", "step_bytes"]

_COPY_BYTES = 1 << 30
_NODES = 1000
_REPEATS = 10


def step_bytes(dims: Dimensions, *, batch: int, rows: int, rank: int, cached: int, item: int) -> dict[str, int]:
    """Bytes that one step has to read at least.

    Args:
        dims: of the base.
        batch: utterances B.
        rows: R.
        rank: r of the adapters.
        cached: tokens in the self-attention cache.
        item: bytes of a number: 2 or 4.
    """
    width, layers = dims.d_model, dims.decoder_layers
    attention = 6 * width * width  # q, v and out of the self-attention, its k; q and out of the cross-attention
    weights = layers * (attention + 2 * width * dims.decoder_ffn)
    cross = layers * batch * dims.audio_positions * (2 * width + rows * rank)
    lora = layers * rows * rank * width * 7  # sq, sv and cq have A and B; of cv the decoder reads B alone
    cache = layers * batch * rows * cached * 2 * width
    parts = {"layers": weights, "lm_head": dims.vocabulary * width, "cross": cross, "lora": lora, "cache": cache}
    return {name: numbers * item for name, numbers in parts.items()}


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
