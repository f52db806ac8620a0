"""Quantised variants: the graphs of a bundle once more, with 8- or 4-bit weights, in a folder of their own.

    write_variant(Path("bundle"), "int8", dims)   # bundle/int8/encoder.onnx, bundle/int8/decoder.onnx

`int8`: the encoder's products take 8-bit weights and activations, which is where a CPU gains most
(`integer_encoder`). An activation's scale comes from its whole tensor, so the runtime encodes utterances one by one:
what a request gets must not depend on what it is batched with. The decoder's weights have 8 bits and a scale for every
block of inputs, and activations are rounded in the same blocks, each row for itself. `int4`: the same with 4 bits in
the decoder's layers, in small blocks; the output layer keeps 8.

The token table is stored once, in the blocks of the output layer, and embeddings are made from it. Convolutions, norms,
biases, and everything that belongs to adapters stay float32. Quantisation itself is ONNX Runtime's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from das_asr.export.integer_cross import declare_integer_cross, use_integer_cross
from das_asr.export.integer_encoder import products_of_inputs, save_variant, write_integer_encoder
from das_asr.runtime.contract import DECODER_FILE, ENCODER_FILE
from das_asr.runtime.errors import ExportError
from das_asr.runtime.manifest import Dimensions

__all__ = ["VARIANTS", "write_variant"]

VARIANTS = ("int8", "int4")

_SMALLEST_BLOCK = 32  # inputs that share a scale
_BLOCKS = (256, 128, 64, _SMALLEST_BLOCK)  # 8 bits stay exact enough in any of them, and the largest is the fastest
_INTEGER_PRODUCTS = 4  # ONNX Runtime's accuracy level that rounds activations to 8 bits, block by block
_HEAD = "decoder/lm_head"
_TABLE = "model.decoder.embed_tokens.weight"
_HEAD_WEIGHT = "lm_head.weight"


def write_variant(bundle: Path, precision: str, dims: Dimensions) -> None:
    """Writes a variant of the float32 graphs in `bundle` into `bundle/<precision>`.

    Raises:
        ExportError: the width of the model is no multiple of a block.
    """
    assert precision in VARIANTS
    if dims.d_model % _SMALLEST_BLOCK:
        raise ExportError(
            f"--precision {precision} needs a model width that is a multiple of {_SMALLEST_BLOCK}; this base has "
            f"{dims.d_model}. Leave it out."
        )
    folder = bundle / precision
    folder.mkdir()
    write_integer_encoder(bundle / ENCODER_FILE, folder / ENCODER_FILE, dims)
    block = next(size for size in _BLOCKS if dims.d_model % size == 0)
    bits = 8 if precision == "int8" else 4
    _write_decoder(bundle / DECODER_FILE, folder / DECODER_FILE, dims, bits, block)


# --- Decoder ---


def _write_decoder(source: Path, target: Path, dims: Dimensions, bits: int, block: int) -> None:
    """`block` is that of the weights with 8 bits; those with fewer have the smallest."""
    from onnxruntime.quantization import QuantFormat
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    model = onnx.load(source)
    _untie(model)
    original = onnx.load(source, load_external_data=False)

    def quantize(given: onnx.ModelProto, width: int, block: int, excluded: list[str]) -> onnx.ModelProto:
        tool = MatMulNBitsQuantizer(
            given,
            bits=width,
            block_size=block,
            is_symmetric=True,
            accuracy_level=_INTEGER_PRODUCTS,
            nodes_to_exclude=excluded,
            quant_format=QuantFormat.QOperator,
            op_types_to_quantize=("MatMul",),
        )
        tool.process()
        wrapped: Any = tool.model
        result: onnx.ModelProto = wrapped.model
        return result

    fed = products_of_inputs(original)
    if bits != 8:
        model = quantize(model, bits, _SMALLEST_BLOCK, [*fed, _HEAD])
    model = quantize(model, 8, block, fed)
    _embed_from_head(model, block)
    use_integer_cross(model, dims)
    declare_integer_cross(original.graph, dims)
    save_variant(model, original, target)


def _untie(model: onnx.ModelProto) -> None:
    """Turns the output layer's Gemm on the token table [V, D] into a product with a weight of its own [D, V]."""
    table = numpy_helper.to_array(next(item for item in model.graph.initializer if item.name == _TABLE))
    node = next(node for node in model.graph.node if node.name == _HEAD)
    model.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(table.T), _HEAD_WEIGHT))
    node.op_type, node.input[1] = "MatMul", _HEAD_WEIGHT
    del node.attribute[:]


def _embed_from_head(model: onnx.ModelProto, block: int) -> None:
    """Makes embeddings of the output layer's blocks [V, D / block, block] and scales, and drops the float32 table."""
    graph = model.graph
    head = next(node for node in graph.node if node.op_type == "MatMulNBits" and node.input[1].startswith(_HEAD_WEIGHT))
    blocks, scales = head.input[1], head.input[2]
    width, vocabulary = (helper.get_node_attr_value(head, name) for name in ("K", "N"))
    gather = next(node for node in graph.node if node.op_type == "Gather" and node.input[0] == _TABLE)
    ids, result, name = gather.input[1], gather.output[0], gather.name
    _reshape(graph, scales, (vocabulary, width // block))
    constants = {"middle": np.float32(128), "last": np.array([-1]), "shape": np.array([0, 0, 0, width])}
    graph.initializer.extend(
        numpy_helper.from_array(np.asarray(value), f"{name}/{key}") for key, value in constants.items()
    )

    def node(kind: str, inputs: list[str], output: str, **attributes: Any) -> onnx.NodeProto:
        return helper.make_node(kind, inputs, [output], name=output, **attributes)

    steps = [
        node("Gather", [blocks, ids], f"{name}/blocks"),  # [B, R, n, D / block, block], uint8
        node("Cast", [f"{name}/blocks"], f"{name}/float", to=TensorProto.FLOAT),
        node("Sub", [f"{name}/float", f"{name}/middle"], f"{name}/centred"),
        node("Gather", [scales, ids], f"{name}/scales"),  # [B, R, n, D / block]
        node("Unsqueeze", [f"{name}/scales", f"{name}/last"], f"{name}/scale"),
        node("Mul", [f"{name}/centred", f"{name}/scale"], f"{name}/scaled"),
        node("Reshape", [f"{name}/scaled", f"{name}/shape"], result),
    ]
    place = list(graph.node).index(gather)
    graph.node.remove(gather)
    for offset, step in enumerate(steps):
        graph.node.insert(place + offset, step)
    graph.initializer.remove(next(item for item in graph.initializer if item.name == _TABLE))


def _reshape(graph: onnx.GraphProto, name: str, shape: tuple[int, ...]) -> None:
    tensor = next(item for item in graph.initializer if item.name == name)
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).reshape(shape), name))
