"""A decoder's products with constant weights in blocks of 4 or 8 bits, by ONNX Runtime's own tool, for few rows.

Each block of inputs has a scale, and activations are rounded in the same blocks, each row for itself.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from das_asr.export.rewriting import Nodes, attribute, replace

__all__ = ["SMALLEST_BLOCK", "embed_from_blocks", "largest_block", "round_in_blocks"]

SMALLEST_BLOCK = 32
"""Inputs that share a scale, at least."""

_BLOCKS = (256, 128, 64, SMALLEST_BLOCK)  # 8 bits stay exact enough in any of them, and the largest is the fastest
_INTEGER_PRODUCTS = 4  # ONNX Runtime's accuracy level that rounds activations to 8 bits, block by block


def largest_block(width: int) -> int:
    """The largest block of which a width is a multiple."""
    return next(size for size in _BLOCKS if width % size == 0)


def round_in_blocks(model: onnx.ModelProto, bits: int, block: int, excluded: Collection[str]) -> onnx.ModelProto:
    """Replaces every product with a constant weight but those of the excluded nodes."""
    from onnxruntime.quantization import QuantFormat
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    tool = MatMulNBitsQuantizer(
        model,
        bits=bits,
        block_size=block,
        is_symmetric=True,
        accuracy_level=_INTEGER_PRODUCTS,
        nodes_to_exclude=list(excluded),
        quant_format=QuantFormat.QOperator,
        op_types_to_quantize=("MatMul",),
    )
    tool.process()
    wrapped: Any = tool.model
    result: onnx.ModelProto = wrapped.model
    return result


def embed_from_blocks(model: onnx.ModelProto, gather: onnx.NodeProto, weight: str) -> None:
    """Makes token embeddings [B, R, n, D] of the output layer's blocks [V, D / block, block] and their scales.

    Args:
        model: a decoder with a rounded output layer.
        gather: the node that looks tokens up in the float32 table.
        weight: what the output layer's weight was called before it was rounded.
    """
    head = next(node for node in model.graph.node if node.op_type == "MatMulNBits" and node.input[1].startswith(weight))
    blocks, scales = head.input[1], head.input[2]
    width, vocabulary, block = (attribute(head, name) for name in ("K", "N", "block_size"))
    tensor = next(item for item in model.graph.initializer if item.name == scales)
    by_token = numpy_helper.to_array(tensor).reshape(vocabulary, width // block)
    tensor.CopyFrom(numpy_helper.from_array(by_token, scales))

    n = Nodes(gather.name)
    ids = gather.input[1]
    values = n.op("Cast", n.op("Gather", blocks, ids, name="blocks"), name="float", to=TensorProto.FLOAT)
    centred = n.op("Sub", values, n.constant("middle", 128, np.float32), name="centred")
    scale = n.op("Unsqueeze", n.op("Gather", scales, ids, name="scales"), n.constant("last", [-1]), name="scale")
    scaled = n.op("Mul", centred, scale, name="scaled")  # [B, R, n, D / block, block]
    shape = n.constant("shape", [0, 0, 0, width])
    n.op("Reshape", scaled, shape, name="embedded", output=gather.output[0])
    replace(model, [gather], n)
