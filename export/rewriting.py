"""Changing a finished graph: new nodes are written like formulas and put in the place of others."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import ArrayLike
from onnx import TensorProto, helper, numpy_helper

__all__ = ["ENGINE", "Nodes", "attribute", "declare_engine", "node_of", "products_of_inputs", "replace", "save_variant"]

ENGINE = "com.microsoft"
"""Domain of the operators that ONNX Runtime adds to the standard's."""


class Nodes:
    """New nodes with one output each, and the small constants that they read, under a common prefix."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[TensorProto] = []

    def name(self, name: str) -> str:
        """A name under the prefix."""
        return f"{self._prefix}/{name}"

    def constant(self, name: str, value: ArrayLike, dtype: Any = np.int64) -> str:
        """A constant, stored in the graph."""
        full = self.name(name)
        self.constants.append(numpy_helper.from_array(np.asarray(value, dtype), full))
        return full

    def op(self, kind: str, *inputs: str, name: str, output: str = "", **attributes: Any) -> str:
        """Adds a node of the standard's and returns its output, named as the node if it needs no other name."""
        return self._add(kind, inputs, self.name(name), output, "", attributes)

    def engine(self, kind: str, *inputs: str, name: str, output: str = "", **attributes: Any) -> str:
        """The same with a node of ONNX Runtime's own."""
        return self._add(kind, inputs, self.name(name), output, ENGINE, attributes)

    def rounded(self, x: str, axis: int, zero: int, dtype: type) -> tuple[str, str, str]:
        """X in 8 bits, relative to the largest of each line along an axis: (8 bits, those largest, the step 1 / 127).

        In a line of zeros, such as an adapter of row 0, the quotient is no number; whatever integer becomes of it is
        multiplied by a largest of 0.
        """
        lines = self.constant("line", [axis])
        largest = self.op("ReduceMax", self.op("Abs", x, name="abs"), lines, name="largest", keepdims=1)
        step, middle = self.constant("step", 1 / 127, np.float32), self.constant("zero", zero, dtype)
        relative = self.op("Div", x, largest, name="relative")
        return self.op("QuantizeLinear", relative, step, middle, name="rounded"), largest, step

    def _add(
        self, kind: str, inputs: Sequence[str], name: str, output: str, domain: str, attributes: dict[str, Any]
    ) -> str:
        output = output or name
        self.nodes.append(helper.make_node(kind, inputs, [output], name=name, domain=domain, **attributes))
        return output


def node_of(graph: onnx.GraphProto, output: str) -> onnx.NodeProto:
    """The node that makes a tensor."""
    return next(node for node in graph.node if output in node.output)


def attribute(node: onnx.NodeProto, name: str) -> Any:
    """An attribute that the node has."""
    return helper.get_node_attr_value(node, name)


def replace(model: onnx.ModelProto, old: Iterable[onnx.NodeProto], new: Nodes) -> None:
    """Puts new nodes in the place of the last of those that go."""
    graph, old = model.graph, list(old)
    order = list(graph.node)
    place = max(order.index(node) for node in old)
    for offset, node in enumerate(new.nodes):
        graph.node.insert(place + offset + 1, node)
    for node in old:
        graph.node.remove(node)
    graph.initializer.extend(new.constants)
    if any(node.domain == ENGINE for node in new.nodes):
        declare_engine(model)


def declare_engine(model: onnx.ModelProto) -> None:
    """Says that the model uses ONNX Runtime's own operators."""
    if not any(item.domain == ENGINE for item in model.opset_import):
        model.opset_import.append(helper.make_opsetid(ENGINE, 1))


def products_of_inputs(model: onnx.ModelProto) -> list[str]:
    """Names of the products whose right side can be fed: adapters have defaults, but are no constants."""
    fed = {value.name for value in model.graph.input}
    return [node.name for node in model.graph.node if node.op_type == "MatMul" and node.input[1] in fed]


def save_variant(model: onnx.ModelProto, original: onnx.ModelProto, target: Path) -> None:
    """Writes the model beside its weights, with the properties and the order of inputs of the original."""
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
