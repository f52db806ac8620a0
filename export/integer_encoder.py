"""The encoder with 8-bit weights and activations, for ONNX Runtime on CPUs: layers, strided convolution and attention.

    write_integer_encoder(Path("bundle/encoder.onnx"), Path("bundle/int8/encoder.onnx"), dims)

Products with weights are quantised by ONNX Runtime's own tool: a scale per output, activations by a scale of their
whole tensor. The strided convolution is written as such a product. Attention, most of an encoder's time and without an
integer form in the engine, is written here as two integer products around a softmax in float32. What the decoder is
handed is in integers too (`integer_cross`).

The other convolution, norms, biases, and everything that belongs to adapters stay float32.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from das_asr.export.integer_cross import round_cross_tensors
from das_asr.export.rewriting import Nodes, attribute, declare_engine, products_of_inputs, replace, save_variant
from das_asr.runtime.contract import ALONE
from das_asr.runtime.manifest import Dimensions

__all__ = ["use_integer_attention", "write_integer_encoder"]


def write_integer_encoder(source: Path, target: Path, dims: Dimensions) -> None:
    """Writes the integer form of the float32 encoder in `source`."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    original = onnx.load(source, load_external_data=False)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:  # on the same disk: it is as large as the encoder
        unfolded, quantized = Path(scratch) / "unfolded.onnx", Path(scratch) / "quantized.onnx"
        model = onnx.load(source)
        _unfold_convolution(model)
        helper.set_model_props(model, {"onnx.quant.pre_process": "onnxruntime.quant"})  # shapes are known: no advice
        onnx.save(model, unfolded, save_as_external_data=True, location="unfolded.onnx.data")
        quantize_dynamic(
            unfolded,
            quantized,
            op_types_to_quantize=["MatMul"],
            nodes_to_exclude=products_of_inputs(original),
            per_channel=True,
            weight_type=QuantType.QInt8,
            use_external_data_format=True,
            extra_options={"MatMulConstBOnly": True},
        )
        model = onnx.load(quantized)
    use_integer_attention(model)
    round_cross_tensors(model, dims)
    original.metadata_props.add(key=ALONE, value="activations are rounded over the whole batch")
    save_variant(model, original, target)


# --- Convolution ---


def _unfold_convolution(model: onnx.ModelProto) -> None:
    """Turns the convolution over every second frame, its activation and the transpose behind it into a product.

    Position t hears frames 2t - 1, 2t and 2t + 1, so frames in pairs [B, S, 2D] lack only the odd one before:
    [B, S, 3D] @ [3D, D]. The engine's own integer convolution takes three times as long as its float32 one.
    """
    graph = model.graph
    convolution = next(node for node in graph.node if node.op_type == "Conv" and attribute(node, "strides") == [2])
    activation = next(node for node in graph.node if convolution.output[0] in node.input)
    transpose = next(node for node in graph.node if activation.output[0] in node.input)
    assert transpose.op_type == "Transpose"
    given, weight_name, bias = convolution.input
    kernel = next(item for item in graph.initializer if item.name == weight_name)
    weight = numpy_helper.to_array(kernel)  # [D, D, 3]
    width = weight.shape[1]
    kernel.CopyFrom(numpy_helper.from_array(weight.transpose(2, 1, 0).reshape(3 * width, -1), weight_name))

    n = Nodes(convolution.name)
    frames = n.op("Transpose", given, name="frames", perm=[0, 2, 1])
    pairs = n.op("Reshape", frames, n.constant("in_pairs", [0, -1, 2 * width]), name="pairs")
    half = (n.constant("width", [width]), n.constant("two_widths", [2 * width]), n.constant("channels", [2]))
    odd = n.op("Slice", pairs, *half, name="odd")
    padded = n.op("Pad", odd, n.constant("one_before", [0, 1, 0, 0, 0, 0]), name="padded")
    but_last = (n.constant("0", [0]), n.constant("-1", [-1]), n.constant("positions", [1]))
    before = n.op("Slice", padded, *but_last, name="odd_before")
    product = n.op("MatMul", n.op("Concat", before, pairs, name="unfolded", axis=2), weight_name, name="MatMul")
    biased = n.op("Add", product, bias, name="biased")
    n.op(activation.op_type, biased, name="activation", output=transpose.output[0])
    replace(model, [convolution, activation, transpose], n)


# --- Attention ---


def use_integer_attention(model: onnx.ModelProto) -> None:
    """Replaces every attention of [B, S, D] by a loop over utterances, and in it over heads.

    So only one head's weights [S, S] are in memory at a time, and they stay in the processor's caches.
    """
    for node in [node for node in model.graph.node if node.op_type == "Attention"]:
        assert attribute(node, "scale") == 1.0  # folded into the projection of the keys
        n = Nodes(node.name)
        body = _utterance(n.name("utterance"), node)
        n.op("Scan", *node.input[:3], name="utterances", output=node.output[0], body=body, num_scan_inputs=3)
        replace(model, [node], n)
    declare_engine(model)  # inside the loops


def _utterance(prefix: str, attention: onnx.NodeProto) -> onnx.GraphProto:
    """Queries, keys and values [S, D] of one utterance -> [S, D]."""
    n = Nodes(prefix)
    split = n.constant("split", [0, attribute(attention, "q_num_heads"), -1])
    heads = [n.op("Reshape", n.name(kind), split, name=f"{kind}_heads") for kind in ("q", "k", "v")]  # [S, H, d]
    body, axes = _head(n.name("head")), [1, 1, 1]
    context = n.op(
        "Scan", *heads, name="heads", body=body, num_scan_inputs=3, scan_input_axes=axes, scan_output_axes=axes[:1]
    )
    n.op("Reshape", context, n.constant("merge", [0, -1]), name="merged")
    return _body(n)


def _head(prefix: str) -> onnx.GraphProto:
    """Queries, keys and values [S, d] of one head -> [S, d]: softmax(Q K^T) V in integer products.

    Left operands are unsigned, right ones signed: that is the pair for which processors have instructions. Each row of
    weights is scaled by its own largest: a common scale would round rows that attend to everything a little to nothing.
    """
    n = Nodes(prefix)
    last, one = n.constant("last", [-1]), n.constant("one", 1, np.float32)
    q_8, q_scale, q_zero = (n.name(name) for name in ("q_8", "q_scale", "q_zero"))
    n.nodes.append(helper.make_node("DynamicQuantizeLinear", [n.name("q")], [q_8, q_scale, q_zero], name=q_8))
    k_8, k_scale = _signed(n, "k")
    v_8, v_scale = _signed(n, "v")
    k_t = n.op("Transpose", k_8, name="k_t", perm=[1, 0])
    scores = n.engine("MatMulIntegerToFloat", q_8, k_t, q_scale, k_scale, q_zero, name="scores")
    weights = n.op("Softmax", scores, name="weights", axis=-1)
    largest = n.op("ReduceMax", weights, last, name="largest", keepdims=1)
    scale = n.op("Mul", largest, n.constant("to_unsigned", 1 / 255, np.float32), name="weights_scale")  # [S, 1]
    per_row = n.op("Squeeze", scale, last, name="row_scales")
    weights_8 = n.op("QuantizeLinear", weights, per_row, name="weights_8", axis=0)
    context = n.engine("MatMulIntegerToFloat", weights_8, v_8, one, v_scale, name="unscaled")
    n.op("Mul", context, scale, name="context")
    return _body(n)


def _signed(n: Nodes, kind: str) -> tuple[str, str]:
    """A tensor in signed 8 bits around 0, and its scale."""
    largest = n.op("ReduceMax", n.op("Abs", n.name(kind), name=f"{kind}_abs"), name=f"{kind}_largest", keepdims=0)
    scale = n.op("Mul", largest, n.constant(f"{kind}_to_signed", 1 / 127, np.float32), name=f"{kind}_scale")
    zero = n.constant(f"{kind}_zero", 0, np.int8)
    return n.op("QuantizeLinear", n.name(kind), scale, zero, name=f"{kind}_8"), scale


def _body(n: Nodes) -> onnx.GraphProto:
    """The body of a loop over q, k and v, whose result is that of the last node."""

    def values(names: Sequence[str]) -> list[onnx.ValueInfoProto]:
        return [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names]

    inputs = [n.name(kind) for kind in ("q", "k", "v")]
    return helper.make_graph(n.nodes, n.name("body"), values(inputs), values(n.nodes[-1].output), n.constants)
