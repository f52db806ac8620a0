"""Half precision: a bundle's float32 graphs once more with fp16 or bf16 weights, activations and caches.

    write_half(Path("bundle"), "fp16", dims, Path("bundle/fp16"))   # encoder.onnx, decoder.onnx, decoder_static.onnx

Before -> after, for every node:

- Products, convolutions, attention, activations and sums take and give halves; weights, adapters and constants are
  rounded once.
- x -> LayerNormalization -> y becomes x -> Cast to float32 -> LayerNormalization -> Cast -> y, with scale and bias in
  float32: its squares and sums leave the range of fp16 long before its input does.
- Logits are cast to float32 as soon as they are computed. All behind them (suppression, log-probabilities, the rule)
  stays as it was.
- Nodes without float tensors (ids, positions, shapes) stay as they were.

What has which type at the border is the contract's. It works from file to file, without the base, one tensor in memory
at a time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

from das_asr.export.builder import WeightFile, value_info
from das_asr.runtime.contract import (
    DECODER_FILE,
    DECODER_STATIC_FILE,
    ENCODER_FILE,
    DType,
    TensorSpec,
    decoder_inputs,
    decoder_outputs,
    encoder_inputs,
    encoder_outputs,
    static_decoder_inputs,
    static_decoder_outputs,
)
from das_asr.runtime.errors import ExportError
from das_asr.runtime.manifest import Dimensions

__all__ = ["HALF_PRECISIONS", "write_half"]

HALF_PRECISIONS: dict[str, DType] = {"fp16": "float16", "bf16": "bfloat16"}

_NUMPY: dict[DType, Any] = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
_ENTRANCE = "features"  # float32 at the border, and the network behind it is not

# The mask's -1e9 would be minus infinity in fp16, and the softmax of a query that sees nothing would be NaN.
_LARGEST_CONSTANT = 6e4


@dataclass(frozen=True)
class _Form:
    """One graph, and what the contract says of its border."""

    file: str
    inputs: Callable[[Dimensions, DType], Sequence[TensorSpec]]
    outputs: Callable[[Dimensions, DType], Sequence[TensorSpec]]


# Those in one line share a file of weights.
_FORMS = (
    (_Form(ENCODER_FILE, encoder_inputs, encoder_outputs),),
    (
        _Form(DECODER_FILE, decoder_inputs, decoder_outputs),
        _Form(DECODER_STATIC_FILE, static_decoder_inputs, static_decoder_outputs),
    ),
)


def write_half(bundle: Path, precision: str, dims: Dimensions, target: Path) -> None:
    """Writes the float32 graphs in `bundle` in half precision into the new folder `target`.

    Args:
        bundle: has the graphs; a bundle without a static decoder gives a variant without one.
        precision: one of `HALF_PRECISIONS`.
        dims: of the bundle.
        target: folder to make.

    Raises:
        ExportError: a weight lies beyond the range of the precision.
        onnx.checker.ValidationError: a graph is not valid ONNX.
    """
    dtype = HALF_PRECISIONS[precision]
    target.mkdir()
    for forms in _FORMS:
        present = [form for form in forms if (bundle / form.file).is_file()]
        with contextlib.closing(WeightFile(target / f"{present[0].file}.data")) as weights:
            for form in present:
                model = onnx.load(bundle / form.file, load_external_data=False)
                halver = _Halver(bundle, dtype, form.inputs(dims, dtype), form.outputs(dims, dtype), weights)
                halver.rewrite(model)
                (target / form.file).write_bytes(model.SerializeToString())
        for form in present:  # by path: the checker then finds the external data
            onnx.checker.check_model(str(target / form.file), full_check=True)


@dataclass
class _Halver:
    """Rewrites one graph in place; which tensors are halves spreads from its inputs to its outputs."""

    source: Path  # folder of the float32 weights
    dtype: DType
    inputs: Sequence[TensorSpec]
    outputs: Sequence[TensorSpec]
    weights: WeightFile
    _floats: set[str] = field(default_factory=set)  # tensors that were float32
    _fixed: set[str] = field(default_factory=set)  # weights and constants among them
    _halves: set[str] = field(default_factory=set)  # tensors that are halves now, weights apart
    _rounded: dict[str, bool] = field(default_factory=dict)  # weight or constant -> whether it becomes a half

    def rewrite(self, model: onnx.ModelProto) -> None:
        """Casts, types and weights of the whole graph."""
        graph = model.graph
        self._floats = _float_tensors(model)
        fed = {value.name for value in graph.input}  # adapters are both: fed, with a default
        self._fixed = {tensor.name for tensor in graph.initializer if tensor.name in self._floats - fed}
        self._halves = {spec.name for spec in self.inputs if spec.dtype == self.dtype}
        nodes = [*self._enter(fed), *(new for node in graph.node for new in self._node(node))]
        tensors = [self._tensor(tensor) for tensor in graph.initializer]
        del graph.node[:], graph.initializer[:]
        graph.node.extend(nodes)
        graph.initializer.extend(tensors)
        for declared, specs in ((graph.input, self.inputs), (graph.output, self.outputs)):
            values = [value_info(spec, value.doc_string) for spec, value in zip(specs, declared, strict=True)]
            del declared[:]
            declared.extend(values)

    # --- Nodes ---

    def _enter(self, fed: set[str]) -> Iterator[NodeProto]:
        if _ENTRANCE in fed:
            yield self._cast(_ENTRANCE, f"{_ENTRANCE}/half")
            self._halves.add(f"{_ENTRANCE}/half")

    def _node(self, node: NodeProto) -> Iterator[NodeProto]:
        """The node, with casts around it where it needs them."""
        node.input[:] = [f"{name}/half" if name == _ENTRANCE else name for name in node.input]
        if node.op_type == "LayerNormalization":
            yield from self._layer_norm(node)
            return
        given = {name in self._halves for name in node.input if name in (self._floats | self._halves) - self._fixed}
        assert len(given) < 2, f"{node.name} takes both halves and float32"
        # Without any: an embedding or the mask, which belong to the network, or a truth value that is cast to float32.
        half = given.pop() if given else node.op_type != "Cast"
        for name in self._fixed.intersection(node.input):
            self._fix(name, half)
        yield node
        if half:
            yield from self._leave(node)

    def _layer_norm(self, node: NodeProto) -> Iterator[NodeProto]:
        (x, scale, bias), (y,) = node.input, node.output
        self._fix(scale, half=False)
        self._fix(bias, half=False)
        node.input[0], node.output[0] = f"{y}/float32_in", f"{y}/float32_out"
        yield self._cast(x, node.input[0], TensorProto.FLOAT)
        yield node
        yield self._cast(node.output[0], y)
        self._halves.add(y)

    def _leave(self, node: NodeProto) -> Iterator[NodeProto]:
        """Marks what a half node computes, and casts what the contract wants in float32."""
        wanted = {spec.name for spec in self.outputs if spec.dtype == "float32"}
        for place, name in enumerate(node.output):
            if name in wanted:
                node.output[place] = f"{name}/half"
                yield self._cast(f"{name}/half", name, TensorProto.FLOAT)
            elif name in self._floats:
                self._halves.add(name)

    def _cast(self, source: str, target: str, to: int | None = None) -> NodeProto:
        """A cast to the half type unless told otherwise."""
        kind = helper.np_dtype_to_tensor_dtype(np.dtype(_NUMPY[self.dtype])) if to is None else to
        return helper.make_node("Cast", [source], [target], name=f"{target}/Cast", to=kind)

    # --- Weights and constants ---

    def _fix(self, name: str, half: bool) -> None:
        assert self._rounded.setdefault(name, half) == half, f"{name} is read as a half and as float32"

    def _tensor(self, tensor: TensorProto) -> TensorProto:
        """The tensor as the nodes read it, in the new file of weights if it was in the old one."""
        half = self._rounded.get(tensor.name, tensor.name in self._halves)
        outside = tensor.data_location == TensorProto.EXTERNAL
        if not outside and not half:
            return tensor
        array = numpy_helper.to_array(tensor, base_dir=str(self.source))
        if half:
            array = self._half(tensor.name, array if outside else self._within_range(array))
        return self.weights.add(tensor.name, array) if outside else numpy_helper.from_array(array, tensor.name)

    def _within_range(self, constant: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.clip(constant, -_LARGEST_CONSTANT, _LARGEST_CONSTANT) if self.dtype == "float16" else constant

    def _half(self, name: str, array: NDArray[np.float32]) -> NDArray[Any]:
        with np.errstate(over="ignore"):
            half: NDArray[Any] = array.astype(_NUMPY[self.dtype])
        if not np.isfinite(half.astype(np.float32)).all():
            raise ExportError(
                f"{name} has values up to {np.abs(array).max():.3g}, beyond the range of {self.dtype}. Take bf16, "
                "which has the range of float32, or leave this precision out of --precision."
            )
        return half


def _float_tensors(model: onnx.ModelProto) -> set[str]:
    """Names of all float32 tensors of a graph."""
    graph = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True).graph
    values = (*graph.value_info, *graph.input, *graph.output)
    found = {value.name for value in values if value.type.tensor_type.elem_type == TensorProto.FLOAT}
    return found | {tensor.name for tensor in graph.initializer if tensor.data_type == TensorProto.FLOAT}
