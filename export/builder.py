"""A thin writer of ONNX graphs: readable names, weights streamed to one external file, nothing hidden.

The graphs are written node by node instead of being traced, because then every node and weight carries the name a
reader of the checkpoint expects, shapes stay symbolic without guesses, and the layout that the runtime needs is exactly
the layout that is written. `graph.py`, `decoder.py` and `selection.py` hold the mathematics.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import ArrayLike, NDArray
from onnx import TensorProto, helper, numpy_helper

from das_asr.runtime.contract import DType, TensorSpec

__all__ = ["GraphBuilder", "Value", "WeightFile", "value_info"]

Value = str
"""The name of a tensor in the graph."""

_ELEMENT_TYPES: dict[DType, int] = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
    "int64": TensorProto.INT64,
    "int8": TensorProto.INT8,
    "uint8": TensorProto.UINT8,
    "bool": TensorProto.BOOL,
}
_ALIGNMENT = 4096  # a page, so that a weight can be memory-mapped where it lies


class WeightFile:
    """External data of one or more graphs: each tensor is written once, page-aligned, as soon as it is added."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handle = path.open("wb")
        self._tensors: dict[str, TensorProto] = {}

    def add(self, name: str, array: NDArray[Any]) -> TensorProto:
        """Writes `array` unless a tensor of that name is already in the file; returns the reference to it."""
        if name not in self._tensors:
            self._tensors[name] = self._write(name, np.ascontiguousarray(array))
        return self._tensors[name]

    def _write(self, name: str, array: NDArray[Any]) -> TensorProto:
        offset = -(-self._handle.tell() // _ALIGNMENT) * _ALIGNMENT
        self._handle.seek(offset)
        self._handle.write(array.tobytes())
        tensor = TensorProto(name=name, data_type=helper.np_dtype_to_tensor_dtype(array.dtype), dims=array.shape)
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", self.path.name), ("offset", offset), ("length", array.nbytes)):
            tensor.external_data.add(key=key, value=str(value))
        return tensor

    def close(self) -> None:
        """Flushes and closes the file."""
        self._handle.close()


class GraphBuilder:
    """Collects the nodes of one graph.

    Every method that adds something returns the name of the tensor it makes, so code reads like the formula. Names are
    unique paths: `with graph.scope("layers.0")` prefixes all that is added inside.
    """

    def __init__(self, name: str, doc: str, weights: WeightFile, opset: int) -> None:
        self.name, self.doc, self.opset = name, doc, opset
        self._weights = weights
        self._scope: list[str] = []
        self._nodes: list[onnx.NodeProto] = []
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._initializers: dict[str, TensorProto] = {}
        self._names: set[str] = set()
        self._renamed: dict[Value, str] = {}

    @contextlib.contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Prefixes the names of everything added inside with `name/`."""
        self._scope.append(name)
        try:
            yield
        finally:
            self._scope.pop()

    def input(self, spec: TensorSpec, doc: str = "") -> Value:
        """Declares a graph input."""
        self._claim(spec.name)
        self._inputs.append(value_info(spec, doc))
        return spec.name

    def overridable(self, spec: TensorSpec, default: NDArray[np.float32], doc: str = "") -> Value:
        """Declares an input with a default: an initializer that is listed among the graph's inputs too."""
        self.input(spec, doc)
        self._initializers[spec.name] = self._weights.add(spec.name, default)
        return spec.name

    def output(self, spec: TensorSpec, value: Value, doc: str = "") -> None:
        """Declares `value` as a graph output under the contract's name.

        The tensor itself is renamed when the model is made: an Identity node would copy one that has other readers.
        """
        self._claim(spec.name)
        self._renamed[value] = spec.name
        self._outputs.append(value_info(spec, doc))

    def weight(self, name: str, array: NDArray[np.float32]) -> Value:
        """A weight under its checkpoint name, kept in the external file; adding it again gives the same tensor."""
        if name not in self._initializers:
            self._claim(name)
            self._initializers[name] = self._weights.add(name, array)
        return name

    def constant(self, name: str, value: ArrayLike, dtype: type = np.int64) -> Value:
        """A small constant, kept inside the graph file (shape inference reads it); same name, same constant."""
        full = f"const/{name}"
        if full not in self._initializers:
            self._claim(full)
            self._initializers[full] = numpy_helper.from_array(np.asarray(value, dtype=dtype), full)
        return full

    def dimension(self, x: Value, axis: int, name: str) -> Value:
        """One dimension of x as an int64 scalar."""
        shape = self.op("Shape", x, name=f"{name}/shape", start=axis, end=axis + 1)
        return self.op("Squeeze", shape, self.constant("axis_0", [0]), name=name)

    def op(self, kind: str, *inputs: Value, name: str | None = None, **attributes: Any) -> Value:
        """Adds a node with one output and returns it; `name` defaults to the operator's."""
        return self.ops(kind, inputs, (name or kind,), **attributes)[0]

    def ops(self, kind: str, inputs: Sequence[Value], names: Sequence[str], **attributes: Any) -> list[Value]:
        """Adds a node with one output per name and returns them."""
        outputs = [self._claim("/".join((*self._scope, name))) for name in names]
        self._nodes.append(helper.make_node(kind, list(inputs), outputs, name=outputs[0], **attributes))
        return outputs

    def model(self, metadata: Mapping[str, str]) -> onnx.ModelProto:
        """The finished model; its weights are in the external file."""
        for node in self._nodes:
            node.input[:] = [self._renamed.get(name, name) for name in node.input]
            node.output[:] = [self._renamed.get(name, name) for name in node.output]
        graph = helper.make_graph(
            self._nodes, self.name, self._inputs, self._outputs, list(self._initializers.values()), doc_string=self.doc
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], producer_name="das-asr")
        # The oldest file version that has this opset: older runtimes can then still read the file.
        model.ir_version = helper.find_min_ir_version_for(list(model.opset_import))
        helper.set_model_props(model, dict(metadata))
        return model

    def _claim(self, name: str) -> str:
        if name in self._names:
            raise ValueError(f"two tensors of graph {self.name} are called {name!r}")
        self._names.add(name)
        return name


def value_info(spec: TensorSpec, doc: str) -> onnx.ValueInfoProto:
    """The declaration of a graph input or output."""
    return helper.make_tensor_value_info(spec.name, _ELEMENT_TYPES[spec.dtype], spec.shape, doc_string=doc)
