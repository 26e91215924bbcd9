"""A mask is made no wider than it is: what it is added to, or compared with, does that on the way.

Exporters expand masks to every sequence and every new token, and combine them with others that are true everywhere.
Left narrow, a mask is less to compute and to read, and ONNX Runtime adds one that all heads and tokens share within
its softmax.
"""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from accel.graph.shapes import Dims, dims, made_by, scalar

# They broadcast their inputs, element by element.
ELEMENTWISE = {
    *("Add", "Sub", "Mul", "Div", "Min", "Max", "Neg", "Abs", "Cast", "Where", "And", "Or", "Xor", "Not"),
    *("Less", "LessOrEqual", "Greater", "GreaterOrEqual", "Equal"),
}
SAME_PLACES = ("Unsqueeze", "Expand", "Identity", "Cast")  # true everywhere before, true everywhere after


def eliminate_expand(models: Sequence[ir.Model]) -> None:
    """In place: an `Expand` goes, and an `And` with what is true everywhere, where those that read them broadcast.

    What any other reader further down is left with has the shape it had.
    """
    for model in models:
        for node in list(model.graph):
            for narrow in _candidates(node):
                shapes = _narrowed(node.outputs[0], narrow)
                if shapes is not None:
                    ir.convenience.replace_all_uses_with(node.outputs[0], narrow)
                    for value, shape in shapes.items():
                        value.shape = ir.Shape(shape)
                    break
        RemoveUnusedNodesPass()(model)


def _candidates(node: ir.Node) -> list[ir.Value]:
    """What may stand in for what `node` makes, if a narrower shape will do."""
    found: list[ir.Value | None] = []
    if node.domain == "" and node.op_type == "Expand":
        found = [node.inputs[0]]
    elif node.domain == "" and node.op_type == "And":
        first, second = node.inputs
        found = [second if _all_true(first) else None, first if _all_true(second) else None]
    return [value for value in found if value is not None]


def _narrowed(value: ir.Value, narrow: ir.Value) -> dict[ir.Value, Dims] | None:
    """The values, and their shapes, that become narrower if `narrow` is read in place of `value`.

    None if that is not known, or if one of them is the caller's or read by something that doesn't broadcast.
    """
    known = dims(narrow)
    if known is None:
        return None
    found = {value: known}
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if one.is_graph_output():
            return None
        for node, _ in one.uses():
            if node.domain != "" or node.op_type not in ELEMENTWISE:
                return None
            made = node.outputs[0]
            left = _broadcast([found.get(given, dims(given)) if given is not None else () for given in node.inputs])
            if left is None:
                return None
            if left != found.get(made, dims(made)):
                found[made] = left
                waiting.append(made)
    del found[value]
    return found


def _broadcast(shapes: Sequence[Dims | None]) -> Dims | None:
    """The shape that all of `shapes` broadcast to; None if that is not known."""
    rank = max((len(shape) for shape in shapes if shape is not None), default=0)
    found: list[int | str] = []
    for axis in range(-rank, 0):
        lengths = set()
        for shape in shapes:
            if shape is None:
                return None
            lengths.add(shape[axis] if len(shape) >= -axis else 1)
        wide = lengths - {1}
        if len(wide) > 1:
            return None
        found.append(wide.pop() if wide else 1)
    return tuple(found)


def _all_true(value: ir.Value | None) -> bool:
    """Whether every element is true, whatever the input."""
    if value is None:
        return False
    constant = ir.convenience.get_const_tensor(value)
    if constant is not None:
        return constant.dtype is ir.DataType.BOOL and bool(np.all(constant.numpy()))
    node = value.producer()
    if node is None or node.domain != "":
        return False
    if node.op_type in SAME_PLACES:
        return _all_true(node.inputs[0])
    if node.op_type == "And":
        return all(_all_true(one) for one in node.inputs)
    return node.op_type == "GreaterOrEqual" and scalar(node.inputs[1]) == 0 and _counts(node.inputs[0])


def _counts(value: ir.Value | None) -> bool:
    """Whether `value` counts upwards from zero."""
    while (node := made_by(value, "Unsqueeze")) is not None:
        value = node.inputs[0]
    count = made_by(value, "Range")
    return count is not None and scalar(count.inputs[0]) == 0 and (scalar(count.inputs[2]) or 0) > 0
