"""Cross-attention in integers: what the encoder hands to the decoder has 8 bits, and the decoder multiplies in 8 bits.

A step of the decoder reads the keys and values of the whole audio, tens of megabytes in float32. Here they have 8 bits
and a scale per utterance and head, low-rank values one per utterance and row (`contract.integer_cross_specs`). Queries
and attention weights are rounded row by row, so that no row or utterance depends on the others of its run.

The engine's integer product is fast for an unsigned left and a signed right operand. Keys, which are large, are the
left one, so that only the few queries are packed at every step; attention weights are left of the values.
"""

from __future__ import annotations

import numpy as np
import onnx

from das_asr.export.builder import value_info
from das_asr.export.rewriting import Nodes, attribute, node_of, replace
from das_asr.runtime.contract import integer_cross_specs
from das_asr.runtime.manifest import Dimensions

__all__ = ["declare_integer_cross", "round_cross_tensors", "use_integer_cross"]

_MIDDLE = 128  # zero point of the keys


# --- Encoder ---


def round_cross_tensors(model: onnx.ModelProto, dims: Dimensions) -> None:
    """Makes an encoder's outputs those of `contract.integer_cross_specs`."""
    for layer in range(dims.decoder_layers):
        _use_integer_adapter(model, layer)
        values = node_of(model.graph, f"cross_v{layer}")
        assert attribute(values, "perm") == [0, 2, 3, 1]
        del values.attribute[:]
        values.attribute.append(onnx.helper.make_attribute("perm", [0, 2, 1, 3]))  # [B, H, S, d], right operands now
        for kind, middle, type_ in (("k", _MIDDLE, np.uint8), ("v", 0, np.int8), ("u", 0, np.int8)):
            _round_output(model, f"cross_{kind}{layer}", f"cross_{kind}_scale{layer}", middle, type_)
    del model.graph.output[:]
    model.graph.output.extend(value_info(spec, "") for spec in integer_cross_specs(dims))


def _use_integer_adapter(model: onnx.ModelProto, layer: int) -> None:
    """Low-rank values X A of all rows: adapters are rounded when they are used, each column [D] with a scale."""
    product = node_of(model.graph, f"cross.{layer}/u")
    hidden, adapters = product.input  # [B, S, D], [G, D, R*r]
    x = next(node for node in model.graph.node if node.op_type == "DynamicQuantizeLinear" and node.input[0] == hidden)
    n = Nodes(product.name)
    a_8, largest, step = n.rounded(adapters, -2, 0, np.int8)
    x_8, scale, middle = x.output
    scales = n.op("Mul", largest, step, name="a_scales")
    n.engine("MatMulIntegerToFloat", x_8, a_8, scale, scales, middle, name="product", output=product.output[0])
    replace(model, [product], n)


def _round_output(model: onnx.ModelProto, output: str, scale_name: str, middle: int, dtype: type) -> None:
    """Rounds an output [B, H or R, ...] around `middle` with a scale [B, H or R, 1, 1], which is an output too."""
    node = node_of(model.graph, output)
    n = Nodes(node.name)
    exact = node.output[0] = n.name("float32")
    n.nodes.append(node)
    axes = n.constant("all_but_two", [2, 3])
    largest = n.op("ReduceMax", n.op("Abs", exact, name="abs"), axes, name="largest", keepdims=1)
    scale = n.op("Mul", largest, n.constant("to_8_bits", 1 / 127, np.float32), name="scale", output=scale_name)
    scales = n.op("Reshape", scale, n.constant("one_axis", [-1]), name="scales")
    zeros = n.op("Expand", n.constant("middle", middle, dtype), n.op("Shape", scales, name="count"), name="zeros")
    flat = n.op("QuantizeLinear", n.op("Flatten", exact, name="flat", axis=2), scales, zeros, name="flat_8", axis=0)
    n.op("Reshape", flat, n.op("Shape", exact, name="shape"), name="8", output=output)
    replace(model, [node], n)


# --- Decoder ---


def declare_integer_cross(graph: onnx.GraphProto, dims: Dimensions) -> None:
    """Makes a decoder's cross inputs those of `contract.integer_cross_specs`."""
    specs = list(integer_cross_specs(dims))
    names = {spec.name for spec in specs}
    kept = [value for value in graph.input if value.name not in names]
    del graph.input[:]
    graph.input.extend([*kept, *(value_info(spec, "") for spec in specs)])


def use_integer_cross(model: onnx.ModelProto, dims: Dimensions) -> None:
    """Rewrites the cross-attention of a float32 decoder, `decoder._cross_attention`, layer by layer."""
    for layer in range(dims.decoder_layers):
        path = f"decoder/layers.{layer}/encoder_attn"
        _scores(model, path, layer)
        _contexts(model, path, layer)


def _scores(model: onnx.ModelProto, path: str, layer: int) -> None:
    """Keys times queries, [B, H, S, R*n]: each row's query of a head has a scale of its own."""
    n = Nodes(f"{path}/scores_8")
    rounded, largest, step = n.rounded(f"{path}/q_split", -1, 0, np.int8)  # [B, R*n, H, d]
    columns = n.op("Transpose", rounded, name="q_t", perm=[0, 2, 3, 1])  # [B, H, d, R*n]
    scale = n.op("Transpose", largest, name="largest_t", perm=[0, 2, 3, 1])  # [B, H, 1, R*n]
    scale = n.op("Mul", scale, f"cross_k_scale{layer}", name="scale")
    old = [node_of(model.graph, f"{path}/{name}") for name in ("q_t", "scores_t")]
    keys, middle = f"cross_k{layer}", n.constant("middle", _MIDDLE, np.uint8)
    n.engine("MatMulIntegerToFloat", keys, columns, step, scale, middle, name="product", output=old[-1].output[0])
    replace(model, old, n)


def _contexts(model: onnx.ModelProto, path: str, layer: int) -> None:
    """Attention weights times values and low-rank values: each row's weights of a head have a scale of their own."""
    parts = ("weights_by_column", "weights_t", "base_context_t", "base_context_split", "lora_cv/down")
    old = [node_of(model.graph, f"{path}/{name}") for name in parts]
    by_column = old[0].input[1]  # [0, -1, H, 0]
    n = Nodes(f"{path}/context_8")
    one, weights = n.constant("one", 1, np.float32), f"{path}/weights"  # [B, R, n*H, S]
    largest = n.op("ReduceMax", weights, n.constant("last", [-1]), name="largest", keepdims=1)
    scale = n.op("Mul", largest, n.constant("to_unsigned", 1 / 255, np.float32), name="scale")
    flat_scale = n.op("Reshape", scale, n.constant("one_axis", [-1]), name="flat_scale")
    flat = n.op("QuantizeLinear", n.op("Flatten", weights, name="flat", axis=3), flat_scale, name="flat_8", axis=0)
    rounded = n.op("Reshape", flat, n.op("Shape", weights, name="shape"), name="weights_8")

    def by_head(x: str, name: str) -> str:
        """[B, R, n*H, ...] -> [B, H, R*n, ...]."""
        split = n.op("Reshape", x, by_column, name=f"{name}_split")
        return n.op("Transpose", split, name=f"{name}_by_head", perm=[0, 2, 1, 3])

    base = n.engine("MatMulIntegerToFloat", by_head(rounded, "weights"), f"cross_v{layer}", one, one, name="base_8")
    base_scale = n.op("Mul", by_head(scale, "scale"), f"cross_v_scale{layer}", name="base_scale")
    base = n.op("Mul", base, base_scale, name="base")  # [B, H, R*n, d]
    n.op("Transpose", base, name="base_split", output=old[3].output[0], perm=[0, 2, 1, 3])
    low = n.engine("MatMulIntegerToFloat", rounded, f"cross_u{layer}", one, one, name="low_8")
    low_scale = n.op("Mul", scale, f"cross_u_scale{layer}", name="low_scale")
    n.op("Mul", low, low_scale, name="low", output=old[4].output[0])  # [B, R, n*H, r]
    replace(model, old, n)
