"""Which nodes of a graph left the provider they were meant for, read from a profile of ONNX Runtime.

Some belong on the CPU: a GPU's provider leaves them there because they compute shapes, on a few integers that the host
needs to know anyway. A node counts as one of those if all that goes in and comes out are integers and booleans of at
most `_SHAPE_BYTES`. Everything else that another provider ran, be it the CPU's or that of plain CUDA kernels where
TensorRT is wanted, and every copy that the engine itself inserted, is a fall-back that costs more than it computes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

__all__ = ["CPU", "CUDA", "TENSORRT", "fallen_back"]

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"
TENSORRT = "TensorrtExecutionProvider"

_SHAPE_BYTES = 1024
_SIZES = {"int64": 8, "int32": 4, "bool": 1}


def fallen_back(profile: Path, wanted: str) -> list[str]:
    """The nodes that should have run elsewhere, each once, as "name (operator)".

    Args:
        profile: what `InferenceSession.end_profiling` named.
        wanted: the provider that should have run them.
    """
    events = json.loads(profile.read_text(encoding="utf-8"))
    runs = (event for event in events if event.get("cat") == "Node" and "provider" in event.get("args", {}))
    return list(dict.fromkeys(_name(event) for event in runs if _strays(event["args"], wanted)))


def _strays(node: Mapping[str, Any], wanted: str) -> bool:
    if node["op_name"].startswith("Memcpy"):
        return True
    return node["provider"] != wanted and not all(_of_shapes(tensor) for tensor in _tensors(node))


def _tensors(node: Mapping[str, Any]) -> Iterator[tuple[str, Iterable[int]]]:
    """Dtype and shape of everything that a node reads or writes; of what it asks the shape of, it reads nothing."""
    asks = node["op_name"] in ("Shape", "Size")
    for side in ("output_type_shape",) if asks else ("input_type_shape", "output_type_shape"):
        for tensor in node.get(side, ()):
            yield from tensor.items()


def _of_shapes(tensor: tuple[str, Iterable[int]]) -> bool:
    dtype, shape = tensor
    return dtype in _SIZES and math.prod(shape) * _SIZES[dtype] <= _SHAPE_BYTES


def _name(event: Mapping[str, Any]) -> str:
    return f"{event['name'].removesuffix('_kernel_time')} ({event['args']['op_name']})"
