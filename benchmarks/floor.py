"""The floor under a step and under the encoder: what reading the weights, and multiplying them, must take.

    read_ms      bytes that a run must read / bytes per second that the machine reads
    compute_ms   operations / operations per second of the machine's matrix product, float32 and 8 bits each at its own
    floor_ms     the larger of the two: a run that overlaps them perfectly takes no longer

With few rows a step waits for memory, with many it computes. Weights are counted in the graph's file, tensor by tensor,
so the figures follow the precision; adapters and what is fed (cross-attention, caches) follow from the sizes, for they
need not be those that the file was exported with.
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
HALF = 2
INTEGER_PRODUCTS = ("MatMulNBits", "MatMulInteger", "MatMulIntegerToFloat")
PRODUCTS = ("MatMul", "Gemm", *INTEGER_PRODUCTS)


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


def step_demand(
    graph: Path, dims: Dimensions, rows: int, past: int, *, batch: int = 1, rank: int | None = None
) -> Demand:
    """One step of a decoder file: every row of every utterance feeds one token.

    Args:
        graph: a decoder of some precision, with whatever cache.
        dims: the model's sizes.
        rows: R.
        past: tokens in the self-attention cache.
        batch: utterances B.
        rank: of the adapters; None is that of the graph's own.
    """
    model = _load(graph)
    rank = rank or int(_shapes(model)["lora_cv_b0"][-2])
    audio, width, layers = dims.audio_positions, dims.d_model, dims.decoder_layers
    heard = layers * batch * (2 * audio * width + rows * audio * rank)  # cross keys, values, low-rank values
    cached = layers * batch * rows * 2 * past * width
    cross = layers * batch * rows * (4 * audio * width + 2 * audio * rank * dims.decoder_heads)
    item, cross_item = _item(model, "past_k0"), _item(model, "cross_k0")
    fed = Demand(cross_item * heard + item * cached, 2 * cached, 0) + _of_type(cross_item, cross)
    adapters = layers * rows * rank * width * 7  # sq, sv and cq have A and B; of cv the decoder reads B alone
    return fed + Demand(item * adapters, 2 * adapters * batch, 0) + _weights(model, batch * rows)


def encoder_demand(graph: Path, dims: Dimensions) -> Demand:
    """One window through an encoder file."""
    model = _load(graph)
    shapes, positions, item = _shapes(model), dims.frames, _item(model, "lora_cv_a0")
    adapters = sum(math.prod(shapes[name]) for name in _inputs(model) & shapes.keys())
    convolutions = 0
    for node in model.graph.node:
        if node.op_type == "Conv":
            positions //= next((item.ints[0] for item in node.attribute if item.name == "strides"), 1)
            convolutions += 2 * positions * math.prod(shapes[node.input[1]])
    attention = 4 * dims.encoder_layers * dims.audio_positions**2 * dims.d_model
    read = Demand(FLOAT * dims.mels * dims.frames + item * adapters, convolutions, 0)
    of_audio = _of_type(_item(model, "cross_k0"), attention + 2 * adapters * dims.audio_positions)
    return read + of_audio + _weights(model, dims.audio_positions)


def _of_type(item: int, operations: int) -> Demand:
    """Operations on numbers of so many bytes: with one byte they are those of integers."""
    return Demand(0, 0, operations) if item == 1 else Demand(0, operations, 0)


def _load(graph: Path) -> Any:
    import onnx

    return onnx.load(graph, load_external_data=False)


def _weights(model: Any, vectors: int) -> Demand:
    """Bytes of the base's tensors but those that are only looked up in, and operations of the products with them.

    Args:
        model: a graph.
        vectors: that every weight [in, out] is multiplied with.
    """
    adapters = _inputs(model)
    shapes = {name: shape for name, shape in _shapes(model).items() if name not in adapters}
    read = {name for node in model.graph.node if node.op_type != "Gather" for name in node.input if name in shapes}
    size = sum(_bytes(item) for item in model.graph.initializer if item.name in read)
    total = Demand(size, 0, 0)
    for node, elements in _products(model, shapes):
        operations = 2 * elements * vectors
        integer = node.op_type in INTEGER_PRODUCTS
        total += Demand(0, 0 if integer else operations, operations if integer else 0)
    return total


def _products(model: Any, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[Any, int]]:
    """Products with an operand in `shapes`: (node, that operand's elements)."""
    for node in model.graph.node:
        name = next((name for name in node.input if len(shapes.get(name, ())) > 1), None)
        if node.op_type in PRODUCTS and name is not None:
            sizes = {item.name: item.i for item in node.attribute if item.name in ("K", "N")}
            packed = node.op_type == "MatMulNBits"
            yield node, sizes["K"] * sizes["N"] if packed else math.prod(shapes[name])


def _shapes(model: Any) -> dict[str, tuple[int, ...]]:
    return {item.name: tuple(item.dims) for item in model.graph.initializer}


def _inputs(model: Any) -> set[str]:
    """Names of the graph's inputs; those that are stored as well are adapters."""
    return {item.name for item in model.graph.input}


def _item(model: Any, name: str) -> int:
    """Bytes of a number of a graph's input or output; bfloat16 is none of numpy's types."""
    from onnx import TensorProto

    values = (*model.graph.input, *model.graph.output)
    (kind,) = (value.type.tensor_type.elem_type for value in values if value.name == name)
    return {TensorProto.FLOAT: FLOAT, TensorProto.UINT8: 1}.get(kind, HALF)


def _bytes(item: Any) -> int:
    from onnx import helper

    kind: Any = helper.tensor_dtype_to_np_dtype(item.data_type)
    return int(math.prod(item.dims) * kind.itemsize)
