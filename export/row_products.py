"""A decoder's products with constant weights in integers, for many rows: each row's activations have one scale.

ONNX Runtime's products in blocks (`precision`) read weights faster, which decides for few rows; its plain integer
products compute faster, which decides from about eight rows on. Weights have a scale per output.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from das_asr.export.rewriting import Nodes, replace

__all__ = ["embed_from_outputs", "round_by_row"]

_MIDDLE = 128  # zero point of activations: unsigned times signed is what processors have instructions for
_SCALES = "/scales"


def round_by_row(model: onnx.ModelProto, excluded: Collection[str]) -> None:
    """Replaces every product x W [in, out] but those of the excluded nodes; x is rounded once for all its readers."""
    graph = model.graph
    rounded: dict[str, tuple[str, str, str]] = {}  # by the name of x
    for node in [node for node in graph.node if node.op_type == "MatMul" and node.name not in excluded]:
        weight = next((item for item in graph.initializer if item.name == node.input[1]), None)
        if weight is None:
            continue
        n = Nodes(f"{node.name}_8")
        x = node.input[0]
        if x not in rounded:
            rounded[x] = n.rounded(x, -1, _MIDDLE, np.uint8)
        x_8, x_largest, x_step = rounded[x]
        _round_weight(graph, weight)
        scales, zero = (x_step, weight.name + _SCALES), n.constant("middle", _MIDDLE, np.uint8)
        product = n.engine("MatMulIntegerToFloat", x_8, weight.name, *scales, zero, name="product")
        n.op("Mul", product, x_largest, name="scaled", output=node.output[0])
        replace(model, [node], n)


def _round_weight(graph: onnx.GraphProto, weight: TensorProto) -> None:
    """Rounds a weight [in, out] where it is, and adds its scales [out]."""
    exact = numpy_helper.to_array(weight)
    scales = np.maximum(np.abs(exact).max(axis=0) / 127, np.finfo(np.float32).tiny).astype(np.float32)
    weight.CopyFrom(numpy_helper.from_array(np.rint(exact / scales).astype(np.int8), weight.name))
    graph.initializer.append(numpy_helper.from_array(scales, weight.name + _SCALES))


def embed_from_outputs(model: onnx.ModelProto, gather: onnx.NodeProto, head: str) -> None:
    """Makes token embeddings [B, R, n, D] of the rounded weight [D, V] of the output layer."""
    n = Nodes(gather.name)
    ids = gather.input[1]
    columns = n.op("Gather", head, ids, name="columns", axis=1)  # [D, B, R, n]
    values = n.op("Cast", n.op("Transpose", columns, name="8", perm=[1, 2, 3, 0]), name="float", to=TensorProto.FLOAT)
    scales = n.op("Gather", head + _SCALES, ids, name="scales")
    scale = n.op("Unsqueeze", scales, n.constant("last", [-1]), name="scale")
    n.op("Mul", values, scale, name="scaled", output=gather.output[0])
    replace(model, [gather], n)
