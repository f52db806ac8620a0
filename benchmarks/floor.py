"""The floor under a step and under the encoder: what reading the weights, and multiplying them, must take.

    read_ms      bytes that a run must read / bytes per second that the machine reads
    compute_ms   operations / operations per second of the machine's matrix product, float32 and 8 bits each at its own
    floor_ms     the larger of the two: a run that overlaps them perfectly takes no longer

With few rows a step waits for memory, with many it computes. Weights are counted in the graph's file, tensor by tensor,
so the figures follow the precision; what is fed (cross-attention, caches) follows from the model's sizes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from das_asr.benchmarks.rates import Rates
from das_asr.runtime.manifest import Dimensions, read_manifest

__all__ = ["Demand", "demands", "encoder_demand", "floor_ms", "step_demand"]

FLOAT = 4  # bytes
PRODUCTS = ("MatMul", "Gemm", "MatMulNBits", "MatMulInteger")
INTEGER_PRODUCTS = ("MatMulNBits", "MatMulInteger")


@dataclass(frozen=True)
class Demand:
    """What one run of a graph needs at least."""

    bytes: int  # read
    fp32: int  # operations; multiplication and addition are two
    int8: int  # operations

    def __add__(self, other: Demand) -> Demand:
        return Demand(self.bytes + other.bytes, self.fp32 + other.fp32, self.int8 + other.int8)


def demands(bundle: Path, precision: str, past: int) -> dict[str, dict[str, int]]:
    """Of the `step` with `past` cached tokens and of the `encoder`, for one utterance, as the results file has them."""
    manifest = read_manifest(bundle)
    graphs, dims, rows = manifest.graphs(bundle, precision), manifest.dimensions, manifest.rows
    step = step_demand(graphs / "decoder.onnx", dims, rows, past)
    return {"step": asdict(step), "encoder": asdict(encoder_demand(graphs / "encoder.onnx", dims))}


def floor_ms(demand: Mapping[str, int], rates: Rates) -> dict[str, float]:
    """`read`, `compute` and `floor` in milliseconds."""
    read = 1e3 * demand["bytes"] / rates.read
    compute = 1e3 * (demand["fp32"] / rates.fp32 + demand["int8"] / rates.int8)
    return {"read": read, "compute": compute, "floor": max(read, compute)}


def step_demand(graph: Path, dims: Dimensions, rows: int, past: int) -> Demand:
    """One step of a decoder file: every row feeds one token.

    Args:
        graph: `decoder.onnx` of some precision, with the adapters of all rows.
        dims: the model's sizes.
        rows: R.
        past: tokens in the self-attention cache.
    """
    model = _load(graph)
    rank = int(_shapes(model)["lora_cv_b0"][-2])
    audio, width, layers = dims.audio_positions, dims.d_model, dims.decoder_layers
    shared = 2 * audio * width  # cross keys and values
    row = audio * rank + 2 * past * width  # low-rank values, own keys and values
    attention = 4 * audio * width + 2 * audio * rank * dims.decoder_heads + 4 * past * width
    fed = Demand(FLOAT * layers * (shared + rows * row), layers * rows * attention, 0)
    return fed + _weights(model, rows, 1)


def encoder_demand(graph: Path, dims: Dimensions) -> Demand:
    """One window through an encoder file."""
    model = _load(graph)
    shapes, positions = _shapes(model), dims.frames
    convolutions = 0
    for node in model.graph.node:
        if node.op_type == "Conv":
            positions //= next((item.ints[0] for item in node.attribute if item.name == "strides"), 1)
            convolutions += 2 * positions * math.prod(shapes[node.input[1]])
    attention = 4 * dims.encoder_layers * dims.audio_positions**2 * dims.d_model
    features = FLOAT * dims.mels * dims.frames
    return Demand(features, convolutions + attention, 0) + _weights(model, dims.audio_positions, dims.audio_positions)


def _load(graph: Path) -> Any:
    import onnx

    return onnx.load(graph, load_external_data=False)


def _weights(model: Any, vectors: int, vectors_of_adapters: int) -> Demand:
    """Bytes of all tensors but those that are only looked up in, and operations of the products with them.

    Args:
        model: a graph.
        vectors: that every weight [in, out] is multiplied with.
        vectors_of_adapters: that every row's part of an adapter's tensor [1, R, in, out] is multiplied with.
    """
    shapes, adapters = _shapes(model), {item.name for item in model.graph.input}
    read = {name for node in model.graph.node if node.op_type != "Gather" for name in node.input if name in shapes}
    size = sum(_bytes(item) for item in model.graph.initializer if item.name in read)
    total = Demand(size, 0, 0)
    for node, name, elements in _products(model, shapes):
        operations = 2 * elements * (vectors_of_adapters if name in adapters else vectors)
        integer = node.op_type in INTEGER_PRODUCTS
        total += Demand(0, 0 if integer else operations, operations if integer else 0)
    return total


def _products(model: Any, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[Any, str, int]]:
    """Products with a stored operand: (node, its name, its elements)."""
    for node in model.graph.node:
        name = next((name for name in node.input if name in shapes), None)
        if node.op_type in PRODUCTS and name is not None:
            sizes = {item.name: item.i for item in node.attribute if item.name in ("K", "N")}
            packed = node.op_type == "MatMulNBits"
            yield node, name, sizes["K"] * sizes["N"] if packed else math.prod(shapes[name])


def _shapes(model: Any) -> dict[str, tuple[int, ...]]:
    return {item.name: tuple(item.dims) for item in model.graph.initializer}


def _bytes(item: Any) -> int:
    from onnx import helper

    kind: Any = helper.tensor_dtype_to_np_dtype(item.data_type)
    return int(math.prod(item.dims) * kind.itemsize)
