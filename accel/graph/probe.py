"""Measures every float value of a graph while it runs: reductions are appended, so that only scalars leave it."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

PREFIX = "probe"
OUTPUTS = tuple(f"{PREFIX}.{name}" for name in ("largest", "smallest", "not_finite"))
FLOAT = ir.DataType.FLOAT


@dataclass
class Range:
    """What a value was seen to hold: largest and smallest non-zero magnitude, and how many NaN or infinite elements."""

    largest: float = 0.0
    smallest: float = float("inf")
    not_finite: int = 0

    def widen(self, other: "Range") -> None:
        self.largest = max(self.largest, other.largest)
        self.smallest = min(self.smallest, other.smallest)
        self.not_finite += other.not_finite


def infer_types(model: ir.Model) -> None:
    """In place: give every value its type, and its shape where nothing says it yet; shapes that are known stay.

    Operators that the ONNX specification lacks are passed over: who makes such a node notes its types. Weights are set
    aside meanwhile: inference would copy them.
    """
    values = [value for node in model.graph.all_nodes() for value in node.outputs if value.name]
    if any(value.dtype is None or value.shape is None for value in values):
        known = [
            (value, value.shape) for value in values if value.shape is not None and not value.shape.has_unknown_dim()
        ]
        ShapeInferencePass(strict_mode=False)(model)
        for value, shape in known:
            value.shape = shape


def float_values(graph: ir.Graph) -> list[ir.Value]:
    """The FP32 inputs and node outputs of a graph, subgraphs aside, and what is computed from weights alone."""
    fixed = {node for node in graph if node.inputs and all(value and value.is_initializer() for value in node.inputs)}
    values = [*graph.inputs, *(output for node in graph if node not in fixed for output in node.outputs)]
    return [value for value in values if value.dtype == FLOAT and value.name]


def add_probes(model: ir.Model) -> list[str]:
    """In place: append `OUTPUTS`, three vectors with one element for each returned value name, in that order.

    The graph must not be fed empty tensors: a maximum over nothing is not defined.
    """
    infer_types(model)
    graph = model.graph
    values = float_values(graph)
    flat = _constant(graph, "flat", np.array([-1], np.int64))
    axis = _constant(graph, "axis", np.array([0], np.int64))
    zero = _constant(graph, "zero", np.zeros((), np.float32))
    huge = _constant(graph, "huge", np.array(np.inf, np.float32))
    columns: tuple[list[ir.Value], list[ir.Value], list[ir.Value]] = ([], [], [])
    for value in values:
        size = _append(graph, "Abs", [_append(graph, "Reshape", [value, flat])])  # [elements]
        nonzero = _append(graph, "Where", [_append(graph, "Greater", [size, zero]), size, huge])
        bad = _append(graph, "Or", [_append(graph, "IsNaN", [size]), _append(graph, "IsInf", [size])])
        columns[0].append(_append(graph, "ReduceMax", [size, axis]))
        columns[1].append(_append(graph, "ReduceMin", [nonzero, axis]))
        columns[2].append(_append(graph, "ReduceSum", [_append(graph, "Cast", [bad], to=FLOAT), axis]))
    for name, column in zip(OUTPUTS, columns, strict=True):
        output = _append(graph, "Concat", column, axis=0)
        output.name, output.type, output.shape = name, ir.TensorType(FLOAT), ir.Shape([len(values)])
        graph.outputs.append(output)
    return [value.name or "" for value in values]


def read_probes(names: Sequence[str], columns: Iterable[np.ndarray]) -> dict[str, Range]:
    """The three vectors of one run -> a range for each value."""
    rows = zip(*(column.tolist() for column in columns), strict=True)
    return {
        name: Range(largest, smallest, int(bad)) for name, (largest, smallest, bad) in zip(names, rows, strict=True)
    }


def _append(graph: ir.Graph, op: str, inputs: Sequence[ir.Value], **attributes: int | ir.DataType) -> ir.Value:
    node = ir.node(op, inputs, attributes={name: int(value) for name, value in attributes.items()})
    node.outputs[0].name = f"{PREFIX}.{graph.num_nodes()}"
    graph.append(node)
    return node.outputs[0]


def _constant(graph: ir.Graph, name: str, content: np.ndarray) -> ir.Value:
    value = ir.val(f"{PREFIX}.{name}", const_value=ir.tensor(content, name=f"{PREFIX}.{name}"))
    graph.register_initializer(value)
    return value
