"""Remove redundant `Expand`s on masks; consumers broadcast implicitly.

Exporters expand masks to every sequence and every new token, and combine them with masks that are true everywhere.
A narrow mask is less to compute and to read, and ONNX Runtime adds one that all heads and tokens share within its
softmax.
"""

import numpy as np
import onnx_ir as ir
from onnx_ir import convenience
from onnx_ir.passes import PassResult

from accel.graph.passes import GraphPass, remove_unused
from accel.graph.shapes import Dims, broadcast, dims, made_by, scalar

# Operators that broadcast their inputs and compute element by element.
ELEMENTWISE = {
    *("Add", "Sub", "Mul", "Div", "Min", "Max", "Neg", "Abs", "Cast", "Where", "And", "Or", "Xor", "Not"),
    *("Less", "LessOrEqual", "Greater", "GreaterOrEqual", "Equal"),
}
KEEP_TRUE = ("Unsqueeze", "Expand", "Identity", "Cast")  # their output is true everywhere if their input is


class EliminateExpand(GraphPass):
    """Remove `Expand`, and `And` with a mask that is true everywhere, where all consumers broadcast.

    Only where every value that is left with a narrower shape is read by elementwise operators alone: what any other
    node further down reads, and the model's outputs, keep their shapes.
    """

    name = "eliminate_expand"
    description = "Let consumers broadcast narrow masks"

    def call(self, model: ir.Model) -> PassResult:
        """Bypass them, and correct the shapes of what is computed from their inputs."""
        modified = False
        for node in list(model.graph):
            for narrow in _replacements(node):
                shapes = _narrowed_shapes(node.outputs[0], narrow)
                if shapes is not None:
                    convenience.replace_all_uses_with(node.outputs[0], narrow)
                    for value, shape in shapes.items():
                        value.shape = ir.Shape(shape)
                    modified = True
                    break
        return remove_unused(model, modified)


def _replacements(node: ir.Node) -> list[ir.Value]:
    """Return the values that equal the output of `node` once they are broadcast."""
    values: list[ir.Value | None] = []
    if node.domain == "" and node.op_type == "Expand":
        values.append(node.inputs[0])
    elif node.domain == "" and node.op_type == "And":
        first, second = node.inputs
        if _is_true(first):
            values.append(second)
        if _is_true(second):
            values.append(first)
    return [value for value in values if value is not None]


def _narrowed_shapes(value: ir.Value, narrow: ir.Value) -> dict[ir.Value, Dims] | None:
    """Return the values that change shape if `narrow` is read in place of `value`, with their new shapes.

    None if a shape is unknown, or if a value that changes is an output of the model or read by a node that doesn't
    broadcast.
    """
    narrow_shape = dims(narrow)
    if narrow_shape is None:
        return None
    shapes = {value: narrow_shape}
    pending = [value]
    while pending:
        changed = pending.pop()
        if changed.is_graph_output():
            return None
        for node, _ in changed.uses():
            if node.domain != "" or node.op_type not in ELEMENTWISE:
                return None
            shape = _output_shape(node, shapes)
            if shape is None:
                return None
            output = node.outputs[0]
            if shape != shapes.get(output, dims(output)):
                shapes[output] = shape
                pending.append(output)
    del shapes[value]
    return shapes


def _output_shape(node: ir.Node, shapes: dict[ir.Value, Dims]) -> Dims | None:
    """Return the shape that the inputs of `node` broadcast to, where `shapes` overrides what is noted on values."""
    inputs: list[Dims] = []
    for value in node.inputs:
        if value is not None:
            shape = shapes.get(value, dims(value))
            if shape is None:
                return None
            inputs.append(shape)
    return broadcast(inputs)


def _is_true(value: ir.Value | None) -> bool:
    """Return whether every element is known to be true."""
    if value is None:
        return False
    constant = convenience.get_const_tensor(value)
    if constant is not None:
        return constant.dtype is ir.DataType.BOOL and bool(np.all(constant.numpy()))
    node = value.producer()
    if node is None or node.domain != "":
        return False
    if node.op_type in KEEP_TRUE:
        return _is_true(node.inputs[0])
    if node.op_type == "And":
        return all(_is_true(term) for term in node.inputs)
    return node.op_type == "GreaterOrEqual" and scalar(node.inputs[1]) == 0 and _counts_from_zero(node.inputs[0])


def _counts_from_zero(value: ir.Value | None) -> bool:
    """Return whether `value` is a `Range` that counts upwards from zero."""
    while (unsqueeze := made_by(value, "Unsqueeze")) is not None:
        value = unsqueeze.inputs[0]
    count = made_by(value, "Range")
    return count is not None and scalar(count.inputs[0]) == 0 and (scalar(count.inputs[2]) or 0) > 0
