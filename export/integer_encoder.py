"""The encoder with 8-bit weights and activations, for ONNX Runtime on CPUs: layers, strided convolution and attention.

    write_integer_encoder(Path("bundle/encoder.onnx"), Path("bundle/int8/encoder.onnx"))

Products with weights are quantised by ONNX Runtime's own tool: a scale per output, activations by a scale of their
whole tensor. The strided convolution is written as such a product. Attention, most of an encoder's time and without an
integer form in the engine, is written here as two integer products around a softmax in float32.

The other convolution, norms, biases, and everything that belongs to adapters stay float32.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from das_asr.runtime.contract import ALONE

__all__ = ["products_of_inputs", "save_variant", "write_integer_encoder"]

_ENGINE = "com.microsoft"  # domain of ONNX Runtime's own operators


def write_integer_encoder(source: Path, target: Path) -> None:
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
    _use_integer_attention(model)
    original.metadata_props.add(key=ALONE, value="activations are rounded over the whole batch")
    save_variant(model, original, target)


def products_of_inputs(model: onnx.ModelProto) -> list[str]:
    """Names of the products whose right side can be fed: adapters have defaults, but are no constants."""
    fed = {value.name for value in model.graph.input}
    return [node.name for node in model.graph.node if node.op_type == "MatMul" and node.input[1] in fed]


def save_variant(model: onnx.ModelProto, original: onnx.ModelProto, target: Path) -> None:
    """Writes the model beside its weights, with the properties and the order of inputs of the float32 one."""
    del model.metadata_props[:]
    model.metadata_props.extend(original.metadata_props)
    model.producer_name = original.producer_name
    del model.graph.input[:]
    model.graph.input.extend(original.graph.input)
    used = {name for node in model.graph.node for name in node.input}
    for item in [item for item in model.graph.initializer if item.name not in used]:
        model.graph.initializer.remove(item)
    onnx.save(
        model,
        target,
        save_as_external_data=True,
        all_tensors_to_one_file=True,
        location=f"{target.name}.data",
        size_threshold=1024,
    )


def _replace(graph: onnx.GraphProto, old: Sequence[onnx.NodeProto], new: Sequence[onnx.NodeProto]) -> None:
    """Puts nodes in the place of the last of those that go."""
    place = list(graph.node).index(old[-1])
    for offset, node in enumerate(new):
        graph.node.insert(place + offset, node)
    for node in old:
        graph.node.remove(node)


def _node(kind: str, inputs: Sequence[str], output: str, domain: str = "", **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(kind, inputs, [output], name=output, domain=domain, **attributes)


# --- Convolution ---


def _unfold_convolution(model: onnx.ModelProto) -> None:
    """Turns the convolution over every second frame, its activation and the transpose behind it into a product.

    Position t hears frames 2t - 1, 2t and 2t + 1, so frames in pairs [B, S, 2D] lack only the odd one before:
    [B, S, 3D] @ [3D, D]. The engine's own integer convolution takes three times as long as its float32 one.
    """
    graph = model.graph
    convolution = next(node for node in graph.node if node.op_type == "Conv" and _attribute(node, "strides") == [2])
    activation = next(node for node in graph.node if convolution.output[0] in node.input)
    transpose = next(node for node in graph.node if activation.output[0] in node.input)
    assert transpose.op_type == "Transpose"
    frames, weight_name, bias = convolution.input
    kernel = next(item for item in graph.initializer if item.name == weight_name)
    weight = numpy_helper.to_array(kernel)  # [D, D, 3]
    width = weight.shape[1]
    kernel.CopyFrom(numpy_helper.from_array(weight.transpose(2, 1, 0).reshape(3 * width, -1), weight_name))
    constants = {
        "in_pairs": [0, -1, 2 * width],
        "width": [width],
        "two_widths": [2 * width],
        "before_the_first": [0, 1, 0, 0, 0, 0],
        "0": [0],
        "-1": [-1],
        "positions": [1],
        "channels": [2],
    }
    name = convolution.name
    graph.initializer.extend(numpy_helper.from_array(np.array(v), f"{name}/{key}") for key, v in constants.items())

    def of(*keys: str) -> list[str]:
        return [f"{name}/{key}" for key in keys]

    steps = [
        _node("Transpose", [frames], f"{name}/frames", perm=[0, 2, 1]),
        _node("Reshape", of("frames", "in_pairs"), f"{name}/pairs"),  # [B, S, 2D]
        _node("Slice", of("pairs", "width", "two_widths", "channels"), f"{name}/odd"),
        _node("Pad", of("odd", "before_the_first"), f"{name}/padded"),
        _node("Slice", of("padded", "0", "-1", "positions"), f"{name}/odd_before"),
        _node("Concat", of("odd_before", "pairs"), f"{name}/unfolded", axis=2),
        _node("MatMul", [f"{name}/unfolded", weight_name], f"{name}/MatMul"),
        _node("Add", [f"{name}/MatMul", bias], convolution.output[0]),
        _node(activation.op_type, [convolution.output[0]], transpose.output[0]),
    ]
    _replace(graph, [convolution, activation, transpose], steps)


def _attribute(node: onnx.NodeProto, name: str) -> Any:
    return helper.get_node_attr_value(node, name)


# --- Attention ---


def _use_integer_attention(model: onnx.ModelProto) -> None:
    """Replaces every attention of [B, S, D] by a loop over utterances, and in it over heads.

    So only one head's weights [S, S] are in memory at a time, and they stay in the processor's caches.
    """
    if not any(item.domain == _ENGINE for item in model.opset_import):
        model.opset_import.append(helper.make_opsetid(_ENGINE, 1))
    graph = model.graph
    for node in [node for node in graph.node if node.op_type == "Attention"]:
        assert _attribute(node, "scale") == 1.0  # folded into the projection of the keys
        body = _utterance(node.name, _attribute(node, "q_num_heads"))
        loop = helper.make_node(
            "Scan", list(node.input[:3]), [node.output[0]], name=node.name, body=body, num_scan_inputs=3
        )
        _replace(graph, [node], [loop])


def _utterance(name: str, heads: int) -> onnx.GraphProto:
    """Queries, keys and values [S, D] of one utterance -> [S, D]."""
    constants = {f"{name}/split": np.array([0, heads, -1]), f"{name}/merge": np.array([0, -1])}
    parts = [
        _node("Reshape", [f"{name}/{kind}", f"{name}/split"], f"{name}/{kind}_heads") for kind in ("q", "k", "v")
    ]  # [S, H, d]
    loop = helper.make_node(
        "Scan",
        [part.output[0] for part in parts],
        [f"{name}/heads"],
        name=f"{name}/heads",
        body=_head(f"{name}/head"),
        num_scan_inputs=3,
        scan_input_axes=[1, 1, 1],
        scan_output_axes=[1],
    )
    merge = _node("Reshape", [f"{name}/heads", f"{name}/merge"], f"{name}/merged")
    return _body(name, [*parts, loop, merge], constants)


def _head(name: str) -> onnx.GraphProto:
    """Queries, keys and values [S, d] of one head -> [S, d]: softmax(Q K^T) V in integer products.

    Left operands are unsigned, right ones signed: that is the pair for which processors have instructions. Each row of
    weights is scaled by its own largest: a common scale would round rows that attend to everything a little to nothing.
    """
    constants: dict[str, NDArray[Any]] = {
        "signed": np.array(0, np.int8),  # a zero point, which gives the type
        "to_signed": np.array(1 / 127, np.float32),
        "to_unsigned": np.array(1 / 255, np.float32),
        "one": np.array(1, np.float32),
        "last": np.array([-1]),
    }

    def of(*keys: str) -> list[str]:
        return [f"{name}/{key}" for key in keys]

    def signed(kind: str) -> list[onnx.NodeProto]:
        return [
            _node("Abs", of(kind), f"{name}/{kind}_abs"),
            _node("ReduceMax", of(f"{kind}_abs"), f"{name}/{kind}_max", keepdims=0),
            _node("Mul", of(f"{kind}_max", "to_signed"), f"{name}/{kind}_scale"),
            _node("QuantizeLinear", of(kind, f"{kind}_scale", "signed"), f"{name}/{kind}_8"),
        ]

    def product(inputs: list[str], output: str) -> onnx.NodeProto:
        return _node("MatMulIntegerToFloat", inputs, f"{name}/{output}", _ENGINE)

    steps = [
        helper.make_node("DynamicQuantizeLinear", of("q"), of("q_8", "q_scale", "q_zero"), name=f"{name}/q_8"),
        *signed("k"),
        *signed("v"),
        _node("Transpose", of("k_8"), f"{name}/k_t", perm=[1, 0]),
        product(of("q_8", "k_t", "q_scale", "k_scale", "q_zero"), "scores"),
        _node("Softmax", of("scores"), f"{name}/weights", axis=-1),
        _node("ReduceMax", of("weights", "last"), f"{name}/weights_max", keepdims=1),
        _node("Mul", of("weights_max", "to_unsigned"), f"{name}/weights_scale"),  # [S, 1]
        _node("Squeeze", of("weights_scale", "last"), f"{name}/row_scales"),
        _node("QuantizeLinear", of("weights", "row_scales"), f"{name}/weights_8", axis=0),
        product(of("weights_8", "v_8", "one", "v_scale"), "unscaled"),
        _node("Mul", of("unscaled", "weights_scale"), f"{name}/context"),
    ]
    return _body(name, steps, {f"{name}/{key}": value for key, value in constants.items()})


def _body(name: str, steps: Sequence[onnx.NodeProto], constants: Mapping[str, NDArray[Any]]) -> onnx.GraphProto:
    """The body of a loop over q, k and v, whose result is that of the last step."""

    def value(name: str) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, None)

    return helper.make_graph(
        steps,
        name,
        [value(f"{name}/{kind}") for kind in ("q", "k", "v")],
        [value(steps[-1].output[0])],
        [numpy_helper.from_array(array, key) for key, array in constants.items()],
    )
