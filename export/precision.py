"""Quantised variants: the graphs of a bundle once more, with 8- or 4-bit weights, in a folder of their own.

    write_variant(Path("bundle"), "int8", dims)   # bundle/int8/encoder.onnx, bundle/int8/decoder.onnx

`int8`: the encoder's products take 8-bit weights and activations, which is where a CPU gains most
(`integer_encoder`). An activation's scale comes from its whole tensor, so the runtime encodes utterances one by one:
what a request gets must not depend on what it is batched with. The decoder's weights have 8 bits too, and activations
are rounded row by row: in blocks with a scale each (`block_products`), or where the bundle has many rows, each row with
one scale (`row_products`). Cross-attention is in integers as well (`integer_cross`). `int4`: the same with 4 bits in
the decoder's layers, in small blocks; the output layer keeps 8.

The token table is stored once, in the integers of the output layer, and embeddings are made from it. The first
convolution, norms, biases, self-attention in the decoder, and everything that belongs to adapters stay float32.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from das_asr.export.block_products import SMALLEST_BLOCK, embed_from_blocks, largest_block, round_in_blocks
from das_asr.export.integer_cross import declare_integer_cross, use_integer_cross
from das_asr.export.integer_encoder import write_integer_encoder
from das_asr.export.rewriting import node_of, products_of_inputs, save_variant
from das_asr.export.row_products import embed_from_outputs, round_by_row
from das_asr.runtime.contract import DECODER_FILE, ENCODER_FILE
from das_asr.runtime.errors import ExportError
from das_asr.runtime.manifest import Dimensions

__all__ = ["VARIANTS", "write_variant"]

VARIANTS = ("int8", "int4")

_MANY_ROWS = 8  # from here on products of whole rows are faster than those in blocks
_HEAD = "decoder/lm_head"
_TABLE = "model.decoder.embed_tokens.weight"
_HEAD_WEIGHT = "lm_head.weight"


def write_variant(bundle: Path, precision: str, dims: Dimensions) -> None:
    """Writes a variant of the float32 graphs in `bundle` into `bundle/<precision>`.

    Raises:
        ExportError: the width of the model is no multiple of a block.
    """
    assert precision in VARIANTS
    if dims.d_model % SMALLEST_BLOCK:
        raise ExportError(
            f"--precision {precision} needs a model width that is a multiple of {SMALLEST_BLOCK}; this base has "
            f"{dims.d_model}. Leave it out."
        )
    folder = bundle / precision
    folder.mkdir()
    write_integer_encoder(bundle / ENCODER_FILE, folder / ENCODER_FILE, dims)
    _write_decoder(bundle / DECODER_FILE, folder / DECODER_FILE, dims, bits=8 if precision == "int8" else 4)


def _write_decoder(source: Path, target: Path, dims: Dimensions, bits: int) -> None:
    model, original = onnx.load(source), onnx.load(source, load_external_data=False)
    _untie(model, dims)
    embeddings = next(node for node in model.graph.node if node.op_type == "Gather" and node.input[0] == _TABLE)
    fed = products_of_inputs(original)
    if bits == 8 and _rows(original) >= _MANY_ROWS:
        round_by_row(model, fed)
        embed_from_outputs(model, embeddings, _HEAD_WEIGHT)
    else:
        if bits != 8:
            model = round_in_blocks(model, bits, SMALLEST_BLOCK, [*fed, _HEAD])
        model = round_in_blocks(model, 8, largest_block(dims.d_model), fed)
        embed_from_blocks(model, node_of(model.graph, embeddings.output[0]), _HEAD_WEIGHT)
    use_integer_cross(model, dims)
    declare_integer_cross(original.graph, dims)
    save_variant(model, original, target)


def _rows(decoder: onnx.ModelProto) -> int:
    """Rows of the adapters that the graph carries."""
    return next(int(item.dims[1]) for item in decoder.graph.initializer if item.name == "lora_sq_a0")


def _untie(model: onnx.ModelProto, dims: Dimensions) -> None:
    """Gives the output layer a weight of its own [D, V] instead of the token table [V, D], and rows a dimension.

    Its result then is `logits` [B, R, V] itself, where that of the Gemm is copied into another shape.
    """
    graph = model.graph
    table = numpy_helper.to_array(next(item for item in graph.initializer if item.name == _TABLE))
    head, logits = node_of(graph, _HEAD), node_of(graph, "logits")
    rows = node_of(graph, head.input[0])
    shape = numpy_helper.from_array(np.array([0, 0, dims.d_model]), "lm_head/rows")
    graph.initializer.extend([numpy_helper.from_array(np.ascontiguousarray(table.T), _HEAD_WEIGHT), shape])
    rows.input[1] = shape.name
    head.op_type, head.input[1], head.output[0] = "MatMul", _HEAD_WEIGHT, "logits"
    del head.attribute[:]
    graph.node.remove(logits)
